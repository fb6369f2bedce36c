"""Whole runs of the program: what they leave, how they end, and what they say."""

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import (
    HEIGHT,
    PATCH,
    WIDTH,
    at_file,
    results,
    rows,
    spoil,
    start,
    watching,
)
from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.compliance_checker.mlp_parser import parse_file
from sklearn.model_selection import train_test_split

import data_loader
import slstr_cloud
from cloudmask import predict_scene
from harness import REPOSITORY
from harness.inference import predictor
from harness.records.results import peaks
from harness.records.saved_masks import read_mask_and_label
from model import unet
from tools.make_scenes import make_scene, write_scene

SHAPE = (PATCH, PATCH, 9)


def error_lines(capsys):
    """What is on the screen besides the plan of the run."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if not line.startswith(("Run ", "  "))]


def scene_file(settings, stem):
    (path,) = (p for p in data_loader.find_scenes(settings["inference_dir"]) if p.stem == stem)
    return path


# --- a whole run


def test_run_leaves_every_file_of_the_design(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "cloudmask.log", "mlperf_cloudmask.log", "history.csv", "scenes.csv",
        "results.json", "model.keras", "masks", "checkpoints", "rank-0.log", "samples.csv",
    }  # fmt: skip
    assert len(list((finished / "masks").iterdir())) == 2


def test_scene_accuracy_equals_numpy_on_mask_and_scene_files(finished, settings):
    scene_rows = rows(finished / "scenes.csv")
    assert len(scene_rows) == 2
    for row in scene_rows:
        with h5py.File(finished / "masks" / f"{row['scene']}.h5") as file:
            mask, probability = file["mask"][:], file["probability"][:]
            stored_valid = file["valid"][:]
            assert file.attrs["threshold"] == 0.5
            assert file.attrs["scene_bytes"] == scene_file(settings, row["scene"]).stat().st_size
        with h5py.File(scene_file(settings, row["scene"])) as file:
            label, bts = file["bayes"][..., 0] != 0, np.nan_to_num(file["bts"][:])
        assert mask.dtype == np.uint8 and mask.shape == label.shape == (HEIGHT, WIDTH)
        assert probability.dtype == np.float32
        np.testing.assert_array_equal(mask, probability > 0.5)
        assert float(row["accuracy"]) == (mask == label).mean()
        valid = (bts != 0).all(axis=-1)
        np.testing.assert_array_equal(stored_valid, valid)
        assert float(row["valid_accuracy"]) == (mask == label)[valid].mean()
        assert float(row["no_data_clear_accuracy"]) == (np.where(valid, mask, 0) == label).mean()
        assert float(row["all_cloud_accuracy"]) == label.mean()
        assert float(row["threshold_accuracy"]) == ((bts[..., 2] < 273.15) == label).mean()
    wanted = np.mean([float(row["accuracy"]) for row in scene_rows])
    assert results(finished)["inference"]["accuracy"] == pytest.approx(wanted)


def threshold_model(path):
    """Save a model that takes images of any size: cloud where S9 is below 273.15 K or missing."""
    inputs = keras.Input((None, None, 9))
    last = keras.layers.Conv2D(1, 1, activation="sigmoid")
    model = keras.Model(inputs, last(inputs))
    weights = np.zeros((1, 1, 9, 1), np.float32)
    weights[0, 0, 8] = -1000
    last.set_weights([weights, np.array([1000 * (273.15 - 270) / 22], np.float32)])
    model.save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "windows"), [("patches", 35), ("scene", 1), ("scene", 4)], ids=["", "whole", "strips"]
)
def test_masks_are_clear_without_data_and_both_accuracies_are_those_of_numpy(
    settings, tmp_path, monkeypatch, capsys, mode, windows
):
    monkeypatch.setattr(predictor, "STRIPS_TRIED", (windows,))
    shutil.copytree(settings["inference_dir"], tmp_path / "ssts")
    paths = data_loader.find_scenes(tmp_path / "ssts")
    for path in paths:
        with h5py.File(path, "a") as file:
            file["bts"][20:30, 40:50, 1] = np.nan  # in S8 alone; elsewhere it is 0
            file["bts"][30:40, 40:50, 1] = 0
    changes = {"inference_dir": str(tmp_path / "ssts"), "inference_mode": mode, "no_data": "clear"}
    model = threshold_model(tmp_path / "threshold.keras")
    run = start(
        tmp_path / "out", {**settings, **changes, "keep_probability": True, "cpu_devices": 2},
        "--mode", "inference", "--model", str(model),
    )  # fmt: skip
    assert run.status == 0
    assert "\n              clear where a brightness temperature is" in capsys.readouterr().err
    found = {"accuracy": [], "no_data_clear_accuracy": []}
    for path, row in zip(paths, rows(run.folder / "scenes.csv"), strict=True):
        with h5py.File(path) as file:
            bts, label = file["bts"][:], file["bayes"][..., 0] != 0
        valid = ~((bts == 0) | np.isnan(bts)).any(axis=-1)
        mask_file = run.folder / "masks" / f"{path.stem}.h5"
        with h5py.File(mask_file) as file:
            mask, network = file["mask"][:], file["probability"][:] > 0.5
            np.testing.assert_array_equal(file["valid"], valid)
        np.testing.assert_array_equal(read_mask_and_label(mask_file, path)[0], mask)
        assert network[~valid].any() and mask[valid].any() and not valid[20:40, 40:50].any()
        np.testing.assert_array_equal(mask, network & valid)
        found["accuracy"].append((network == label).mean())
        found["no_data_clear_accuracy"].append((mask == label).mean())
        assert float(row["accuracy"]) == found["accuracy"][-1]
        assert float(row["no_data_clear_accuracy"]) == found["no_data_clear_accuracy"][-1]
        assert float(row["no_data_clear_all_cloud_accuracy"]) == (valid == label).mean()
    inference = results(run.folder)["inference"]
    assert inference["windows"] == windows
    (line,) = (run.folder / "cloudmask.log").read_text().splitlines()
    for key, values in found.items():
        assert inference[key] == pytest.approx(np.mean(values))
        assert f", {key}={np.mean(values):.3f}" in line


def test_probability_equals_a_plain_loop_over_patches(finished, settings):
    model = keras.models.load_model(finished / "model.keras")
    path = data_loader.find_scenes(settings["inference_dir"])[0]
    channels = data_loader.read_scene(path, (HEIGHT, WIDTH, 9)).channels
    stride = PATCH - 10  # 22: 5 x 7 patches
    padded = np.zeros((4 * stride + PATCH, 6 * stride + PATCH, 9), np.float32)
    above, left = (padded.shape[0] - HEIGHT) // 2, (padded.shape[1] - WIDTH) // 2
    padded[above : above + HEIGHT, left : left + WIDTH] = channels
    plain = np.zeros(padded.shape[:2])
    for row in range(0, 5 * stride, stride):
        for col in range(0, 7 * stride, stride):
            patch = model(padded[None, row : row + PATCH, col : col + PATCH]).numpy()[0, ..., 0]
            plain[row + 5 : row + 27, col + 5 : col + 27] = patch[5:27, 5:27]
    with h5py.File(finished / "masks" / f"{path.stem}.h5") as file:
        ours = file["probability"][:]
    np.testing.assert_allclose(ours, plain[above : above + HEIGHT, left : left + WIDTH], atol=1e-5)


def split(settings):
    """The scenes of training and validation, by the rule of mlcommons/science v1.1."""
    paths = sorted(Path(settings["train_dir"]).rglob("S3A*.hdf"))
    return train_test_split(paths, train_size=settings["train_split"], random_state=42)


def validate(model_file, settings):
    """Validation loss and accuracy of a saved model and share of cloud, computed with NumPy."""
    x, y = [], []
    for path in split(settings)[1]:
        scene = data_loader.read_scene(path, (HEIGHT, WIDTH, 9))
        for row in range(2, 98, PATCH):  # 100 rows: 3 patches of 32 from row 4 // 2
            for col in range(3, 131, PATCH):  # 135 columns: 4 from column 7 // 2
                x.append(scene.channels[row : row + PATCH, col : col + PATCH])
                y.append(scene.cloud[row : row + PATCH, col : col + PATCH])
    p = keras.models.load_model(model_file).predict(np.stack(x), verbose=0)
    clip = slice(3, PATCH - 3)
    p, y = p[:, clip, clip].astype(np.float64), np.stack(y)[:, clip, clip] != 0
    p = np.clip(p, 1e-7, 1 - 1e-7)  # as Keras does
    return -np.log(np.where(y, p, 1 - p)).mean(), ((p > 0.5) == y).mean(), y.mean()


def best_epoch(history):
    return min(history, key=lambda row: float(row["val_loss"]))


def test_training_and_validation_have_the_scenes_of_v1_1(settings):
    paths = sorted(Path(settings["train_dir"]).rglob("S3A*.hdf"))
    assert data_loader.split_scenes(paths, 0.75) == split(settings)
    many = list(range(100))
    assert data_loader.split_scenes(many, 0.8) == train_test_split(
        many, train_size=0.8, random_state=42
    )


@pytest.fixture(scope="module")
def worsening(tmp_path_factory, settings):
    """A training whose second epoch is worse than the first, by 0.002 in loss."""
    changed = {**settings, "epochs": 9, "patience": 1, "learning_rate": 0.001}
    return start(tmp_path_factory.mktemp("worsening"), changed, "--mode", "train")


def test_best_model_is_kept_when_later_epochs_are_worse(worsening, settings):
    history = rows(worsening.folder / "history.csv")
    best, last = best_epoch(history), history[-1]
    assert float(last["val_loss"]) > float(best["val_loss"]) + 1e-3
    loss, accuracy, _ = validate(worsening.folder / "model.keras", settings)
    assert float(best["val_loss"]) == pytest.approx(loss, abs=1e-4)
    assert float(best["val_accuracy"]) == pytest.approx(accuracy, abs=1e-5)
    training = results(worsening.folder)["training"]
    assert training["best_epoch"] == int(best["epoch"])
    assert training["val_loss"] == float(best["val_loss"])


def test_patience_ends_training(worsening):
    history = rows(worsening.folder / "history.csv")
    assert worsening.status == 0
    assert len(history) == int(best_epoch(history)["epoch"]) + 1 < 9


def test_validation_equals_numpy_on_the_saved_model(finished, settings):
    best = best_epoch(rows(finished / "history.csv"))
    loss, accuracy, cloud = validate(finished / "model.keras", settings)
    assert float(best["val_accuracy"]) == pytest.approx(accuracy, abs=1e-5)
    assert float(best["val_loss"]) == pytest.approx(loss, abs=1e-5)
    assert results(finished)["training"]["baselines"] == {"all_cloud_accuracy": cloud}


def test_history_and_results_agree(finished):
    history, found = rows(finished / "history.csv"), results(finished)
    assert list(history[0]) == [
        "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "patches_per_second",
        "labels_replaced",
    ]  # fmt: skip
    assert [row["epoch"] for row in history] == ["1", "2"]
    training = found["training"]
    assert training["epochs_run"] == 2 and len(training["seconds_per_epoch"]) == 2
    assert (training["scenes_train"], training["scenes_test"]) == (5, 2)
    assert (training["patches_train"], training["patches_test"]) == (60, 24)
    best = history[training["best_epoch"] - 1]
    assert training["val_loss"] == pytest.approx(float(best["val_loss"]))
    assert training["warm_up_seconds"] > 0
    assert training["synthetic"] is found["inference"]["synthetic"] is True
    assert found["status"] == "success" and found["inference"]["scenes"] == 2
    assert found["inference"]["inference_mode"] == "patches"
    assert 1e8 < found["peak_rss"] < 24e9 and found["peak_gpu_memory"] == []
    parts = found["inference"]["seconds_per_scene_parts"]
    assert set(parts) == {"read", "network", "stitch", "write", "score"}


def test_scene_mode_masks_in_one_pass_and_counts_differing_pixels(finished, settings, tmp_path):
    once = {**settings, "model_file": str(finished / "model.keras"), "inference_mode": "scene"}
    folder = start(tmp_path, {**once, "keep_probability": True}, "--mode", "inference").folder
    model = keras.models.load_model(finished / "model.keras")
    whole = keras.models.clone_model(model, input_tensors=keras.Input((104, 144, 9)))
    whole.set_weights(model.get_weights())
    differing = {}
    for path in data_loader.find_scenes(settings["inference_dir"]):
        scene = data_loader.read_scene(path, (HEIGHT, WIDTH, 9))
        # Before the scene the remainder by 8 of what is before it in patches, 10 rows and 14
        # columns; after it up to multiples of 8.
        padded = np.pad(scene.channels, [(2, 2), (6, 3), (0, 0)])
        expected = whole(padded[None]).numpy()[0, 2:102, 6:141, 0]
        with h5py.File(folder / "masks" / f"{path.stem}.h5") as file:
            np.testing.assert_allclose(file["probability"], expected, atol=1e-5)
            with h5py.File(finished / "masks" / f"{path.stem}.h5") as patches:
                differing[path.stem] = np.count_nonzero(file["mask"][:] != patches["mask"][:])
    inference = results(folder)["inference"]
    assert (inference["inference_mode"], inference["windows"]) == ("scene", 1)
    first = sorted(differing)[0]
    assert inference["differs"] == {
        "scene": first,
        "pixels": differing[first],
        "share": differing[first] / (HEIGHT * WIDTH),
    }


def test_log_has_the_two_lines_of_v1_1(finished):
    training, inference = (finished / "cloudmask.log").read_text().splitlines()
    fields = dict(part.strip().split("=") for part in training.split(",")[1:])
    assert training.startswith("CloudMask training, samples ")
    assert [name.strip() for name in fields][:6] == [
        "samples", "epochs", "bs", "nodes", "gpus", "time_per_epoch",
    ]  # fmt: skip
    seconds = [float(row["seconds"]) for row in rows(finished / "history.csv")]
    assert float(fields["time_per_epoch"]) == pytest.approx(np.mean(seconds), abs=0.01)
    assert len(seconds) > 1
    fields = dict(part.strip().split("=") for part in inference.split(",")[1:])
    assert list(fields)[:6] == [
        "inferences", "bs", "nodes", "gpus", "time_per_inference", "accuracy",
    ]  # fmt: skip
    assert fields["inferences"] == "2" and fields["gpus"] == "0"


def test_resolved_configuration_repeats_the_run_bit_for_bit(finished, tmp_path):
    status = slstr_cloud.main(
        ["--config", str(finished / "config.yaml"), "--set", f"output_dir={tmp_path}"]
    )
    (again,) = tmp_path.iterdir()
    assert status == 0
    drop = ("seconds", "patches_per_second")
    for a, b in zip(rows(finished / "history.csv"), rows(again / "history.csv"), strict=True):
        assert {k: v for k, v in a.items() if k not in drop} == {
            k: v for k, v in b.items() if k not in drop
        }
    models = [keras.models.load_model(folder / "model.keras") for folder in (finished, again)]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)
    for mask in (finished / "masks").iterdir():
        with h5py.File(mask) as a, h5py.File(again / "masks" / mask.name) as b:
            np.testing.assert_array_equal(a["probability"], b["probability"])


def test_second_run_of_the_same_name_is_rejected(finished, settings, capsys):
    status = start(finished.parent, settings).status
    assert status == 2 and "exists" in capsys.readouterr().err


def test_every_file_is_on_the_disk_before_it_gets_its_name(finished_run):
    inside = [(t, late) for t, late in finished_run.renames if finished_run.folder in t.parents]
    names = {target.name for target, _ in inside}
    assert names >= {"results.json", "config.yaml", "history.csv", "scenes.csv", "model.keras"}
    assert {target.parent.name for target, _ in inside} >= {"masks", "checkpoints"}
    assert [(target.name, late) for target, late in inside if late] == []


# --- the MLPerf log


def objections_to(log):
    """What the checker of mlperf_logging objects to, with our rules."""
    checker = mlp_compliance.make_checker("hpc", "3.0.0", quiet=False, werror=False)
    mlp_compliance.main(str(log), str(REPOSITORY / "harness/mlperf_rules.yaml"), checker)
    return [*checker.overwritable.values(), *checker.not_overwritable]


def test_checker_accepts_the_log(finished):
    assert objections_to(finished / "mlperf_cloudmask.log") == []


def test_hpc_rules_object_to_the_benchmarks_name_alone(finished):
    checker = mlp_compliance.make_checker("hpc", "3.0.0", quiet=False, werror=False)
    log, _ = parse_file(str(finished / "mlperf_cloudmask.log"), ruleset="3.0.0")
    folder = os.path.dirname(mlp_compliance.__file__)
    for rules in ("common.yaml", "open_common.yaml"):
        checker.configured_checks(log, os.path.join(folder, "hpc_3.0.0", rules))
    mlp_compliance.enqueued_configs.clear()
    objections = [*checker.overwritable.values(), *checker.not_overwritable]
    assert len(objections) == 1 and "submission_benchmark" in objections[0]


@pytest.mark.parametrize(
    "key", ["seed", "init_stop", "epoch_stop", "eval_accuracy", "run_stop", "inference_stop"]
)
def test_checker_misses_an_event(finished, tmp_path, key):
    lines = (finished / "mlperf_cloudmask.log").read_text().splitlines(keepends=True)
    (tmp_path / "log").write_text("".join(line for line in lines if f'"key": "{key}"' not in line))
    assert objections_to(tmp_path / "log") != []


def test_results_hold_the_digest_of_the_log(finished):
    log = (finished / "mlperf_cloudmask.log").read_bytes()
    assert b'"run_stop"' in log.splitlines()[-1]
    assert results(finished)["mlperf_sha256"] == hashlib.sha256(log).hexdigest()


def test_events_name_the_submitter_and_what_ran(finished):
    lines, errors = parse_file(str(finished / "mlperf_cloudmask.log"), ruleset="3.0.0")
    assert not errors
    values = {line.key: line.value["value"] for line in lines}
    expected = {
        "submission_benchmark": "cloudmask",
        "submission_org": "tests",
        "submission_division": "open",
        "submission_status": "research",
        "submission_platform": "pytest",
        "submission_poc_name": "Ada Lovelace",
        "submission_poc_email": "ada@example.org",
        "seed": 1234,
        "global_batch_size": 11,
        "opt_name": "adam",
        "opt_base_learning_rate": 0.00001,
        "train_samples": 60,
        "eval_samples": 24,
        "number_of_ranks": 1,
        "number_of_nodes": 1,
        "accelerators_per_node": 0,
    }
    assert {key: values.get(key) for key in expected} == expected
    assert values["result"]["accuracy"] == results(finished)["inference"]["accuracy"]
    assert set(results(finished)["inference"]) >= {"day", "night"}
    evaluated = [line.value for line in lines if line.key == "eval_accuracy"]
    assert [(e["metadata"]["epoch_num"], e["value"]) for e in evaluated] == [
        (int(row["epoch"]), float(row["val_accuracy"])) for row in rows(finished / "history.csv")
    ]


# --- modes


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_training_alone_then_inference_alone(settings, tmp_path, name):
    changed = {**settings, "epochs": 1, "model_file": name}
    trained = start(tmp_path / "a", changed, "--mode", "train")
    assert trained.status == 0 and not (trained.folder / "masks").exists()
    assert objections_to(trained.folder / "mlperf_cloudmask.log") == []
    model = str(trained.folder / name)
    masked = start(tmp_path / "b", settings, "--mode", "inference", "--model", model)
    assert masked.status == 0 and not (masked.folder / "history.csv").exists()
    assert results(masked.folder)["inference"]["scenes"] == 2
    assert objections_to(masked.folder / "mlperf_cloudmask.log") == []


def assert_same_losses_and_scores(first, second):
    """Compare two runs' folders within the tolerance that docs/clusters.md states."""
    one, many = rows(first / "history.csv"), rows(second / "history.csv")
    for a, b in zip(one, many, strict=True):
        for name in ("loss", "val_loss"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-4)
    one, many = rows(first / "scenes.csv"), rows(second / "scenes.csv")
    for a, b in zip(one, many, strict=True):
        assert a["scene"] == b["scene"]
        assert float(a["accuracy"]) == pytest.approx(float(b["accuracy"]), abs=2e-3)


