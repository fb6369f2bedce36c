"""The notebooks in docs/ run from the first to the last cell."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_after_the_demo(notebook, finished, dataset, tmp_path):
    for folder, source in {"outputs/run": finished, "data/ssts": dataset / "ssts"}.items():
        shutil.copytree(source, tmp_path / "demo" / folder)
    (tmp_path / "docs").mkdir()
    copy = Path(shutil.copy(notebook, tmp_path / "docs"))
    # In a process of its own, as by a user: a kernel needs an event loop and sockets.
    program = Path(sys.executable).with_name("jupyter-execute")
    mine = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # the programs' setting
    environment = {**mine, "PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(
        [program, "--inplace", copy], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in json.loads(copy.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [output["output_type"] for output in outputs].count("display_data") == 1  # the picture
    assert not [output for output in outputs if output["output_type"] == "stream"]  # no warnings


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
