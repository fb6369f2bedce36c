"""Runs as the report and tools/ read them: finished or not, on any machine, without TensorFlow."""

import contextlib
import csv
import functools
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.console import format_bytes
from harness.errors import UserError
from harness.files import read_text
from harness.inference.scores import MEAN_SCORES, SCENE_PARTS

PARTS = ("config", "devices", "versions", "training", "inference", "sampling")
# Keys of the configuration that say where the files of a run are and do not change what it does.
PLACES = {"run_name", "output_dir", "log_file", "mlperf_logfile"}
TEXT_COLUMNS = {"scene", "day_night"}  # of history.csv, scenes.csv and samples.csv
MAX_NUMBER = 1e100  # squares and differences of larger numbers overflow


@dataclass(frozen=True)
class Measure:
    """A number that runs are compared by."""

    label: str  # name in tables for people
    show: Callable[[float], str]  # formats a value for people
    meaning: str
    place: tuple = ()  # keys that lead to it in results.json; empty if `measures` calculates it


MEASURES = {  # in the order of all tables
    "replicas": Measure("replicas", "{:g}".format, "Devices.", ("devices", "replicas")),
    "epochs": Measure("epochs", "{:g}".format, "Epochs trained.", ("training", "epochs_run")),
    "seconds_per_epoch": Measure("s/epoch", "{:.2f}".format, "Training and validation [s]."),
    "patches_per_second": Measure(
        "patches/s", "{:.1f}".format, "Training without the first epoch, all replicas.",
        ("training", "patches_per_second"),
    ),
    "seconds_to_target": Measure(
        "s to target", "{:.1f}".format,
        "Training and validation until target_accuracy, 0.9 if it is not set, was reached [s].",
        ("training", "seconds_to_target"),
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


def _numbers(*names):
    return dict.fromkeys(names, float)


KINDS = {  # of the fields of results.json that are calculated with: numbers, lists, dictionaries
    **_numbers("seconds", "peak_rss"),
    "parts": [_numbers("seconds", "checkpoint_seconds")],
    "peak_gpu_memory": [float],
    "bad_scenes": [{}],
    "network": {},
    "config": _numbers("batch_size"),
    "devices": _numbers("replicas", "nodes", "ranks"),
    "training": {
        **_numbers("seconds", "epochs_run", "best_epoch", "patches_per_second", "warm_up_seconds"),
        **_numbers("val_loss", "val_accuracy", "target_accuracy", "seconds_to_target"),
        "baselines": _numbers("all_cloud_accuracy"),
        **{f"{part}seconds_per_epoch": [float] for part in ("", "train_", "input_")},
    },
    "inference": {
        **_numbers("seconds", "seconds_per_scene", *MEAN_SCORES),
        "seconds_per_scene_parts": _numbers(*SCENE_PARTS),
        "shares": _numbers(*SCENE_PARTS),
    },
    "sampling": {
        **_numbers("energy_joules", "cpu_energy_joules", "gpu_energy_joules"),
        **_numbers("cpu_seconds", "read_bytes", "written_bytes"),
    },
}


@dataclass(frozen=True)
class Run:
    """The files of a run; a table has NaN where the file has no usable number.

    Attributes:
        folder: Its folder.
        name: The folder's name.
        results: results.json as it is; those of PARTS that are absent are empty dictionaries.
        history: A dictionary for each row of history.csv; empty without the file.
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

    @property
    def warnings(self):
        """What looked wrong in the run, as texts; see run_warnings."""
        found = self.results.get("warnings")
        return list(map(str, found)) if isinstance(found, list) else []

    @property
    def is_synthetic(self):
        """Whether any of its scenes were synthetic; runs before this was recorded count as not."""
        return any(
            self.results[part].get("synthetic") is True for part in ("training", "inference")
        )

    @functools.cached_property
    def clean_results(self):
        """`results` to calculate with: None or empty where a field is not what KINDS says."""
        return _of_kind(self.results, KINDS)

    @functools.cached_property
    def samples(self):
        """Rows of samples.csv, read on first use, without a last line that a crash cut off."""
        return _read_rows(self.folder / "samples.csv", may_be_cut=True)


def read_run(folder):
    """Read a run of any status.

    Raises:
        UserError: If the folder is not that of a run, or a file in it is damaged.
    """
    folder = Path(folder)
    file = folder / "results.json"
    try:
        results = json.loads(read_text(file))
        if not isinstance(results, dict) or not isinstance(results.get("status"), str):
            raise ValueError("it has no status")
        results |= {part: results.get(part) or {} for part in PARTS}
        if wrong := [part for part in PARTS if not isinstance(results[part], dict)]:
            raise ValueError(f"{wrong[0]} should be a dictionary")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not the folder of a run: it has no results.json. "
            "Name the folder of a run."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} should be that of a run ({type(error).__name__}: {error}). "
            "Name the folder of a run."
        ) from None
    tables = (_read_rows(folder / f"{name}.csv") for name in ("history", "scenes"))
    return Run(folder, folder.resolve().name, results, *tables)


def _of_kind(value, kind):
    """The value, in which everything that is not of its kind is None, or empty if a container."""
    if isinstance(kind, dict):
        value = value if isinstance(value, dict) else {}
        return value | {key: _of_kind(value[key], k) for key, k in kind.items() if key in value}
    if isinstance(kind, list):
        return [_of_kind(v, kind[0]) for v in value] if isinstance(value, list) else []
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= MAX_NUMBER else None


def clean_row(row):
    """A row of a table: texts in TEXT_COLUMNS, elsewhere numbers, NaN for anything else."""
    return {
        column: str(value) if column in TEXT_COLUMNS else _parse_number(value)
        for column, value in row.items()
    }


def _parse_number(value):
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            value = kind(value)
            break
    number = _of_kind(value, float)
    return math.nan if number is None else number


def _read_rows(path, may_be_cut=False):
    """The rows of a CSV file, cleaned by `clean_row`; none if there is no file."""
    try:
        content = read_text(path)
        if may_be_cut:
            content = content[: content.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
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
    return list(map(clean_row, rows))


def labels(runs):
    """A name for each run: its own, or its folder if two have the same name."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]


def measures(run):
    """The status and the MEASURES of a run; None for a number that it does not have."""
    results, values = run.clean_results, {}
    for name, measure in MEASURES.items():
        *parts, key = measure.place or (name,)
        values[name] = (results[parts[0]] if parts else results).get(key)
    seconds, epochs = results["training"].get("seconds"), values["epochs"]
    values["seconds_per_epoch"] = seconds / epochs if seconds and epochs else None
    peaks = [peak for peak in results.get("peak_gpu_memory", []) if peak is not None]
    values["peak_gpu_memory"] = max(peaks, default=None)
    return {"status": run.status, **values}


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
    """The circumstances that differ between runs: {place: [value of each run, None if absent]}."""
    all_of = [circumstances(run) for run in runs]
    names = dict.fromkeys(name for each in all_of for name in each)
    values = {name: [each.get(name) for each in all_of] for name in names}
    return {name: v for name, v in values.items() if any(value != v[0] for value in v)}


def repeats(runs, ignored=()):
    """Group runs that repeat one another: successful, in equal circumstances except the ignored.

    Returns:
        Lists of Runs, in the order of their first; a run without success is alone in its list.
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
