"""The numbers, charts and pictures that the report shows of one run."""

import json
import math
from pathlib import Path

import numpy as np

from harness.config import Config, load_config
from harness.console import counted, format_bytes, format_duration, progress
from harness.data.mask_files import mask_files
from harness.data.scene_files import short_name
from harness.errors import UserError
from harness.inference.scores import MEAN_SCORES, SCENE_PARTS, SCORES, compare_with_baselines
from harness.records.report import pictures
from harness.records.report.charts import chart
from harness.records.results import target_text
from harness.records.saved_masks import read_row
from harness.records.saved_runs import MEASURES, PLACES, measures

BINS = 1000  # of probability
RELIABILITY_BINS = 20
MIN_PIXELS = 100  # of a point in the reliability diagram
MAX_GAP = 30.0  # [s] between two samples in a chart; a resumed run may have waited for days
PAGE_BYTES = 12_000_000  # of pictures in the page; more scenes get a page of their own
MAX_ROWS = 1000  # of the table of scenes, and points of their chart; 1.1 kB each
MAX_CALIBRATED = 200  # scenes whose probabilities are read, 50 ms each
MAX_SCENES = 21  # drawn unless all are asked for; one of 1200 x 1500 takes 0.5 to 1.1 s
COMPARED_MASKS = ("mask", "all cloud", "threshold")  # in the order of COMPARED
# Of long tables, which are as wide as the page; "Mask and baselines" has the other baselines.
LONG_SCORES = {
    key: score for key, score in SCORES.items()
    if score.kind != "baseline" or key in ("all_cloud_accuracy", "threshold_accuracy")
}  # fmt: skip
SCORE_COLUMNS = {score.label: score.meaning for score in LONG_SCORES.values()}


def mean(values):
    """Mean of the numbers among the values; NaN without any."""
    known = [value for value in values if not is_missing(value)]
    return sum(known) / len(known) if known else math.nan


def is_missing(value):
    """Whether a value of a run is no number."""
    return value is None or math.isnan(value)


def column(rows, key):
    """The numbers of a column, NaN where there is none: float (n,)."""
    return np.array([row.get(key, math.nan) for row in rows], float)


def cell(value, show):
    """A number in a table: its value, by which rows are sorted, and its text."""
    return (None, "–") if is_missing(value) else (value, show(value))


