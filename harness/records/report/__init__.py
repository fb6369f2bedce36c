"""report.html: numbers, charts and pictures of one run, or of several side by side.

Nothing here needs TensorFlow. All that comes from files is escaped, and the page runs no script but
its own.
"""

import base64
import hashlib
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np

from harness.console import printable, progress
from harness.data.mask_files import find_masks
from harness.errors import UserError
from harness.files import check_own, write_text
from harness.inference.scores import SCORES, TARGET_ACCURACY
from harness.records.report import pictures
from harness.records.report.charts import chart
from harness.records.report.one_run import (
    cell,
    column,
    compared_accuracies,
    describe_run,
    scene_folder,
    setting,
    table,
)
from harness.records.saved_runs import MEASURES, differences, labels, measures, read_run


def make_report(run_folder, data=None, output=None, all_scenes=False):
    """Make the page of one run, finished or not, and pages of scenes that it has no room for.

    Args:
        run_folder: The run's folder.
        data: Folder of the scene files; None for the run's own inference_dir.
        output: File to write; None for report.html in the run's folder. Pages of scenes are in
            a folder beside it, report_scenes.
        all_scenes: Whether to draw every scene, see MAX_SCENES.

    Returns:
        Path of the page.

    Raises:
        UserError: If the folder is not that of a run, or a file in it is damaged.
    """
    run = read_run(run_folder)
    output = check_output(output or run.folder / "report.html")
    scene_pages = output.with_name(f"{output.stem}_scenes")
    check_own(scene_pages)

    def write_scene(name, scene):
        file = scene_pages / f"{name}.html"
        sections = {"Pictures": {"scenes": [scene]}}
        back = quote(os.fsencode(f"../{output.name}"))
        write_page(file, {"name": scene["title"], "back": back, "sections": sections})
        return quote(os.fsencode(f"{file.parent.name}/{file.name}"))

    return write_page(output, describe_run(run, write_scene, data, all_scenes))


def make_comparison(run_folders, output):
    """Make one page of several runs and return its path; raises UserError as `make_report`."""
    output = check_output(output)
    return write_page(output, describe_runs(list(map(read_run, run_folders))))


def write_pictures(run_folder, output, data=None):
    """Write the pictures of each masked scene as PNG to a folder; returns how many.

    Raises:
        UserError: If there is no mask, or a scene file is missing or differs from the one masked.
    """
    run = read_run(run_folder)
    masks = find_masks(run.folder, [])
    folder = scene_folder(run, data)
    scenes = pictures.scenes_by_name(folder)
    if missing := [path.stem for path in masks if path.stem not in scenes]:
        raise UserError(
            f"{len(missing)} of {len(masks)} masked scenes are not in {folder}, for example "
            f"{missing[0]}. Name the folder of the scene files with --data."
        )
    accuracies = {row.get("scene"): row.get("accuracy") for row in run.scenes}
    for path in progress(masks, "Drawing", len(masks)):
        scene = pictures.read_masked_scene(path, scenes[path.stem])
        _, accuracy = cell(accuracies.get(path.stem), SCORES["accuracy"].show)
        png = Path(output) / f"{path.stem}.png"
        facts = f"run {run.name}, accuracy {accuracy}"
        pictures.write_png(png, path.stem, facts, *pictures.draw(scene))
    return len(masks)


def describe_runs(runs):
    """Everything that the page shows of several runs; its charts name runs by number."""
    measured = {str(n): measures(run) for n, run in enumerate(runs, 1)}
    columns = [key for key in MEASURES if any(m[key] is not None for m in measured.values())]
    numbers = range(1, len(runs) + 1)
    found = []
    accuracies = [compared_accuracies(m) for m in measured.values()]
    for pixels, names in accuracies[0].items():
        lines = {
            name: (values, numbers)
            for name in names
            if np.isfinite(
                values := np.array([each[pixels][name] for each in accuracies], float)
            ).any()
        }
        if lines:
            lines[f"target {TARGET_ACCURACY}"] = ([TARGET_ACCURACY] * len(runs), numbers)
            options = {"height": 1.2 + 0.3 * len(runs), "yticks": numbers, "points": True}
            label = f"accuracy, {pixels}"
            found.append(chart(label.capitalize(), label, "run", lines, **options))
    for key in ("val_loss", "val_accuracy"):
        lines = {
            str(n): (column(run.history, "epoch"), column(run.history, key))
            for n, run in enumerate(runs, 1)
            if run.history
        }
        if lines:
            found.append(chart(label := MEASURES[key].label, "epoch", label, lines, height=3))
    rows = [["folder", *labels(runs)], ["status", *(run.status for run in runs)]] + [
        [
            {"text": MEASURES[key].label, "name": MEASURES[key].meaning},
            *(cell(m[key], MEASURES[key].show) for m in measured.values()),
        ]
        for key in columns
    ]
    differing = [
        [key, *("–" if value is None else setting(value) for value in values)]
        for key, values in differences(runs).items()
    ]
    title = "Configuration, commit, devices, versions, scenes"
    none = "" if differing else "None: the runs repeat one another."
    of_runs = ("key", *(f"run {n}" for n in measured))
    return {
        "name": f"{len(runs)} runs",
        "sections": {
            "Results": {"charts": found, "tables": table("Runs", of_runs, rows)},
            "Differences": {"text": none, "tables": table(title, of_runs, differing)},
        },
    }


def check_output(output):
    """The path of a page.

    Raises:
        UserError: If it is a folder.
    """
    if (output := Path(output)).is_dir():
        raise UserError(f"The page is a file, but {output} is a folder. Name a file with -o.")
    return output


def write_page(output, content):
    """Write an HTML page, whole or not at all, and return its path."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    folder = Path(__file__).parent
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def plain(value):
        """Text without what would reverse or hide other text."""
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value) if is_text else value

    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, finalize=plain,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.jinja").render(
        **content,
        target=TARGET_ACCURACY,
        classes=pictures.DIFFERENCES,
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=digest,
    )
    write_text(output, page)
    return output
