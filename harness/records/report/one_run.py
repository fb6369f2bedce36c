"""What tools/report.py shows of one run: numbers for its template, charts and pictures."""

import functools
import json
import math
from pathlib import Path

import numpy as np

from harness.config import Config, load_config
from harness.console import format_bytes, format_duration, progress
from harness.data.hdf5 import open_hdf5
from harness.data.mask_files import mask_files
from harness.errors import UserError
from harness.records.report import charts, pictures
from harness.records.saved_runs import PLACES, measures, number

BINS = 1000  # of probability
RELIABILITY_BINS = 20
FEWEST_PIXELS = 100  # of a point in the reliability diagram
MOST_GPU_LINES = 3  # in a chart; of more GPUs the mean and the extremes
LONGEST_GAP = 30.0  # [s] between two samples that a chart shows; a resumed run may wait for days
SCENE_COLUMNS = {  # of scenes.csv: (heading, digits)
    "accuracy": ("accuracy", 4),
    "valid_accuracy": ("valid accuracy", 4),
    "balanced_accuracy": ("balanced accuracy", 4),
    "precision": ("precision", 4),
    "recall": ("recall", 4),
    "f1": ("F1", 4),
    "iou": ("IoU", 4),
    "threshold_accuracy": ("threshold baseline", 4),
    "all_cloud_accuracy": ("cloud in label", 4),
    "cloud_fraction": ("cloud in mask", 4),
    "seconds": ("seconds", 2),
}
PHASES = {"epoch": "training", "eval": "validation", "inference": "inference"}


def numbers(values):
    """A list of finite numbers and NaN, of what should be a list of numbers."""
    known = map(number, values if isinstance(values, list) else [])
    return [math.nan if value is None else value for value in known]


def mean(values):
    """Mean of the numbers in a list; None without any."""
    known = [value for value in map(number, values) if value is not None]
    return sum(known) / len(known) if known else None


def dictionaries(values):
    """The dictionaries in what should be a list of them."""
    return [value for value in (values if isinstance(values, list) else []) if type(value) is dict]


# --- one run --------------------------------------------------------------------------------


def report_of_one(run, data):
    """What the page shows of a run, by the names that the template uses.

    Args:
        run: Run of harness.records.saved_runs.
        data: Folder of the scene files; None for the run's own inference_dir.
    """
    results, notes = run.results, []
    training, inference = results["training"], results["inference"]
    masks = mask_files(run.folder)
    rows = run.scenes
    if masks and not rows:
        rows = rows_of_masks(masks)
        notes.append(f"Masking had not ended: scores are those of the {len(rows)} masks so far.")
    folder = scene_folder(run, data)
    scenes = pictures.scenes_by_name(folder) if masks else {}
    if masks and not scenes:
        notes.append(f"No pictures: there are no scene files in {folder} (--data says where).")
    known = {name: (masks[name], scenes[name]) for name in masks if name in scenes}
    others = set()
    calibrated = calibration(known, notes, others)
    chosen = chosen_pictures(rows, known, notes, others)
    if others:
        notes.append(
            f"{len(others)} scene(s) are not those that were masked ({min(others)} for one): they "
            "have no picture and no part in the calibration. --data says where the scenes are."
        )
    return {
        "run": run,
        "accuracy": number(inference.get("accuracy")) or mean([r.get("accuracy") for r in rows]),
        "seconds_per_scene": number(inference.get("seconds_per_scene")),
        "patches_per_second": number(training.get("patches_per_second")),
        "validation": number(training.get("val_accuracy")),
        "baselines": {
            key: number(inference.get(key)) or mean([row.get(key) for row in rows])
            for key in ("valid_accuracy", "all_cloud_accuracy", "threshold_accuracy")
        },
        "speed": speed(run),
        "facts": facts(run),
        "changed": changed_settings(results["config"]),
        "parts": [
            {
                "start": moment(part.get("start", "")),
                "status": part.get("status", ""),
                "took": _told(format_duration, part.get("seconds")) or "",
            }
            for part in dictionaries(results.get("parts"))
        ],
        "bad_scenes": [
            {key: str(bad.get(key, "")) for key in ("path", "reason", "during")}
            for bad in dictionaries(results.get("bad_scenes"))
        ],
        "curves": training_curves(run, training.get("best_epoch")) if run.history else [],
        "times": time_parts(run),
        "scene_times": scene_time_parts(inference),
        "scenes": scene_table(rows),
        "scene_chart": scene_chart(rows),
        "kinds": by_kind(rows),
        "confusion": confusion(rows),
        "calibration": calibrated,
        "pictures": chosen,
        "machine": machine_charts(run),
        "notes": notes,
    }


