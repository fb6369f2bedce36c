"""The launchers of MPI that Debian has start one benchmark, not several."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import results

from harness import REPOSITORY

LIMIT_SECONDS = 400  # two TensorFlow processes on a busy host; 30 alone
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_SECONDS + 100)]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
PROXY = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # a closed port


@pytest.mark.parametrize("launcher", ["mpiexec.mpich", "mpiexec.openmpi"])
def test_two_ranks_are_one_run_also_behind_a_web_proxy(settings, tmp_path, launcher):
    if not shutil.which(launcher):
        pytest.skip(f"no {launcher}: apt-get install mpich openmpi-bin")
    options = ["--oversubscribe"] if launcher.endswith("openmpi") else []
    config = settings | {"epochs": 1, "output_dir": str(tmp_path), "run_name": "run"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    program = [sys.executable, "slstr_cloud.py", "--config", tmp_path / "config.yaml"]
    ended = subprocess.run(
        [launcher, *options, "-n", "2", *program],
        cwd=REPOSITORY, env={**os.environ, **AS_ROOT, **PROXY}, capture_output=True, text=True,
        timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = results(tmp_path / "run")
    assert (found["status"], found["devices"]["ranks"]) == ("success", 2)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
    events = (tmp_path / "run/mlperf_cloudmask.log").read_text().splitlines()
    values = {e["key"]: e["value"] for e in (json.loads(line[8:]) for line in events)}
    assert values["number_of_ranks"] == 2
