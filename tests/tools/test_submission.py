import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import at_call, results, start
from mlperf_logging.system_desc_checker import system_desc_checker

import slstr_cloud
from harness import REPOSITORY
from harness.clock import active_seconds
from harness.config import load_config, resolved
from harness.records.saved_runs import read_run
from harness.training.trainer import Trainer
from tools import compare, submission

LOG = "mlperf_cloudmask.log"
TOKEN = ":::MLLOG "
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTACT = {"name": "A. Person", "email": "a.person@example.org"}


@pytest.fixture(scope="session")
def made(tmp_path_factory, settings):
    """The folder of a run with a contact person."""
    run = start(tmp_path_factory.mktemp("made"), {**settings, **CONTACT})
    assert run.status == 0
    return run.folder


def read_log(folder):
    lines = (folder / LOG).read_text().splitlines()
    return [json.loads(line.removeprefix(TOKEN)) for line in lines]


def write_log(folder, events, with_digest=True):
    """Replace a run's log and, as a careful forger would, its digest in results.json."""
    text = "".join(f"{TOKEN}{json.dumps(event)}\n" for event in events)
    (folder / LOG).write_text(text)
    if with_digest:
        edit_results(folder, mlperf_sha256=hashlib.sha256(text.encode()).hexdigest())


def edit_results(folder, **values):
    """Set values in results.json: edit_results(folder, **{"training.val_loss": 0.1})."""
    found = results(folder)
    for place, value in values.items():
        *outer, key = place.split(".")
        part = found
        for name in outer:
            part = part[name]
        part[key] = value
    (folder / "results.json").write_text(json.dumps(found))


def edit_config(folder, **values):
    """Set values in config.yaml alone."""
    found = yaml.safe_load((folder / "config.yaml").read_text()) | values
    (folder / "config.yaml").write_text(yaml.safe_dump(found, sort_keys=False))


def copy(run, folder, commit=COMMIT, config=None, **values):
    """A run's folder as another run of committed code would leave it.

    Args:
        run: The run's folder.
        folder: Path of the copy; the first letter of its name makes its log unique.
        commit: Of the code.
        config: Values of the configuration, in all files.
        values: See `edit_results`.
    """
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("masks", "checkpoints", "*.keras"))
    parts = [part | {"git_commit": commit} for part in results(folder)["parts"]]
    edit_results(folder, git_commit=commit, parts=parts, **{"config.run_name": folder.name})
    edit_results(folder, **{f"config.{key}": value for key, value in (config or {}).items()})
    edit_config(folder, **(config or {}))
    events = read_log(folder)
    for event in events:
        event["time_ms"] += ord(folder.name[0])
        if event["key"] == "submission_github_commit_version":
            event["value"] = commit
    write_log(folder, events)
    edit_results(folder, **values)
    return folder


def submit(*folders, to, **options):
    """Run the command and return its exit status."""
    options = {"system": "box", **options}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    try:
        return submission.main([*map(str, folders), "-o", str(to), *arguments])
    except SystemExit as error:
        return error.code


def faults(*folders):
    return submission.find_faults(list(map(read_run, folders)))


@pytest.fixture
def run(made, tmp_path):
    return copy(made, tmp_path / "a")


@pytest.fixture
def submitted(made, tmp_path):
    """The folder of a submission of two runs."""
    folders = [copy(made, tmp_path / name) for name in "ab"]
    assert submit(*folders, to=tmp_path / "out") == 0
    return tmp_path / "out/tests/cloudmask/box/experiment-1"


# --- the files