@pytest.mark.slow
def test_replicas_change_neither_losses_nor_scores(finished, settings, tmp_path):
    # 3 replicas: their shares of 11 patches differ, and one has no scene to mask
    run = start(tmp_path, {**settings, "cpu_devices": 3})
    assert run.status == 0 and results(run.folder)["devices"]["replicas"] == 3
    assert_same_losses_and_scores(finished, run.folder)


def test_each_scene_is_masked_by_one_device(finished, settings, tmp_path):
    made, both_are_done = Counter(), threading.Barrier(2)

    def watcher(event, source, target=None):
        if event == "os.rename" and target.match("masks/*.h5"):
            made[target.stem] += 1
            # Neither device sees the other's mask before it has made one itself.
            if made.total() <= 2:
                both_are_done.wait(200)

    changed = {**settings, "cpu_devices": 2, "model_file": str(finished / "model.keras")}
    with watching(watcher):
        run = start(tmp_path, changed, "--mode", "inference")
    assert run.status == 0
    scenes = [row["scene"] for row in rows(finished / "scenes.csv")]
    assert made == Counter(scenes)
    assert [row["scene"] for row in rows(run.folder / "scenes.csv")] == scenes
    devices = results(run.folder)["inference"]["devices"]
    assert [device["scenes"] for device in devices] == [1, 1]
    assert len({device["device"] for device in devices}) == 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_computes_in_half_precision_and_nearly_agrees(
    whole, quick, tmp_path, precision
):
    run = start(tmp_path, {**quick, "epochs": 1, "precision": precision}, "--mode", "train")
    assert run.status == 0
    model = keras.models.load_model(run.folder / "model.keras")
    convolutions = [layer for layer in model.layers if "conv" in layer.name]
    assert {layer.compute_dtype for layer in convolutions[:-1]} == {precision}
    assert {weight.dtype for weight in model.weights} == {"float32"}
    full, half = rows(whole / "history.csv")[0], rows(run.folder / "history.csv")[0]
    for name in ("loss", "val_loss"):
        assert 0 < abs(float(half[name]) - float(full[name])) < 0.02

    changed = {**quick, "precision": precision, "model_file": str(whole / "model.keras")}
    masked = start(tmp_path / "masked", changed, "--mode", "inference")
    assert masked.status == 0
    for mask in (whole / "masks").iterdir():
        with h5py.File(mask) as a, h5py.File(masked.folder / "masks" / mask.name) as b:
            difference = np.abs(a["probability"][:] - b["probability"][:])
            assert 0 < difference.max() < 0.1
            assert (a["mask"][:] == b["mask"][:]).mean() > 0.99


