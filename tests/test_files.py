"""Files that a run writes, reads or deletes in a folder where others may have put something."""

import json
import os
from pathlib import Path

import pytest

import slstr_cloud
from harness.command_line import choose_task, parse_arguments
from harness.config import Config
from harness.console import table
from harness.data.bad_scenes import BadScenes
from harness.data.page_cache import evict
from harness.errors import UserError
from harness.files import MAX_TEXT_BYTES, check_own, read_text, replacing, write_csv, write_json
from harness.records.resume import find_requeued, load_resumed
from harness.records.run_folder import make_folder
from harness.records.saved_runs import read_run
from tools import export_masks, report
from tools.lib.markdown import markdown

ROOT = 0  # which alone may give files to other users


@pytest.fixture
def outside(tmp_path):
    """A folder with a file that a run must not touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "S3A_x").write_text("precious")
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has begun and can be resumed."""
    return make_folder(Config(output_dir=tmp_path / "outputs"), "benchmark")


def link_file(path, outside):
    path.symlink_to(outside / "S3A_x")


def link_folder(path, outside):
    path.symlink_to(outside)


def link_to_nothing(path, outside):
    path.symlink_to(outside / "new")


def hard_link(path, outside):
    path.hardlink_to(outside / "S3A_x")


def pipe(path, outside):
    os.mkfifo(path)  # opening it would block


def owned_by_another(path, outside):
    if os.geteuid() != ROOT:
        pytest.skip("only root can give a file to another user")
    path.write_text("")
    os.chown(path, 12345, -1)


LINKS = {  # name in the folder of a run: how somebody else has made it
    "mlperf_cloudmask.log": link_file,
    "cloudmask.log": hard_link,
    "rank-0.log": link_to_nothing,
    "rank-1.log": pipe,
    "samples.csv": owned_by_another,
    "masks": link_folder,
    "masks/.locks": link_folder,
    "checkpoints": link_folder,
    "checkpoints/.epoch-00001-step-0000000.part": link_folder,
    "bad_scenes/start-0.json": link_file,
    "tensorboard": link_folder,
}