def test_missing_contact_and_version_are_added_and_others_rejected(run, tmp_path, capsys):
    edit_results(run, **{"config.name": ""})
    edit_config(run, name="")
    write_log(run, [e | ({"value": ""} if e["key"].endswith("poc_name") else {})
                    for e in read_log(run)])  # fmt: skip

    def add(*texts):
        arguments = ["--system", "box", "-o", str(tmp_path / "out"), "--set", *texts]
        return submission.main([str(run), *arguments])

    assert add("name=Me", "seed=7") == 2 and "found seed" in capsys.readouterr().err
    assert add("email=me@example.org") == 2
    assert f"the runs have '{CONTACT['email']}'" in capsys.readouterr().err
    assert add("name=Me", "submission={version: 1.0}") == 0
    notes = capsys.readouterr().err
    assert "no fault:" in notes and "Science asks for" not in notes
    assert "official benchmark has 970 scenes in train_dir, found 7" in notes
    folder = tmp_path / "out/tests/cloudmask/box/experiment-1"
    config = load_config(folder / "config.yaml")
    assert (config.name, config.submission.version) == ("Me", "1.0")
    assert "Contact: Me; e-mail: a" in (folder / "README.md").read_text()


def test_submission_has_the_files_of_the_policy(submitted, tmp_path):
    assert {path.name for path in submitted.iterdir()} == {
        "result-1.txt", "result-2.txt", "config.yaml", "run.sh", "box.json", "README.md",
        "scientific_contribution.md",
    }  # fmt: skip
    for number, name in enumerate("ab", 1):
        expected = (tmp_path / name / LOG).read_bytes()
        assert (submitted / f"result-{number}.txt").read_bytes() == expected


def test_configuration_is_that_of_the_runs_with_the_commit(submitted, made):
    expected = resolved(load_config(made / "config.yaml"))
    found = resolved(load_config(submitted / "config.yaml"))
    assert found.pop("submission") == {"version": None, "github_commit_version": COMMIT}
    expected.pop("submission"), expected.pop("output_dir"), found.pop("output_dir")
    assert found == expected


def test_absolute_paths_of_files_become_names(made, tmp_path):
    values = {"mlperf_logfile": str(tmp_path / "a" / LOG), "model_file": "/x/model.keras"}
    assert submit(copy(made, tmp_path / "a", config=values), to=tmp_path / "out") == 0
    found = load_config(tmp_path / "out/tests/cloudmask/box/experiment-1/config.yaml")
    assert (str(found.mlperf_logfile), str(found.model_file)) == (LOG, "model.keras")


