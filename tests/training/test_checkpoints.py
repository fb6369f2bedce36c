import os
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from conftest import watching

from harness.training.checkpoints import Checkpoints
from harness.training.state import TrainingState


def trainer(value=0.0):
    """What a checkpoint takes of a trainer: two objects with variables, and sums."""
    model, optimizer = tf.Module(), tf.Module()
    model.weight, optimizer.momentum = tf.Variable(value), tf.Variable(2 * value)
    strategy = tf.distribute.get_strategy()
    return SimpleNamespace(
        model=model, optimizer=optimizer, train_totals=[value] * 3, strategy=strategy
    )


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(b"best")
    return path


def epochs(n):
    return [{"epoch": i + 1, "val_loss": 1.0} for i in range(n)]


def test_last_two_checkpoints_are_kept_and_the_newest_is_restored(tmp_path, model_file):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    for n, step in ((0, 5), (9, 0), (10, 3)):
        one = trainer(10.0 * n + step)
        checkpoints.save(TrainingState(epochs(n), step, 2.5), one.train_totals, one, model_file)
    names = [path.name for path in sorted(checkpoints.folder.iterdir())]
    assert names == ["epoch-00009-step-0000000", "epoch-00010-step-0000003"]

    path, state = checkpoints.newest()
    assert state == TrainingState(epochs(10), 3, 2.5)
    model_file.unlink()
    other = trainer()
    checkpoints.restore(path, other)
    assert not model_file.exists()  # another process restores it
    checkpoints.restore(path, other, model_file)
    values = other.model.weight, other.optimizer.momentum, *other.train_totals
    np.testing.assert_array_equal(values, [103, 206, 103, 103, 103])
    assert model_file.read_bytes() == b"best"


def test_next_checkpoint_removes_what_a_killed_process_left(tmp_path, model_file):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    left = checkpoints.folder / ".epoch-00000-step-0000003.part"
    left.mkdir(parents=True)
    (left / "weights.index").touch()
    checkpoints.save(TrainingState(step=5), [0.0] * 3, trainer(), model_file)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["epoch-00000-step-0000005"]


def test_all_damaged_checkpoints_are_reported_and_replaced(tmp_path, model_file, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(TrainingState(step=1), [0.0] * 3, trainer(1.0), model_file)
    (checkpoints.folder / "epoch-00000-step-0000001" / "SHA256SUMS").write_text("")
    assert checkpoints.newest() is None
    assert "training starts again at epoch 1" in caplog.text
    checkpoints.save(TrainingState(step=1), [0.0] * 3, trainer(2.0), model_file)
    assert checkpoints.newest()[1].step == 1


def test_checkpoint_and_its_name_are_on_the_disk_before_an_older_one_is_deleted(
    tmp_path, model_file, monkeypatch
):
    events, folder = [], tmp_path / "checkpoints"

    def fsync(descriptor, call=os.fsync):
        call(descriptor)
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def renamed(event, source, target=None):
        if event == "os.rename":
            events.append(f"rename {target.name}")

    monkeypatch.setattr(os, "fsync", fsync)
    with watching(renamed):
        Checkpoints(folder).save(TrainingState(step=1), [0.0] * 3, trainer(), model_file)
    name = "epoch-00000-step-0000001"
    assert events[-4:] == ["SHA256SUMS", f".{name}.part", f"rename {name}", "checkpoints"]
    files = {path.name for path in (folder / name).iterdir()}
    assert files <= set(events)
