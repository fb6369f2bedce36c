import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from harness import REPOSITORY
from tools import repeat

# Stands in for the program: reads its command line as it does, and leaves a run without training.
# Where a file `fail` lies beside the runs, it is aborted.
PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from harness.command_line import choose_task, parse_arguments
from harness.records.run_folder import make_folder
task = choose_task(parse_arguments(sys.argv[1:]))
folder = task.folder or make_folder(task.config, task.mode)
fails = (folder.parent / "fail").exists()
results = json.loads((folder / "results.json").read_text())
status = "aborted" if fails else "success"
results |= {{"status": status, "seconds": 60, "config": task.config.model_dump(by_alias=True, mode="json")}}
results["parts"].append({{"start": "now", "status": status, "seconds": 60}})
(folder / "results.json").write_text(json.dumps(results))
sys.exit(3 * fails)
"""  # noqa: E501


COMMIT = "0123456789abcdef0123456789abcdef01234567"
MINE = ("--system", "mine", "--set", "organisation=me")


@pytest.fixture
def committed(monkeypatch):
    """The code has no uncommitted changes."""
    monkeypatch.setattr(repeat, "git_commit", lambda: COMMIT)


@pytest.fixture
def series(tmp_path, monkeypatch):
    """Run the command on a series of its own; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = f"{sys.executable} program.py"
    return lambda *options: repeat.main(["-o", "series", "--launch", launch, *options])


def parts(run):
    return [part["status"] for part in json.loads((run / "results.json").read_text())["parts"]]


def test_runs_are_numbered_and_compared(series, tmp_path, capsys):
    assert series("--repeats", "3") == 0
    screen = capsys.readouterr()
    for n in (1, 2, 3):
        assert parts(tmp_path / f"series/run-{n}") == ["success"]
        assert f"Run {n} of 3, series/run-{n}: starts" in screen.err
    assert "Mean and standard deviation over repeats" in screen.out
    assert "mean ± sd" in (tmp_path / "series/comparison.md").read_text()


def test_time_left_is_that_of_the_remaining_runs(series, capsys):
    series("--repeats", "2")
    series("--repeats", "4")
    # Two of 60 s by their results.json, which are kept, then two that are made.
    assert "series/run-3: starts; about 2 min 0 s left in all" in capsys.readouterr().err


def test_same_command_resumes_what_was_aborted(series, tmp_path, capsys):
    runs = [tmp_path / "series" / f"run-{n}" for n in (1, 2, 3)]
    series("--repeats", "1")
    (tmp_path / "series/fail").touch()
    assert series("--repeats", "3") == 2
    error = capsys.readouterr().err
    assert "ended with exit status 3" in error and "Compared 1 of 3 runs" in error
    assert not runs[2].exists()
    (tmp_path / "series/fail").unlink()
    assert series("--repeats", "3") == 0
    assert [parts(run) for run in runs] == [["success"], ["aborted", "success"], ["success"]]
    assert "Compared 3 of 3 runs" in capsys.readouterr().err


def test_run_that_cannot_be_resumed_is_repeated_and_its_files_kept(series, tmp_path, capsys):
    run = tmp_path / "series/run-1"
    run.mkdir(parents=True)
    (run / "results.json").write_text("{")
    (run / "config.yaml").touch()
    assert series("--repeats", "1") == 0
    assert parts(run) == ["success"]
    assert (tmp_path / "series/run-1-aborted-1/results.json").read_text() == "{"
    assert "its files are now in series/run-1-aborted-1" in capsys.readouterr().err


def test_series_with_other_settings_is_rejected(series, tmp_path, capsys):
    series("--repeats", "1")
    assert series("--repeats", "1", "--set", "learning_rate=0.5") == 2
    assert "learning_rate was 0.001, now 0.5" in capsys.readouterr().err.splitlines()[-1]
    assert parts(tmp_path / "series/run-1") == ["success"]


def test_mistake_in_the_configuration_is_reported_before_a_run(series, tmp_path, capsys):
    assert series("--set", "epochs=0") == 2
    assert capsys.readouterr().err.startswith("Error: --set: epochs:")
    assert not (tmp_path / "series").exists()


def test_each_seed_has_its_runs(series, tmp_path, capsys):
    assert series("--seeds", "5", "6", "--repeats", "2", "--set", "epochs=3") == 0
    found = {
        run.name: yaml.safe_load((run / "config.yaml").read_text())["seed"]
        for run in (tmp_path / "series").glob("*-run-*")
    }
    assert found == {"seed-5-run-1": 5, "seed-5-run-2": 5, "seed-6-run-1": 6, "seed-6-run-2": 6}
    assert "1, 2, 3, 4" in capsys.readouterr().out  # all are repeats but for the seed
    with pytest.raises(SystemExit, match="2"):
        series("--seeds", "5", "--system", "mine")