@pytest.mark.parametrize("name", LINKS)
def test_run_is_not_resumed_with_files_that_are_not_its_own(run, outside, name, capsys):
    path = run / name
    path.parent.mkdir(exist_ok=True)
    LINKS[name](path, outside)
    before = sorted(run.rglob("*"))
    assert slstr_cloud.main(["--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{path} " in error and "writes only to its own files" in error
    assert sorted(run.rglob("*")) == before
    assert [(p.name, p.read_text()) for p in outside.iterdir()] == [("S3A_x", "precious")]


@pytest.mark.parametrize("key", ["model_file", "log_file", "mlperf_logfile"])
@pytest.mark.parametrize("link", [link_file, link_to_nothing, hard_link])
def test_absolute_files_of_a_run_are_not_links(tmp_path, outside, key, link):
    path = tmp_path / "x.keras"
    config = Config(output_dir=tmp_path / "outputs", **{key: path})
    run = make_folder(config, "benchmark")
    link(path, outside)
    assert slstr_cloud.main(["--resume", str(run)]) == 2
    with pytest.raises(UserError, match="x.keras exists: a run does not overwrite"):
        make_folder(config, "benchmark")


@pytest.mark.parametrize("key", ["model_file", "log_file", "mlperf_logfile"])
def test_only_the_command_line_lets_a_resumed_run_write_elsewhere(tmp_path, capsys, key):
    path = tmp_path / "profile.keras"
    run = make_folder(Config(output_dir=tmp_path / "outputs", **{key: path}), "benchmark")
    path.write_text("precious")
    assert slstr_cloud.main(["--resume", str(run)]) == 2
    assert f"add --set {key}={path}" in capsys.readouterr().err
    assert path.read_text() == "precious"
    for named in (["--set", f"{key}={path}"], ["--config", str(run / "config.yaml")]):
        assert choose_task(parse_arguments(["--resume", str(run), *named])).folder == run


def test_own_files_pass(run, tmp_path):
    check_own(run)
    assert load_resumed(run)[1]["parts"] == []
    check_own(tmp_path / "missing")
    (tmp_path / "link").symlink_to(run)
    check_own((tmp_path / "link").resolve())  # --resume may name the folder by a link


def test_requeued_job_passes_by_runs_with_links(run, outside, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    config = Config(output_dir=tmp_path / "outputs")
    assert find_requeued(config, "benchmark") == run
    (run / "cloudmask.log").symlink_to(outside / "S3A_x")
    assert find_requeued(config, "benchmark") is None


def test_requeued_job_continues_the_run_that_has_not_finished(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    config = Config(output_dir=tmp_path / "outputs")
    first, second = (make_folder(config, "benchmark") for _ in range(2))
    for run, status in ((first, "success"), (second, "aborted")):
        made = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps({**made, "status": status}))
    assert find_requeued(config, "benchmark") == second
    (second / "results.json").write_text(json.dumps({**made, "status": "success"}))
    assert find_requeued(config, "benchmark") == min(first, second)


@pytest.mark.parametrize("command", [report.main, export_masks.main])
def test_folders_of_tools_in_a_run_are_not_links(run, outside, command, capsys):
    options = []
    if command is export_masks.main:
        options = ["--format", "png"]
        (run / "masks").mkdir()
        (run / "masks/S3A_x.h5").touch()
        (run / "export").symlink_to(outside)
    else:
        (run / "report_scenes").symlink_to(outside)
    assert command([str(run), *options]) == 2
    assert "is a link" in capsys.readouterr().err
    assert len(list(outside.iterdir())) == 1


def test_temporary_names_cannot_be_predicted(tmp_path):
    names = []
    for _ in range(2):
        with replacing(tmp_path / "x.csv") as temporary:
            names.append(temporary.name)
            temporary.write_text("new")
    assert names[0] != names[1] and {Path(name).suffix for name in names} == {".csv"}


# --- files that would block, or have no end


BLOCKING = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "too large": lambda path: path.touch() or os.truncate(path, MAX_TEXT_BYTES + 1),
}


@pytest.mark.parametrize("kind", BLOCKING)
@pytest.mark.parametrize("name", ["results.json", "history.csv", "scenes.csv", "samples.csv"])
def test_unusual_file_of_a_saved_run_is_an_error(run, name, kind):
    (run / name).unlink(missing_ok=True)
    BLOCKING[kind](run / name)
    with pytest.raises(UserError, match=name):
        _ = read_run(run).samples


@pytest.mark.parametrize("kind", BLOCKING)
def test_unusual_file_is_not_read(tmp_path, kind):
    BLOCKING[kind](path := tmp_path / "x")
    with pytest.raises(OSError, match="x is not a regular file|x has 268435457 bytes"):
        read_text(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_configuration_is_a_regular_file(tmp_path, kind, capsys):
    BLOCKING[kind](path := tmp_path / "config.yaml")
    assert slstr_cloud.main(["--config", str(path)]) == 2
    assert f"{path} cannot be read: {path} is not a regular file" in capsys.readouterr().err


def test_pipe_is_not_evicted_from_the_file_cache(tmp_path):
    os.mkfifo(tmp_path / "x")
    assert evict([tmp_path / "x"])["unverified_bytes"] == 1


PARTS = {  # how somebody has edited the part of a run
    "seconds": 10**400,
    "peak_rss": "x",
    "peak_gpu_memory": 5,
    "sampling": [1],
    "start": None,
}


@pytest.mark.parametrize("key", PARTS)
def test_run_with_values_of_other_types_is_not_resumed(run, key, capsys):
    part = {"start": "a", "status": "aborted", "seconds": 1.0, key: PARTS[key]}
    results = json.loads((run / "results.json").read_text()) | {"parts": [part]}
    write_json(run / "results.json", results)
    assert slstr_cloud.main(["--resume", str(run)]) == 2
    assert "its results.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "7", '{"path": 1}', "", "[" * 100_000])
def test_record_of_a_bad_scene_that_is_none_is_named(run, text):
    (run / "bad_scenes").mkdir()
    (run / "bad_scenes/start-0.json").write_text(text)
    with pytest.raises(UserError, match="start-0.json should describe a skipped scene"):
        BadScenes(run, "skip").all()


# --- texts that other programs interpret


CELLS = {  # text: what the CSV file has
    "=HYPERLINK(A1)": "'=HYPERLINK(A1)",
    "@SUM(A1)": "'@SUM(A1)",
    "+A1": "'+A1",
    "-A1": "'-A1",
    "-1": "-1",
    "+0.5": "+0.5",
    "S3A=1": "S3A=1",
    "-1\n": r"-1\n",
    "\x1b[2J": r"\x1b[2J",
}


@pytest.mark.parametrize("text", CELLS)
def test_cell_of_csv_is_no_formula(tmp_path, text):
    write_csv(tmp_path / "x.csv", ["a", "b"], [{"a": text, "b": -1.5}])
    assert (tmp_path / "x.csv").read_text() == f"a,b\n{CELLS[text]},-1.5\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[x](http://a.b)", r"\[x\]\(http\://a.b\)"),
        ("WWW.a.b, x@y.z", r"WWW\.a.b, x\@y.z"),
        ("2026-01-01T10:11:12", "2026-01-01T10:11:12"),
        ("<img src=x>\n# x", r"\<img src=x\>\\n\# x"),
    ],
)
def test_markdown_shows_texts_unchanged(text, expected):
    assert markdown(text) == expected


def test_table_has_no_terminal_escapes():
    """Such as `--mode check` with an output_dir that contains them."""
    assert "\x1b" not in table({"the \x1brun": {"disk": "free in /\x1b[2J", "\x1b]0;": ""}})