def scene_folder(run, data):
    """Where the scene files of a run should be."""
    if data:
        return data
    try:
        return load_config(run.folder / "config.yaml").inference_dir  # absolute
    except UserError:
        return Path(str(run.results["config"].get("inference_dir", "unknown")))


def rows_of_masks(masks):
    """Rows as in scenes.csv, of the masks of a run that ended before it wrote that file."""
    rows = []
    for path in masks.values():
        with open_hdf5(path) as file:
            rows.append(json.loads(file.attrs["row"]))
    return dictionaries(rows)


def speed(run):
    """What belongs beside the speeds, as pairs of texts."""
    measured, training = measures(run), run.results["training"]
    pairs = {
        "seconds per epoch": measured["seconds_per_epoch"],
        "epochs": measured["epochs"],
        "best epoch": number(training.get("best_epoch")),
        "replicas": measured["replicas"],
    }
    pairs = {name: f"{value:.{2 * ('seconds' in name)}f}" for name, value in pairs.items() if value}
    if energy := _told(_energy, run.results["sampling"].get("energy_joules")):
        pairs["energy"] = energy
    return pairs


def facts(run):
    """What ran where, as pairs of texts."""
    results, training, inference = run.results, run.results["training"], run.results["inference"]
    devices, versions = results["devices"], results["versions"]
    config, sampling = results["config"], results["sampling"]
    pairs = {
        "Devices": devices.get("description"),
        "Platform": config.get("platform"),
        "Organisation": config.get("organisation"),
        "Begin": moment(results.get("start")),
        "Took": _told(format_duration, results.get("seconds")),
        "Mode": results.get("mode"),
        "Job": results.get("job"),
        "Trained on": _counted(
            training, "scenes_train", "scenes", "patches_train", "patches", "epochs_run", "epochs"
        ),
        "Validated on": _counted(training, "scenes_test", "scenes", "patches_test", "patches"),
        "Masked": _counted(inference, "scenes", "scenes"),
        "Precision": config.get("precision"),
        "Bit for bit repeatable": {"True": "yes", "False": "no"}.get(
            str(devices.get("deterministic"))
        ),
        "Peak memory": _told(format_bytes, results.get("peak_rss")),
        "Peak GPU memory": _told(format_bytes, measures(run)["peak_gpu_memory"]),
        "Energy of CPUs": _told(_energy, sampling.get("cpu_energy_joules")),
        "Energy of GPUs": _told(_energy, sampling.get("gpu_energy_joules") or None),
        "CPU time": _told(format_duration, sampling.get("cpu_seconds")),
        "Read, cache included": _told(format_bytes, sampling.get("read_bytes")),
        "Written, cache included": _told(format_bytes, sampling.get("written_bytes")),
        "Commit": results.get("git_commit"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {name: str(value) for name, value in pairs.items() if value not in (None, "")}


def _told(how, value):
    return None if number(value) is None or value < 0 else how(value)


def moment(text):
    """A time of results.json for people."""
    return str(text or "").replace("T", " ").replace("+00:00", " UTC")


def _energy(joules):
    return f"{joules / 1000:.1f} kJ" if joules < 3.6e5 else f"{joules / 3.6e6:.2f} kWh"


def _counted(part, *keys_and_words):
    keys, words = keys_and_words[::2], keys_and_words[1::2]
    return ", ".join(
        f"{part[key]} {word}" for key, word in zip(keys, words, strict=True) if part.get(key)
    )


def changed_settings(config):
    """Settings other than the reference workload's: {key: (value, reference)}."""
    reference = Config().model_dump(by_alias=True, mode="json")
    return {
        key: (value, reference.get(key))
        for key, value in config.items()
        if key not in PLACES and value != reference.get(key)
    }


def training_curves(run, best):
    """Charts of loss and accuracy over epochs, and of the time of each."""
    column = {
        key: numbers([row.get(key) for row in run.history])
        for key in ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds")
    }
    found = []
    for key in ("loss", "accuracy"):
        values = {run.name: (column["epoch"], column[key], column[f"val_{key}"])}
        found.append(
            charts.chart(
                f"curve-{key}",
                f"{key} of training and validation, epoch by epoch",
                functools.partial(charts.learning_curve, runs=values, key=key, best=best),
            )
        )
    training = run.results["training"]
    trained = np.array(numbers(training.get("train_seconds_per_epoch")))
    waited = np.array(numbers(training.get("input_seconds_per_epoch")))
    total = np.array(column["seconds"])
    parts = {"epoch": total}
    if len(trained) == len(total):
        parts = {"training": trained, "validation": total - trained}
        if len(waited) == len(total):
            rest = total - trained
            parts = {"steps": trained - waited, "waiting for data": waited, "validation": rest}
    found.append(
        charts.chart(
            "epochs", "seconds of each epoch", lambda axes: charts.epoch_times(axes, parts)
        )
    )
    return found


def time_parts(run):
    """Where the time of a run went: [(what, seconds)], with what is left at the end."""
    results, training = run.results, run.results["training"]
    whole = number(results.get("seconds"))
    trained = np.nansum(numbers(training.get("train_seconds_per_epoch")))
    waited = np.nansum(numbers(training.get("input_seconds_per_epoch")))
    parts = dictionaries(results.get("parts"))
    checkpoints = [part.get("checkpoint_seconds") for part in parts]
    last = " (last part)" if len(parts) > 1 else ""  # of earlier ones it is not known
    parts = {
        f"setting up: tracing, compiling{last}": number(training.get("warm_up_seconds")),
        "training: waiting for data": waited,
        "training: steps": trained - waited,
        "validation": np.nansum(numbers(training.get("seconds_per_epoch"))) - trained,
        "checkpoints": np.nansum(numbers(checkpoints)),
        f"inference{last}": number(results["inference"].get("seconds")),
    }
    parts = {what: float(seconds) for what, seconds in parts.items() if seconds}
    if whole and parts and (rest := whole - sum(parts.values())) > 0:
        parts["all else: start, scene checks, writing"] = rest
    return list(parts.items())


def scene_time_parts(inference):
    """Where the time of a scene went, on average: [(what, seconds)]."""
    words = {
        "read": "reading, beside the network",
        "network": "network",
        "stitch": "stitching",
        "score": "scoring",
        "write": "writing",
    }
    parts = inference.get("seconds_per_scene_parts")
    parts = parts if isinstance(parts, dict) else {}
    return [(word, parts[key]) for key, word in words.items() if number(parts.get(key))]


# --- scenes ---------------------------------------------------------------------------------


def scene_table(rows):
    """Rows of the table of scenes, the worst first: (name in three pieces, kind, numbers)."""
    table = [
        (
            name_pieces(str(row.get("scene", ""))),
            str(row.get("day_night", "")),
            [(number(row.get(key)), digits) for key, (_, digits) in SCENE_COLUMNS.items()],
        )
        for row in rows
    ]
    return sorted(table, key=lambda row: math.inf if row[2][0][0] is None else row[2][0][0])


def name_pieces(name):
    """A scene's name, divided around the time that tells it from others."""
    head, digits, tail = name[:16], name[16:31], name[31:]
    is_product = head.startswith("S3") and len(digits) == 15 and digits[8] == "T"
    return (head, digits, tail) if is_product else ("", name, "")


def by_kind(rows):
    """Means over day, night and all scenes: [(kind, scenes, numbers)]."""
    kinds = sorted({str(row.get("day_night", "")) for row in rows})
    groups = {kind: [r for r in rows if str(r.get("day_night", "")) == kind] for kind in kinds}
    return [
        (
            kind or "unknown",
            len(members),
            [
                (mean([row.get(key) for row in members]), digits)
                for key, (_, digits) in SCENE_COLUMNS.items()
            ],
        )
        for kind, members in (groups | {"all": rows}).items()
        if members
    ]


def scene_chart(rows):
    """Chart of the accuracy of each scene; None without scores."""
    points = {}
    for row in rows:
        pair = number(row.get("all_cloud_accuracy")), number(row.get("accuracy"))
        if None not in pair:
            points.setdefault(str(row.get("day_night", "")), []).append(pair)
    points = dict(sorted(points.items()))
    if not points:
        return None
    return charts.chart(
        "scenes",
        "accuracy of each scene over the share of cloud in its label",
        lambda axes: charts.scene_accuracies(axes, points),
        height=3.2,
    )


def confusion(rows):
    """Counts of pixels over all scenes, and their shares: {'tp': (count, share)}; or None."""
    counts = {
        key: sum(number(row.get(key)) or 0 for row in rows) for key in ("tp", "fn", "fp", "tn")
    }
    total = sum(counts.values())
    return {key: (count, count / total) for key, count in counts.items()} if total else None


def calibration(known, notes, others):
    """Reliability diagram and ROC over the pixels that have data, a probability and a label.

    Args:
        known: {scene: (mask file, scene file)}.
        notes: Takes what is to be told.
        others: Takes the names of scenes that are not those that were masked.

    Returns:
        Dictionary of the charts and their numbers; None without such pixels.
    """
    counts, n_scenes = np.zeros((2, BINS), np.int64), 0  # of clear and cloud, by probability
    errors = []
    for name, paths in progress(known.items(), "Reading probabilities", len(known)):
        try:
            found = pictures.read_label_and_probability(*paths)
        except pictures.OtherScene:
            others.add(name)
            continue
        except UserError as error:
            errors.append(error)
            continue
        if found:
            label, probability = found
            counts += histogram(label, probability)
            n_scenes += 1
    if errors:
        notes.append(f"{len(errors)} scene(s) are missing in the calibration: {errors[0]}")
    if not counts.sum(axis=1).all():
        return None  # nothing was kept, or all is cloud
    clear, cloud = counts
    # Rates of pixels above the lower edge of each bin, from the highest threshold to the lowest.
    false_alarms, hits = (
        np.concatenate([[0], np.cumsum(n[::-1]) / n.sum()]) for n in (clear, cloud)
    )
    middle = BINS - BINS // 2  # index of the threshold 0.5
    cells = counts.reshape(2, RELIABILITY_BINS, -1)
    totals = cells.sum(axis=(0, 2))
    filled = totals >= FEWEST_PIXELS
    centres = (np.arange(BINS) + 0.5).reshape(RELIABILITY_BINS, -1) / BINS
    probabilities = (cells.sum(axis=0) * centres).sum(axis=1)[filled] / totals[filled]
    shares = cells[1].sum(axis=1)[filled] / totals[filled]
    step = BINS // 100  # enough for the eye
    return {
        "scenes": n_scenes,
        "auc": float(np.trapezoid(hits, false_alarms)),
        "error": float((totals[filled] * abs(probabilities - shares)).sum() / totals.sum()),
        "reliability": charts.chart(
            "reliability",
            "share of cloud over the probability that the network gives",
            lambda axes: charts.reliability(axes, probabilities, shares),
            height=3.2,
        ),
        "roc": charts.chart(
            "roc",
            "true positive rate over false positive rate",
            lambda axes: charts.roc(
                axes, false_alarms[::step], hits[::step], (false_alarms[middle], hits[middle])
            ),
            height=3.2,
        ),
    }


def histogram(label, probability):
    """Pixels by probability: int64 (2, BINS) of clear and of cloud."""
    index = np.clip(probability * BINS, 0, BINS - 1).astype(np.int64)
    return np.bincount(index + BINS * label, minlength=2 * BINS).reshape(2, BINS)


def chosen_pictures(rows, known, notes, others):
    """Pictures of the worst, the median and the best scene; of the first ones without scores.

    Arguments as those of `calibration`.
    """
    rows = [row for row in rows if str(row.get("scene")) in known]
    scored = sorted(
        (row for row in rows if number(row.get("accuracy")) is not None),
        key=lambda row: row["accuracy"],
    )
    members = scored or rows
    if not members:
        return []
    # Of two scenes the second is the best, not the median.
    places = {0: "Worst scene", len(members) // 2: "Median scene", len(members) - 1: "Best scene"}
    found = []
    for place, word in places.items():
        row = members[place]
        name, word = str(row["scene"]), word if scored else "Scene"
        try:
            scene = pictures.read_masked_scene(*known[name])
        except pictures.OtherScene:
            others.add(name)
            continue
        except UserError as error:
            notes.append(f"No pictures of {name}: {error}")
            continue
        shown = pictures.panels(scene, pictures.MOST_COLS)
        images = [(panel, pictures.data_uri(panel)) for panel in shown]
        found.append(
            (word, name, str(row.get("day_night", "")), number(row.get("accuracy")), images)
        )
    return found


# --- the machine ----------------------------------------------------------------------------


def machine_charts(run):
    """Charts of CPU, memory, input and output, GPUs and power over time; none without samples."""
    samples = [row for row in run.samples if number(row.get("time")) is not None]
    if len(samples) < 2:
        return []
    times = np.array([row["time"] for row in samples], float)
    # Minutes that the run ran: of a break between its parts no more than LONGEST_GAP is shown.
    running = np.concatenate([[0], np.cumsum(np.clip(np.diff(times), 0, LONGEST_GAP))]) / 60
    config = run.results["config"]
    log_file = run.folder / str(config.get("mlperf_logfile") or "mlperf_cloudmask.log")
    phases = [
        (kind, *np.interp((begin, times[-1] if end is None else end), times, running))
        for kind, begin, end in read_phases(log_file)
    ]

    def column(name, unit=1):
        return np.array(numbers([row.get(name) for row in samples])) / unit

    gpus = sorted({key.partition("_")[0] for key in samples[0] if key.startswith("gpu")})
    of_gpus = {
        what: {gpu.upper(): column(f"{gpu}_{what}", unit) for gpu in gpus}
        for what, unit in (("percent", 1), ("memory", 1e9), ("watts", 1))
    }
    no_gpu = np.zeros(len(samples)) if gpus else np.full(len(samples), np.nan)
    plans = {
        "CPU [cores]": {"CPU": column("cpu_percent", 100)},
        "memory [GB]": {"memory": column("memory", 1e9)},
        "files [MB/s],\ncache included": {
            "read": column("read_rate", 1e6),
            "written": column("write_rate", 1e6),
        },
        "GPU [%]": few(of_gpus["percent"]),
        "GPU memory [GB]": few(of_gpus["memory"]),
        "power [W]": {"CPU": column("cpu_watts"), "GPUs": sum(of_gpus["watts"].values(), no_gpu)},
    }
    found = []
    for label, lines in plans.items():
        lines = {name: values for name, values in lines.items() if np.isfinite(values).any()}
        if lines:
            found.append(
                charts.chart(
                    f"machine-{len(found)}",
                    f"{label} over time".replace("\n", " "),
                    functools.partial(
                        charts.over_time, times=running, lines=lines, phases=phases, label=label
                    ),
                )
            )
    return found


def few(lines):
    """Lines for a chart: of many GPUs the mean and the extremes."""
    if len(lines) <= MOST_GPU_LINES:
        return lines
    values = np.array(list(lines.values()))
    return {
        "GPU, mean": values.mean(axis=0),
        "lowest": values.min(axis=0),
        "highest": values.max(axis=0),
    }


def read_phases(path):
    """Phases of a run by its MLPerf log: [(kind, begin, end)] in Unix seconds, end None if open."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found, begun = [], {}
    for line in lines:
        try:
            event = json.loads(line.partition(":::MLLOG ")[2])
            name, _, edge = event["key"].rpartition("_")
            seconds = event["time_ms"] / 1000
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # another line, or one that was cut off
        if name in PHASES and edge == "start":
            begun[name] = seconds
        elif name in begun and edge == "stop":
            found.append((PHASES[name], begun.pop(name), seconds))
    return found + [(PHASES[name], begin, None) for name, begin in begun.items()]
