"""The numbers, charts and pictures that the report shows of one run."""

import json
import math
from pathlib import Path

import numpy as np

from harness.config import Config, load_config
from harness.console import format_bytes, format_duration, progress
from harness.data.mask_files import mask_files
from harness.errors import UserError
from harness.inference.scores import SCORES, TARGET_ACCURACY
from harness.records.report import pictures
from harness.records.report.charts import chart
from harness.records.saved_runs import MEASURES, PLACES, measures, number

BINS = 1000  # of probability
RELIABILITY_BINS = 20
MIN_PIXELS = 100  # of a point in the reliability diagram
MAX_GAP = 30.0  # [s] between two samples in a chart; a resumed run may have waited for days
SCORE_COLUMNS = {score.label: score.meaning for score in SCORES.values()}
SCENE_PARTS = {
    "read": "reading, in parallel with the network", "network": "network", "stitch": "stitching",
    "score": "scoring", "write": "writing",
}  # fmt: skip


def numbers(values):
    """Numbers of what should be a list of them, NaN for anything else."""
    known = map(number, values if isinstance(values, list) else [])
    return [math.nan if value is None else value for value in known]


def mean(values):
    """Mean of the numbers among the values; None without any."""
    known = [value for value in map(number, values) if value is not None]
    return sum(known) / len(known) if known else None


def dictionaries(values):
    """The dictionaries in what should be a list of them."""
    return [value for value in (values if isinstance(values, list) else []) if type(value) is dict]


def cell(value, show):
    """A number in a table: its value, by which rows are sorted, and its text."""
    value = number(value)
    return (None, "–") if value is None else (value, show(value))


def table(name, columns, rows, sort=None, is_long=False):
    """A table of the page, in a list; an empty list without rows.

    Args:
        name: Its title.
        columns: {heading: explanation}, or headings.
        rows: Lists of texts, and of numbers as in `cell`.
        sort: None if it cannot be sorted, else the heading by which it is sorted, or "".
        is_long: Whether it has a scroll bar of its own.
    """
    columns = columns if isinstance(columns, dict) else dict.fromkeys(columns, "")
    shown = {"name": name, "columns": columns, "rows": rows, "sort": sort, "is_long": is_long}
    return [shown] if rows else []


def describe_run(run, data=None):
    """Everything that the page shows of a run, by the names in the template.

    Args:
        run: Run of harness.records.saved_runs.
        data: Folder of the scene files; None for the run's own inference_dir.

    Raises:
        UserError: If a table or mask of the run is damaged.
    """
    results, inference = run.results, run.results["inference"]
    notes = [f"Error: {results['error']}"] if results.get("error") else []
    if run.status in ("running", "starting"):
        notes.append("The run had not ended when this page was made, or it was killed.")
    masks, rows = mask_files(run.folder), run.scenes
    if masks and not rows:  # the run was stopped before it wrote scenes.csv
        rows = dictionaries([pictures.read_row(path) for path in masks.values()])
        notes.append(f"Inference did not finish: scores are those of the {len(rows)} masks so far.")
    folder = scene_folder(run, data)
    scenes = pictures.scenes_by_name(folder) if masks else {}
    if masks and not scenes:
        notes.append(f"No pictures: no scene files in {folder}. Name their folder with --data.")
    pairs = {name: (masks[name], scenes[name]) for name in masks if name in scenes}
    problems = {}  # scene: message
    score_charts = [*scene_chart(rows), *calibration(pairs, problems)]
    chosen = chosen_scenes(rows, pairs, problems)
    if problems:
        notes.append(
            f"{len(problems)} scene(s) are missing in pictures and calibration, for example: "
            f"{next(iter(problems.values()))}"
        )
    scene_columns = {"scene": "", "kind": "", **SCORE_COLUMNS, "seconds": "Inference."}
    bad_scenes = [
        [str(bad.get(key, "")) for key in ("path", "reason", "during")]
        for bad in dictionaries(results.get("bad_scenes"))
    ]
    return {
        "name": run.name,
        "status": run.status,
        "notes": notes,
        "cards": cards(run, rows),
        "sections": {
            "What ran where": {
                "facts": facts(run),
                "tables": table(
                    "Settings that differ from the reference workload",
                    ("key", "this run", "reference"), changed_settings(results["config"]),
                ) + table("Bad scenes", ("file", "reason", "during"), bad_scenes),
            },
            "Training": {"charts": training_charts(run)},
            "Times": {"bars": times_of_run(run) + times_of_scene(inference)},
            "Pictures": {"pictures": chosen},
            "Scores": {
                "charts": score_charts,
                "tables": table(
                    "Means over scenes", {"scenes": "", "number": ""} | SCORE_COLUMNS, means(rows)
                ) + table("Scenes", scene_columns, scene_rows(rows), "accuracy", is_long=True),
            },
            "Machine": {"charts": machine_charts(run)},
        },
    }  # fmt: skip