def table_rows(text):
    """Cells of all Markdown tables by the first cell of their row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0].replace("\\", ""): row[1:] for row in rows}


def test_readme_has_reference_and_submitted_values(submitted, made):
    readme, found = (submitted / "README.md").read_text(), results(made)
    rows, accuracy = table_rows(readme), found["inference"]["accuracy"]
    assert rows["measurement"][:2] == ["reference value", "submitted value"]
    assert rows["accuracy"][:2] == ["0.9000", f"{accuracy:.4f} ± 0.0000"]
    assert f"{accuracy - 0.9:+.4f}" in readme and "0 of 2 runs\nreached it" in readme
    assert "unet, 1948609 parameters" in readme and r"loss cross\_entropy" in readme
    assert COMMIT in readme and "recommends 10 runs of CloudMask, found 2; a single one" in readme
    digest = hashlib.sha256((submitted / "result-1.txt").read_bytes()).hexdigest()
    assert rows["result-1.txt"][1:3] == [f"{accuracy:.4f}", "2"]
    assert rows["result-1.txt"][-1] == digest
    times = {event["key"]: event["time_ms"] for event in read_log(made)}
    seconds = (times["eval_stop"] - times["run_start"]) / 1000
    assert rows["time_to_train"][1] == f"{seconds:.1f} ± 0.0"


def test_given_reference_counts_too(made, run, tmp_path):
    accuracy = results(made)["inference"]["accuracy"]
    assert submit(run, to=tmp_path / "out", reference=f"accuracy={accuracy + 0.25}") == 0
    (readme,) = (tmp_path / "out").rglob("README.md")
    assert "-0.2500" in readme.read_text()


def test_readme_shows_hostile_texts_unchanged(made, tmp_path):
    device = "<b>{n_runs}|x\n"
    folder = copy(made, tmp_path / "a", **{"devices.description": device})
    parts = results(folder)["parts"]
    parts[0]["devices"]["description"] = device
    edit_results(folder, parts=parts)
    assert submit(folder, to=tmp_path / "out") == 0
    (readme,) = (tmp_path / "out").rglob("README.md")
    assert r"- System: \<b\>\{n\_runs\}\|x\\n; `box.json`" in readme.read_text().splitlines()


def test_system_has_all_fields_and_passes_mlperfs_checker(submitted, made):
    found, machine = json.loads((submitted / "box.json").read_text()), results(made)["machine"]
    assert system_desc_checker.check_system_desc(submitted / "box.json", "hpc", "3.0.0")[0]
    assert found["host_processor_model_name"] == machine["processor"]
    assert found["operating_system"] == f"{machine['operating_system']}, {machine['kernel']}"
    assert found["accelerators_per_node"] == "0" and found["accelerator_model_name"] == "none"
    assert found["framework"].startswith("TensorFlow 2.") and COMMIT in found["sw_notes"]


def test_recorded_gpus_and_sockets_are_described(made, tmp_path):
    machine = {
        "processor": "EPYC", "sockets": 2, "cores": 64, "threads": 128, "memory": 512_000_000_000,
        "gpus": [{"name": "A100", "memory": 40 * 2**30, "driver": "535.1"}] * 4,
    }  # fmt: skip
    devices = {"devices.nodes": 2, "devices.accelerators_per_node": 4}
    folder = copy(made, tmp_path / "a", machine=machine, **devices)
    system = submission.describe_system(read_run(folder), "box", {"cooling": "water"})
    expected = {
        "number_of_nodes": "2", "host_processors_per_node": "2", "host_processor_core_count": "32",
        "host_processor_vcpu_count": "64", "host_memory_capacity": "512.0 GB",
        "accelerators_per_node": "4", "accelerator_model_name": "A100", "cooling": "water",
        "accelerator_memory_capacity": "42.9 GB", "accelerator_interconnect": submission.UNKNOWN,
        "host_networking": submission.UNKNOWN,
    }  # fmt: skip
    assert {name: system[name] for name in expected} == expected
    assert system["other_software_stack"]["NVIDIA driver"] == "535.1"


def test_fields_that_no_run_recorded_are_unknown_and_reported(made, tmp_path, capsys):
    folder = copy(made, tmp_path / "a", machine=None)
    given = {"cooling": "air", "host_processor_model_name": "Z80"}
    (tmp_path / "system.json").write_text(json.dumps(given))
    assert submit(folder, to=tmp_path / "out", **{"system-json": tmp_path / "system.json"}) == 0
    (path,) = (tmp_path / "out").rglob("box.json")
    found, error = json.loads(path.read_text()), capsys.readouterr().err
    assert found["host_memory_capacity"] == submission.UNKNOWN and "host_memory_capacity" in error
    assert found["host_processor_model_name"] == "Z80" and "cooling" not in error


# The second commit hash reads as a number, which YAML quotes.
@pytest.mark.parametrize("is_number", [False, True])
def test_script_repeats_the_runs_at_their_commit_only(made, tmp_path, is_number):
    code, commit = tmp_path / "code", "1" * 40
    git = ["git", "-C", str(code), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "init", "-q", str(code)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    if is_number:
        (programs / "git").write_text(f"#!/bin/sh\necho {commit}\n")
        (programs / "git").chmod(0o755)
    else:
        command = [*git, "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    folders = [copy(made, tmp_path / name, commit=commit) for name in "ab"]
    assert submit(*folders, to=tmp_path / "out") == 0
    (script,) = (tmp_path / "out").rglob("run.sh")
    command = ["bash", str(script), "--set", "epochs=9"]
    path = f"{programs}:{os.environ['PATH']}"
    env = {**os.environ, "CLOUDMASK": str(code), "START": "echo", "PATH": path}
    answer = subprocess.run(command, env=env, capture_output=True, text=True)
    for n, line in enumerate(answer.stdout.splitlines(), 1):
        options = f"--set run_name=result-{n} output_dir={script.parent}/outputs --set epochs=9"
        config = script.parent / "config.yaml"
        assert line == f"python slstr_cloud.py --config {config} {options}"
    assert answer.returncode == 0 and n == 2
    if not is_number:
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "y"], check=True)
        assert subprocess.run(command, env=env, capture_output=True).returncode == 2


def test_scripts_of_the_system_are_copied(run, tmp_path):
    (tmp_path / "job.sh").write_text("#SBATCH -N 2\n")
    assert submit(run, to=tmp_path / "out", script=tmp_path / "job.sh") == 0
    (script,) = (tmp_path / "out").rglob("job.sh")
    assert script.read_text() == "#SBATCH -N 2\n"
    assert "job.sh" in table_rows((script.parent / "README.md").read_text())


@pytest.mark.slow
def test_resumed_run_is_accepted(settings, tmp_path):
    first = start(tmp_path / "out", {**settings, "epochs": 1}, "--mode", "benchmark")
    again = slstr_cloud.main(["--resume", str(first.folder), "--set", "epochs=2"])
    assert first.status == again == 0
    folder = copy(first.folder, tmp_path / "a")
    assert "resumed" in {event["key"] for event in read_log(folder)}
    assert faults(folder) == []
    edit_results(folder, resumed=2)
    assert any("has last resumed 1, expected 2" in text for text in faults(folder))


# --- logs that were changed


def test_unchanged_runs_have_no_faults(made, tmp_path):
    assert faults(*(copy(made, tmp_path / name) for name in "ab")) == []


def test_any_change_of_the_log_breaks_its_digest(run):
    events = read_log(run)
    events[-1]["metadata"]["lineno"] += 1
    write_log(run, events, with_digest=False)
    (fault,) = faults(run)
    assert "SHA-256 of its log is" in fault


def test_every_missing_event_is_found_without_the_digest(run):
    events = read_log(run)
    for i, event in enumerate(events):
        write_log(run, events[:i] + events[i + 1 :])
        assert faults(run), event
    keys = {event["key"] for event in events}
    assert {"network", "parameters", "loss_function", "result", "inference_stop"} < keys


def test_swapped_events_are_found_without_the_digest(run):
    events = read_log(run)
    # Within these blocks the order carries no meaning.
    free = ("submission_", "cache_clear"), (
        "seed", "global_batch_size", "train_samples", "eval_samples", "opt_", "network",
        "parameters", "loss_function", "number_of_", "accelerators_per_node",
    )  # fmt: skip
    for i in range(len(events) - 1):
        a, b = events[i : i + 2]
        if any(a["key"].startswith(block) and b["key"].startswith(block) for block in free):
            continue
        swapped = [*events[:i], b | {"time_ms": a["time_ms"]}, a | {"time_ms": b["time_ms"]}]
        write_log(run, [*swapped, *events[i + 2 :]])
        assert faults(run), (a["key"], b["key"])


def event_changed(folder, key, **fields):
    """Change the last event with a key."""
    events = read_log(folder)
    index = max(i for i, event in enumerate(events) if event["key"] == key)
    events[index] |= fields
    write_log(folder, events)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("submission_org", "others"), ("submission_platform", "other"), ("submission_version", "2"),
        ("submission_poc_name", CONTACT["email"]), ("submission_poc_email", CONTACT["name"]),
        ("submission_github_commit_version", COMMIT[::-1]), ("submission_division", "closed"),
        ("submission_status", "cloud"), ("seed", 1235), ("global_batch_size", 12),
        ("train_samples", 61), ("eval_samples", 23), ("opt_base_learning_rate", 0.00002),
        ("network", "other"), ("parameters", 7), ("loss_function", "other"),
        ("number_of_ranks", 2), ("number_of_nodes", 2), ("accelerators_per_node", 1),
        ("eval_accuracy", 0.9), ("result", {"accuracy": 0.99}),
    ],
)  # fmt: skip
def test_edited_value_of_the_log_is_named(run, key, value):
    event_changed(run, key, value=value)
    (fault,) = faults(run)
    assert f"its log has {key}" in fault and repr(value) in fault


@pytest.mark.parametrize(
    ("key", "value"), [("opt_name", "sgd"), ("submission_benchmark", "earthquake")]
)
def test_value_that_the_rules_forbid_is_named(run, key, value):
    event_changed(run, key, value=value)
    assert any("mlperf_logging rejects its log" in t and key in t for t in faults(run))


def test_contact_in_the_log_is_that_of_the_configuration(run):
    values = {event["key"]: event["value"] for event in read_log(run)}
    assert values["submission_poc_name"] == CONTACT["name"]
    assert values["submission_poc_email"] == CONTACT["email"]


@pytest.mark.slow
def test_suspended_time_is_in_the_log_alone(settings, tmp_path, monkeypatch):
    def suspend():  # as SIGSTOP does
        time.sleep(3)
        monkeypatch.setattr(active_seconds, "suspended", active_seconds.suspended + 3)

    at_call(monkeypatch, Trainer, "train_step", 3, suspend)
    made = start(tmp_path / "out", settings)
    folder = copy(made.folder, tmp_path / "a")
    assert faults(folder) == []
    part = results(folder)["parts"][0]
    edit_results(folder, parts=[part | {"suspended_seconds": 0}])
    (fault,) = faults(folder)
    assert "s from epoch_start of epoch 1 to eval_stop" in fault


def test_one_epoch_too_many_in_the_log_is_named(run):
    events = read_log(run)
    last = [event for event in events if event["metadata"].get("epoch_num") == 2]
    index = events.index(last[-1]) + 1
    more = [event | {"metadata": event["metadata"] | {"epoch_num": 3}} for event in last]
    write_log(run, [*events[:index], *more, *events[index:]])
    assert any("eval_accuracy of epoch 3" in text for text in faults(run))


@pytest.mark.parametrize("key", ["eval_stop", "inference_stop"])
def test_interval_that_differs_from_the_measured_time_is_named(run, key):
    times = {event["key"]: event["time_ms"] for event in read_log(run)}
    event_changed(run, key, time_ms=times[key] + 3_600_000)
    texts = faults(run)
    assert any(f"to {key}" in text for text in texts)
    assert any("times in its log go backwards" in text for text in texts)


@pytest.mark.parametrize(
    "line", [b":::MLLOG {}\n", b":::MLLOG [1]\n", b":::MLLOG " + b"[" * 9999 + b"\n", b"\xff\n"]
)
def test_line_that_is_not_an_event_is_a_fault(run, line):
    content = (run / LOG).read_bytes() + line
    (run / LOG).write_bytes(content)
    edit_results(run, mlperf_sha256=hashlib.sha256(content).hexdigest())
    # Lines without the token are not part of the log for mlperf_logging.
    assert bool(faults(run)) == line.startswith(TOKEN.encode())


# --- how the result was obtained


@pytest.mark.parametrize(
    ("names", "best_of", "text"),
    [
        ("a", None, "The result of a single run.\n"),
        ("a", 5, "The result of a single run. It is the best of 5 that were made."),
        ("ab", None, "deviation of 2 runs. The best of the 2 by accuracy is `result-1.txt`, {}."),
        ("ab", 3, "`result-1.txt`, {}. They are the best of 3 that were made."),
    ],
)
def test_readme_says_how_the_result_was_obtained(made, tmp_path, names, best_of, text, capsys):
    folders = [copy(made, tmp_path / name) for name in names]
    options = {"best-of": best_of} if best_of else {}
    assert submit(*folders, to=tmp_path / "out", **options) == 0  # ten runs are not required
    (readme,) = (tmp_path / "out").rglob("README.md")
    accuracy = f"{results(made)['inference']['accuracy']:.4f}"
    assert text.format(accuracy) in readme.read_text()
    assert f"recommends 10 runs of CloudMask, found {len(names)}" in capsys.readouterr().err


def test_best_of_fewer_than_given_is_rejected(run, tmp_path, capsys):
    other = copy(run, tmp_path / "b")
    assert submit(run, other, to=tmp_path / "out", **{"best-of": 1}) == 2
    assert "--best-of is the number" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_best_run_is_the_one_of_the_highest_accuracy():
    assert "`result-2.txt`, 0.9000" in submission.how_obtained([0.88, 0.9, 0.89], None)


def test_baselines_stand_beside_the_scores_of_the_same_pixels(submitted, made):
    table, found = table_rows((submitted / "README.md").read_text()), results(made)["inference"]
    names = "valid_accuracy", "valid_all_cloud_accuracy", "valid_threshold_accuracy"
    assert table["accuracy, pixels with data"] == [f"{found[name]:.4f}" for name in names]
    assert table["balanced, all pixels"][1] == "0.5000"


def test_warnings_and_synthetic_scenes_are_reported(made, tmp_path, capsys):
    for name, values, n in (
        ("a", {"warnings": ["The loss <b> rose."]}, 1),
        ("b", {"warnings": [], "training.synthetic": False, "inference.synthetic": False}, 0),
    ):
        assert submit(copy(made, tmp_path / name, **values), to=tmp_path / f"out-{name}") == 0
        error, (readme,) = capsys.readouterr().err, (tmp_path / f"out-{name}").rglob("README.md")
        text = readme.read_text()
        assert error.count("a: The loss <b> rose.\n") == text.count(r"a: The loss \<b\> rose") == n
        assert (
            error.count("The scenes are synthetic") == text.count("Scenes: synthetic, 5 for") == n
        )


def test_emptied_file_cache_is_shown(run, tmp_path, capsys):
    for value, shown in ((False, "not emptied"), (True, "emptied")):
        event_changed(run, "cache_clear", value=value)
        assert submit(run, to=tmp_path / shown) == 0
        (readme,) = (tmp_path / shown).rglob("README.md")
        assert f"- File cache before each run: {shown}\n" in readme.read_text()
        assert ("emptied file cache" in capsys.readouterr().err) is not value


@pytest.mark.slow
def test_resumed_run_repeats_one_that_was_never_stopped(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("train_dir", "inference_dir"):
        settings = settings | CONTACT | {key: os.path.relpath(settings[key])}
    whole = start(tmp_path / "whole", settings | {"output_dir": "whole"})
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "train_step", 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = start(tmp_path / "stopped", settings | {"output_dir": "stopped"})
    assert (whole.status, stopped.status) == (0, 143)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert slstr_cloud.main(["--resume", "../stopped/run"]) == 0
    for number, run in enumerate((whole, stopped)):
        copy(run.folder, tmp_path / "ab"[number])  # as runs of committed code
    assert list(compare.compare([Path("../a"), Path("../b")]).spreads) == [(1, 2)]
    assert submit("../a", "../b", to="out") == 0


# --- other files that were changed


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ("status", "aborted", "it is 'aborted' in --mode benchmark"),
        ("mode", "train", "it is 'success' in --mode train"),
        ("git_commit", None, "the commit is None"),
        ("git_commit", f"{COMMIT}-dirty", "the commit is 0123456789abcdef"),
        ("mlperf_sha256", None, "SHA-256 of its log is"),
        ("training", {}, "not those of a complete run"),
        ("devices", 0, "devices changed when it was resumed"),
        ("parts", 3, "not those of a complete run"),
    ],
)
def test_unsuitable_run_is_rejected(run, tmp_path, capsys, place, value, text):
    edit_results(run, **{place: value})
    assert submit(run, to=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert text in error and str(run) in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("training.epochs_run", 3), ("training.val_loss", 0.1), ("training.accuracy", 0.1),
        ("training.seconds_per_epoch", [1.0, 2.0]), ("training.best_epoch", 9),
        ("training.seconds", 0.1), ("training.patches_per_second", 99999.0),
        ("training.seconds_to_target", 0.1), ("inference.no_data_clear_accuracy", 0.99),
        ("inference.out_of_range", 7), ("inference.f1", 0.99),
        ("inference.accuracy", 0.99), ("inference.tp", 1), ("inference.scenes", 3),
        ("inference.seconds_per_scene", 0.001), ("inference.valid_accuracy", None),
    ],
)  # fmt: skip
def test_results_that_the_tables_contradict_are_named(run, place, value):
    edit_results(run, **{place: value})
    assert any(f"results.json has {place} " in text for text in faults(run))


@pytest.mark.parametrize("table", ["history.csv", "scenes.csv"])
@pytest.mark.parametrize("n_kept", [0, 1])
def test_tables_that_lack_rows_are_a_fault(run, table, n_kept):
    lines = (run / table).read_text().splitlines(keepends=True)
    (run / table).write_text("".join(lines[: 1 + n_kept]))
    assert faults(run)


def test_speed_edited_in_both_files_contradicts_the_log(run):
    with (run / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = [1e-3 * float(row["seconds"]) for row in rows]
    with (run / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row, value in zip(rows, seconds, strict=True):
            writer.writerow(row | {"seconds": value + 9})
    found = {"training.seconds": sum(seconds) + 18, "training.seconds_per_epoch": None}
    found["training.seconds_per_epoch"] = [value + 9 for value in seconds]
    edit_results(run, **found)
    texts = faults(run)
    assert len(texts) == 2 and all("s from epoch_start of epoch" in text for text in texts)


@pytest.mark.parametrize("name", ["git_commit", "versions", "devices"])
def test_part_of_a_run_with_other_code_or_devices_is_named(run, name):
    first = results(run)["parts"][0]
    edit_results(run, parts=[first | {name: "other"}, first])
    (fault,) = (text for text in faults(run) if "resumed. Run" in text)
    assert f"{name} changed" in fault


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epochs": 3}, "config.yaml has epochs 3, expected 2 by results.json"),
        ({"coolness": 1}, "unknown key 'coolness'"),
    ],
)
def test_edited_config_file_is_named(run, values, text):
    edit_config(run, **values)
    (fault,) = faults(run)
    assert text in fault


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("organisation", "unknown"), ("organisation", ".."), ("division", "ajar"),
        ("benchmark", "earthquake"),
    ],
)  # fmt: skip
def test_configuration_that_cannot_be_submitted_is_named(made, tmp_path, key, value):
    folder = copy(made, tmp_path / "a", config={key: value})
    assert any(f"{key} is '{value}'" in fault for fault in faults(folder))


def test_closed_division_requires_the_reference_workload(made, tmp_path):
    config = {"division": "closed", "seed": 7, "MIN_SST": 270.0, "labels": "combined"}
    folder = copy(made, tmp_path / "a", config=config)
    texts = "\n".join(text for text in faults(folder) if "closed division requires" in text)
    for text in (
        "PATCH_SIZE 256, found 32", "seed 1234, found 7", "labels bayes, found combined",
        "MIN_SST of at least 273.15, found 270",
        "970 scenes in train_dir, found 7", "100 scenes in inference_dir, found 2",
    ):  # fmt: skip
        assert texts.count(text) == 1


def test_closed_division_allows_other_epochs_and_rates(run):
    numbers = {"scenes_train": 776, "scenes_test": 194}  # 970 in all
    edit_results(run, **{f"training.{name}": value for name, value in numbers.items()})
    edit_results(run, **{"inference.scenes": 100})
    config = load_config("config.yaml", ["epochs=100", "learning_rate=0.01", "batch_size=64"])
    assert submission.closed_faults(config, read_run(run)) == []


def test_runs_of_different_kinds_are_rejected(made, tmp_path):
    other = copy(made, tmp_path / "b", commit=COMMIT[::-1], config={"epochs": 3})
    texts = [text for text in faults(copy(made, tmp_path / "a"), other) if "repeats" in text]
    assert len(texts) == 2
    assert "git_commit" in texts[0] and "config.epochs differs: 2, 3" in texts[1]


@pytest.mark.parametrize("as_copy", [False, True])
def test_same_run_twice_is_rejected(run, tmp_path, as_copy):
    again = shutil.copytree(run, tmp_path / "copy") if as_copy else run
    (fault,) = faults(run, again)
    assert "are the same run" in fault


def test_all_faults_are_printed_and_nothing_is_written(made, tmp_path, capsys):
    folders = [
        copy(made, tmp_path / "a", status="aborted"),
        copy(made, tmp_path / "b", commit=f"{COMMIT}-dirty"),
        copy(made, tmp_path / "c", **{"training.epochs_run": 3}),
    ]
    assert submit(*folders, to=tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    for folder in folders:
        assert any(str(folder) in line for line in lines)
    assert lines[-1].startswith(f"Error: {len(lines) - 1} faults")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["start", "devices.description", "config.name"])
def test_results_that_lack_a_value_are_rejected(run, tmp_path, capsys, place):
    found = results(run)
    *outer, key = place.split(".")
    del (found[outer[0]] if outer else found)[key]
    (run / "results.json").write_text(json.dumps(found))
    assert submit(run, to=tmp_path / "out") == 2
    assert "Error: " in capsys.readouterr().err


# --- the command line


def test_existing_submission_is_not_changed(submitted, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in submitted.iterdir()}
    assert submit(tmp_path / "a", to=tmp_path / "out") == 2
    assert "exists" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in submitted.iterdir()}
    assert len(list(submitted.parent.iterdir())) == 1
    assert submit(tmp_path / "a", to=tmp_path / "out", descriptor="experiment-2") == 0


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("system", ["", "a b", "../x", ".x", "é", "a/b"]),
        ("descriptor", ["", "a b", "../x", ".x", "é", "a/b"]),
        ("system-json", ["{", "[1]", '{"coolling": "air"}', '{"system_name": "x"}']),
        ("reference", ["accuracy", "accuracy=high", "accuracy=nan", "speed=1"]),
    ],
)
def test_invalid_value_of_an_option_is_rejected(run, tmp_path, option, values, capsys):
    for value in values:
        if option == "system-json":
            (tmp_path / "system-json").write_text(value)
            value = tmp_path / "system-json"
        assert submit(run, to=tmp_path / "out", **{option: value}) == 2
        assert option in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["nowhere.sh"], ["run.sh"], ["x/job.sh", "y/job.sh"]])
def test_scripts_that_cannot_be_copied_are_rejected(run, tmp_path, names, capsys):
    for name in ("run.sh", "x/job.sh", "y/job.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    paths = [str(tmp_path / name) for name in names]
    arguments = [str(run), "-o", str(tmp_path / "out"), "--system", "box", "--script", *paths]
    assert submission.main(arguments) == 2
    assert names[0].rpartition("/")[2] in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Example University, Ulm/DE", "Example_University_Ulm_DE"), ("../..", "")],
)
def test_organisation_becomes_a_name_for_folders_and_git(name, expected):
    assert submission.folder_name(name) == expected


def test_command_runs_from_any_folder_without_tensorflow(run, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    command = [sys.executable, REPOSITORY / "tools/submission.py", run, "--system", "box"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([*command, "-o", tmp_path / "out"], cwd=tmp_path, env=env, check=True)
