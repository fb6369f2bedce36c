import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import results, start
from mlperf_logging.system_desc_checker import system_desc_checker

import slstr_cloud
from harness import REPOSITORY
from harness.config import load_config, resolved
from harness.records.saved_runs import read_run
from tools import submission
from tools.lib.log_check import TOKEN, objections

LOG = "mlperf_cloudmask.log"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(content):
    return hashlib.sha256(content).hexdigest()


def copy(run, folder, change=lambda found: None, commit=COMMIT, config=None):
    """A run's folder as a run of committed code would leave it, its results changed."""
    folder.mkdir()
    lines = []
    for line in (run / LOG).read_text().splitlines():
        event = json.loads(line.removeprefix(TOKEN))
        if event["key"] == "submission_github_commit_version":
            event["value"] = commit
        event["time_ms"] += ord(folder.name[0])  # no two runs are of one millisecond
        lines.append(f"{TOKEN}{json.dumps(event)}\n")
    (folder / LOG).write_text("".join(lines))
    found = results(run) | {"git_commit": commit}
    for part in found["parts"]:
        part["git_commit"] = commit
    found["mlperf_sha256"] = digest((folder / LOG).read_bytes())
    found["config"] |= {"run_name": folder.name, **(config or {})}
    change(found)
    (folder / "results.json").write_text(json.dumps(found))
    values = yaml.safe_load((run / "config.yaml").read_text()) | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for name in ("history.csv", "scenes.csv"):
        (folder / name).write_text((run / name).read_text())
    return folder


def rewrite_log(folder, content, know=True):
    """Change a run's log, and let results.json know it or not."""
    (folder / LOG).write_bytes(content)
    if know:
        found = results(folder) | {"mlperf_sha256": digest(content)}
        (folder / "results.json").write_text(json.dumps(found))


def submit(*folders, to, **options):
    """Run the program."""
    options = {"system": "box", **options}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return submission.main([*map(str, folders), "-o", str(to), *arguments])


@pytest.fixture
def run(finished, tmp_path):
    return copy(finished, tmp_path / "a")


@pytest.fixture
def submitted(finished, tmp_path):
    """The folder of a submission of two runs."""
    folders = [copy(finished, tmp_path / name) for name in "ab"]
    assert submit(*folders, to=tmp_path / "out") == 0
    return tmp_path / "out/tests/cloudmask/box/experiment-1"


# --- what is written


def test_submission_has_the_files_of_the_policy(submitted, tmp_path):
    assert {path.name for path in submitted.iterdir()} == {
        "result-1.txt", "result-2.txt", "config.yaml", "run.sh", "box.json", "README.md",
        "scientific_contribution.md",
    }  # fmt: skip
    for number, name in enumerate("ab", 1):
        wanted = (tmp_path / name / LOG).read_bytes()
        assert (submitted / f"result-{number}.txt").read_bytes() == wanted


def test_configuration_is_that_of_the_runs_with_the_commit(submitted, finished):
    wanted = resolved(load_config(finished / "config.yaml"))
    found = resolved(load_config(submitted / "config.yaml"))
    assert found.pop("submission") == {"version": None, "github_commit_version": COMMIT}
    wanted.pop("submission"), wanted.pop("output_dir"), found.pop("output_dir")
    assert found == wanted


def test_table_has_reference_and_submitted_values(submitted, finished):
    readme = (submitted / "README.md").read_text()
    rows = [line.split("|")[1:4] for line in readme.splitlines() if line.startswith("| ")]
    cells = {name.strip(): (a.strip(), b.strip()) for name, a, b in rows}
    accuracy = results(finished)["inference"]["accuracy"]
    assert cells["measurement"] == ("reference value", "submitted value")
    assert cells["accuracy"] == ("0.9", f"{accuracy:.4f} ± 0.0000")
    assert f"{accuracy - 0.9:+.4f}" in readme and "0 of 2 run(s) reached it" in readme
    assert digest((submitted / "result-1.txt").read_bytes()) in readme
    assert COMMIT in readme and "wants 10 runs of CloudMask, found 2" in readme


def test_time_to_train_is_that_of_the_log(finished, run):
    seconds = sum(row["seconds"] for row in read_run(run).history)
    assert seconds <= submission.time_to_train(read_run(run)) < seconds + 5


def test_given_reference_counts_too(finished, run, tmp_path):
    accuracy = results(finished)["inference"]["accuracy"]
    assert submit(run, to=tmp_path / "out", reference=f"accuracy={accuracy + 0.25}") == 0
    (readme,) = (tmp_path / "out").rglob("README.md")
    assert "-0.2500" in readme.read_text()


