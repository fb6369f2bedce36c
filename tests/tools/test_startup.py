"""What the commands import before they need it."""

import json
import subprocess
import sys

import pytest

from harness import REPOSITORY

WRONG_PATHS = {
    "convert_sen3": ["nowhere.SEN3", "-o", "out"],
    "export_masks": ["nowhere", "--format", "geotiff"],
    "export_model": ["nowhere", "--format", "onnx", "-o", "out"],
    "judge": ["nowhere", "bayes"],
    "mask_product": ["nowhere.SEN3", "--model", "nowhere.keras", "-o", "out"],
    "validate_sst": ["nowhere", "nowhere.csv"],
}
HEAVY = {
    "boto3", "h5netcdf", "keras", "matplotlib", "onnx", "PIL", "rasterio", "scipy", "tensorflow",
}  # fmt: skip

# Runs a command as a program and prints the packages that it imported.
RUN = """
import atexit, json, runpy, sys
sys.argv = sys.argv[1:]
atexit.register(lambda: print(json.dumps([name.partition(".")[0] for name in sys.modules])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(command, arguments, folder):
    """Run a command from another folder; return its status, its errors and its imports."""
    path = REPOSITORY / "tools" / f"{command}.py"
    done = subprocess.run(
        [sys.executable, "-c", RUN, path, *arguments],
        cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(path.parent)},
    )  # fmt: skip
    return done.returncode, done.stderr, set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", ["download_data", "make_scenes", "repeat", *WRONG_PATHS])
@pytest.mark.parametrize(("option", "expected"), [("--help", 0), ("--unknown", 2)])
def test_help_and_usage_errors_import_no_heavy_package(tmp_path, command, option, expected):
    status, _, imported = run(command, [option], tmp_path)
    assert status == expected and not HEAVY & imported


@pytest.mark.parametrize(
    ("command", "options", "reason"),
    [
        ("convert_sen3", [".", "-o", ".", "--jobs", "0"], "--jobs: expected 1 or more, found '0'"),
        ("download_data", ["--scenes", "-1"], "--scenes: expected 1 or more, found '-1'"),
        ("download_data", ["--verify", "--scenes", "1"], "omit --scenes"),
    ],
)
def test_wrong_numbers_are_usage_errors(tmp_path, command, options, reason):
    status, error, _ = run(command, options, tmp_path)
    assert status == 2 and reason in error.splitlines()[-1]


@pytest.mark.parametrize("command", WRONG_PATHS)
def test_wrong_path_is_reported_before_heavy_imports(tmp_path, command):
    status, error, imported = run(command, WRONG_PATHS[command], tmp_path)
    (line,) = error.splitlines()
    assert status == 2 and line.startswith("Error: ") and "nowhere" in line
    assert not HEAVY & imported
