"""Runs that are stopped and go on, against runs that were never stopped."""

import csv
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import at_call, results, start
from mlperf_logging.compliance_checker.mlp_parser import parse_file

import slstr_cloud
from harness.config import load_config
from harness.errors import UserError
from harness.records.resume import find_requeued, load_resumed, sole_user
from harness.records.run import make_folder
from harness.training.checkpoints import Checkpoints, TrainingState
from harness.training.losses import LOSSES
from harness.training.trainer import POLICIES, Trainer
from model import unet

EPOCHS = 3  # of 6 steps and 6 steps of validation


@pytest.fixture(scope="module")
def quick(settings):
    """Settings with which every epoch changes something."""
    return {**settings, "learning_rate": 0.001, "epochs": EPOCHS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick):
    """The folder of a run that was never stopped."""
    run = start(tmp_path_factory.mktemp("whole"), quick)
    assert run.status == 0
    return run.folder


def signal_self(number):
    return lambda: os.kill(os.getpid(), number)


def resume(folder, *arguments):
    return slstr_cloud.main(["--resume", str(folder), *arguments])


def rows_of(path, *, timed=False):
    """The rows of a CSV file, without what is never the same twice."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not timed:
        for row in rows:
            for name in [n for n in row if "second" in n]:
                del row[name]
    return rows


def events(folder, key):
    found, errors = parse_file(str(folder / "mlperf_cloudmask.log"), ruleset="3.0.0")
    assert not errors
    return [event.value for event in found if event.key == key]


def assert_same_outcome(folder, whole):
    """Weights, history, masks and scores are those of the other run, bit for bit."""
    ours, theirs = (
        keras.models.load_model(f / "model.keras").get_weights() for f in (folder, whole)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("history.csv", "scenes.csv"):
        assert rows_of(folder / name) == rows_of(whole / name)
    masks = sorted((whole / "masks").iterdir())
    assert sorted(path.name for path in (folder / "masks").iterdir()) == [p.name for p in masks]
    for path in masks:
        with h5py.File(path) as b, h5py.File(folder / "masks" / path.name) as a:
            np.testing.assert_array_equal(a["mask"][:], b["mask"][:])
    for key in ("epoch_start", "epoch_stop", "eval_start", "eval_stop", "eval_accuracy"):
        assert len(events(folder, key)) == EPOCHS
    for key in ("init_start", "init_stop", "run_start", "run_stop", "inference_start", "result"):
        assert len(events(folder, key)) == 1
    lines = (folder / "cloudmask.log").read_text().splitlines()
    assert [line.split(",")[0].split()[1] for line in lines] == ["training", "inference"]
    ours, theirs = results(folder), results(whole)
    for part, names in (
        ("training", ("loss", "accuracy", "val_loss", "val_accuracy", "best_epoch", "epochs_run")),
        ("inference", ("accuracy", "scenes", "f1", "tp")),
    ):
        assert {n: ours[part][n] for n in names} == {n: theirs[part][n] for n in names}
    assert ours["status"] == "success"


# --- stopped by a signal


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        # Warming up is a call of either step; an epoch is 6 calls.
        (Trainer, "warm_up", 1),
        (Trainer, "train_step", 2),
        (Trainer, "train_step", 1 + 6 + 3),
        (Trainer, "eval_step", 1 + 2),
        (Trainer, "eval_step", 1 + 6 + 1),
        (slstr_cloud, "keep_epoch", 2),
        (slstr_cloud.results, "training_line", 1),
        (slstr_cloud.scores, "score_scene", 2),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_resumed_run_equals_one_that_was_never_stopped(
    tmp_path, quick, whole, monkeypatch, owner, name, call
):
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, signal_self(signal.SIGTERM))
        run = start(tmp_path, quick)
    assert run.status == 143
    assert results(run.folder)["status"] == "aborted"
    if events(run.folder, "run_start"):
        assert len(events(run.folder, "run_stop")) == 1
    assert resume(run.folder) == 0
    assert_same_outcome(run.folder, whole)
    report = results(run.folder)
    assert report["resumed"] == 1
    assert [part["status"] for part in report["parts"]] == ["aborted", "success"]
    assert report["seconds"] == pytest.approx(sum(part["seconds"] for part in report["parts"]))
    assert report["peak_rss"] == max(part["peak_rss"] for part in report["parts"])
    assert {part["git_commit"] for part in report["parts"]} == {report["git_commit"]}
    assert len(events(run.folder, "resumed")) == 1


def test_stopped_training_goes_on_at_the_next_step(tmp_path, quick, whole, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "train_step", 1 + 6 + 3, signal_self(signal.SIGTERM))
        run = start(tmp_path, quick)
    steps = []
    counted = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda *a: (steps.append(1), counted(*a))[1])
    assert resume(run.folder) == 0
    assert len(steps) == 1 + 18 - (6 + 3)  # the step under way was finished
    assert_same_outcome(run.folder, whole)


def test_sigint_ends_with_130_and_a_second_signal_does_not_wait(tmp_path, quick, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    taken = []
    inner = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda *a: (inner(*a), taken.append(1)))
    at_call(monkeypatch, Trainer, "train_step", 4, twice)
    assert start(tmp_path, quick).status == 130
    assert len(taken) == 3


def test_masks_that_are_whole_are_kept(tmp_path, quick, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, slstr_cloud.results, "inference_results", 1, signal_self(signal.SIGTERM))
        run = start(tmp_path, quick)
    kept, damaged = sorted((run.folder / "masks").glob("*.h5"))
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:2000])
    assert resume(run.folder) == 0
    assert kept.stat().st_mtime_ns == before
    with h5py.File(damaged) as file:
        assert file["mask"].shape == (100, 135)
    rows = rows_of(run.folder / "scenes.csv", timed=True)
    assert len(rows) == 2
    assert results(run.folder)["inference"]["seconds"] > float(rows[0]["seconds"])


def test_masks_of_another_model_are_made_again(tmp_path, quick, whole, monkeypatch):
    model = tmp_path / "first.keras"
    shutil.copy(whole / "model.keras", model)
    with monkeypatch.context() as patch:
        at_call(patch, slstr_cloud.results, "inference_results", 1, signal_self(signal.SIGTERM))
        run = start(tmp_path, {**quick, "model_file": str(model)}, "--mode", "inference")
    assert run.status == 143
    other = keras.models.load_model(model)
    other.set_weights([np.zeros_like(w) for w in other.get_weights()])
    other.save(model)
    assert resume(run.folder) == 0
    for row in rows_of(run.folder / "scenes.csv"):
        assert float(row["recall"]) == 0  # a probability of 0.5 everywhere is no cloud


# --- checkpoints


def stopped(tmp_path, quick, monkeypatch):
    """A run stopped in its third epoch, with checkpoints of epochs 2 and of a step of epoch 3."""
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "train_step", 1 + 12 + 3, signal_self(signal.SIGTERM))
        run = start(tmp_path, quick)
    assert run.status == 143
    names = [path.name for path in sorted((run.folder / "checkpoints").iterdir())]
    assert names == ["epoch-00002-step-0000000", "epoch-00002-step-0000003"]
    return run.folder


@pytest.mark.parametrize(
    "damage",
    ["flip", "remove file", "no digests", "empty folder"],
)
def test_damaged_checkpoint_is_passed_over(tmp_path, quick, whole, monkeypatch, capsys, damage):
    folder = stopped(tmp_path, quick, monkeypatch)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    data = next(newest.glob("weights.data*"))
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "remove file":
        data.unlink()
    elif damage == "no digests":
        (newest / "SHA256SUMS").write_text("")
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    capsys.readouterr()
    assert resume(folder) == 0
    assert "damaged checkpoint" in capsys.readouterr().err
    assert_same_outcome(folder, whole)


def damage(path, rng):
    """Damage a file, or what stands in its place; return in which way."""
    content = bytearray(path.read_bytes())
    way = rng.choice(
        ["flip", "cut", "empty", "longer", "absent", "folder", "pipe", "loop", "other"]
    )
    path.unlink()
    if way == "flip":
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    elif way == "cut":
        content = content[: rng.integers(1, len(content))]
    elif way in ("empty", "other"):
        content = rng.bytes(1000) if way == "other" else b""
    elif way == "longer":
        content += b"\0"
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "loop":
        path.symlink_to(path.name)
    elif way != "absent":
        path.write_bytes(content)
    return way


def test_checkpoints_damaged_in_200_ways_are_passed_over(tmp_path, quick, monkeypatch):
    folder = stopped(tmp_path, quick, monkeypatch) / "checkpoints"
    older, newer = sorted(folder.iterdir())
    assert Checkpoints(folder).newest()[0] == newer
    copy, rng, ways = tmp_path / "copy", np.random.default_rng(1), set()
    shutil.copytree(older, copy / older.name)
    for _ in range(200):
        shutil.copytree(newer, copy / newer.name)
        file = rng.choice(sorted((copy / newer.name).iterdir()))
        ways.add((file.name, damage(file, rng)))
        assert Checkpoints(copy).newest()[0] == copy / older.name
        shutil.rmtree(copy / newer.name)
    assert len(ways) > 30
    damage(copy / older.name / "SHA256SUMS", rng)
    assert Checkpoints(copy).newest() is None


def test_loss_scale_of_float16_goes_on(tmp_path):
    def trainer():
        return Trainer(
            tf.distribute.MirroredStrategy(["/CPU:0"]),
            lambda: unet((16, 16, 9), POLICIES["float16"]),
            LOSSES["cross_entropy"],
            learning_rate=0.001, batch_size=2, micro_batch=2, loss_scaling=True,
        )  # fmt: skip

    def batch(seed):
        rng = np.random.default_rng(seed)
        arrays = (
            rng.normal(size=(2, 16, 16, 9)).astype(np.float32),
            rng.integers(2, size=(2, 16, 16, 1)).astype(np.uint8),
            np.ones(2, np.float32),
        )
        return tuple(tf.constant(a) for a in arrays)

    def state(one):
        return [v.numpy() for v in (*one.model.variables, *one.optimizer.variables)]

    ours = trainer()
    ours.optimizer.dynamic_scale.assign(4096.0)  # as after overflows
    for seed in range(3):
        ours.train_step(batch(seed))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainingState(step=3), ours, tmp_path / "model.keras")
    resumed = trainer()
    checkpoints.restore(checkpoints.newest()[0], resumed)
    for one in (ours, resumed):
        one.train_step(batch(3))
    assert float(resumed.optimizer.dynamic_scale.numpy()) == 4096
    assert int(resumed.optimizer.step_counter.numpy()) == 4
    for a, b in zip(state(ours), state(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_whole_checkpoint_training_begins_anew(tmp_path, quick, whole, monkeypatch):
    folder = stopped(tmp_path, quick, monkeypatch)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    assert resume(folder) == 0
    assert_same_outcome(folder, whole)


def test_best_model_of_the_checkpoint_is_put_back(tmp_path, quick, whole, monkeypatch):
    folder = stopped(tmp_path, quick, monkeypatch)
    shutil.copy(whole / "masks" / sorted(os.listdir(whole / "masks"))[0], folder / "model.keras")
    assert resume(folder) == 0
    assert_same_outcome(folder, whole)


def test_a_checkpoint_that_is_being_written_is_none(tmp_path, quick, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        at_call(patch, Checkpoints, "save", 2, lambda: patch.setattr("os.fsync", fail))
        run = start(tmp_path, quick)
    assert run.status == 2
    assert len(list((run.folder / "checkpoints").iterdir())) == 1


def test_checkpoint_every_saves_less_often(tmp_path, quick):
    run = start(tmp_path, {**quick, "checkpoint_every": 2}, "--mode", "train")
    names = [path.name for path in sorted((run.folder / "checkpoints").iterdir())]
    assert names == ["epoch-00002-step-0000000", "epoch-00003-step-0000000"]


# --- what is resumed, and what is not


def test_finished_run_is_left_as_it_is(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert resume(whole) == 0
    assert "has finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_finished_run_can_be_given_more_epochs(tmp_path, quick, whole):
    run = start(tmp_path, {**quick, "epochs": EPOCHS - 1})
    assert resume(run.folder, "--set", f"epochs={EPOCHS}") == 0
    ours, theirs = (rows_of(folder / "history.csv") for folder in (run.folder, whole))
    assert ours == theirs
    assert len(rows_of(run.folder / "scenes.csv")) == 2


def test_key_that_matters_is_refused_with_both_values(tmp_path, quick, monkeypatch, capsys):
    folder = stopped(tmp_path, quick, monkeypatch)
    assert resume(folder, "--set", "batch_size=10", "cloud_weight=2") == 2
    error = capsys.readouterr().err
    assert "batch_size was 11, now 10" in error and "cloud_weight was 1.0, now 2.0" in error


def test_other_scenes_are_refused(tmp_path, quick, monkeypatch, capsys):
    data = tmp_path / "data"
    shutil.copytree(quick["train_dir"], data)
    folder = stopped(tmp_path, {**quick, "train_dir": str(data)}, monkeypatch)
    next(data.rglob("S3A*.hdf")).unlink()
    assert resume(folder) == 2
    assert "its scenes were others" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_folder_that_is_no_run_is_one_clear_error(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert resume(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be resumed" in line


def test_run_that_is_in_use_is_refused(tmp_path):
    with (
        sole_user(tmp_path),
        pytest.raises(UserError, match="in use"),
        sole_user(tmp_path),
    ):
        pass
    with sole_user(tmp_path):  # free again
        pass


def test_two_runs_of_one_second_get_a_folder_each_or_an_error(tmp_path, quick):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**quick, "output_dir": str(tmp_path / "runs"), "run_name": "same"}))
    config = load_config(file)
    barrier = threading.Barrier(8)

    def make(_):
        barrier.wait()
        try:
            return make_folder(config, "train")
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert len([m for m in made if not isinstance(m, str)]) == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["same"]
    assert load_resumed(tmp_path / "runs" / "same")[1]["mode"] == "train"


def test_requeued_job_finds_its_run(tmp_path, quick, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**quick, "output_dir": str(tmp_path / "runs")}))
    config = load_config(file)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    folder = make_folder(config, "train")
    assert find_requeued(config, "train") is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert find_requeued(config, "train") == folder
    assert find_requeued(config, "benchmark") is None
    assert find_requeued(load_config(file, ["seed=1"]), "train") is None
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert find_requeued(config, "train") is None


# --- divergence and memory


def test_divergence_names_epoch_step_and_scenes(tmp_path, quick, capsys):
    run = start(tmp_path, {**quick, "learning_rate": 1e30}, "--mode", "train")
    assert run.status == 1
    error = capsys.readouterr().err
    assert "not finite in epoch 1, step" in error and "S3A" in error
    assert results(run.folder)["status"] == "aborted"


def test_too_little_memory_says_what_to_try(tmp_path, quick, monkeypatch, capsys):
    def fail():
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating\n" * 100)

    at_call(monkeypatch, Trainer, "train_step", 3, fail)
    assert start(tmp_path, {**quick, "micro_batch": 4}, "--mode", "train").status == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "4 patches at once in float32" in line
    assert "micro_batch: 2" in line and "precision: bfloat16" in line
