"""Runs as the programs in tools/ read them: whole or not, on any machine, without TensorFlow."""

import csv
import functools
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError

PARTS = ("config", "devices", "versions", "training", "inference", "sampling")
# Keys of the configuration that say where a run's files go, and nothing of what it does.
PLACES = {"run_name", "output_dir", "log_file", "mlperf_logfile"}
GREATEST = 1e100  # number of a file; squares and differences of greater ones overflow

# What a comparison shows of a run besides its status: the name, and where results.json has it.
MEASURES = {
    "replicas": ("devices", "replicas"),
    "epochs": ("training", "epochs_run"),
    "seconds_per_epoch": None,  # the mean; results.json has each
    "patches_per_second": ("training", "patches_per_second"),
    "seconds_per_scene": ("inference", "seconds_per_scene"),
    "val_loss": ("training", "val_loss"),
    "val_accuracy": ("training", "val_accuracy"),
    "accuracy": ("inference", "accuracy"),
    "valid_accuracy": ("inference", "valid_accuracy"),
    "all_cloud_accuracy": ("inference", "all_cloud_accuracy"),
    "threshold_accuracy": ("inference", "threshold_accuracy"),
    "peak_rss": ("peak_rss",),  # [bytes]
    "peak_gpu_memory": None,  # [bytes], of the GPU that took most
    "energy_joules": ("sampling", "energy_joules"),
}


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: Its folder.
        name: The folder's name.
        results: What results.json holds; PARTS that it lacks, or that are null, are empty
            dictionaries.
        history: A dictionary for each row of history.csv, with numbers; empty without the file.
        scenes: Likewise of scenes.csv.
    """

    folder: Path
    name: str
    results: dict
    history: list
    scenes: list

    @property
    def status(self):
        """The status that results.json gives: 'success', 'aborted', 'running' or 'starting'."""
        return self.results["status"]

    @functools.cached_property
    def samples(self):
        """Rows of samples.csv, read when asked for, without a last line that a crash left torn.

        Raises:
            UserError: If the file is damaged otherwise.
        """
        return _rows(self.folder / "samples.csv", may_be_torn=True)


def add_mask_options(add):
    """Give a program the options that choose masks of a run and say where their scenes are.

    Args:
        add: The add_argument of its parser.
    """
    add("--data", type=Path, help="folder of the scene files (default the run's inference_dir)")
    add(
        "--geodetic", metavar="PATH", type=Path,
        help="a Sentinel-3 geodetic_in.nc for one scene, or a folder of PRODUCT.SEN3 folders",
    )  # fmt: skip
    add("--scene", nargs="+", default=[], help="names of scenes, without suffix (default all)")


def read_run(folder):
    """Read a run, of any status.

    Args:
        folder: The run's folder.

    Returns:
        Run.

    Raises:
        UserError: If it is no run's folder, or a file in it is damaged.
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
    tables = (_rows(folder / f"{name}.csv") for name in ("history", "scenes"))
    return Run(folder, folder.resolve().name, results, *tables)


def _rows(path, may_be_torn=False):
    """The rows of a CSV file, numbers as numbers; none where there is no file.

    Args:
        path: Path.
        may_be_torn: Whether what follows the last end of a line is left out.
    """
    try:
        content = path.read_bytes()
        if may_be_torn:
            content = content[: content.rfind(b"\n") + 1]
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        rows = list(reader)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}. Take it from the run again.") from None
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(
                f"{path} has {len(reader.fieldnames)} columns, row {n} another number of "
                "values. Take it from the run again."
            )
    return [{column: _number(text) for column, text in row.items()} for row in rows]


def _number(text):
    """A number where the text is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def labels(runs):
    """A name for each run: its own, or its folder where two have the same."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]


def measures(run):
    """The status and the MEASURES of a run; None where it has no such number."""
    values = {name: _number_at(run.results, *path) for name, path in MEASURES.items() if path}
    seconds, epochs = _number_at(run.results, "training", "seconds"), values["epochs"]
    values["seconds_per_epoch"] = seconds / epochs if seconds and epochs else None
    peaks = run.results.get("peak_gpu_memory")
    peaks = map(number, peaks if isinstance(peaks, list) else [])
    values["peak_gpu_memory"] = max((peak for peak in peaks if peak is not None), default=None)
    return {"status": run.status, **{name: values[name] for name in MEASURES}}


def _number_at(results, *path):
    for key in path:
        results = results.get(key) if isinstance(results, dict) else None
    return number(results)


def number(value):
    """A number that can be calculated with and drawn, or None for whatever else a file holds."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_one and abs(value) <= GREATEST else None


def circumstances(run):
    """All that should be the same for runs to be repeats: {place in results.json: value}.

    The configuration but for PLACES, devices, versions, mode, commit and scenes.
    """
    results = run.results
    config = {k: v for k, v in results["config"].items() if k not in PLACES}
    parts = {"config": config, "devices": results["devices"], "versions": results["versions"]}
    return {
        **{name: results.get(name) for name in ("mode", "git_commit", "scenes_sha256")},
        **{f"{part}.{key}": value for part, d in parts.items() for key, value in d.items()},
    }


def differences(runs):
    """What of their circumstances differs between runs.

    Args:
        runs: Runs.

    Returns:
        {place in results.json, 'config.epochs' say: [its value in each run, None where absent]}.
    """
    all_of = [circumstances(run) for run in runs]
    names = dict.fromkeys(name for each in all_of for name in each)
    values = {name: [each.get(name) for each in all_of] for name in names}
    return {name: v for name, v in values.items() if any(value != v[0] for value in v)}


def repeats(runs, besides=()):
    """Group runs that repeat one another: the same in their circumstances, and ended in success.

    Args:
        runs: Runs.
        besides: Circumstances that may differ, 'config.seed' say.

    Returns:
        Lists of Runs, each in its order, in the order of their first; one that did not end in
        success stands alone.
    """
    groups = []
    for run in runs:
        for group in groups:
            if run.status == group[0].status == "success" and not (
                differences([group[0], run]).keys() - set(besides)
            ):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups
