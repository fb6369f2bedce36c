"""Check that an MLPerf log is the one that its run wrote, and that the run's files agree.

harness/mlperf_rules.yaml defines the events and their order; values and times are compared here.
Each check returns faults as texts; files that are not those of a complete run raise some error.
"""

import logging
import math
import statistics

from mlperf_logging.compliance_checker import mlp_compliance, mlp_parser

from harness import REPOSITORY
from harness.files import MAX_TEXT_BYTES, check_regular, file_sha256, jsonable
from harness.records import mlperf_log
from harness.records.results import result_event, scene_results
from harness.training.state import TrainingState

RULES = REPOSITORY / "harness/mlperf_rules.yaml"
# How much an interval of the log may differ from the time that the run measured.
TOLERANCE_SECONDS, TOLERANCE_RATIO = 1.0, 0.01


def log_file(run):
    """Path of a run's MLPerf log."""
    return run.folder / run.results["config"]["mlperf_logfile"]


def read_events(run):
    """Read a run's log: mlp_parser.LogLines with timestamps in ms, and the invalid lines."""
    check_regular(log_file(run), MAX_TEXT_BYTES)
    return mlp_parser.parse_file(str(log_file(run)), ruleset="3.0.0")


def event_name(event):
    """The key of an event and its epoch, if any: 'eval_stop of epoch 3'."""
    epoch = event.value["metadata"].get("epoch_num")
    return event.key if epoch is None else f"{event.key} of epoch {epoch}"


def digest_faults(run):
    """Compare the log with the SHA-256 that the run stored in results.json."""
    expected, found = run.results.get("mlperf_sha256"), file_sha256(log_file(run))
    return [] if found == expected else [f"SHA-256 of its log is {found}, expected {expected}"]


def rule_faults(run):
    """Apply the compliance checker of mlperf_logging; of each objection the first line."""
    checker = mlp_compliance.make_checker("hpc", "3.0.0", quiet=True, werror=False)
    events, errors = read_events(run)
    logging.disable(logging.CRITICAL)  # the checker also reports on the root logger
    try:
        checker.check_loglines(events, str(RULES))
    finally:
        logging.disable(logging.NOTSET)
    texts = [*checker.overwritable.values(), *checker.not_overwritable, *(e for _, e in errors)]
    return [f"mlperf_logging rejects its log: {text.strip().splitlines()[0]}" for text in texts]


def value_faults(run):
    """Compare the values in the log with results.json and history.csv."""
    places = mlperf_log.SUBMISSION | mlperf_log.HYPERPARAMETERS
    expected = {key: mlperf_log.value_at(run.results, place) for key, place in places.items()}
    expected[mlperf_log.RESULT] = result_event(run.results)
    logged = {event_name(event): event.value["value"] for event in read_events(run)[0]}
    # The log may have more epochs than history.csv, and it may hide that the run was resumed.
    expected |= {name: None for name in logged if name.startswith("eval_accuracy")}
    for row in run.history:
        expected[f"eval_accuracy of epoch {row['epoch']}"] = row["val_accuracy"]
    expected["last resumed"] = run.results["resumed"]
    logged["last resumed"] = max((logged[n] for n in logged if n.startswith("resumed")), default=0)
    return [
        f"its log has {name} {logged.get(name)!r}, expected {value!r} by its other files"
        for name, value in expected.items()
        if logged.get(name) != value
    ]


def time_faults(run):
    """Compare the times in the log with those that the run measured.

    Only the log includes the time in which the program was suspended, see harness.clock.
    """
    suspended = sum(part.get("suspended_seconds", 0) for part in run.results["parts"])
    events = read_events(run)[0]
    times = {event_name(event): event.timestamp / 1000 for event in events}
    spans = []
    for row in run.history:
        epoch = f"of epoch {row['epoch']}"
        if f"resumed {epoch}" not in times:  # the log shows an epoch that was resumed too short
            spans.append((f"epoch_start {epoch}", f"eval_stop {epoch}", row["seconds"]))
    if not run.results["resumed"]:
        spans.append(("inference_start", "inference_stop", run.results["inference"]["seconds"]))
    faults = []
    for start, stop, seconds in spans:
        found = times.get(stop, math.nan) - times.get(start, math.nan)
        tolerance = TOLERANCE_SECONDS + TOLERANCE_RATIO * seconds
        if not -tolerance <= found - seconds <= tolerance + suspended:
            faults.append(
                f"its log has {found:.3f} s from {start} to {stop}, expected {seconds:.3f} s"
            )
    if (timestamps := [event.timestamp for event in events]) != sorted(timestamps):
        faults.append("the times in its log go backwards")
    return faults


def table_faults(run):
    """Compare results.json with history.csv and scenes.csv."""
    best = min(run.history, key=lambda row: row["val_loss"])
    target = run.results["training"]["target_accuracy"]
    training = {
        "epochs_run": len(run.history),
        "best_epoch": best["epoch"],
        **{name: best[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
        "seconds": sum(row["seconds"] for row in run.history),
        "seconds_per_epoch": [row["seconds"] for row in run.history],
        "seconds_to_target": TrainingState(run.history).seconds_to(target),
    }
    if not run.results.get("bad_scenes"):  # all epochs have the same number of patches
        speeds = [row["patches_per_second"] for row in run.history]
        training["patches_per_second"] = statistics.harmonic_mean(speeds[1:] or speeds)
    scores = jsonable(scene_results(run.scenes))
    inference = {name: value for name, value in scores.items() if name not in ("day", "night")}
    inference["seconds_per_scene"] = run.results["inference"]["seconds"] / len(run.scenes)
    tables = {"history.csv": ("training", training), "scenes.csv": ("inference", inference)}
    return [
        f"results.json has {part}.{name} {run.results[part][name]!r}, expected {value!r} by {table}"
        for table, (part, values) in tables.items()
        for name, value in values.items()
        if not _is_close(value, run.results[part][name])
    ]


def _is_close(expected, found):
    """Whether two values are equal, numbers up to the rounding of sums."""
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-12)
    return expected == found


CHECKS = (digest_faults, rule_faults, value_faults, time_faults, table_faults)
