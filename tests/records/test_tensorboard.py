import numpy as np
import pytest
import tensorflow as tf
from conftest import rows, start
from tensorboard.backend.event_processing.event_accumulator import IMAGES, TENSORS, EventAccumulator

from harness.records.tensorboard import COLDEST, WARMEST, TensorBoard, picture


@pytest.fixture(scope="module")
def run(tmp_path_factory, settings):
    changed = {**settings, "tensorboard": True, "profile_steps": [2, 4]}
    run = start(tmp_path_factory.mktemp("board"), changed, "--mode", "train")
    assert run.status == 0
    return run.folder


@pytest.fixture(scope="module")
def events(run):
    found = EventAccumulator(str(run / "tensorboard"), {TENSORS: 0, IMAGES: 0})
    found.Reload()
    return found


def test_scalars_are_those_of_the_history(run, events):
    for name in ("loss", "val_loss", "val_accuracy", "patches_per_second"):
        told = [float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(name)]
        assert told == pytest.approx([float(row[name]) for row in rows(run / "history.csv")])
    assert [event.step for event in events.Tensors("loss")] == [1, 2]


def test_each_epoch_has_a_picture_of_masks(events):
    pictures = events.Tensors("S9, Bayesian mask, probability")
    assert [event.step for event in pictures] == [1, 2]
    width, height, png = tf.make_ndarray(pictures[-1].tensor_proto)
    assert (int(width), int(height)) == (3 * 32, 4 * 32)  # four patches of 32
    pixels = tf.io.decode_png(png).numpy()
    assert set(np.unique(pixels[:, 32:64])) == {0, 255}  # the Bayesian mask
    assert len(np.unique(pixels[:, 64:])) > 2  # probabilities


def test_profile_of_the_steps_is_there(run):
    (profile,) = (run / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb")
    assert b"train_step" in profile.read_bytes()


@pytest.mark.parametrize(
    ("first", "profiled"), [(1, [3, 4, 5]), (4, [4, 5]), (6, [])], ids=["from", "in", "after"]
)
def test_profile_takes_the_steps_asked_for(monkeypatch, tmp_path, first, profiled):
    now = []
    profiler = tf.profiler.experimental
    monkeypatch.setattr(profiler, "start", lambda folder: now.append(folder))
    monkeypatch.setattr(profiler, "stop", now.clear)
    empty = np.zeros((1, 8, 8, 9), np.float32)
    board = TensorBoard(tmp_path, empty, empty[..., :1], (3, 5))
    seen = [number for number in board.profiled(range(first, 9), first) if now]
    board.close()
    assert seen == profiled and not now


def test_picture_shows_what_is_cold_white():
    channels = np.zeros((2, 4, 5, 9), np.float32)
    channels[0, ..., -1], channels[1, ..., -1] = COLDEST, WARMEST
    shown = picture(channels, np.ones((2, 4, 5, 1)), np.full((2, 4, 5, 1), 0.25))
    assert shown.shape == (8, 15)
    assert (shown[:4, :5] == 1).all() and (shown[4:, :5] == 0).all()
    assert (shown[:, 5:10] == 1).all() and (shown[:, 10:] == 0.25).all()


def test_missing_package_is_told_with_what_to_type(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    run = start(tmp_path, {**settings, "tensorboard": True}, "--mode", "train")
    assert run.status == 2
    assert "pip install -r requirements-tools.txt" in capsys.readouterr().err.splitlines()[-1]
