"""A run that is killed at any moment and resumed ends as one that was never stopped.

In CI a run is killed a few times; `make torture` makes many runs and prints what was hit.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import yaml
from conftest import HEIGHT, PATCH, WIDTH, results, rows
from mlperf_logging.compliance_checker.mlp_parser import parse_file

from harness import REPOSITORY
from tools.make_scenes import make_dataset

EPOCHS = 12  # of 0.5 s; a part of a run that is killed in training completes one or two
PLAN = (
    "checkpointing", "start-up", "training", "writing", "start-up", "training", "inference",
    "writing", "inference",
)  # fmt: skip
STEPS = {"start-up": 8.0, "training": 1.0, "checkpointing": 0.05, "writing": 0.0, "inference": 0.2}
PART_SECONDS = 120
TIMES = ("seconds", "patches_per_second")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration file; scenes enough to be killed among while they are masked."""
    folder = tmp_path_factory.mktemp("torture")
    make_dataset(folder, train=7, inference=10, height=HEIGHT, width=WIDTH, seed=7)
    values = {
        "train_dir": str(folder / "one-day"), "inference_dir": str(folder / "ssts"),
        "IMAGE_H": HEIGHT, "IMAGE_W": WIDTH, "PATCH_SIZE": PATCH, "CROP_SIZE": 10,
        "clip_offset": 3, "epochs": EPOCHS, "batch_size": 11, "train_split": 0.75,
        "keep_probability": True,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run that was never stopped."""
    subprocess.run(command(config, config.parent / "whole"), check=True, capture_output=True)
    return config.parent / "whole"


def command(config, folder):
    """How a run begins, or goes on where there is something of it."""
    program = [sys.executable, str(REPOSITORY / "slstr_cloud.py")]
    if folder.exists():
        return [*program, "--resume", str(folder)]
    named = ["--set", f"output_dir={folder.parent}", f"run_name={folder.name}"]
    return [*program, "--config", str(config), *named]


def wait_for(stage, folder, process, kept, rng):
    """Wait for a moment of a stage; return early if the process has ended."""
    log, masks = folder / "rank-0.log", folder / "masks"
    n_log = log.stat().st_size if log.exists() else 0
    n_masks = len(list(masks.glob("*.h5")))
    signs = {
        "start-up": lambda: True,
        "training": lambda: log.exists() and b"/%d " % EPOCHS in log.read_bytes()[n_log:],
        "checkpointing": lambda: any((folder / "checkpoints").glob(".*.part")),
        "writing": lambda: set(unfinished(folder)) - kept,
        "inference": lambda: len(list(masks.glob("*.h5"))) > n_masks,
    }
    deadline = time.monotonic() + PART_SECONDS
    while not signs[stage]() and process.poll() is None:
        assert time.monotonic() < deadline, f"no {stage} within {PART_SECONDS} s"
        time.sleep(0.001)
    until = time.monotonic() + rng.random() * STEPS[stage]
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.001)


def unfinished(folder):
    """Files that were being written, besides checkpoints."""
    return [p for p in (*folder.glob(".*.part*"), *folder.glob("masks/.*.part*")) if p.is_file()]


def stage_of(folder, kept):
    """What a run was doing when it was killed, by what it left."""
    if any((folder / "checkpoints").glob(".*.part")):
        return "checkpointing"
    if set(unfinished(folder)) - kept:
        return "writing"
    if not (folder / "mlperf_cloudmask.log").exists():
        return "start-up"
    log = (folder / "mlperf_cloudmask.log").read_text().splitlines()
    keys = [json.loads(line.removeprefix(":::MLLOG "))["key"] for line in log if line[-1:] == "}"]
    last = (folder / "rank-0.log").read_text().splitlines()[-1:]
    if not {"run_start", "resumed"} & set(keys) or "Going on" in "".join(last):
        return "start-up"
    return "inference" if "inference_start" in keys else "training"


def killed_and_resumed(config, folder, seed, plan):
    """Kill a run in the planned stages, go on with it until it is done; return the stages hit."""
    rng, hit = random.Random(seed), Counter()
    for stage in (*plan, None):
        kept = set(unfinished(folder))
        output = folder.with_name(f"{folder.name}.out")
        with output.open("wb") as file:
            process = subprocess.Popen(command(config, folder), stdout=file, stderr=file)
            if stage is not None:
                wait_for(stage, folder, process, kept, rng)
                process.kill()
            status = process.wait(10 * PART_SECONDS)
        if status != -9:
            assert status == 0, output.read_text(errors="replace")
            break
        hit[stage_of(folder, kept) if folder.exists() else "start-up"] += 1
    return hit


def without_times(row):
    """A row of a CSV file or JSON object, without what no two runs share."""
    return {k: v for k, v in row.items() if not any(word in k for word in (*TIMES, "devices"))}


def test_killed_run_ends_as_one_that_was_never_stopped(config, whole, pytestconfig, tmp_path):
    hit, n_runs = Counter(), pytestconfig.getoption("torture")
    plan = PLAN if n_runs > 1 else PLAN[::2]
    for seed in range(n_runs):
        folder = tmp_path / f"run-{seed}"
        hit += killed_and_resumed(config, folder, seed, plan)
        assert_equal(folder, whole)
        shutil.rmtree(folder)
    sys.stdout.write(f"\n{n_runs} runs, {hit.total()} kills, nothing lost: {dict(hit)}\n")
    assert hit.total() > 0.7 * n_runs * len(plan) and set(hit) >= {"training", "inference"}
    if n_runs > 3:
        assert set(hit) == set(PLAN)


def assert_equal(folder, whole):
    """Compare all that a run leaves with that of the run that was never stopped."""
    models = [keras.models.load_model(run / "model.keras") for run in (folder, whole)]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("history.csv", "scenes.csv"):
        a, b = ([without_times(row) for row in rows(run / name)] for run in (folder, whole))
        assert a == b
    masks = sorted(path.name for path in (whole / "masks").iterdir())
    assert sorted(path.name for path in (folder / "masks").iterdir()) == masks
    for name in masks:
        with h5py.File(folder / "masks" / name) as a, h5py.File(whole / "masks" / name) as b:
            for dataset in ("mask", "probability"):
                np.testing.assert_array_equal(a[dataset][:], b[dataset][:])
    ours, theirs = results(folder), results(whole)
    for part in ("training", "inference"):
        assert without_times(ours[part]) == without_times(theirs[part])
    assert ours["status"] == "success" and ours["resumed"] == len(ours["parts"]) - 1
    events, objections = parse_file(str(folder / "mlperf_cloudmask.log"), ruleset="3.0.0")
    assert not objections
    for key in ("epoch_start", "epoch_stop", "eval_accuracy"):
        epochs = [e.value["metadata"]["epoch_num"] for e in events if e.key == key]
        assert epochs == list(range(1, EPOCHS + 1))
    assert [e.value["metadata"]["status"] for e in events if e.key == "run_stop"] == ["success"]
    assert unfinished(folder) == []


def test_runs_of_the_same_second_never_touch_one_another(config, tmp_path):
    program = [sys.executable, str(REPOSITORY / "slstr_cloud.py"), "--config", str(config)]
    program += ["--mode", "train", "--set", f"output_dir={tmp_path}", "epochs=1"]
    runs = [subprocess.Popen(program, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait(PART_SECONDS) for run in runs] == [0, 0]
    folders = sorted(path for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert len(folders) == 2
    for folder in folders:
        assert results(folder)["status"] == "success"
        assert len(rows(folder / "history.csv")) == 1
    assert not list(Path(tmp_path).glob(".new-*"))
