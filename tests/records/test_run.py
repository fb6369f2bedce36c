import csv
import json
import logging
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from harness import VERSION
from harness.config import Config
from harness.console import PlainFormatter, log_to_file, printable
from harness.errors import UserError
from harness.files import write_csv
from harness.records import run_folder
from harness.records.mlperf_log import open_mlperf_log
from harness.records.resume import load_resumed
from harness.records.run import Run
from harness.signals import Interrupted, install_handlers

FORGED = "S3A_a\nError: all is lost\x1b[2J\u202efdh\udcff\r.hdf"
ESCAPED = r"S3A_a\nError: all is lost\x1b[2J\u202efdh\udcff\r.hdf"


def test_printable_text_stays_as_it_is():
    assert printable("S3A_é_雲 '\\n'") == "S3A_é_雲 '\\n'"


def test_name_of_a_file_forges_no_line_of_a_log(tmp_path):
    handler = log_to_file(tmp_path / "rank-0.log")
    try:
        # To the file alone: pytest-xdist cannot send a captured log that is not UTF-8.
        handler.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": FORGED}))
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    (line,) = (tmp_path / "rank-0.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith(f"ERROR {ESCAPED}")


def test_formatter_leaves_a_traceback_its_lines():
    try:
        raise ValueError("x")
    except ValueError as error:
        info = type(error), error, error.__traceback__
    record = logging.LogRecord("cloudmask", logging.ERROR, "", 0, "a\nb", (), info)
    assert PlainFormatter("%(message)s").format(record).startswith("a\\nb\nTraceback")


@pytest.mark.parametrize("name", [FORGED, 'a,"b"'], ids=["forged", "quoted"])
def test_row_of_csv_is_one_line(tmp_path, name):
    """A formula needs = + - or @ at the front of a cell; names of scenes begin with S3A."""
    write_csv(tmp_path / "scenes.csv", ["scene", "accuracy"], [{"scene": name, "accuracy": 0.5}])
    text = (tmp_path / "scenes.csv").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2
    (row,) = csv.DictReader(text.splitlines())
    assert row == {"scene": printable(name), "accuracy": "0.5"}


def test_mlperf_log_that_lost_bytes_is_refused_and_kept(tmp_path):
    log = tmp_path / "mlperf.log"
    log.write_text("ten bytes\n")
    with pytest.raises(UserError, match="has 10 bytes, the run had written 20"):
        open_mlperf_log(log, tmp_path, 20)
    assert log.read_text() == "ten bytes\n"


def repository(folder, name="harness/code.py"):
    """A function that runs git in a new repository of one committed file."""

    def git(*arguments):
        who = "-c", "user.name=Ada", "-c", "user.email=ada@example.org"
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True)

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("a")
    git("init", "--quiet")
    git("add", name)
    git("commit", "--quiet", "--message", "a")
    return git


def test_commit_says_whether_the_code_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "REPOSITORY", tmp_path)
    assert run_folder.git_commit() is None
    git = repository(tmp_path)
    git("tag", "v1")  # a tag must not replace the commit
    commit = run_folder.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "harness/code.py").write_text("b")
    assert run_folder.git_commit() == f"{commit}-dirty"


@pytest.mark.parametrize("place", ["parent", "GIT_DIR", "same folder, without this code"])
def test_commit_of_another_repository_is_not_reported(tmp_path, monkeypatch, place):
    ours = tmp_path / "ours"
    (ours / "harness").mkdir(parents=True)
    if place == "parent":
        repository(tmp_path, "paper.tex")
        (ours / ".git").mkdir()  # damaged: git continues in the parent
    elif place == "GIT_DIR":
        repository(tmp_path / "other", "harness/code.py")
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
        monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    else:
        repository(ours, "paper.tex")
    monkeypatch.setattr(run_folder, "REPOSITORY", ours)
    assert run_folder.git_commit() is None
    assert run_folder.package_versions()["cloudmask"] == VERSION


def test_error_about_an_existing_model_says_how_to_repeat_the_run(tmp_path):
    model = tmp_path / "cloudModel.h5"
    model.touch()
    config = Config(model_file=model, output_dir=tmp_path)
    with pytest.raises(UserError, match="add (--set )(model_file=cloudModel.h5),") as error:
        run_folder.make_folder(config, "train")
    key, _, value = re.search("--set (.*?),", str(error.value))[1].partition("=")
    run_folder.make_folder(config.model_copy(update={key: Path(value)}), "train")


def test_file_monitor_of_a_repository_is_not_started(tmp_path, monkeypatch):
    git = repository(tmp_path)
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    hook.chmod(0o755)
    git("config", "core.fsmonitor", str(hook))
    monkeypatch.setattr(run_folder, "REPOSITORY", tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", run_folder.git_commit())
    assert not (tmp_path / "started").exists()


def test_edited_configuration_of_a_run_is_refused_with_both_values(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    told = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**told, "status": "aborted"}))
    monkeypatch.chdir(tmp_path)
    assert load_resumed(run)[0].crop_size == 10
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("CROP_SIZE: 10", "CROP_SIZE: 20"))
    with pytest.raises(UserError, match="CROP_SIZE was 10, now 20"):
        load_resumed(run)


@pytest.mark.parametrize("parts", [None, "abc", [{}], [{"start": "", "status": "", "seconds": ""}]])
def test_damaged_results_of_a_run_are_the_users_to_mend(finished, tmp_path, parts):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    told = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**told, "parts": parts}))
    with pytest.raises(UserError, match="cannot be resumed"):
        load_resumed(run)


DEVICES = SimpleNamespace(
    is_chief=True, rank=0, n_ranks=1, kind="CPU", summary=dict, peak_gpu_memory=list
)


def new_run(settings, folder, **keys):
    folder.mkdir()
    config = Config.model_validate({**settings, "sampling": False, **keys})
    return Run(config, DEVICES, "train", folder)


def test_run_that_cannot_begin_closes_its_logs(settings, tmp_path):
    (tmp_path / "file").touch()
    handlers = logging.getLogger().handlers[:]
    with pytest.raises(OSError, match="file"):
        new_run(settings, tmp_path / "run", log_file=str(tmp_path / "file" / "x.log"))
    assert logging.getLogger().handlers == handlers
    assert not [f for f in psutil.Process().open_files() if f.path.startswith(str(tmp_path))]


@pytest.mark.parametrize("error", [None, ValueError("wrong")])
def test_signals_while_a_run_ends_wait_until_its_results_say_how(
    settings, tmp_path, monkeypatch, error
):
    def stop():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    install_handlers()
    try:
        with pytest.raises(Interrupted), new_run(settings, tmp_path / "run") as run:
            monkeypatch.setattr(run.board, "close", stop)
            if error:
                raise error
    finally:
        install_handlers()  # forgets the signals
        for number, handler in before.items():
            signal.signal(number, handler)
    results = json.loads((tmp_path / "run/results.json").read_text())
    expected = ("aborted", "ValueError: wrong") if error else ("success", None)
    assert (results["status"], results["error"]) == expected