def test_system_has_all_fields_and_passes_mlperfs_checker(submitted, finished):
    found = json.loads((submitted / "box.json").read_text())
    machine = results(finished)["machine"]
    assert system_desc_checker.check_system_desc(submitted / "box.json", "hpc", "3.0.0")[0]
    assert tuple(found) == submission.SYSTEM_FIELDS
    assert found["host_processor_model_name"] == machine["processor"]
    assert found["accelerators_per_node"] == "0" and found["accelerator_model_name"] == "none"
    assert found["framework"].startswith("TensorFlow 2.") and COMMIT in found["sw_notes"]


def gpus(found):
    found["machine"] = {
        "processor": "EPYC", "sockets": 2, "cores": 64, "threads": 128, "memory": 512_000_000_000,
        "gpus": [{"name": "A100", "memory": 40 * 2**30, "driver": "535.1"}] * 4,
    }  # fmt: skip
    found["devices"] |= {"nodes": 2, "accelerators_per_node": 4}


def test_recorded_gpus_and_sockets_are_described(finished, tmp_path):
    system = submission.describe_system(
        read_run(copy(finished, tmp_path / "a", gpus)), "box", {"cooling": "water"}
    )
    wanted = {
        "number_of_nodes": "2", "host_processors_per_node": "2", "host_processor_core_count": "32",
        "host_processor_vcpu_count": "64", "host_memory_capacity": "512.0 GB",
        "accelerators_per_node": "4", "accelerator_model_name": "A100", "cooling": "water",
        "accelerator_memory_capacity": "42.9 GB", "accelerator_interconnect": submission.UNKNOWN,
    }  # fmt: skip
    assert {name: system[name] for name in wanted} == wanted
    assert system["other_software_stack"]["NVIDIA driver"] == "535.1"


def test_what_no_run_noted_is_unknown_and_told(finished, tmp_path, capsys):
    folder = copy(finished, tmp_path / "a", lambda found: found.pop("machine"))
    given = {"cooling": "air", "host_processor_model_name": "Z80"}
    (tmp_path / "system.json").write_text(json.dumps(given))
    assert submit(folder, to=tmp_path / "out", **{"system-json": tmp_path / "system.json"}) == 0
    (path,) = (tmp_path / "out").rglob("box.json")
    found, error = json.loads(path.read_text()), capsys.readouterr().err
    assert found["host_memory_capacity"] == submission.UNKNOWN and "host_memory_capacity" in error
    assert found["host_processor_model_name"] == "Z80" and "cooling" not in error


def test_script_repeats_the_runs_at_their_commit_alone(finished, tmp_path):
    code = tmp_path / "code"
    git = ["git", "-C", str(code), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "init", "-q", str(code)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert submit(copy(finished, tmp_path / "a", commit=commit.strip()), to=tmp_path / "out") == 0
    (script,) = (tmp_path / "out").rglob("run.sh")
    command = ["bash", str(script), "--set", "epochs=9"]
    env = {**os.environ, "CLOUDMASK": str(code), "START": "echo"}
    (line,) = subprocess.run(command, env=env, capture_output=True, text=True).stdout.splitlines()
    assert line.startswith("python slstr_cloud.py --config") and line.endswith("--set epochs=9")
    words = line.split()
    options = words[words.index("--set") :]
    assert f"run_name=result-1 output_dir={script.parent}/outputs" in " ".join(options)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "y"], check=True)
    assert subprocess.run(command, env=env, capture_output=True).returncode == 2


def test_scripts_of_the_system_come_along(run, tmp_path):
    (tmp_path / "job.sh").write_text("#SBATCH -N 2\n")
    assert submit(run, to=tmp_path / "out", script=tmp_path / "job.sh") == 0
    (script,) = (tmp_path / "out").rglob("job.sh")
    assert script.read_text() == "#SBATCH -N 2\n"
    assert "job.sh" in (script.parent / "README.md").read_text()


@pytest.mark.slow
def test_resumed_run_is_accepted(settings, tmp_path):
    first = start(tmp_path / "out", {**settings, "epochs": 1}, "--mode", "benchmark")
    again = slstr_cloud.main(["--resume", str(first.folder), "--set", "epochs=2"])
    assert first.status == again == 0
    folder = copy(first.folder, tmp_path / "a")
    assert '"resumed"' in (folder / LOG).read_text()
    assert submission.faults_of([read_run(folder)]) == []


# --- a log that was changed


def objections_to(folder):
    return objections(read_run(folder))