# --- texts and numbers ----------------------------------------------------------------------


def scene_folder(run, data=None):
    """The folder where the scene files of a run should be.

    Raises:
        UserError: If `data` is no folder.
    """
    if data is not None:
        if not Path(data).is_dir():
            raise UserError(f"No directory {data}. Name the folder of the scene files with --data.")
        return data
    try:
        return load_config(run.folder / "config.yaml").inference_dir  # absolute
    except UserError:
        return Path(str(run.results["config"].get("inference_dir", "unknown")))


def cards(run, rows):
    """The metrics in large type: the accuracy with its baselines, and the two speeds."""
    values, inference = measures(run), run.results["inference"]
    for key in SCORES:  # a run that was stopped has them in the rows alone
        mean_of_rows = mean([row.get(key) for row in rows])
        values[key] = mean_of_rows if number(inference.get(key)) is None else inference[key]
    texts = {
        key: None if values[key] is None else m.show(values[key]) for key, m in MEASURES.items()
    }
    baselines = [key for key, score in SCORES.items() if score.kind == "baseline"]
    bars = [
        (MEASURES[key].label, values[key], texts[key], MEASURES[key].meaning)
        for key in ("accuracy", "valid_accuracy", *baselines, "val_accuracy")
        if texts[key]
    ]

    def card(title, key, note, missing, bars=()):
        text = texts[key]
        return {
            "title": title,
            "text": text or "–",
            "note": note if text else missing,
            "bars": bars,
        }

    return [
        card(
            "Accuracy", "accuracy",
            "Agreement with the Bayesian mask, mean over scenes. "
            f"Dashed: the target, {TARGET_ACCURACY}.",
            "The scenes have no labels." if rows else "No scenes were masked.", bars,
        ),
        card(
            "Seconds per scene", "seconds_per_scene",
            "Inference, wall time: reading, network, stitching, scoring, writing.",
            "Inference did not finish.",
        ),
        card(
            "Training patches per second", "patches_per_second",
            "All replicas together, without the first epoch. "
            f"{texts['epochs']} epochs, {texts['seconds_per_epoch']} s per epoch.",
            "Nothing was trained.",
        ),
    ]  # fmt: skip