def test_compiled_network_is_another_program_with_the_same_results(whole, quick, tmp_path):
    run = start(tmp_path, {**quick, "epochs": 1, "xla": True})
    assert run.status == 0
    plain, compiled = rows(whole / "history.csv")[0], rows(run.folder / "history.csv")[0]
    # Bit for bit the same where XLA is not used: it adds up in another order.
    assert 0 < abs(float(compiled["loss"]) - float(plain["loss"])) < 2e-3
    loss, accuracy, _ = validate(run.folder / "model.keras", quick)
    assert float(compiled["val_loss"]) == pytest.approx(loss, abs=1e-4)


def test_target_accuracy_is_one_of_validation(finished, settings, tmp_path, capsys):
    first = rows(finished / "history.csv")[0]
    trained, validated = float(first["accuracy"]), float(first["val_accuracy"])
    between = (trained + validated) / 2  # the one has reached it, the other has not
    assert min(trained, validated) < between < max(trained, validated)
    run = start(tmp_path, {**settings, "target_accuracy": between}, "--mode", "train")
    history = rows(run.folder / "history.csv")
    assert len(history) == (1 if validated >= between else 2)
    reached = float(history[-1]["val_accuracy"]) >= between
    expected = sum(float(row["seconds"]) for row in history) if reached else None
    training = results(run.folder)["training"]
    assert (training["target_accuracy"], training["seconds_to_target"]) == (between, expected)
    events, _ = parse_file(str(run.folder / "mlperf_cloudmask.log"), ruleset="3.0.0")
    (result,) = (event.value["value"] for event in events if event.key == "result")
    assert (result["target_accuracy"], result["seconds_to_target"]) == (between, expected)
    text = "reached in validation after" if reached else "not reached in validation"
    assert f"  target      accuracy {between:g} {text}" in capsys.readouterr().err
    # Without the key the target is that of MLCommons Science.
    assert results(finished)["training"]["target_accuracy"] == 0.9