def evenly_spaced(items, most):
    """At most so many of a list, its first and last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def table(name, columns, rows, sort=None, is_long=False):
    """A table of the page, in a list; an empty list without rows.

    Args:
        name: Its title.
        columns: {heading: explanation}, or headings.
        rows: Lists of texts, and of numbers as in `cell`.
        sort: None if it cannot be sorted, else the heading by which it is sorted, or "".
        is_long: Whether it is small, with a scroll bar of its own.
    """
    columns = columns if isinstance(columns, dict) else dict.fromkeys(columns, "")
    shown = {"name": name, "columns": columns, "rows": rows, "sort": sort, "is_long": is_long}
    return [shown] if rows else []


def compared_accuracies(scores):
    """Accuracies of mask and baselines, {set of pixels: {name: number or None}}."""
    return {
        what.partition(", ")[2]: dict(zip(COMPARED_MASKS, values, strict=True))
        for what, values in compare_with_baselines(scores).items()
        if what.startswith("accuracy")
    }


def describe_run(run, write_scene, data=None, all_scenes=False):
    """Everything that the page shows of a run, by the names in the template.

    Args:
        run: Run of harness.records.saved_runs.
        write_scene: Function of a name and a dictionary of `draw_scenes`, which writes a page of
            that scene alone and returns its address.
        data: Folder of the scene files; None for the run's own inference_dir.
        all_scenes: Whether to draw more scenes than MAX_SCENES.

    Raises:
        UserError: If a table or mask of the run is damaged.
    """
    results = run.clean_results
    notes = [f"Error: {results['error']}"] if results.get("error") else []
    notes += [f"Warning: {text}" for text in run.warnings]
    if run.is_synthetic:
        notes.append("Synthetic scenes: the scores tell nothing about real scenes.")
    if run.status in ("running", "starting"):
        notes.append("The run had not ended when this page was made, or it was killed.")
    masks, rows = mask_files(run.folder), run.scenes
    if masks and not rows:  # the run was stopped before it wrote scenes.csv
        rows = [read_row(path) for path in masks.values()]
        masked = counted(len(rows), "mask")
        notes.append(f"Inference did not finish: scores are those of the {masked} so far.")
    # A run that was stopped has them in the rows alone.
    inference = results["inference"]
    scores = {key: inference.get(key) for key in MEAN_SCORES}
    for key in filter(lambda key: is_missing(scores[key]), scores):
        scores[key] = mean([row.get(key) for row in rows])
    folder = scene_folder(run, data)
    scenes = pictures.scenes_by_name(folder) if masks else {}
    if masks and not scenes:
        notes.append(f"No pictures: no scene files in {folder}. Name their folder with --data.")
    pairs = {name: (masks[name], scenes[name]) for name in masks if name in scenes}
    problems = {}  # scene: message
    score_charts = [*scene_chart(rows), *calibration(pairs, problems)]
    most = len(pairs) if all_scenes else MAX_SCENES
    drawn = draw_scenes(rows, pairs, problems, most, write_scene)
    if problems:
        notes.append(
            f"Pictures and calibration lack {counted(len(problems), 'scene')}, for example: "
            f"{next(iter(problems.values()))}"
        )
    text = ""
    if most < len(pairs):
        text = f"{most} of {len(pairs)} scenes, evenly spaced by accuracy. To draw all of them: "
        text += "python tools/report.py RUN_DIR --all-scenes. "
    if results["config"].get("keep_probability") is False:
        text += "This run kept no probabilities: set keep_probability: true for pictures of them."
    scene_columns = {"scene": "", "kind": "", **SCORE_COLUMNS, "seconds": "Inference."}
    table_of_scenes = scene_rows(rows, drawn)
    scenes_title = "Scenes"
    if len(table_of_scenes) < len(rows):
        scenes_title = f"Scenes: the {MAX_ROWS} with the lowest accuracy, and those with pictures, "
        scenes_title += f"of {len(rows)}; scenes.csv has all"
    bad_scenes = [
        [str(bad.get(key, "")) for key in ("path", "reason", "during")]
        for bad in results.get("bad_scenes", [])
    ]
    return {
        "name": run.name,
        "status": run.status,
        "notes": notes,
        "headline": headline(run, scores, len(rows)),
        "sections": {
            "Pictures": {"scenes": drawn, "text": text if drawn else ""},
            "Scores": {
                "charts": score_charts,
                "tables": table(
                    "Mask and baselines", ("mean over scenes", *COMPARED_MASKS),
                    baseline_rows(scores),
                ) + table(
                    "Means over scenes", {"scenes": "", "number": ""} | SCORE_COLUMNS, means(rows),
                    is_long=True,
                ) + table(
                    scenes_title, scene_columns, table_of_scenes, "accuracy", is_long=True
                ),
            },
            "What ran where": {
                "facts": facts(run),
                "tables": table(
                    "Settings that differ from the reference workload",
                    ("key", "this run", "reference"), changed_settings(results["config"]),
                ) + table("Bad scenes", ("file", "reason", "during"), bad_scenes),
            },
            "Training": {"charts": training_charts(run)},
            "Times": {"tables": times(run)},
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
        if not Path(data).exists():
            raise UserError(f"No directory {data}. Name the folder of the scene files with --data.")
        return data
    try:
        return load_config(run.folder / "config.yaml").inference_dir  # absolute
    except UserError:
        return Path(str(run.clean_results["config"].get("inference_dir", "unknown")))


def headline(run, scores, n_scenes):
    """The metrics in large type, and accuracies in groups of bars next to the target."""
    values = measures(run) | scores
    texts = {key: m.show(values[key]) for key, m in MEASURES.items() if not is_missing(values[key])}
    training = run.clean_results["training"]
    groups = compared_accuracies(scores)
    groups["validation patches"] = {
        "network": values["val_accuracy"], "all cloud": validation_baseline(training)
    }  # fmt: skip
    show = SCORES["accuracy"].show
    bars = {
        title.capitalize(): [(name, v, show(v)) for name, v in group.items() if not is_missing(v)]
        for title, group in groups.items()
    }
    return {"texts": texts, "bars": bars, "n_scenes": n_scenes}


def validation_baseline(training):
    """Accuracy of calling every pixel of the validation patches cloud; None if unknown."""
    return training.get("baselines", {}).get("all_cloud_accuracy")


def baseline_rows(scores):
    """Rows of the mask's scores beside those of the baselines on the same pixels."""
    show = SCORES["accuracy"].show
    return [
        [what, *(cell(value, show) for value in values)]
        for what, values in compare_with_baselines(scores).items()
        if not is_missing(values[0])
    ]


