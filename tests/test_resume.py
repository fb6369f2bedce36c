"""Runs that are stopped and resumed, against a run that was never stopped."""

import errno
import json
import logging
import os
import shutil
import signal
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    EPOCHS,
    PATCH,
    at_call,
    at_file,
    damage_chunk,
    epochs_in,
    pixel_views,
    results,
    rows,
    start,
)
from mlperf_logging.compliance_checker.mlp_parser import parse_file
from mlperf_logging.mllog.mllog import MLLogger

import slstr_cloud
from harness.config import Config, load_config
from harness.errors import UserError
from harness.files import lock
from harness.records import mlperf_log
from harness.records.resume import find_requeued, load_resumed
from harness.records.run_folder import make_folder
from harness.training.checkpoints import Checkpoints
from harness.training.label_noise import CoTeaching, EarlyLearning, ForwardCorrection
from harness.training.losses import LOSSES
from harness.training.state import TrainingState
from harness.training.trainer import POLICIES, Trainer
from model import unet

WARM_UP = 1  # call of either step before the first epoch
# Submission, hyperparameters, cache_clear, opt_name, eval_accuracy of each epoch, result
N_EVENTS = len(mlperf_log.SUBMISSION) + len(mlperf_log.HYPERPARAMETERS) + 2 + EPOCHS + 1
N_STEPS = 6  # of an epoch, and of its validation


def signal_self(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


def resume(folder, *arguments):
    return slstr_cloud.main(["--resume", str(folder), *arguments])


def rows_of(path):
    """The rows of a CSV file, without times, which differ between runs."""
    return [
        {name: value for name, value in row.items() if "second" not in name} for row in rows(path)
    ]


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
            for name in ("mask", "probability"):
                np.testing.assert_array_equal(a[name][:], b[name][:])
    for key in ("epoch_start", "epoch_stop", "eval_start", "eval_stop", "eval_accuracy"):
        assert len(events(folder, key)) == EPOCHS
    for key in ("init_start", "init_stop", "run_start", "run_stop", "inference_start", "result"):
        assert len(events(folder, key)) == 1
    lines = (folder / "cloudmask.log").read_text().splitlines()
    assert [line.split(",")[0].split()[1] for line in lines] == ["training", "inference"]
    ours, theirs = results(folder), results(whole)
    for part, names in (
        ("training", ("loss", "accuracy", "val_loss", "val_accuracy", "best_epoch", "epochs_run")),
        ("training", ("baselines", "synthetic")),
        ("inference", ("accuracy", "scenes", "f1", "tp", "synthetic")),
    ):
        assert {n: ours[part][n] for n in names} == {n: theirs[part][n] for n in names}
    assert ours["status"] == "success" and ours["warnings"] == theirs["warnings"]


# --- stopped by a signal


def in_step(name, number):
    """While the Trainer takes its training or validation step of that number."""
    return lambda patch, action: at_call(patch, Trainer, name, WARM_UP + number, action)


def at_event(method, number):
    """Before an event of the MLPerf log: its start or end of that number."""
    return lambda patch, action: at_call(patch, MLLogger, method, number, action)


def before(pattern, number=1, **how):
    """Before a file gets its name; the signal itself keeps the file from getting it, or waits."""
    return lambda patch, action: patch.enter(at_file(pattern, action, number, **how))


MOMENTS = {
    "before training": at_event("end", 1),  # init_stop
    "in the first epoch": in_step("train_step", 2),
    "in the first validation": in_step("eval_step", 2),
    "while history.csv is written": before("run/history.csv", 2),
    "while a checkpoint is written": before("checkpoints/epoch-00002-*"),
    "between epochs": before("run/results.json", when=lambda path: epochs_in(path) == 2),
    "between training and inference": at_event("start", 2 + 2 * EPOCHS + 1),  # inference_start
    "in inference": before("masks/*.h5", 2),
    "after inference": at_event("event", N_EVENTS),  # result
}


def stop(folder, settings, moment, number=signal.SIGTERM, *arguments):
    """Start a run that gets a signal at a moment; its folder."""
    with Patch() as patch:
        moment(patch, signal_self(number))
        run = start(folder, settings, *arguments)
    assert run.status == 128 + number
    return run.folder


class Patch(pytest.MonkeyPatch):
    """A MonkeyPatch that leaves contexts too."""

    def __enter__(self):
        self._contexts = ExitStack()
        self.enter = self._contexts.enter_context
        return self

    def __exit__(self, *error):
        self._contexts.close()
        self.undo()


FAST_MOMENTS = ("in the first epoch", "in inference")


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=() if m in FAST_MOMENTS else pytest.mark.slow) for m in MOMENTS],
)
def test_resumed_run_equals_one_that_was_never_stopped(tmp_path, quick, whole, moment):
    folder = stop(tmp_path, quick, MOMENTS[moment])
    assert results(folder)["status"] == "aborted"
    if events(folder, "run_start"):
        assert len(events(folder, "run_stop")) == 1
    assert resume(folder) == 0
    assert_same_outcome(folder, whole)
    report = results(folder)
    assert report["resumed"] == 1
    assert [part["status"] for part in report["parts"]] == ["aborted", "success"]
    assert report["seconds"] == pytest.approx(sum(part["seconds"] for part in report["parts"]))
    assert report["peak_rss"] == max(part["peak_rss"] for part in report["parts"])
    assert {part["git_commit"] for part in report["parts"]} == {report["git_commit"]}
    assert len(events(folder, "resumed")) == 1