def test_cache_changes_no_number_and_follows_the_scene_files(finished, dataset, settings, tmp_path):
    train_dir = copy_of_training_scenes(dataset, tmp_path)
    cache = tmp_path / "cache"
    changed = {**settings, "cache_dir": str(cache), "train_dir": str(train_dir), "epochs": 1}
    run = start(tmp_path / "a", changed, "--mode", "train")
    assert len(list(cache.iterdir())) == 84  # 7 scenes of 12 patches, a file each
    plain, cached = rows(finished / "history.csv")[0], rows(run.folder / "history.csv")[0]
    assert [plain[n] for n in ("loss", "val_loss")] == [cached[n] for n in ("loss", "val_loss")]

    for path in train_dir.rglob("S3A*.hdf"):  # the same size, written later
        before = path.stat()
        with h5py.File(path, "r+") as file:
            file["bayes"][:] = 255 - file["bayes"][:]
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
        assert path.stat().st_size == before.st_size
    again = start(tmp_path / "b", changed, "--mode", "train")
    (renewed,) = rows(again.folder / "history.csv")
    for name in ("loss", "val_loss"):
        assert renewed[name] != cached[name]


# --- what goes wrong


def copy_of_training_scenes(dataset, tmp_path):
    shutil.copytree(dataset / "one-day", tmp_path / "one-day")
    return tmp_path / "one-day"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_dir": "/nowhere/at/all"}, "No directory /nowhere/at/all"),
        ({"train_dir": "{tmp_path}"}, "No scenes matching 'S3[A-D]*.hdf' under"),
        ({"inference_dir": "/nowhere/at/all"}, "No directory /nowhere/at/all"),
        ({"train_split": 0.01}, "train_split 0.01 of 7 scenes leaves 0"),
        ({"batch_size": 2, "cpu_devices": 3}, "batch_size 2"),
        ({"gpu": 3}, "gpu: 3 requires 3 GPUs per node, TensorFlow finds 0"),
        ({"nodes": 2}, "nodes: 2 requires 2 nodes, the scheduler started 1"),
        ({"output_dir": "/proc/nowhere"}, "/proc/nowhere"),
        ({"IMAGE_H": 120}, "dataset 'refs' has shape (100, 135, 6)"),
        ({"N_CHANNELS": 8}, "dataset 'refs' has shape (100, 135, 6)"),
        ({"PATCH_SIZE": 30}, "rows and columns divide by 8, found 30 x 30"),
        ({"network": "nonet"}, "Unknown network 'nonet'. Set network to unet"),
        ({"network": "{tmp_path}/no.keras"}, "no.keras"),
    ],
)  # fmt: skip
def test_user_error_is_one_line_and_exit_status_2(settings, tmp_path, capsys, change, words):
    change = {
        key: value.format(tmp_path=tmp_path) if isinstance(value, str) else value
        for key, value in change.items()
    }
    run = start(tmp_path, {**settings, **change})
    (line,) = error_lines(capsys)
    assert run.status == 2 and words in line
    assert run.folder is None