def facts(run):
    """What ran where, {name: text}."""
    results = run.clean_results
    training, sampling = results["training"], results["sampling"]
    devices, config, peaks = results["devices"], results["config"], measures(run)
    parts = results.get("parts", [])

    def shown(show, value):
        return show(value) if value and value > 0 else None

    def numbers(part, **nouns):
        return ", ".join(counted(part[key], noun) for key, noun in nouns.items() if part.get(key))

    def listed(values):
        return ", ".join(f"{name} {value}" for name, value in values.items())

    def energy(name):
        return shown(lambda joules: f"{joules / 3.6e6:.3g} kWh", sampling.get(name))

    found = {
        "Devices": devices.get("description"),
        "Platform": config.get("platform"),
        "Organisation": config.get("organisation"),
        "Start": str(results.get("start") or "").replace("T", " ").replace("+00:00", " UTC"),
        "Duration": shown(format_duration, results.get("seconds")),
        "Parts": len(parts) > 1 and ", ".join(
            f"{part.get('status')} after {shown(format_duration, part.get('seconds'))}"
            for part in parts
        ),
        "Mode": results.get("mode"),
        "Job": results.get("job"),
        "Network": listed(results.get("network", {})),
        "Loss": config.get("loss"),
        "Labels": config.get("labels", "bayes"),
        "Label correction": config.get("label_correction", "none"),
        "Training": numbers(
            training, scenes_train="scene", patches_train="patch", epochs_run="epoch"
        ),
        "Best epoch": training.get("best_epoch"),
        "Target": training.get("target_accuracy") and target_text(training, config),
        "Validation": numbers(training, scenes_test="scene", patches_test="patch"),
        "Inference": numbers(results["inference"], scenes="scene"),
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
        "Versions": listed(results["versions"]),
    }  # fmt: skip
    return {name: str(value) for name, value in found.items() if value}


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
    training, epochs = run.clean_results["training"], column(run.history, "epoch")
    found = []
    for key in ("loss", "accuracy"):
        lines = {
            name: (epochs, column(run.history, start + key))
            for name, start in {"validation": "val_", "training": ""}.items()
        }
        baseline = validation_baseline(training)
        if key == "accuracy" and not is_missing(baseline):
            lines["all cloud"] = (epochs, [baseline] * len(epochs))
        best = training.get("best_epoch")
        found.append(chart(f"Training and validation {key}", "epoch", key, lines, best=best))
    starts = {"epoch": "", "training": "train_", "waiting for data": "input_"}
    lines = {
        name: (range(1, len(seconds) + 1), seconds)
        for name, start in starts.items()
        if (seconds := training.get(f"{start}seconds_per_epoch"))
    }
    return [*found, chart("Seconds per epoch", "epoch", "seconds", lines, ylim=(0, None))]