@pytest.mark.parametrize("status", ["starting", "running"])
@pytest.mark.parametrize("without_job", [True, False])
def test_run_whose_job_may_be_alive_is_left_alone(
    series, tmp_path, capsys, monkeypatch, status, without_job
):
    run = tmp_path / "series/run-1"
    run.mkdir(parents=True)
    results = {"format": 2, "status": status, "mode": "benchmark", "job": "4711", "parts": []}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").touch()
    assert series("--repeats", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"run-1 is '{status}': cancel job 4711 first, or wait for it." in error
    assert json.loads((run / "results.json").read_text()) == results
    assert [path.name for path in run.parent.glob("run-*")] == ["run-1"]
    if without_job:  # no scheduler started it
        (run / "results.json").write_text(json.dumps(results | {"job": None}))
    else:  # the series runs in the same job: only a lock says whether the run is alive
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert series("--repeats", "1") == 0


@pytest.mark.parametrize(
    ("commit", "setting", "words"),
    [
        (f"{COMMIT}-dirty", "organisation=me", f"the commit is {COMMIT}-dirty. Commit"),
        (None, "organisation=me", "the commit is None. Commit"),
        (COMMIT, "organisation=unknown", "organisation is 'unknown'. Set it"),
        (COMMIT, "benchmark=mine", "benchmark is 'mine', expected cloudmask"),
        (COMMIT, "division=ajar", "division is 'ajar', expected open or closed"),
        (COMMIT, "seed=7", "the closed division requires seed 1234, found 7"),
    ],
)
def test_series_that_cannot_be_submitted_is_not_started(
    series, tmp_path, capsys, monkeypatch, commit, setting, words
):
    monkeypatch.setattr(repeat, "git_commit", lambda: commit)
    settings = ["organisation=me", "division=closed", setting]
    assert series("--system", "mine", "--set", *settings) == 2
    error = capsys.readouterr().err
    assert words in error and "1 fault, see above" in error.splitlines()[-1]
    assert not (tmp_path / "series").exists()


def test_what_a_submission_lacks_is_printed_before_the_first_run(series, committed, capsys):
    series("--repeats", "1", *MINE, "--set", "name=Ada")
    lines = capsys.readouterr().err.splitlines()
    begin = next(n for n, line in enumerate(lines) if "Run 1 of 1" in line)
    asked = [n for n, line in enumerate(lines) if "MLCommons Science asks for" in line]
    assert [lines[n].split("asks for ")[1].split(",")[0] for n in asked] == ["email", "submission"]
    assert max(asked) < begin


def test_failure_of_a_run_is_reported_although_comparing_fails_too(series, tmp_path, capsys):
    series("--repeats", "1")
    (tmp_path / "series/run-1/history.csv").write_text("epoch,loss\n1\n")
    (tmp_path / "series/fail").touch()
    assert series("--repeats", "2") == 2
    *_, comparing, failure = capsys.readouterr().err.splitlines()
    assert "history.csv has 2 columns" in comparing
    assert "ended with exit status 3" in failure


def test_existing_submission_is_kept(series, committed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(repeat.submission, "main", lambda argv: pytest.fail("made again"))
    folder = tmp_path / "series/submission/me/cloudmask/mine/experiment-1"
    folder.mkdir(parents=True)
    for _ in range(2):
        assert series("--repeats", "2", *MINE) == 0
        last = capsys.readouterr().err.splitlines()[-1]
        assert "Kept the submission in series/submission/me/cloudmask/mine/experiment-1" in last
        # Later changes of the code do not matter: all runs have finished.
        monkeypatch.setattr(repeat, "git_commit", lambda: None)


def test_submission_is_made_of_all_runs(series, committed, tmp_path, capsys, monkeypatch):
    assert series("--repeats", "2", *MINE) == 2  # these runs have no masks
    assert "No submission was written" in capsys.readouterr().err.splitlines()[-1]
    calls = []
    monkeypatch.setattr(repeat.submission, "main", lambda argv: calls.append(argv))
    assert series("--repeats", "2", *MINE) == 0
    runs, output = ["series/run-1", "series/run-2"], "series/submission"
    assert calls == [[*runs, "-o", output, "--system", "mine"]]


def test_launcher_that_does_not_wait_is_an_error(series, capsys):
    assert repeat.main(["-o", "series", "--launch", "true"]) == 2
    assert "should wait for the run" in capsys.readouterr().err.splitlines()[-1]


def test_signal_reaches_the_run_and_the_command_waits_for_its_end(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "launch.sh").write_text(
        "trap 'kill $!; touch stopped; exit 143' TERM; touch started; sleep 60 & wait"
    )
    command = [sys.executable, REPOSITORY / "tools/repeat.py", "-o", "series"]
    process = subprocess.Popen(
        [*command, "--launch", "bash launch.sh"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 143 and (tmp_path / "stopped").exists()
    assert "The same command continues the series." in error