def test_bad_scene_aborts_the_run_with_its_name(dataset, settings, tmp_path, capfd):
    train_dir = copy_of_training_scenes(dataset, tmp_path)
    bad = sorted(train_dir.rglob("S3A*.hdf"))[2]
    spoil(bad)
    run = start(tmp_path / "out", {**settings, "train_dir": str(train_dir)})
    assert run.status == 2
    error = capfd.readouterr().err
    assert str(bad) in error and "Traceback" not in error
    found = results(run.folder)
    assert found["status"] == "aborted" and bad.name in found["error"]
    objections = objections_to(run.folder / "mlperf_cloudmask.log")
    assert len(objections) == 1 and "run_stop" in objections[0]  # the success rule


def test_bad_inference_scene_keeps_the_training(dataset, settings, tmp_path, capfd):
    shutil.copytree(dataset / "ssts", tmp_path / "ssts")
    bad = sorted((tmp_path / "ssts").rglob("S3A*.hdf"))[0]
    spoil(bad)
    changed = {**settings, "epochs": 1, "inference_dir": str(tmp_path / "ssts")}
    run = start(tmp_path / "out", changed)
    assert run.status == 2 and "'/bts' has a damaged chunk" in capfd.readouterr().err
    assert (run.folder / "model.keras").is_file() and (run.folder / "history.csv").is_file()
    objections = objections_to(run.folder / "mlperf_cloudmask.log")
    assert len(objections) == 1 and "run_stop" in objections[0]