def times(run):
    """Tables of how long the parts of the run took, and those of masking a scene on average."""
    results = run.clean_results
    training, inference = results["training"], results["inference"]
    waited, trained, both = (
        sum(s or 0 for s in training.get(f"{part}seconds_per_epoch", []))
        for part in ("input_", "train_", "")
    )
    parts = results.get("parts", [])
    last = " (last part)" if len(parts) > 1 else ""  # unknown for earlier parts
    of_run = {
        f"setup: tracing, compiling{last}": training.get("warm_up_seconds"),
        "training: waiting for data": waited,
        "training: steps": trained - waited,
        "validation": both - trained,
        "checkpoints": sum(part.get("checkpoint_seconds") or 0 for part in parts),
        f"inference{last}": inference.get("seconds"),
    }
    rest = (results.get("seconds") or 0) - sum(s or 0 for s in of_run.values())
    if any(of_run.values()) and rest > 0:
        of_run["other: start, scene checks, writing"] = rest
    of_scene, shares = (inference.get(k, {}) for k in ("seconds_per_scene_parts", "shares"))
    columns = {
        "part": "", "time": "",
        "share": "Of the time per scene on a device. Reading, network with stitching, and scoring "
        "with writing run at the same time, each for another scene.",
    }  # fmt: skip
    parts_of_scene = [
        [word, cell(of_scene[key], show_seconds), cell(shares.get(key), "{:.0%}".format)]
        for key, word in SCENE_PARTS.items()
        if of_scene.get(key)
    ]
    limit = inference.get("limited_by")
    title = "One scene, on average" + (f": limited by {limit}" if limit else "")
    return table(
        "The run", ("part", "time"), [[k, cell(s, show_seconds)] for k, s in of_run.items() if s]
    ) + table(title, columns, parts_of_scene)


def show_seconds(s):
    """A duration in a table."""
    return format_duration(s) if s >= 10 else f"{s:.3g} s"


# --- scenes ---------------------------------------------------------------------------------


def score_cells(values):
    """Cells of a table row with LONG_SCORES."""
    return [cell(values.get(key), score.show) for key, score in LONG_SCORES.items()]


def scene_rows(rows, drawn):
    """Rows of the table of scenes, those with the lowest accuracy first, with links to `drawn`.

    Of more than MAX_ROWS scenes the first ones, and those that are drawn.
    """
    links = {scene["name"]: scene for scene in drawn}
    rows = sorted(
        rows, key=lambda row: math.inf if is_missing(row.get("accuracy")) else row["accuracy"]
    )
    return [
        [
            {"text": short_name(name := row.get("scene", "")), "name": name} | links.get(name, {}),
            row.get("day_night", ""),
            *score_cells(row),
        ]
        + [cell(row.get("seconds"), "{:.2f}".format)]
        for place, row in enumerate(rows)
        if place < MAX_ROWS or row.get("scene") in links
    ]


def by_kind(rows):
    """Rows of scenes by day_night, sorted."""
    groups = {}
    for row in sorted(rows, key=lambda row: row.get("day_night", "")):
        groups.setdefault(row.get("day_night", ""), []).append(row)
    return groups


def means(rows):
    """Rows of means over day, night and all scenes; none if all are of one kind."""
    groups = by_kind(rows)
    return [
        [kind, (len(group), str(len(group)))]
        + score_cells({key: mean([row.get(key) for row in group]) for key in LONG_SCORES})
        for kind, group in (groups | {"all": rows}).items()
        if len(groups) > 1
    ]


def scene_chart(rows):
    """A list of the chart of accuracies; empty without any."""
    keys = ("all_cloud_accuracy", "accuracy")
    known = [
        row for row in rows
        if row.get("day_night") in ("day", "night")  # a chart has no text from files
        and not any(is_missing(row.get(key)) for key in keys)
    ]  # fmt: skip
    if not known:
        return []
    note = "Above the dotted line a mask agrees more often than one that is all cloud, which "
    note += "would leave no surface to measure. Balanced accuracy counts both classes alike."
    if len(known) > MAX_ROWS:
        note += f" {MAX_ROWS} of {len(known)} scenes, evenly spaced."
        known = evenly_spaced(known, MAX_ROWS)
    points = {kind: [column(group, key) for key in keys] for kind, group in by_kind(known).items()}
    return [
        chart(
            "Accuracy of each scene", "share of cloud in the label", "accuracy", points,
            points=True, diagonal="all cloud", height=3.2, note=note,
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
    chosen = evenly_spaced([*pairs.items()], MAX_CALIBRATED)
    for name, paths in progress(chosen, "Reading probabilities", len(chosen)):
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
            note=f"Pixels with data of {counted(n_scenes, 'scene')}. Mean difference between "
            f"probability and share of cloud: {error:.3f}.",
        ),
        chart(
            "ROC curve", "false alarm rate", "hit rate",
            {"network": (false_alarms, hits)}, diagonal="chance", height=3.2,
            note=f"Area under the curve: {area:.3f}.",
        ),
    ]  # fmt: skip