def facts(run):
    """What ran where, {name: text}."""
    results, training, inference = run.results, run.results["training"], run.results["inference"]
    devices, config, sampling = results["devices"], results["config"], results["sampling"]
    parts, network, peaks = (
        dictionaries(results.get("parts")),
        results.get("network"),
        measures(run),
    )
    if isinstance(network, dict):
        network = ", ".join(f"{key} {value}" for key, value in network.items())

    def shown(show, value):
        return None if number(value) is None or value < 0 else show(value)

    def counted(part, **words):
        return ", ".join(f"{part[key]} {word}" for key, word in words.items() if part.get(key))

    def energy(name):
        return shown(lambda joules: f"{joules / 3.6e6:.3g} kWh", sampling.get(name) or None)

    found = {
        "Devices": devices.get("description"),
        "Platform": config.get("platform"),
        "Organisation": config.get("organisation"),
        "Start": str(results.get("start") or "").replace("T", " ").replace("+00:00", " UTC"),
        "Duration": shown(format_duration, results.get("seconds")),
        "Parts": ", ".join(
            f"{part.get('status')} after {shown(format_duration, part.get('seconds'))}"
            for part in parts
            if len(parts) > 1
        ),
        "Mode": results.get("mode"),
        "Job": results.get("job"),
        "Network": network,
        "Loss": config.get("loss"),
        "Training": counted(
            training, scenes_train="scenes", patches_train="patches", epochs_run="epochs"
        ),
        "Best epoch": training.get("best_epoch"),
        "Validation": counted(training, scenes_test="scenes", patches_test="patches"),
        "Inference": counted(inference, scenes="scenes"),
        "Precision": config.get("precision"),
        "Deterministic": {"True": "yes", "False": "no"}.get(str(devices.get("deterministic"))),
        "Peak memory": shown(format_bytes, peaks["peak_rss"]),
        "Peak GPU memory": shown(format_bytes, peaks["peak_gpu_memory"]),
        "Energy": energy("energy_joules"),
        "Energy of CPUs": energy("cpu_energy_joules"),
        "Energy of GPUs": energy("gpu_energy_joules"),
        "CPU time": shown(format_duration, sampling.get("cpu_seconds")),
        "Read, with cache": shown(format_bytes, sampling.get("read_bytes")),
        "Written, with cache": shown(format_bytes, sampling.get("written_bytes")),
        "Commit": results.get("git_commit"),
        "Versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def changed_settings(config):
    """Rows of settings that differ from the reference workload: key, value, reference."""
    reference = Config().model_dump(by_alias=True, mode="json")
    return [
        [key, setting(value), setting(reference.get(key))]
        for key, value in config.items()
        if key not in PLACES and value != reference.get(key)
    ]


def setting(value):
    """A value as it is written in a configuration."""
    return value if isinstance(value, str) else json.dumps(value)


# --- training and times ---------------------------------------------------------------------


def training_charts(run):
    """Charts of loss, accuracy and seconds of each epoch; none without training."""
    if not run.history:
        return []
    training, epochs = run.results["training"], numbers([row.get("epoch") for row in run.history])
    found = []
    for key in ("loss", "accuracy"):
        names = {"validation": f"val_{key}", "training": key}
        lines = {
            name: (epochs, numbers([row.get(column) for row in run.history]))
            for name, column in names.items()
        }
        best = number(training.get("best_epoch"))
        found.append(chart(f"Training and validation {key}", "epoch", key, lines, best=best))
    names = {"epoch": "", "training": "train_", "waiting for data": "input_"}
    lines = {
        name: (range(1, len(seconds) + 1), seconds)
        for name, start in names.items()
        if (seconds := numbers(training.get(f"{start}seconds_per_epoch")))
    }
    return [*found, chart("Seconds per epoch", "epoch", "seconds", lines, ylim=(0, None))]


def times_of_run(run):
    """How long the parts of a run took, with the remainder at the end, as `bars`."""
    results, training = run.results, run.results["training"]
    trained, waited, both = (
        float(np.nansum(numbers(training.get(f"{part}seconds_per_epoch"))))
        for part in ("train_", "input_", "")
    )
    parts = dictionaries(results.get("parts"))
    last = " (last part)" if len(parts) > 1 else ""  # unknown for earlier parts
    times = {
        f"setup: tracing, compiling{last}": number(training.get("warm_up_seconds")),
        "training: waiting for data": waited,
        "training: steps": trained - waited,
        "validation": both - trained,
        "checkpoints": np.nansum(numbers([part.get("checkpoint_seconds") for part in parts])),
        f"inference{last}": number(results["inference"].get("seconds")),
    }
    times = {name: float(seconds) for name, seconds in times.items() if seconds}
    rest = (number(results.get("seconds")) or 0) - sum(times.values())
    rest = {"other: start, scene checks, writing": rest} if times and rest > 0 else {}
    return bars("The run", times | rest)


def times_of_scene(inference):
    """How long the parts of masking a scene took on average, as `bars`."""
    parts = inference.get("seconds_per_scene_parts")
    parts = parts if isinstance(parts, dict) else {}
    times = {word: parts[key] for key, word in SCENE_PARTS.items() if number(parts.get(key))}
    return bars("One scene, on average", times)


def bars(title, times):
    """A group of bars, title and [(name, share of the longest, text)], in a list; or none."""
    longest = max(times.values(), default=0)
    members = [
        (name, s / longest, format_duration(s) if s >= 10 else f"{s:.3g} s")
        for name, s in times.items()
    ]
    return [(title, members)] if members else []


# --- scenes ---------------------------------------------------------------------------------


def score_cells(values):
    """Cells of a table row with all scores."""
    return [cell(values.get(key), score.show) for key, score in SCORES.items()]


def scene_rows(rows):
    """Rows of the table of scenes, those with the lowest accuracy first."""
    shown = [
        [str(row.get("scene", "")), str(row.get("day_night", "")), *score_cells(row)]
        + [cell(row.get("seconds"), "{:.2f}".format)]
        for row in rows
    ]
    return sorted(shown, key=lambda row: math.inf if row[2][0] is None else row[2][0])


def means(rows):
    """Rows of means over day, night and all scenes; none if all are of one kind."""
    groups = {}
    for row in rows:
        groups.setdefault(str(row.get("day_night", "")), []).append(row)
    groups = dict(sorted(groups.items())) | {"all": rows} if len(groups) > 1 else {}
    return [
        [kind, (len(group), str(len(group)))]
        + score_cells({key: mean([row.get(key) for row in group]) for key in SCORES})
        for kind, group in groups.items()
    ]


def scene_chart(rows):
    """A list of the chart of accuracies; empty without any."""
    groups = {}
    for row in rows:
        point = number(row.get("all_cloud_accuracy")), number(row.get("accuracy"))
        kind = row.get("day_night") if row.get("day_night") in ("day", "night") else "unknown"
        if None not in point:
            groups.setdefault(kind, []).append(point)
    if not groups:
        return []
    return [
        chart(
            "Accuracy of each scene", "share of cloud in the label", "accuracy",
            {kind: tuple(zip(*groups[kind], strict=True)) for kind in sorted(groups)}, points=True,
            diagonal="all cloud", height=3.2,
            note="A mask above the dotted line is better than calling every pixel cloud.",
        )
    ]  # fmt: skip


def calibration(pairs, problems):
    """Reliability diagram and ROC curve over the pixels with data, a probability and a label.

    Args:
        pairs: {scene: (mask file, scene file)}.
        problems: Takes the message of each scene that cannot be read.

    Returns:
        Two charts; none without such pixels of both classes.
    """
    counts, n_scenes = np.zeros((2, BINS), np.int64), 0  # of clear and cloud, by probability
    for name, paths in progress(pairs.items(), "Reading probabilities", len(pairs)):
        try:
            found = pictures.read_label_and_probability(*paths)
        except UserError as error:
            problems[name] = str(error)
            continue
        if found:
            label, probability = found
            index = np.clip(probability * BINS, 0, BINS - 1).astype(np.int64) + BINS * label
            counts += np.bincount(index, minlength=2 * BINS).reshape(2, BINS)
            n_scenes += 1
    if not counts.sum(axis=1).all():
        return []
    cells = counts.reshape(2, RELIABILITY_BINS, -1)
    totals = cells.sum(axis=(0, 2))
    kept = totals >= MIN_PIXELS
    centres = (np.arange(BINS) + 0.5).reshape(RELIABILITY_BINS, -1) / BINS
    probabilities = (cells.sum(axis=0) * centres).sum(axis=1)[kept] / totals[kept]
    shares = cells[1].sum(axis=1)[kept] / totals[kept]
    error = (totals[kept] * abs(probabilities - shares)).sum() / totals.sum()
    # Rates of pixels above the lower edge of each bin, from the highest threshold to the lowest.
    false_alarms, hits = (np.append(0, np.cumsum(n[::-1]) / n.sum()) for n in counts)
    area = np.trapezoid(hits, false_alarms)
    return [
        chart(
            "Calibration", "probability of cloud", "share of cloud in the label",
            {"network": (probabilities, shares)}, diagonal="ideal", height=3.2,
            note=f"Pixels with data of {n_scenes} scene(s). Mean difference between probability "
            f"and share of cloud: {error:.3f}.",
        ),
        chart(
            "ROC curve", "false positive rate", "true positive rate",
            {"network": (false_alarms, hits)}, diagonal="chance", height=3.2,
            note=f"Area under the curve: {area:.3f}.",
        ),
    ]  # fmt: skip


def chosen_scenes(rows, pairs, problems):
    """Pictures of the worst, the median and the best scene; without scores, of three scenes.

    Arguments as those of `calibration`.

    Returns:
        Dictionaries with `title`, `name` and `images`, pairs of a Panel and its address.
    """
    rows = [row for row in rows if str(row.get("scene")) in pairs]
    scored = [row for row in rows if number(row.get("accuracy")) is not None]
    rows = sorted(scored, key=lambda row: row["accuracy"]) or rows
    # Of two scenes the second is the best, not the median.
    places = {0: "Worst scene", len(rows) // 2: "Median scene", len(rows) - 1: "Best scene"}
    found = []
    for place, title in places.items() if rows else ():
        row, name = rows[place], str(rows[place]["scene"])
        try:
            panels = pictures.panels(pictures.read_masked_scene(*pairs[name]), pictures.MAX_COLS)
        except UserError as error:
            problems[name] = str(error)
            continue
        title = f"{title if scored else 'Scene'}: {row.get('day_night', '')}"
        title += f", accuracy {row['accuracy']:.4f}" if scored else ""
        images = [(panel, pictures.data_uri(panel)) for panel in panels]
        found.append({"title": title, "name": name, "images": images})
    return found


# --- the machine ----------------------------------------------------------------------------


def machine_charts(run):
    """Charts of the samples over time: CPU, memory, files, GPUs and power; none without samples."""
    samples = [row for row in run.samples if number(row.get("time")) is not None]
    if len(samples) < 2:
        return []
    times = np.array([row["time"] for row in samples], float)
    # Minutes of running: gaps between the parts of a resumed run are cut to MAX_GAP.
    running = np.append(0, np.cumsum(np.clip(np.diff(times), 0, MAX_GAP))) / 60
    gpus = sorted({str(key).partition("_")[0] for key in samples[0] if str(key).startswith("gpu")})

    def columns(*names, unit=1):
        return np.array([numbers([row.get(name) for name in names]) for row in samples]) / unit

    def of_gpus(name, unit=1):
        return columns(*(f"{gpu}_{name}" for gpu in gpus), unit=unit)

    plans = {
        "CPU [cores]": {"CPU": columns("cpu_percent", unit=100)},
        "memory [GB]": {"memory": columns("memory", unit=1e9)},
        "files [MB/s]": {
            "read": columns("read_rate", unit=1e6), "written": columns("write_rate", unit=1e6),
        },
        "GPU [%]": {"each GPU": of_gpus("percent")},
        "GPU memory [GB]": {"each GPU": of_gpus("memory", 1e9)},
        "power [W]": {"CPUs": columns("cpu_watts"), "each GPU": of_gpus("watts")},
    }  # fmt: skip
    found = []
    for label, lines in plans.items():
        lines = {name: (running, y) for name, y in lines.items() if np.isfinite(y).any()}
        top = 1.1 * max((np.nanmax(y) for _, y in lines.values()), default=0)
        if lines:
            title = f"{label} over time"
            found.append(chart(title, "minutes", label, lines, ylim=(0, top or 1)))
    return found