def scene_by_scene(settings):
    """Settings with which each batch is the 12 patches of one scene."""
    return {**settings, "batch_size": 12, "shuffle_scenes": 1}


@pytest.mark.parametrize("n_cloudy", [7, 1])
def test_loss_that_is_not_finite_names_epoch_step_and_scenes(
    dataset, settings, tmp_path, capsys, n_cloudy
):
    train_dir = copy_of_training_scenes(dataset, tmp_path)
    # The weight of cloud makes the loss of a scene with cloud infinite, others have none.
    changed = {**scene_by_scene(settings), "train_dir": str(train_dir), "cloud_weight": 3e38}
    cloudy = split(changed)[0][:n_cloudy]
    for path in train_dir.rglob("S3A*.hdf"):
        with h5py.File(path, "r+") as file:
            file["bayes"][:] = 255 if path in cloudy else 0
    run = start(tmp_path / "out", changed, "--mode", "train")
    assert run.status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    epoch, step, n_steps = map(int, re.search(r"epoch (\d), step (\d) of (\d)", last).groups())
    assert (epoch, n_steps) == (1, 5)
    (named,) = [path for path in train_dir.rglob("S3A*.hdf") if path.name in last]
    assert named in cloudy
    assert step == 1 if n_cloudy > 1 else step > 1
    assert results(run.folder)["status"] == "aborted"


def test_batch_without_usable_patches_leaves_numbers_finite(dataset, settings, tmp_path):
    train_dir = copy_of_training_scenes(dataset, tmp_path)
    changed = {
        **scene_by_scene(settings), "train_dir": str(train_dir), "on_bad_scene": "skip",
        "learning_rate": 0.001,
    }  # fmt: skip
    spoil(split(changed)[0][0])
    run = start(tmp_path / "out", changed, "--mode", "train")
    assert run.status == 0
    (skipped,) = results(run.folder)["bad_scenes"]
    assert skipped["during"] == "training"
    history = rows(run.folder / "history.csv")
    losses = [float(row[name]) for row in history for name in ("loss", "val_loss")]
    assert len(history) == 2 and np.isfinite(losses).all()
    weights = keras.models.load_model(run.folder / "model.keras").get_weights()
    assert all(np.isfinite(weight).all() for weight in weights)


@pytest.mark.parametrize("content", [None, b"no model"])
def test_unreadable_model_is_named(settings, tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "m.keras"
    if content:
        model.write_bytes(content)
    run = start(tmp_path, settings, "--mode", "inference", "--model", "m.keras")
    error = capsys.readouterr().err
    assert run.status == 2 and str(model) in error and ("--model" in error or content)
    assert run.folder is None


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_model_that_contains_code_is_rejected(settings, tmp_path, capsys, suffix):
    trace = str(tmp_path / "the_code_ran")
    code = keras.layers.Lambda(
        lambda x: __import__("os").makedirs(trace, exist_ok=True) or x[..., :1],
        output_shape=(PATCH, PATCH, 1),
    )
    path = tmp_path / f"m{suffix}"
    keras.Sequential([keras.Input((PATCH, PATCH, 9)), code]).save(path)
    keras.models.load_model(path, compile=False, safe_mode=False)(np.zeros((1, PATCH, PATCH, 9)))
    os.rmdir(trace)  # it runs where it is loaded
    capsys.readouterr()

    run = start(tmp_path / "out", {**settings, "model_file": str(path)}, "--mode", "inference")
    (line,) = error_lines(capsys)
    assert run.status == 2 and str(path) in line and "Lambda" in line
    assert not os.path.exists(trace)


@pytest.mark.parametrize(
    ("trained_here", "patch_size", "reason"),
    [(True, 28, "divide by 8, found 28 x 28. Choose another PATCH_SIZE"), (False, 24, f"{SHAPE}")],
)
def test_patch_size_that_a_model_does_not_take_is_rejected(
    finished, settings, tmp_path, capsys, trained_here, patch_size, reason
):
    path = finished / "model.keras"
    if not trained_here:
        path = tmp_path / "one_size.keras"
        unet(SHAPE).save(path)
    changed = {**settings, "model_file": str(path), "PATCH_SIZE": patch_size}
    run = start(tmp_path, changed, "--mode", "inference")
    assert run.status == 2 and reason in capsys.readouterr().err
    assert run.folder is None


def without_labels(dataset, folder, n):
    """A copy of the inference scenes, the first n of them without a Bayesian mask."""
    shutil.copytree(dataset / "ssts", folder)
    paths = sorted(folder.rglob("S3A*.hdf"))
    for path in paths[:n]:
        with h5py.File(path, "a") as file:
            del file["bayes"]
    return paths


@pytest.mark.parametrize("n", [1, 2])
def test_inference_needs_no_labels(finished, dataset, settings, tmp_path, n):
    paths = without_labels(dataset, tmp_path / "mine", n)
    changed = {**settings, "inference_dir": str(tmp_path / "mine")}
    model = str(finished / "model.keras")
    run = start(tmp_path / "out", changed, "--mode", "inference", "--model", model)
    assert run.status == 0
    for path in paths:
        with h5py.File(run.folder / "masks" / f"{path.stem}.h5") as mine:
            with h5py.File(finished / "masks" / f"{path.stem}.h5") as scored:
                np.testing.assert_array_equal(mine["mask"], scored["mask"])
    before = {row["scene"]: row for row in rows(finished / "scenes.csv")}
    for row in rows(run.folder / "scenes.csv"):
        assert row["cloud_fraction"] == before[row["scene"]]["cloud_fraction"]
        if row["scene"] in {path.stem for path in paths[:n]}:
            assert (row["accuracy"], row["all_cloud_accuracy"], row["tp"]) == ("nan", "nan", "0")
        else:
            assert row["accuracy"] == before[row["scene"]]["accuracy"]
    inference = results(run.folder)["inference"]
    assert (inference["scenes"], inference["scenes_labelled"]) == (2, 2 - n)
    assert (inference["accuracy"] is None) == (n == 2)
    assert objections_to(run.folder / "mlperf_cloudmask.log") == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["patches", "scene"])