def count_steps(monkeypatch):
    """A list that grows with every training step from now on, warming up included."""
    steps, step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda *a: (steps.append(1), step(*a))[1])
    return steps


def test_resumed_training_continues_at_the_next_step(copy_of_stopped, whole, monkeypatch):
    (copy_of_stopped / "masks").mkdir()
    (copy_of_stopped / "masks" / ".S3A.1-2.part.h5").touch()  # of a killed process
    steps = count_steps(monkeypatch)
    assert resume(copy_of_stopped) == 0
    assert len(steps) == WARM_UP + 3 * N_STEPS - (2 * N_STEPS + 3)  # the third step was finished
    assert_same_outcome(copy_of_stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["early_learning", "co_teaching"])
def test_resumed_training_with_replaced_labels_equals_one_that_was_never_stopped(
    tmp_path, quick, monkeypatch, correction
):
    """As confusion matrices, limits and replaced labels follow from the epochs before."""
    monkeypatch.setattr(EarlyLearning, "bent_classes", lambda self, counts: [len(counts) > 0] * 2)
    for method in (EarlyLearning, ForwardCorrection):
        monkeypatch.setattr(method, "CONFIDENT", 0.5)
    limits = CoTeaching.limits  # of views that have hardly learned
    monkeypatch.setattr(CoTeaching, "limits", lambda self, counts: limits(counts) - any(counts) / 2)
    pixel_views((PATCH, PATCH, 9)).save(tmp_path / "views.keras")
    network = "pixel" if correction == "early_learning" else str(tmp_path / "views.keras")
    noisy = {
        **quick, "loss": "forward_correction", "label_correction": correction, "network": network
    }  # fmt: skip
    whole = start(tmp_path / "whole", noisy).folder
    shares = [float(row["labels_replaced"]) for row in rows(whole / "history.csv")]
    assert shares[0] == 0 and all(share > 0 for share in shares[1:])
    folder = stop(tmp_path, noisy, in_step("train_step", N_STEPS + 3))
    assert resume(folder) == 0
    assert_same_outcome(folder, whole)
    for path in (folder / "masks").glob("*.h5"):
        with h5py.File(path) as file:
            assert ("uncertainty" in file) == (correction == "co_teaching")


def test_signal_between_epochs_loses_no_epoch(tmp_path, quick, monkeypatch):
    moment = before("run/results.json", when=lambda path: epochs_in(path) == 3)
    changed = {**quick, "epochs": 4, "checkpoint_every": 10}
    folder = stop(tmp_path, changed, moment, signal.SIGTERM, "--mode", "train")
    assert len(rows(folder / "history.csv")) == 3
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == "epoch-00003-step-0000000"
    steps = count_steps(monkeypatch)
    assert resume(folder) == 0
    assert len(steps) == WARM_UP + N_STEPS
    assert len(rows(folder / "history.csv")) == 4