def draw_scenes(rows, pairs, problems, most, write_scene):
    """Draw scenes: the worst, the best and the median, and others evenly spaced by accuracy.

    Args:
        rows: Of scenes.csv.
        pairs: As those of `calibration`.
        problems: As those of `calibration`.
        most: Number of scenes to draw.
        write_scene: As that of `describe_run`.

    Returns:
        Dictionaries with `name`, `title`, `href` and `data`, in the order of accuracy; `data` is
        None if the scene is in a page of its own.
    """
    rows = [row for row in rows if row.get("scene") in pairs]
    scored = [row for row in rows if not is_missing(row.get("accuracy"))]
    rows = sorted(scored, key=lambda row: row["accuracy"]) or rows
    last, n_bytes, found = len(rows) - 1, 0, {}
    # Of two scenes the second is the best, not the median; one is neither.
    places = {len(rows) // 2: "median", 0: "worst", last: "best"} if scored and last > 0 else {}
    spread = np.linspace(0, max(last, 0), most).round().astype(int).tolist()
    chosen = list(dict.fromkeys([*sorted(places), *spread]))[:most] if rows else []
    for place in progress(chosen, "Drawing", len(chosen)):
        row, name = rows[place], rows[place]["scene"]
        try:
            data = pictures.viewer_data(*pictures.draw(pictures.read_masked_scene(*pairs[name])))
        except UserError as error:
            problems[name] = str(error)
            continue
        title = f"{short_name(name)} {row.get('day_night', '')}"
        title += f", {row['accuracy']:.4f}" if scored else ""
        title += f" ({places[place]})" if place in places else ""
        found[place] = scene = {"name": name, "title": title, "href": "#pictures", "data": data}
        if n_bytes and n_bytes + len(data) > PAGE_BYTES:
            scene["href"], scene["data"] = write_scene(name, scene), None
        else:
            n_bytes += len(data)
    return [found[place] for place in sorted(found)]


# --- the machine ----------------------------------------------------------------------------


def machine_charts(run):
    """Charts of the samples over time: CPU, memory, files, GPUs and power; none without samples."""
    samples = [row for row in run.samples if not is_missing(row.get("time"))]
    if len(samples) < 2:
        return []
    # Minutes of running: gaps between the parts of a resumed run are cut to MAX_GAP.
    steps = np.clip(np.diff(column(samples, "time")), 0, MAX_GAP)
    running = np.append(0, np.cumsum(steps)) / 60
    gpus = sorted({key.partition("_")[0] for key in samples[0] if key.startswith("gpu")})

    def of_gpus(name):
        return [f"{gpu}_{name}" for gpu in gpus]

    plans = {  # label: unit, {name of the line: columns}
        "CPU [cores]": (100, {"CPU": ["cpu_percent"]}),
        "memory [GB]": (1e9, {"memory": ["memory"]}),
        "files [MB/s]": (1e6, {"read": ["read_rate"], "written": ["write_rate"]}),
        "GPU [%]": (1, {"each GPU": of_gpus("percent")}),
        "GPU memory [GB]": (1e9, {"each GPU": of_gpus("memory")}),
        "power [W]": (1, {"CPUs": ["cpu_watts"], "each GPU": of_gpus("watts")}),
    }
    found = []
    for label, (unit, names) in plans.items():
        lines = {
            name: (running, np.transpose([column(samples, key) for key in keys]) / unit)
            for name, keys in names.items()
        }
        lines = {name: line for name, line in lines.items() if np.isfinite(line[1]).any()}
        if lines:
            top = 1.1 * max(np.nanmax(y) for _, y in lines.values())
            title = f"{label} over time"
            found.append(chart(title, "minutes", label, lines, ylim=(0, top or 1)))
    return found