def test_inference_masks_scenes_of_different_sizes(finished, dataset, settings, tmp_path, mode):
    folder, model = tmp_path / "mine", finished / "model.keras"
    shutil.copytree(dataset / "ssts", folder)
    sizes = {"S3A_a": (HEIGHT - 1, WIDTH), "S3A_b": (HEIGHT + 2, WIDTH), "S3B_c": (20, 90)}
    for seed, (name, size) in enumerate(sizes.items()):
        write_scene(folder / f"{name}.hdf", make_scene(np.random.default_rng(seed), *size))
    changed = {**settings, "inference_dir": str(folder), "inference_mode": mode}
    changed |= {"keep_probability": True, "cpu_devices": 2}
    run = start(tmp_path / "out", changed, "--mode", "inference", "--model", str(model))
    assert run.status == 0
    paths = data_loader.find_scenes(folder)
    assert [row["scene"] for row in rows(run.folder / "scenes.csv")] == sorted(
        path.stem for path in paths
    )
    for path in paths:
        _, expected = predict_scene(model, path, mode, PATCH, 10)
        with h5py.File(run.folder / "masks" / f"{path.stem}.h5") as file:
            found = file["probability"][:]
        assert found.shape == sizes.get(path.stem, (HEIGHT, WIDTH))
        known = np.isfinite(expected)  # predict_scene says nothing where there are no data
        assert known.any()
        np.testing.assert_allclose(found[known], expected[known], atol=1e-5)


def test_benchmark_needs_scenes_of_one_size(dataset, settings, tmp_path, capsys):
    shutil.copytree(dataset / "ssts", tmp_path / "mine")
    scene = make_scene(np.random.default_rng(0), HEIGHT + 2, WIDTH)
    write_scene(tmp_path / "mine/S3A_a.hdf", scene)
    run = start(tmp_path / "out", {**settings, "inference_dir": str(tmp_path / "mine")})
    assert run.status == 2
    (line, _) = error_lines(capsys)
    assert "has shape (102, 135, 6)" in line and line.endswith(
        "To give all scenes 100 rows, make them by convert_sen3.py --rows 100; --mode inference "
        "masks scenes of any size."
    )


@pytest.mark.parametrize("labels", ["bayes", "none"])  # these of training, not of the scores
def test_benchmark_needs_labels_of_the_scenes_to_mask(dataset, settings, tmp_path, capsys, labels):
    without_labels(dataset, tmp_path / "mine", 1)
    settings = {**settings, "labels": labels, "inference_dir": str(tmp_path / "mine")}
    run = start(tmp_path / "out", settings)
    assert run.status == 2 and "has no dataset 'bayes'" in capsys.readouterr().err
    assert run.folder is None  # it did not begin
    assert start(tmp_path / "out", settings, "--mode", "check").status == 2


def test_model_that_is_no_unet_can_mask(settings, tmp_path):
    model = threshold_model(tmp_path / "threshold.keras")
    run = start(tmp_path / "out", settings, "--mode", "inference", "--model", str(model))
    assert run.status == 0
    for row in rows(run.folder / "scenes.csv"):
        assert float(row["accuracy"]) == pytest.approx(float(row["threshold_accuracy"]), abs=1e-3)


@pytest.mark.parametrize(
    ("outputs", "words"), [(2, "gives (32, 32, 2)"), (0, "gives (32, 32, 9) and (32, 32, 9)")]
)
def test_model_without_one_output_per_pixel_is_rejected(settings, tmp_path, capsys, outputs, words):
    inputs = keras.Input((PATCH, PATCH, 9))
    made = [keras.layers.Conv2D(outputs or 9, 1)(inputs) for _ in range(1 if outputs else 2)]
    keras.Model(inputs, made).save(tmp_path / "m.keras")
    run = start(
        tmp_path / "out", settings, "--mode", "inference", "--model", str(tmp_path / "m.keras")
    )
    assert run.status == 2 and words in capsys.readouterr().err


def test_model_whose_output_is_not_finite_is_rejected(settings, tmp_path, capsys):
    inputs = keras.Input((PATCH, PATCH, 9))
    last = keras.layers.Conv2D(1, 1)
    model = keras.Model(inputs, last(inputs))
    last.set_weights([np.full((1, 1, 9, 1), np.nan, np.float32), np.zeros(1, np.float32)])
    model.save(tmp_path / "m.keras")
    arguments = "--mode", "inference", "--model", str(tmp_path / "m.keras")
    run = start(tmp_path / "out", settings, *arguments)
    assert run.status == 1 and "probabilities that are not finite" in capsys.readouterr().err


def test_file_that_is_no_model_is_rejected_by_its_name(settings, tmp_path, capsys):
    run = start(tmp_path, settings, "--mode", "inference", "--model", "m.txt")
    assert run.status == 2 and "--model takes a .keras or .h5 file" in capsys.readouterr().err


