"""Whether an MLPerf log is the one that its run left, and tells what the run's other files tell."""

import difflib
import hashlib
import json
import logging
import math
import statistics
from itertools import pairwise
from pathlib import Path

from harness import REPOSITORY
from harness.console import printable
from harness.files import jsonable
from harness.records.results import result_event, scene_results

RULES = REPOSITORY / "harness/mlperf_rules.yaml"
TOKEN = ":::MLLOG "
FIELDS = ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
# How far an interval of the log may be from the time that the run measured [s]; and the share.
SLACK_SECONDS, SLACK = 1.0, 0.01


def log_file(run):
    """Path of a run's MLPerf log."""
    return run.folder / Path(run.results["config"]["mlperf_logfile"])


def objections(run):
    """All that is wrong with the evidence of a run that ended in success.

    Args:
        run: harness.records.saved_runs.Run.

    Returns:
        Texts; none if its log, results.json, history.csv and scenes.csv are whole and agree.
    """
    found = []
    try:
        content = log_file(run).read_bytes()
        events, found = parse(content)
        found += digest_objections(run, content) + table_objections(run)
        if events:
            found += rule_objections(log_file(run))
            resumed = [event for event in events if event["key"] == "resumed"]
            others = [event for event in events if event["key"] != "resumed"]
            found += sequence_objections(others, list(expected_events(run)))
            found += resumed_objections(run, resumed)
            found += time_objections(run, events)
    except OSError as error:
        return [f"its MLPerf log cannot be read: {error}"]
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        found.append(f"its files are not those of a whole run ({type(error).__name__}: {error})")
    return found


def parse(content):
    """Read the events of a log.

    Args:
        content: Bytes of the log.

    Returns:
        Events as dictionaries, each with the number of its `line`, none where one cannot be used;
        and objections.
    """
    events, found = [], []
    if not content.endswith(b"\n"):
        found.append("its log does not end with a whole line")
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            event = json.loads(line.removeprefix(TOKEN))
            if f"{TOKEN}{json.dumps(event)}" != line or list(event) != FIELDS:
                raise ValueError("written otherwise than mlperf_logging does")
            is_whole = (
                (event["namespace"], type(event["time_ms"])) == ("", int)
                and isinstance(event["key"], str)
                and isinstance(event["metadata"]["file"], str)
                and type(event["metadata"]["lineno"]) is int
            )
            if not is_whole:
                raise ValueError("a field of another kind than mlperf_logging writes")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            found.append(f"line {number} of its log is no event: {type(error).__name__}: {error}")
        else:
            events.append(event | {"line": number})
    return ([] if found else events), found


def digest_objections(run, content):
    """Compare a log with the SHA-256 that the run took of it."""
    wanted = run.results.get("mlperf_sha256")
    if wanted is None:
        return ["results.json has no mlperf_sha256, whether its log is whole is not known"]
    if wanted != (found := hashlib.sha256(content).hexdigest()):
        return [f"its log was changed: SHA-256 is {found}, by results.json {wanted}"]
    return []


def rule_objections(path):
    """What the compliance checker of mlperf_logging objects to, the first line of each."""
    from mlperf_logging.compliance_checker import mlp_compliance, mlp_parser

    checker = mlp_compliance.make_checker("hpc", "3.0.0", quiet=True, werror=False)
    logging.disable(logging.CRITICAL)  # it tells what it finds on the root logger
    try:
        lines, errors = mlp_parser.parse_file(str(path), ruleset="3.0.0")
        checker.check_loglines(lines, str(RULES))
    finally:
        logging.disable(logging.NOTSET)
    found = [*checker.overwritable.values(), *checker.not_overwritable, *(e for _, e in errors)]
    return [f"mlperf_logging objects to its log: {text.strip().splitlines()[0]}" for text in found]


# --- what a log has to hold -----------------------------------------------------------------


def expected_events(run):
    """Yield what a log must hold by the run's other files: (key, value, metadata), in order."""
    results = run.results
    config, devices, training = results["config"], results["devices"], results["training"]
    yield from {
        "submission_benchmark": config["benchmark"],
        "submission_org": config["organisation"],
        "submission_division": config["division"],
        "submission_status": config["status"],
        "submission_platform": config["platform"],
        "submission_poc_name": config["name"],
        "submission_poc_email": config["email"],
        "submission_version": config["submission"]["version"],
        "submission_github_commit_version": results["git_commit"],
        "cache_clear": False,
        "init_start": None,
        "seed": config["seed"],
        "global_batch_size": config["batch_size"],
        "train_samples": training["patches_train"],
        "eval_samples": training["patches_test"],
        "opt_name": "adam",
        "opt_base_learning_rate": config["learning_rate"],
        "number_of_ranks": devices["ranks"],
        "number_of_nodes": devices["nodes"],
        "accelerators_per_node": devices["accelerators_per_node"],
        "init_stop": None,
        "run_start": None,
    }.items()
    for row in run.history:
        for key in ("epoch_start", "epoch_stop", "eval_start", "eval_accuracy", "eval_stop"):
            value = row["val_accuracy"] if key == "eval_accuracy" else None
            yield key, value, {"epoch_num": row["epoch"]}
    yield from {"inference_start": None, "inference_stop": None}.items()
    yield "result", result_event(results)
    yield "run_stop", None, {"status": "success"}