def changes(content, n, seed):
    """n texts that differ from a log in one character: another one, one more, one less."""
    rng = random.Random(seed)
    for _ in range(n):
        i, c = rng.randrange(len(content)), bytes([rng.randrange(32, 127)])
        if content[i : i + 1] == c:
            c = b"~" if c != b"~" else b"!"
        kind = rng.randrange(4)
        yield i, content[:i] + (b"" if kind == 0 else c) + content[i + (kind != 1) :]


def test_log_that_is_whole_has_no_objection(run):
    assert objections_to(run) == []


def test_every_single_character_matters(run):
    content = (run / LOG).read_bytes()
    for _, changed in changes(content, 150, seed=1):
        rewrite_log(run, changed, know=False)
        assert any("its log was changed" in text for text in objections_to(run)), changed


def test_characters_matter_without_the_digest_but_where_nothing_else_tells_them(run):
    content, n_free = (run / LOG).read_bytes(), 0
    for i, changed in changes(content, 150, seed=2):
        rewrite_log(run, changed)
        line_start = content.rfind(b"\n", 0, i) + 1
        before = content[line_start:i]
        # The place in the source, and a time where no interval ends by it.
        if b'"file": "' in before and b"epoch_num" not in before and b"status" not in before:
            n_free += 1
        elif before.endswith(b"time_ms") or b'time_ms": ' in before and b"event_type" not in before:
            n_free += 1
        else:
            assert objections_to(run), (before, changed[line_start : i + 20])
    assert n_free < 75


@pytest.mark.parametrize("know", [False, True])
def test_every_line_is_missed(run, know):
    lines = (run / LOG).read_bytes().splitlines(keepends=True)
    for i in range(len(lines)):
        rewrite_log(run, b"".join(lines[:i] + lines[i + 1 :]), know)
        key = json.loads(lines[i].decode().removeprefix(TOKEN))["key"]
        assert any("lacks the event" in t and key in t for t in objections_to(run)), key


def test_line_twice_or_out_of_order_is_seen_without_the_digest(run):
    lines = (run / LOG).read_bytes().splitlines(keepends=True)
    for i in range(len(lines) - 1):
        for changed in (
            [*lines[: i + 1], *lines[i:]],
            [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]],
        ):
            rewrite_log(run, b"".join(changed))
            assert objections_to(run), lines[i]


def event_changed(folder, key, **fields):
    """Change the first event of a key, and let results.json know the log."""
    lines = (folder / LOG).read_text().splitlines()
    for i, line in enumerate(lines):
        event = json.loads(line.removeprefix(TOKEN))
        if event["key"] == key:
            lines[i] = TOKEN + json.dumps(event | fields)
            break
    rewrite_log(folder, "".join(f"{line}\n" for line in lines).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("submission_org", "others"), ("submission_platform", "other"), ("seed", 1235),
        ("global_batch_size", 12), ("train_samples", 61), ("eval_samples", 23),
        ("opt_base_learning_rate", 0.00002), ("number_of_ranks", 2), ("number_of_nodes", 2),
        ("accelerators_per_node", 1), ("eval_accuracy", 0.9), ("cache_clear", True),
        ("result", {"accuracy": 0.99}), ("submission_github_commit_version", COMMIT[::-1]),
        ("seed", 1234.0), ("cache_clear", 0),
    ],
)  # fmt: skip
def test_value_of_another_run_is_named(run, key, value):
    event_changed(run, key, value=value)
    (text,) = [text for text in objections_to(run) if "by the run's other files" in text]
    assert key in text and json.dumps(value) in text


def test_time_that_the_run_did_not_take_is_named(run):
    # Two seconds later than the epoch took; what follows is then earlier.
    lines = (run / LOG).read_text().splitlines()
    times = {e["key"]: e for e in (json.loads(line.removeprefix(TOKEN)) for line in lines)}
    event_changed(run, "inference_stop", time_ms=times["inference_stop"]["time_ms"] + 2000)
    texts = objections_to(run)
    assert any("from inference_start to inference_stop" in text for text in texts)
    assert any("earlier than the line before" in text for text in texts)


@pytest.mark.parametrize(
    "line",
    [
        b"noise\n",
        b":::MLLOG {}\n",
        b":::MLLOG [1]\n",
        b":::MLLOG " + b"[" * 9999 + b"\n",
        b"\xff\n",
    ],
)
def test_line_that_is_no_event_is_named(run, line):
    rewrite_log(run, (run / LOG).read_bytes() + line)
    assert any("is no event" in text for text in objections_to(run))


