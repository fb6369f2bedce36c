"""Runs as the report and tools/ read them: finished or not, on any machine, without TensorFlow."""

import csv
import functools
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.console import format_bytes
from harness.errors import UserError
from harness.inference.scores import MEAN_SCORES

PARTS = ("config", "devices", "versions", "training", "inference", "sampling")
# Keys of the configuration that say where the files of a run are and do not change what it does.
PLACES = {"run_name", "output_dir", "log_file", "mlperf_logfile"}
MAX_NUMBER = 1e100  # squares and differences of larger numbers overflow


@dataclass(frozen=True)
class Measure:
    """A number that runs are compared by.

    Attributes:
        label: Name in tables for people.
        show: Function that formats a value for people.
        meaning: A short explanation.
        place: Keys that lead to it in results.json; empty if `measures` calculates it.
    """

    label: str
    show: Callable[[float], str]
    meaning: str
    place: tuple = ()


MEASURES = {  # in the order of all tables
    "replicas": Measure("replicas", "{:g}".format, "Devices.", ("devices", "replicas")),
    "epochs": Measure("epochs", "{:g}".format, "Epochs trained.", ("training", "epochs_run")),
    "seconds_per_epoch": Measure("s/epoch", "{:.2f}".format, "Training and validation [s]."),
    "patches_per_second": Measure(
        "patches/s", "{:.1f}".format, "Training without the first epoch, all replicas.",
        ("training", "patches_per_second"),
    ),
    "seconds_per_scene": Measure(
        "s/scene", "{:.3f}".format, "Inference, reading to writing [s].",
        ("inference", "seconds_per_scene"),
    ),
    "val_loss": Measure(
        "validation loss", "{:.4f}".format, "Loss of the validation patches, best epoch.",
        ("training", "val_loss"),
    ),
    "val_accuracy": Measure(
        "validation accuracy", "{:.4f}".format, "Accuracy there.", ("training", "val_accuracy")
    ),
    **{
        key: Measure(score.label, score.show, score.meaning, ("inference", key))
        for key, score in MEAN_SCORES.items()
    },
    "peak_rss": Measure(
        "peak memory", format_bytes, "Peak memory of the first rank's process.", ("peak_rss",)
    ),
    "peak_gpu_memory": Measure(
        "peak GPU memory", format_bytes, "Peak memory of TensorFlow on a GPU of the first rank."
    ),
    "energy_joules": Measure(
        "energy [J]", "{:.0f}".format, "Energy of CPUs and GPUs.", ("sampling", "energy_joules")
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The files of a run.

    Attributes:
        folder: Its folder.
        name: The folder's name.
        results: results.json; those of PARTS that are absent or null are empty dictionaries.
        history: A dictionary for each row of history.csv, with numbers; empty without the file.
        scenes: The same of scenes.csv.
    """

    folder: Path
    name: str
    results: dict
    history: list
    scenes: list

    @property
    def status(self):
        """The status in results.json: 'success', 'aborted', 'running' or 'starting'."""
        return self.results["status"]

    @functools.cached_property
    def samples(self):
        """Rows of samples.csv, read on first use, without a last line that a crash cut off.

        Raises:
            UserError: If the file is damaged in another way.
        """
        return _read_rows(self.folder / "samples.csv", may_be_cut=True)


def read_run(folder):
    """Read a run of any status.

    Args:
        folder: The run's folder.

    Raises:
        UserError: If it is not the folder of a run, or a file in it is damaged.
    """
    folder = Path(folder)
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(results, dict) or not isinstance(results.get("status"), str):
            raise ValueError("it has no status")
        results |= {part: results.get(part) or {} for part in PARTS}
        if wrong := [part for part in PARTS if not isinstance(results[part], dict)]:
            raise ValueError(f"{wrong[0]} should be a dictionary")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} should be that of a run ({type(error).__name__}: {error}). "
            "Name the folder of a run."
        ) from None
    tables = (_read_rows(folder / f"{name}.csv") for name in ("history", "scenes"))
    return Run(folder, folder.resolve().name, results, *tables)


def _read_rows(path, may_be_cut=False):
    """The rows of a CSV file, numbers as numbers; none if there is no file.

    Args:
        path: Path.
        may_be_cut: Whether to ignore what follows the last end of a line.
    """
    try:
        content = path.read_bytes()
        if may_be_cut:
            content = content[: content.rfind(b"\n") + 1]
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        rows = list(reader)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"Cannot read {path}: {error}. Copy it from the run again.") from None
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(
                f"{path} has {len(reader.fieldnames)} columns, but row {n} has another number of "
                "values. Copy it from the run again."
            )
    return [{column: _parse_number(text) for column, text in row.items()} for row in rows]


def _parse_number(text):
    """A number if the text is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def labels(runs):
    """A name for each run: its own, or its folder if two have the same name."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]


def measures(run):
    """The status and the MEASURES of a run; None for a number that it does not have."""
    values = {name: _number_at(run.results, measure.place) for name, measure in MEASURES.items()}
    seconds, epochs = _number_at(run.results, ("training", "seconds")), values["epochs"]
    values["seconds_per_epoch"] = seconds / epochs if seconds and epochs else None
    peaks = run.results.get("peak_gpu_memory")
    peaks = map(number, peaks if isinstance(peaks, list) else [])
    values["peak_gpu_memory"] = max((peak for peak in peaks if peak is not None), default=None)
    return {"status": run.status, **values}


def _number_at(results, place):
    for key in place:
        results = results.get(key) if isinstance(results, dict) else None
    return number(results)


def number(value):
    """A number that can be calculated with and drawn; None for anything else in a file."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_one and abs(value) <= MAX_NUMBER else None


def circumstances(run):
    """All that should be equal for runs to be repeats: {place in results.json: value}.

    These are the configuration without PLACES, devices, versions, mode, commit and scenes.
    """
    results = run.results
    config = {k: v for k, v in results["config"].items() if k not in PLACES}
    parts = {"config": config, "devices": results["devices"], "versions": results["versions"]}
    return {
        **{name: results.get(name) for name in ("mode", "git_commit", "scenes_sha256")},
        **{f"{part}.{key}": value for part, d in parts.items() for key, value in d.items()},
    }


def differences(runs):
    """The circumstances that differ between runs.

    Args:
        runs: Runs.

    Returns:
        {place in results.json, for example 'config.epochs': [value of each run, None if absent]}.
    """
    all_of = [circumstances(run) for run in runs]
    names = dict.fromkeys(name for each in all_of for name in each)
    values = {name: [each.get(name) for each in all_of] for name in names}
    return {name: v for name, v in values.items() if any(value != v[0] for value in v)}


def repeats(runs, ignored=()):
    """Group runs that repeat one another: finished with success in equal circumstances.

    Args:
        runs: Runs.
        ignored: Circumstances that may differ, for example 'config.seed'.

    Returns:
        Lists of Runs, each in its order, in the order of their first; a run without success is
        alone in its list.
    """
    groups = []
    for run in runs:
        for group in groups:
            if run.status == group[0].status == "success" and not (
                differences([group[0], run]).keys() - set(ignored)
            ):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups
