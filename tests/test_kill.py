"""A run that is killed at any moment and resumed ends like one that was never stopped.

In CI a run is killed a few times; `make torture` makes many runs and prints what was hit.
"""

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
PART_SECONDS = 600  # for a stage: only a hang takes longer
TIMES = ("seconds", "patches_per_second", "shares", "limited_by")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]  # `make torture` is one test


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
    """The command that starts a run, or resumes it if its folder exists."""
    program = [sys.executable, str(REPOSITORY / "slstr_cloud.py")]
    if folder.exists():
        return [*program, "--resume", str(folder)]
    named = ["--set", f"output_dir={folder.parent}", f"run_name={folder.name}"]
    return [*program, "--config", str(config), *named]


class Part:
    """What a run had done when a part of it began."""

    def __init__(self, folder):
        self.folder, self.kept = folder, set(unfinished(folder))
        self._log = folder / "rank-0.log"
        self._n_log = self._log.stat().st_size if self._log.exists() else 0
        self._n_masks = self._count_masks()

    def _count_masks(self):
        return len(list(self.folder.glob("masks/[!.]*.h5")))

    def has_reached(self, stage):
        """Whether this part shows that it is, or was, in a stage."""
        if stage == "training":  # it has completed an epoch: '3/12 '
            return self._log.exists() and b"/%d " % EPOCHS in self._log.read_bytes()[self._n_log :]
        if stage == "checkpointing":
            return any(self.folder.glob("checkpoints/.*.part"))
        if stage == "writing":
            return bool(set(unfinished(self.folder)) - self.kept)
        if stage == "inference":
            return self._count_masks() > self._n_masks
        return True


def wait_for(stage, part, process, rng):
    """Wait for a moment of a stage; return early if the process has ended."""
    deadline = time.monotonic() + PART_SECONDS
    while not part.has_reached(stage) and process.poll() is None:
        assert time.monotonic() < deadline, f"no {stage} within {PART_SECONDS} s"
        time.sleep(0.001)
    until = time.monotonic() + rng.random() * STEPS[stage]
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.001)


def unfinished(folder):
    """Files that were being written, besides checkpoints."""
    return [p for p in (*folder.glob(".*.part*"), *folder.glob("masks/.*.part*")) if p.is_file()]


def killed_and_resumed(config, folder, seed, plan):
    """Kill a run in the planned stages, resume it until it has finished; return the stages hit."""
    rng, hit = random.Random(seed), Counter()
    for stage in (*plan, None):
        part = Part(folder)
        output = folder.with_name(f"{folder.name}.out")
        with output.open("wb") as file:
            process = subprocess.Popen(command(config, folder), stdout=file, stderr=file)
            if stage is not None:
                wait_for(stage, part, process, rng)
                process.kill()
            status = process.wait(10 * PART_SECONDS)
        if status != -9:
            assert status == 0, output.read_text(errors="replace")
            break
        # What a run was doing when it was killed, by what it left
        stages = ("checkpointing", "writing", "inference", "training", "start-up")
        hit[next(stage for stage in stages if part.has_reached(stage))] += 1
    return hit


def without_times(row):
    """A row of a CSV file or JSON object, without what differs between any two runs."""
    return {k: v for k, v in row.items() if not any(word in k for word in (*TIMES, "devices"))}


def test_killed_run_ends_like_one_that_was_never_stopped(config, whole, pytestconfig, tmp_path):
    hit, n_runs = Counter(), pytestconfig.getoption("torture")
    plan = PLAN if n_runs > 1 else PLAN[::2]
    for seed in range(n_runs):
        folder = tmp_path / f"run-{seed}"
        hit += killed_and_resumed(config, folder, seed, plan)
        assert_equal(folder, whole)
        shutil.rmtree(folder)
    sys.stdout.write(f"\n{n_runs} runs, {hit.total()} kills, nothing lost: {dict(hit)}\n")
    assert hit.total() > 0.7 * n_runs * len(plan)
    if n_runs > 3:
        assert set(hit) == set(PLAN)


def assert_equal(folder, whole):
    """Compare everything in a run's folder with the run that was never stopped."""
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


def test_runs_of_the_same_second_have_folders_of_their_own(config, tmp_path):
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