def test_rules_of_mlperf_logging_are_asked(run, monkeypatch):
    # An accuracy above 1 in all files agrees with itself.
    history = (run / "history.csv").read_text()
    value = read_run(run).history[1]["val_accuracy"]
    (run / "history.csv").write_text(history.replace(repr(value), "1.5"))
    content = (run / LOG).read_text().replace(repr(value), "1.5")
    rewrite_log(run, content.encode())
    assert any("mlperf_logging objects" in t and "eval_accuracy" in t for t in objections_to(run))


# --- runs that cannot be submitted


def faults(*folders):
    return submission.faults_of(list(map(read_run, folders)))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"status": "aborted"}, "ended as 'aborted'"),
        ({"mode": "train"}, "--mode train"),
        ({"git_commit": None}, "commit is not known"),
        ({"git_commit": f"{COMMIT}-dirty"}, "code was changed"),
        ({"mlperf_sha256": None}, "no mlperf_sha256"),
        ({"training": {}}, "not those of a whole run"),
        ({"devices": 0}, "not those of a whole run"),
        ({"resumed": 1}, "resumed up to 1 times"),
    ],
)
def test_unfit_run_is_named(finished, tmp_path, values, word):
    folder = copy(finished, tmp_path / "a", lambda found: found.update(values))
    assert any(word in text and str(folder) in text for text in faults(folder))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("training", "epochs_run", 3), ("training", "val_loss", 0.1), ("training", "accuracy", 0.1),
        ("training", "seconds_per_epoch", [1.0, 2.0]), ("training", "best_epoch", 9),
        ("training", "seconds", 0.1), ("training", "patches_per_second", 99999.0),
        ("inference", "out_of_range", 7), ("inference", "day", {"accuracy": 0.99}),
        ("inference", "accuracy", 0.99), ("inference", "tp", 1), ("inference", "scenes", 3),
        ("inference", "seconds_per_scene", 0.001), ("inference", "valid_accuracy", None),
    ],
)  # fmt: skip
def test_results_that_other_files_contradict_are_named(finished, tmp_path, part, name, value):
    folder = copy(finished, tmp_path / "a", lambda found: found[part].update({name: value}))
    assert any(f"results.json has {part}.{name}" in text for text in faults(folder))


@pytest.mark.parametrize("name", ["git_commit", "versions", "devices"])
def test_part_that_other_code_or_devices_made_is_named(finished, tmp_path, name):
    def change(found):
        found["parts"] = [found["parts"][0] | {name: "other"}, *found["parts"]]

    (fault,) = (text for text in faults(copy(finished, tmp_path / "a", change)) if "part" in text)
    assert f"other {name} than the last" in fault


def test_copy_of_a_run_is_no_other_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    (fault,) = faults(run, tmp_path / "copy")
    assert "are one run" in fault


def test_scenes_of_an_edited_configuration_are_named(run):
    values = yaml.safe_load((run / "config.yaml").read_text()) | {"train_dir": "/elsewhere"}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    (fault,) = faults(run)
    assert "config.yaml has train_dir /elsewhere" in fault


def test_files_elsewhere_are_left_to_each_run(finished, tmp_path):
    values = {"mlperf_logfile": str(tmp_path / "a" / LOG), "model_file": "/x/model.keras"}
    assert submit(copy(finished, tmp_path / "a", config=values), to=tmp_path / "out") == 0
    found = load_config(tmp_path / "out/tests/cloudmask/box/experiment-1/config.yaml")
    assert (str(found.mlperf_logfile), str(found.model_file)) == (LOG, "model.keras")


@pytest.mark.parametrize("name", ["start", "devices.description", "config.precision"])
def test_results_that_lack_a_value_are_refused(finished, tmp_path, capsys, name):
    def change(found):
        *outer, key = name.split(".")
        place = found[outer[0]] if outer else found
        del place[key]

    assert submit(copy(finished, tmp_path / "a", change), to=tmp_path / "out") == 2
    assert "Error: " in capsys.readouterr().err


def test_configuration_that_was_edited_is_named(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("epochs: 2", "epochs: 3"))
    (fault,) = faults(run)
    assert "config.yaml has epochs 3, results.json 2" in fault


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"organisation": "unknown"}, "organisation is 'unknown'"),
        ({"division": "ajar"}, "division is 'ajar'"),
        ({"benchmark": "earthquake"}, "benchmark is 'earthquake'"),
    ],
)
def test_unfit_configuration_is_named(finished, tmp_path, config, word):
    folder = copy(finished, tmp_path / "a", config=config)
    assert any(word in text for text in faults(folder))


