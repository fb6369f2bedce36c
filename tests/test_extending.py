"""docs/extending.md: each change in it applies to the code and works."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import results, rows

from harness import REPOSITORY

CHANGES = re.findall(
    r"^## (.+?)$.*?^```diff\n(.*?)^```$",
    (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE | re.DOTALL,
)
JSM = {"JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3", "LSB_JOBID": "9"}


def changed_copy(folder, changes):
    """A copy of the repository's code with changes applied."""
    ignored = shutil.ignore_patterns(".*", "demo", "outputs", "data", "docs", "__pycache__")
    for name in ("harness", "slstr_cloud.py", "data_loader.py", "model.py", "config.yaml"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored if name != "harness" else None)
        else:
            shutil.copy(source, folder / name)
    for _, change in changes:
        subprocess.run(["git", "apply", "-"], input=change, text=True, cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(("title", "change"), CHANGES, ids=[title for title, _ in CHANGES])
def test_change_edits_as_few_files_as_promised(tmp_path, title, change):
    changed_copy(tmp_path, [(title, change)])
    assert change.count("\n+++ b/") == (3 if title == "A configuration key" else 1)


def test_all_kinds_of_extensions_are_shown():
    assert [title.split()[-1] for title, _ in CHANGES] == [
        "network", "loss", "augmentation", "score", "launcher", "key",
    ]  # fmt: skip


@pytest.mark.slow
def test_benchmark_runs_with_all_changes(tmp_path, settings):
    code = changed_copy(tmp_path / "code", CHANGES)
    extended = {
        **settings, "network": "small", "loss": "squared_error", "augment": "noise",
        "warm_up_steps": False, "epochs": 1, "output_dir": str(tmp_path), "run_name": "run",
        "inference_mode": "scene", "report": True,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(extended))
    command = [sys.executable, "slstr_cloud.py", "--config", tmp_path / "config.yaml"]
    program = subprocess.run(command, cwd=code, capture_output=True, text=True, check=False)
    assert program.returncode == 0, program.stderr
    found = results(tmp_path / "run")
    # Two 3x3 convolutions and one of 1x1, each with a weight per output besides.
    kernels = 9 * 9 * 16 + 9 * 16 * 16 + 16
    assert found["network"] == {
        "name": "small", "layers": 4, "parameters": kernels + 16 + 16 + 1,
        "multiplications_per_pixel": kernels,
    }  # fmt: skip
    assert found["training"]["loss_function"] == "squared_error"
    assert found["training"]["loss"] < 1  # a squared difference of probabilities
    assert found["training"]["warm_up_seconds"] == 0
    for row in rows(tmp_path / "run/scenes.csv"):
        tp, fp, fn, tn = (int(row[name]) for name in ("tp", "fp", "fn", "tn"))
        skill = tp / (tp + fn) - fp / (fp + tn)
        assert float(row["true_skill"]) == pytest.approx(skill, rel=1e-12)
    assert "true skill" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_launcher_of_the_guide_finds_its_rank(tmp_path):
    code = changed_copy(tmp_path, CHANGES)
    script = (
        "from harness.parallel.launchers import detect_launch; import sys; "
        "launch = detect_launch(dict(pair.split('=') for pair in sys.argv[1:])); "
        "print(launch.rank, launch.n_ranks, launch.job)"
    )
    variables = [f"{name}={value}" for name, value in JSM.items()]
    command = [sys.executable, "-c", script, *variables]
    answer = subprocess.run(command, cwd=code, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["3", "4", "9-jsm"]