def test_option_model_is_for_inference_only(settings, tmp_path, capsys):
    run = start(tmp_path, settings, "--model", "m.keras")
    assert run.status == 2 and "--mode inference" in capsys.readouterr().err


def test_screen_shows_the_plan_progress_and_results(finished_run):
    lines = finished_run.screen.splitlines()
    # 7 scenes at 0.75: 5 to train on; 12 patches each.
    assert any(
        "5 scenes of 100 x 135, 60 patches of 32; 2 for validation" in line for line in lines
    )
    assert any(line.split()[0] == "2/2" for line in lines)
    assert "  data        synthetic scenes in inference and training" in lines
    scores = results(finished_run.folder)["inference"]
    for row, keys in (  # each with the baselines of the same pixels
        ("all pixels", ("accuracy", "all_cloud_accuracy", "threshold_accuracy")),
        (
            "no data is clear",
            (
                "no_data_clear_accuracy",
                "no_data_clear_all_cloud_accuracy",
                "no_data_clear_threshold_accuracy",
            ),
        ),
        (
            "pixels with data",
            ("valid_accuracy", "valid_all_cloud_accuracy", "valid_threshold_accuracy"),
        ),
    ):
        expected = [f"{scores[key]:.3f}" for key in keys]
        (line,) = (line for line in lines if line.strip().startswith(f"accuracy, {row} "))
        assert line.partition(row)[2].split()[:3] == expected
    # What is printed after the run is in its log as well.
    log = (finished_run.folder / "rank-0.log").read_text().splitlines()
    n = len(lines) - next(i for i, line in enumerate(lines) if line.startswith("Trained 2 epochs"))
    assert [line.split(" INFO ", 1)[1] for line in log[-n:]] == lines[-n:]
    assert lines[-1] == f"Results are in {finished_run.folder}"
    long = [line for line in lines if len(line) > 80 and str(finished_run.folder) not in line]
    assert long == []


def test_bad_scene_aborts_inference(finished, dataset, settings, tmp_path):
    shutil.copytree(dataset / "ssts", tmp_path / "ssts")
    spoil(sorted((tmp_path / "ssts").rglob("S3A*.hdf"))[1])
    changed = {
        "inference_dir": str(tmp_path / "ssts"), "model_file": str(finished / "model.keras"),
        "cpu_devices": 2,
    }  # fmt: skip
    run = start(tmp_path / "out", {**settings, **changed}, "--mode", "inference")
    assert run.status == 2 and results(run.folder)["status"] == "aborted"
    (objection,) = objections_to(run.folder / "mlperf_cloudmask.log")
    assert "run_stop" in objection


def test_unusable_tf_config_is_one_line(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{")
    run = start(tmp_path, settings)
    error = capsys.readouterr().err
    assert run.status == 2 and run.folder is None
    assert len(error.splitlines()) == 1 and "TF_CONFIG cannot be used" in error


def test_run_whose_last_results_cannot_be_written_is_no_success(settings, tmp_path):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    def is_last(source):
        return '"status": "success"' in source.read_text()

    with at_file("run/results.json", fail, when=is_last):
        run = start(tmp_path, {**settings, "epochs": 1}, "--mode", "train")
    assert run.status == 2 and results(run.folder)["status"] == "aborted"
    log = run.folder / "mlperf_cloudmask.log"
    (objection,) = objections_to(log)
    assert "run_stop" in objection and log.read_text().count('"run_stop"') == 1
    assert results(run.folder)["mlperf_sha256"] == hashlib.sha256(log.read_bytes()).hexdigest()


def test_verbose_shows_the_traceback(settings, tmp_path, capsys):
    run = start(tmp_path, {**settings, "train_dir": "/nowhere/at/all"}, "--verbose")
    assert run.status == 2 and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_output_folder_that_cannot_be_written_is_named(settings, tmp_path, capsys, number):
    output = tmp_path / "read-only"

    def refuse(event, folder, target=None):  # root may write anywhere
        if event == "os.mkdir" and output in (folder, *folder.parents):
            raise OSError(number, os.strerror(number), str(folder))

    with watching(refuse):
        run = start(tmp_path, {**settings, "output_dir": str(output)})
    (line,) = error_lines(capsys)
    assert run.status == 2 and str(output) in line and os.strerror(number) in line


def test_sigterm_ends_with_143_and_an_aborted_run(settings, tmp_path):
    arguments = [f"{key}={value}" for key, value in settings.items()]
    process = subprocess.Popen(
        [sys.executable, "slstr_cloud.py", "--set", *arguments, "epochs=1000", "run_name=run",
         f"output_dir={tmp_path}"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not (tmp_path / "run/history.csv").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=150)[1]
    assert process.returncode == 143 and "Traceback" not in error
    assert results(tmp_path / "run")["status"] == "aborted"
    objections = objections_to(tmp_path / "run/mlperf_cloudmask.log")
    assert len(objections) == 1 and "run_stop" in objections[0]


@pytest.mark.parametrize("key", ["model_file", "log_file", "mlperf_logfile"])
def test_run_never_overwrites_a_file_outside_its_folder(settings, tmp_path, capsys, key):
    (tmp_path / "earlier.h5").write_text("earned")
    run = start(tmp_path / "out", {**settings, key: str(tmp_path / "earlier.h5")})
    assert run.status == 2 and "earlier.h5 exists" in capsys.readouterr().err
    assert (tmp_path / "earlier.h5").read_text() == "earned" and run.folder is None


def test_peak_memory_is_that_of_all_parts():
    parts = [{"peak_rss": 5, "peak_gpu_memory": [1, 9]}, {"peak_rss": 3, "peak_gpu_memory": [2]}]
    assert peaks([*parts, {}]) == {"peak_rss": 5, "peak_gpu_memory": [2, 9]}