def test_closed_division_wants_the_reference(finished, tmp_path):
    folder = copy(finished, tmp_path / "a", config={"division": "closed", "seed": 7})
    texts = [text for text in faults(folder) if "closed division wants" in text]
    for word in ("PATCH_SIZE 256, found 32", "seed 1234, found 7", "970 scenes", "100 scenes"):
        assert len([text for text in texts if word in text]) == 1


def test_closed_division_takes_the_reference(finished, tmp_path):
    def change(found):
        found["training"] |= {"scenes_train": 776, "scenes_test": 194}
        found["inference"] |= {"scenes": 100}

    run = read_run(copy(finished, tmp_path / "a", change))
    reference = load_config("config.yaml", ["epochs=100", "learning_rate=0.01", "batch_size=64"])
    assert submission.closed_faults(run, reference) == []
    warm = reference.model_copy(update={"min_sst": 270.0})
    assert len(submission.closed_faults(run, warm)) == 1


def test_runs_of_two_kinds_are_refused(finished, tmp_path):
    folders = [
        copy(finished, tmp_path / "a"),
        copy(finished, tmp_path / "b", commit=COMMIT[::-1], config={"epochs": 3}),
    ]
    texts = [text for text in faults(*folders) if "of one kind" in text]
    assert (
        len(texts) == 2 and "git_commit" in texts[0] and "config.epochs differs: 2, 3" in texts[1]
    )


def test_all_faults_are_told_and_nothing_is_written(finished, tmp_path, capsys):
    folders = [
        copy(finished, tmp_path / "a", lambda found: found.update(status="aborted")),
        copy(finished, tmp_path / "b", commit=f"{COMMIT}-dirty"),
        copy(finished, tmp_path / "c", lambda found: found["training"].update(epochs_run=3)),
    ]
    assert submit(*folders, to=tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    for folder in folders:
        assert any(str(folder) in line for line in lines)
    assert lines[-1].startswith(f"Error: {len(lines) - 1} fault(s)")
    assert not (tmp_path / "out").exists()


# --- the command line


def test_submission_of_that_name_is_left_alone(submitted, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in submitted.iterdir()}
    assert submit(tmp_path / "a", to=tmp_path / "out") == 2
    assert "exists" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in submitted.iterdir()}
    assert len(list(submitted.parent.iterdir())) == 1
    assert submit(tmp_path / "a", to=tmp_path / "out", descriptor="experiment-2") == 0


@pytest.mark.parametrize("option", ["system", "descriptor"])
@pytest.mark.parametrize("name", ["", "a b", "../x", ".x", "é", "a/b"])
def test_name_that_leaves_the_folder_is_refused(run, tmp_path, option, name, capsys):
    assert submit(run, to=tmp_path / "out", **{option: name}) == 2
    assert f"--{option}" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"coolling": "air"}', '{"system_name": "x"}'])
def test_system_that_cannot_be_used_is_refused(run, tmp_path, content, capsys):
    (tmp_path / "system.json").write_text(content)
    status = submit(run, to=tmp_path / "out", **{"system-json": tmp_path / "system.json"})
    assert status == 2 and "system.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["accuracy", "accuracy=high", "accuracy=nan", "speed=1"])
def test_reference_that_is_none_is_refused(run, tmp_path, text, capsys):
    assert submit(run, to=tmp_path / "out", reference=text) == 2
    assert "--reference" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere.sh", "run.sh"])
def test_script_that_cannot_come_along_is_refused(run, tmp_path, name, capsys):
    (tmp_path / "run.sh").write_text("")
    assert submit(run, to=tmp_path / "out", script=tmp_path / name) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_run_that_stands_twice_is_refused(run, tmp_path, capsys):
    assert submit(run, run, to=tmp_path / "out") == 2
    assert "are one run" in capsys.readouterr().err


def test_scripts_of_one_name_are_refused(run, tmp_path, capsys):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "job.sh").write_text(folder)
    scripts = [str(tmp_path / folder / "job.sh") for folder in ("x", "y")]
    arguments = [str(run), "-o", str(tmp_path / "out"), "--system", "box", "--script", *scripts]
    assert submission.main(arguments) == 2
    assert "have one name" in capsys.readouterr().err


def test_organisation_becomes_a_name_that_git_likes():
    assert submission.folder_name("Example University, Ulm/DE") == "Example_University_Ulm_DE"
    assert submission.folder_name("../..") == ""


def test_program_does_without_tensorflow(run, tmp_path):
    code = (
        "import sys; from tools import submission; status = submission.main(sys.argv[1:]); "
        "sys.exit(status or 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(run), "--system", "box", "-o", str(tmp_path / "o")]
    subprocess.run(command, cwd=REPOSITORY, check=True)