def test_sigint_exits_with_130_and_a_second_signal_does_not_wait(tmp_path, quick, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    steps = count_steps(monkeypatch)
    at_call(monkeypatch, Trainer, "train_step", 4, twice)
    assert start(tmp_path, quick).status == 130
    assert len(steps) == 3


# --- masks


@pytest.fixture(scope="module")
def masked(tmp_path_factory, quick, whole):
    """A run of inference alone, stopped when it has made its masks."""
    model = tmp_path_factory.mktemp("model") / "first.keras"
    shutil.copy(whole / "model.keras", model)
    changed = {**quick, "model_file": str(model)}
    folder = tmp_path_factory.mktemp("masked")
    return stop(folder, changed, before("run/scenes.csv"), signal.SIGTERM, "--mode", "inference")


@pytest.fixture
def copy_of_masked(masked, tmp_path):
    return Path(shutil.copytree(masked, tmp_path / "run"))


@pytest.mark.parametrize("damage", ["cut", "chunk", "older than its scene"])
def test_unusable_masks_are_made_again_and_others_kept(copy_of_masked, whole, quick, damage):
    kept, damaged = sorted((copy_of_masked / "masks").glob("*.h5"))
    with h5py.File(kept, "r+") as file:
        file.attrs["row"] = json.dumps({**json.loads(file.attrs["row"]), "seconds": 10_000.0})
    before = kept.stat()
    (scene,) = Path(quick["inference_dir"]).rglob(f"{damaged.stem}.hdf")
    scene_time = scene.stat().st_mtime_ns
    if damage == "cut":
        os.truncate(damaged, 2000)
    elif damage == "chunk":
        damage_chunk(damaged, "mask")
    else:
        with h5py.File(damaged, "r+") as file:
            file["mask"][:] = 1
        os.utime(scene, ns=(scene_time, scene_time + 1_000_000_000))
    try:
        assert resume(copy_of_masked) == 0
    finally:
        os.utime(scene, ns=(scene_time, scene_time))
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    for path in (kept, damaged):
        with h5py.File(path) as ours, h5py.File(whole / "masks" / path.name) as expected:
            for name in ("mask", "probability"):
                np.testing.assert_array_equal(ours[name][:], expected[name][:])
    assert rows_of(copy_of_masked / "scenes.csv") == rows_of(whole / "scenes.csv")
    inference = results(copy_of_masked)["inference"]
    assert inference["seconds"] == pytest.approx(10_000, rel=0.1)  # with those of the first part


def test_masks_of_another_model_are_made_again(copy_of_masked):
    model = Path(results(copy_of_masked)["config"]["model_file"])
    before = model.read_bytes()
    other = keras.models.load_model(model)
    other.set_weights([np.zeros_like(w) for w in other.get_weights()])
    try:
        other.save(model)
        assert resume(copy_of_masked) == 0
    finally:
        model.write_bytes(before)
    for row in rows(copy_of_masked / "scenes.csv"):
        assert float(row["cloud_fraction"]) == 0  # a probability of 0.5 everywhere is no cloud


# --- checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, quick):
    """A run stopped in its third epoch: checkpoints of epoch 2, and of a step of epoch 3."""
    folder = tmp_path_factory.mktemp("stopped")
    folder = stop(folder, quick, in_step("train_step", 2 * N_STEPS + 3))
    names = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert names == ["epoch-00002-step-0000000", "epoch-00002-step-0000003"]
    return folder


@pytest.fixture
def copy_of_stopped(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_damaged_checkpoint_is_skipped(copy_of_stopped, whole, capsys):
    newest = sorted((copy_of_stopped / "checkpoints").iterdir())[-1]
    data = next(newest.glob("weights.data*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert resume(copy_of_stopped) == 0
    assert "damaged checkpoint" in capsys.readouterr().err
    assert_same_outcome(copy_of_stopped, whole)


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


@pytest.mark.slow
def test_checkpoints_damaged_in_200_ways_are_skipped(stopped, tmp_path):
    older, newer = sorted((stopped / "checkpoints").iterdir())
    assert Checkpoints(stopped / "checkpoints").newest()[0] == newer
    copy, rng, ways = tmp_path / "copy", np.random.default_rng(1), set()
    shutil.copytree(older, copy / older.name)
    for _ in range(200):
        shutil.copytree(newer, copy / newer.name)
        file = rng.choice(sorted((copy / newer.name).iterdir()))
        ways.add((file.name, damage(file, rng)))
        assert Checkpoints(copy).newest()[0] == copy / older.name
        shutil.rmtree(copy / newer.name)
    assert len(ways) > 30
    (copy / newer.name).mkdir()  # an empty one
    assert Checkpoints(copy).newest()[0] == copy / older.name
    damage(copy / older.name / "SHA256SUMS", rng)
    assert Checkpoints(copy).newest() is None


def test_loss_scale_of_float16_is_restored(tmp_path):
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
            np.int32(2),
        )
        return tuple(tf.constant(a) for a in arrays)

    def state(one):
        return [v.numpy() for v in (*one.model.variables, *one.optimizer.variables)]

    ours = trainer()
    ours.optimizer.dynamic_scale.assign(4096.0)  # as after overflows
    for seed in range(3):
        ours.train_step(batch(seed))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainingState(step=3), ours.train_totals, ours, tmp_path / "model.keras")
    resumed = trainer()
    checkpoints.restore(checkpoints.newest()[0], resumed)
    for one in (ours, resumed):
        one.train_step(batch(3))
    assert float(resumed.optimizer.dynamic_scale.numpy()) == 4096
    assert int(resumed.optimizer.step_counter.numpy()) == 4
    for a, b in zip(state(ours), state(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_an_intact_checkpoint_training_starts_over(copy_of_stopped, whole):
    for checkpoint in (copy_of_stopped / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    assert resume(copy_of_stopped) == 0
    assert_same_outcome(copy_of_stopped, whole)


def test_best_model_is_restored_from_the_checkpoint(copy_of_stopped, whole):
    (copy_of_stopped / "model.keras").write_bytes(b"damaged")
    assert resume(copy_of_stopped) == 0
    assert_same_outcome(copy_of_stopped, whole)


def test_failed_checkpoint_leaves_the_earlier_ones(tmp_path, quick, whole, monkeypatch):
    def full(descriptor, fsync=os.fsync):
        if "epoch-00003" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run = start(tmp_path, quick)
    assert run.status == 2
    left = sorted((run.folder / "checkpoints").iterdir())
    assert [path.name for path in left] == ["epoch-00001-step-0000000", "epoch-00002-step-0000000"]
    assert Checkpoints(run.folder / "checkpoints").newest()[0] == left[-1]
    steps = count_steps(monkeypatch)
    assert resume(run.folder) == 0
    assert len(steps) == WARM_UP + N_STEPS
    assert_same_outcome(run.folder, whole)


def test_checkpoint_every_saves_less_often(tmp_path, quick):
    with at_file("checkpoints/epoch-00002-*", lambda: time.sleep(1)):
        run = start(tmp_path, {**quick, "checkpoint_every": 2}, "--mode", "train")
    assert results(run.folder)["parts"][0]["checkpoint_seconds"] > 1  # of all checkpoints
    names = [path.name for path in sorted((run.folder / "checkpoints").iterdir())]
    assert names == ["epoch-00002-step-0000000", "epoch-00003-step-0000000"]


# --- what is resumed, and what is not


def test_finished_run_is_not_changed(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert resume(whole) == 0
    assert "has finished: its files were not checked" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_finished_run_can_be_given_more_epochs(tmp_path, quick, whole):
    run = start(tmp_path, {**quick, "epochs": EPOCHS - 1})
    target = float(rows_of(whole / "history.csv")[-1]["val_accuracy"])
    changes = f"epochs={EPOCHS}", f"target_accuracy={target}"
    assert resume(run.folder, "--set", *changes) == 0
    ours, theirs = (rows_of(folder / "history.csv") for folder in (run.folder, whole))
    assert ours == theirs
    seconds = [float(row["seconds"]) for row in rows(run.folder / "history.csv")]
    assert results(run.folder)["training"]["seconds_to_target"] == sum(seconds)  # of both parts
    assert len(rows_of(run.folder / "scenes.csv")) == 2


# docs/resuming.md, "What may change": these change neither weights nor masks.
FREE_KEYS = {
    "epochs", "patience", "target_accuracy", "training_seconds", "checkpoint_every", "cache",
    "cache_dir", "no_cache", "reader_threads", "micro_batch", "gpu", "nodes", "cpu_devices",
    "on_bad_scene", "read_timeout", "output_dir", "report", "sampling", "tensorboard",
    "profile_steps",
}  # fmt: skip
FIXED_KEYS = {
    field.alias: field for name, field in Config.model_fields.items() if name not in FREE_KEYS
}


def another_value(field, file, before):
    """A valid value of a key, as the text of --set, that differs from the one before."""
    choices = [value for value in typing.get_args(field.annotation) if isinstance(value, str)]
    candidates = [
        *choices,
        "true",
        "false",
        2,
        0.5,
        16,
        64,
        "other",
        "other.keras",
        "1/2",
        "{version: x}",
    ]
    for value in candidates:
        try:
            changed = load_config(file, [f"{field.alias}={value}"])
        except UserError:
            continue
        after = changed.model_dump(by_alias=True, mode="json")[field.alias]
        if after != before:
            return value, after
    raise AssertionError(f"No other value of {field.alias} is known: add one to the candidates.")


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_key_that_changes_results_is_rejected_with_both_values(stopped, key, capsys):
    before = results(stopped)["config"][key]
    value, after = another_value(FIXED_KEYS[key], stopped / "config.yaml", before)
    files = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    assert resume(stopped, "--set", f"{key}={value}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert key in line
    for shown in (before, after):
        assert (str(shown) if not isinstance(shown, dict) else "version") in line
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == files


def test_free_keys_may_change(copy_of_stopped):
    changes = ["patience=9", "target_accuracy=0.999", "checkpoint_every=2", "micro_batch=3",
               "on_bad_scene=skip", "sampling=false"]  # fmt: skip
    assert resume(copy_of_stopped, "--set", *changes) == 0
    found = results(copy_of_stopped)
    assert (found["status"], found["config"]["micro_batch"]) == ("success", 3)
    assert found["training"]["target_accuracy"] == 0.999
    assert found["training"]["seconds_to_target"] is None


def test_other_scenes_are_rejected(copy_of_stopped, tmp_path, quick, capsys):
    data = tmp_path / "data"
    shutil.copytree(quick["train_dir"], data)
    next(data.rglob("S3A*.hdf")).unlink()
    config = copy_of_stopped / "config.yaml"
    # The folder was moved: its path in the configuration of the run is where the data were.
    config.write_text(config.read_text().replace(quick["train_dir"], str(data)))
    assert resume(copy_of_stopped) == 2
    assert "scenes" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "no such folder"),
        ({}, "it has no results.json and no config.yaml"),
        ({"results.json": "{}"}, "it has no config.yaml"),
        ({"results.json": "", "config.yaml": ""}, "its results.json is damaged"),
        ({"results.json": "[]", "config.yaml": ""}, "its results.json is damaged"),
        ({"results.json": "{}", "config.yaml": ""}, "its results.json is damaged"),
    ],
)
def test_folder_that_is_no_run_is_one_error_line(tmp_path, files, reason, capsys):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    assert resume(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder} cannot be resumed: {reason}" in line and "Errno" not in line


def test_run_that_cannot_begin_to_sample_is_aborted_and_resumes(copy_of_stopped, whole, capsys):
    samples, handlers = copy_of_stopped / "samples.csv", logging.getLogger().handlers
    samples.unlink()
    samples.mkdir()
    assert resume(copy_of_stopped) == 2
    assert str(samples) in capsys.readouterr().err.splitlines()[-1]
    found = results(copy_of_stopped)
    assert found["status"] == "aborted" and str(samples) in found["error"]
    assert not [handler for handler in handlers if isinstance(handler, logging.FileHandler)]
    samples.rmdir()
    assert resume(copy_of_stopped) == 0
    assert_same_outcome(copy_of_stopped, whole)


def test_run_that_is_in_use_is_rejected(copy_of_stopped, capsys):
    with lock(copy_of_stopped, "locked"):
        assert resume(copy_of_stopped) == 2
    assert "in use by another process" in capsys.readouterr().err.splitlines()[-1]


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
    assert find_requeued(load_config(file, [f"run_name={folder.name}"]), "train") == folder
    assert find_requeued(load_config(file, ["run_name=another"]), "train") is None
    assert find_requeued(load_config(file, ["seed=1"]), "train") is None
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert find_requeued(config, "train") is None


# --- memory


def test_too_little_memory_says_what_to_try(tmp_path, quick, monkeypatch, capsys):
    def fail():
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating\n" * 100)

    at_call(monkeypatch, Trainer, "train_step", 3, fail)
    assert start(tmp_path, {**quick, "micro_batch": 4}, "--mode", "train").status == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "4 patches at once in float32" in line
    assert "micro_batch: 2" in line and "precision: bfloat16" in line
