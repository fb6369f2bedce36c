"""`make gpu-check`: the checks of checks.py on the GPUs of this machine, and their report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_loader import find_scenes
from harness import REPOSITORY, VERSION
from harness.files import write_text
from harness.parallel.gpu_setup import has_nvidia_gpu
from harness.records.machine import describe_machine
from harness.records.run import git_commit

REPORT = REPOSITORY / "gpu-check.json"
CHECKS = {
    "versions": "devices, driver, CUDA and cuDNN",
    "memory_growth": "memory is taken as it is needed",
    "agreement": "float32, bfloat16 and float16 against the CPU",
    "repeats": "deterministic runs",
    "compiled": "XLA",
    "several_gpus": "several GPUs against one",
    "two_ranks": "two ranks of a node",
    "runs": "input, memory and throughput of runs",
}
# Ten scenes of full size, 170 MB each, under eight names: an epoch of 64 of them has 1280 patches,
# and all stay in the file cache.
TRAINING_SCENES, NAMES = 10, 8

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def checks(request):
    """The outcomes by name of the check, which become the report."""
    outcomes = {}
    yield outcomes
    if "gpu" in request.config.option.markexpr:
        facts = {
            "version": VERSION, "commit": git_commit(), "unix_time": round(time.time()),
            "machine": describe_machine("GPU"), "checks": outcomes,
        }  # fmt: skip
        write_text(REPORT, json.dumps(facts, indent=1) + "\n")
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            if all(outcome["status"] == "skipped" for outcome in outcomes.values()):
                text = f"Skipped: {', '.join(outcomes)}. Nothing was checked, see {REPORT}."
            else:
                text = f"The report is {REPORT}: attach it to an issue."
            sys.stdout.write(f"\n{text}\n")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of full-size scenes."""
    from make_scenes import make_dataset

    folder = tmp_path_factory.mktemp("scenes")
    make_dataset(folder, train=TRAINING_SCENES, inference=2, jobs=min(os.cpu_count(), 12))
    for path in find_scenes(folder / "one-day"):
        for i in range(1, NAMES):
            os.link(path, path.with_name(f"S3A_{i}_{path.name}"))
    return folder


def reason_to_skip(config, checks):
    """Why a check is not made, or None."""
    if not has_nvidia_gpu():
        return "this machine has no NVIDIA GPU"
    if "gpu" not in config.option.markexpr:
        return "make gpu-check runs it"
    failed = checks.get("versions", {}).get("status") == "failed"
    return "the check of versions failed" if failed else None


@pytest.mark.parametrize("name", CHECKS)
def test_gpu(name, checks, request):
    if reason := reason_to_skip(request.config, checks):
        checks[name] = {"status": "skipped", "reason": reason}
        pytest.skip(reason)  # without the name: pytest shows equal reasons once
    # Scenes take a minute, and versions tells in seconds what is wrong.
    folder = None if name == "versions" else request.getfixturevalue("scenes")
    checks[name] = run(name, folder)
    if checks[name]["status"] == "skipped":
        pytest.skip(f"{name} ({CHECKS[name]}): {checks[name]['reason']}")
    assert checks[name]["status"] == "passed", checks[name]["reason"]


def run(name, scenes):
    """Make a check in a process of its own, which sees all GPUs; return its outcome."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["GPUS_BEFORE_TESTS"]}
    if environment["CUDA_VISIBLE_DEVICES"] == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    begin = time.perf_counter()
    program = subprocess.run(
        [sys.executable, Path(__file__).with_name("checks.py"), name, str(scenes)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = program.stdout.splitlines()
    if program.returncode or not lines:
        last = "; ".join(program.stderr.splitlines()[-5:])
        return {"status": "failed", "reason": f"exit status {program.returncode}: {last}"}
    return json.loads(lines[-1]) | {"seconds": round(time.perf_counter() - begin, 1)}
