"""Programs under a Python that lacks packages."""

import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from harness import REPOSITORY, errors

TOOLS = {f"tools/{path.name}" for path in REPOSITORY.glob("tools/[!_]*.py")}
PROGRAMS = ["slstr_cloud.py", *sorted(TOOLS - {"tools/performance_model.py"})]  # needs no package
ARGUMENTS = {  # the least with which a program begins its work; others find packages missing before
    "slstr_cloud.py": [],
    "tools/compare_scenes.py": ["scenes"],
    "tools/download_data.py": ["--scenes", "1"],
    "tools/report.py": ["run"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_without_packages_ends_with_one_line(program, tmp_path):
    command = [sys.executable, "-S", REPOSITORY / program, *ARGUMENTS.get(program, ["--help"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    file = "requirements-tools.txt" if "download" in program else "requirements.txt"
    assert re.match(rf"Error: the package \w+ is missing. Install it: pip install -r {file}", line)


def packages_in(file):
    """The packages that a requirements file names, as importlib.metadata spells them."""
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    return {re.match(r"[\w-]+", line)[0] for line in lines if re.match(r"\w", line)}


def test_table_of_packages_is_that_of_the_requirements():
    imported = {}  # {name that is imported: packages that have it}
    for name, packages in packages_distributions().items():
        imported[name] = {package.lower() for package in packages}
    tools = packages_in("requirements-tools.txt")
    for name in errors.TOOLS_PACKAGES - {"botocore"}:  # which boto3 brings
        assert imported[name] & tools, name
    listed = set().union(*(imported[name] for name in errors.TOOLS_PACKAGES))
    assert tools <= listed


def test_message_names_the_python_that_make_demo_made(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "REPOSITORY", tmp_path)
    assert ".venv" not in errors.missing_package("numpy")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert f"or use {tmp_path}/.venv/bin/python, which" in errors.missing_package("h5py")
    assert ".venv" not in errors.missing_package("boto3.session")  # it has no packages of tools