def event_type(key):
    """The type that mlperf_logging gives an event of this key."""
    if key.endswith("_start"):
        return "INTERVAL_START"
    return "INTERVAL_END" if key.endswith("_stop") else "POINT_IN_TIME"


def label(key, metadata):
    """How an event is called here: 'eval_stop of epoch 3'."""
    return f"{key} of epoch {metadata['epoch_num']}" if "epoch_num" in metadata else key


def sequence_objections(events, expected):
    """Compare events with those expected: missing ones, others, and what they say."""
    wanted = [(key, value, *(metadata or [{}])) for key, value, *metadata in expected]
    names = [label(key, metadata) for key, _, metadata in wanted]
    found_names = [label(event["key"], event["metadata"]) for event in events]
    found = []
    matcher = difflib.SequenceMatcher(a=names, b=found_names, autojunk=False)
    for change, i, i_end, j, j_end in matcher.get_opcodes():
        if change != "equal":
            found += [f"its log lacks the event {name}" for name in names[i:i_end]]
            found += [
                f"line {event['line']} of its log is an event out of place, "
                f"{label(event['key'], event['metadata'])}"
                for event in events[j:j_end]
            ]
            continue
        for (key, value, metadata), event in zip(wanted[i:i_end], events[j:j_end], strict=True):
            said = {k: v for k, v in event["metadata"].items() if k not in ("file", "lineno")}
            for what, one, other in (
                ("value", value, event["value"]),
                ("event_type", event_type(key), event["event_type"]),
                ("metadata", metadata, said),
            ):
                if json.dumps(one) != json.dumps(other):  # 1, 1.0 and true are not the same
                    found.append(
                        f"line {event['line']} of its log, {key}, should have the {what} "
                        f"{json.dumps(one)} by the run's other files, found {json.dumps(other)}"
                    )
    return found


def resumed_objections(run, events):
    """Check that a run that was resumed says so, to the last time."""
    values, n = [event["value"] for event in events], run.results["resumed"]
    is_whole = all(type(value) is int for value in values) and values == sorted(set(values))
    if not is_whole or (values[-1] if values else 0) != n:
        return [f"its log should say that it was resumed up to {n} times, found {values}"]
    return []


def time_objections(run, events):
    """Check that time goes on, and intervals take as long as the run measured."""
    found = [
        f"line {later['line']} of its log is earlier than the line before"
        for earlier, later in pairwise(events)
        if later["time_ms"] < earlier["time_ms"]
    ]
    broken = {event["metadata"].get("epoch_num") for event in events if event["key"] == "resumed"}
    times = {label(event["key"], event["metadata"]): event["time_ms"] / 1000 for event in events}
    spans = [
        (
            f"epoch_start of epoch {row['epoch']}",
            f"eval_stop of epoch {row['epoch']}",
            row["seconds"],
        )
        for row in run.history
        if row["epoch"] not in broken  # it took more than the log has of it
    ]
    if not run.results["resumed"]:
        spans.append(("inference_start", "inference_stop", run.results["inference"]["seconds"]))
    for start, stop, seconds in spans:
        if start in times and stop in times:
            took = times[stop] - times[start]
            if abs(took - seconds) > SLACK_SECONDS + SLACK * seconds:
                found.append(
                    f"its log has {took:.3f} s from {start} to {stop}, the run measured "
                    f"{seconds:.3f} s"
                )
    return found


# --- the tables -----------------------------------------------------------------------------


def table_objections(run):
    """Compare results.json with history.csv and scenes.csv."""
    training, inference, found = run.results["training"], run.results["inference"], []
    best = min(run.history, key=lambda row: row["val_loss"], default={})
    wanted = {
        "training.epochs_run": (training["epochs_run"], len(run.history)),
        "training.seconds": (training["seconds"], sum(row["seconds"] for row in run.history)),
        "training.seconds_per_epoch": (
            training["seconds_per_epoch"],
            [row["seconds"] for row in run.history],
        ),
        **{
            f"training.{name}": (training[name], best.get(column))
            for name, column in (
                ("best_epoch", "epoch"), ("loss", "loss"), ("accuracy", "accuracy"),
                ("val_loss", "val_loss"), ("val_accuracy", "val_accuracy"),
            )
        },
    }  # fmt: skip
    if run.history and not run.results.get("bad_scenes"):  # epochs of equally many patches
        rates = [row["patches_per_second"] for row in run.history]
        mean = statistics.harmonic_mean(rates[1:] or rates)
        wanted["training.patches_per_second"] = (training["patches_per_second"], mean)
    if run.scenes:
        counted = jsonable(scene_results(run.scenes))
        counted["seconds_per_scene"] = inference["seconds"] / len(run.scenes)
        wanted |= {f"inference.{name}": (inference[name], counted[name]) for name in counted}
    for name, (said, counted) in wanted.items():
        if not _same(said, counted):
            table = "history.csv" if name.startswith("training") else "scenes.csv"
            found.append(
                printable(
                    f"results.json has {name} {said!r:.100}, by {table} it is {counted!r:.100}"
                )
            )
    return found


def _same(one, other):
    """Equal, numbers up to the rounding of sums."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return all(_same(one[key], other[key]) for key in one)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return one == other
