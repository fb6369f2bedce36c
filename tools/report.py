"""Make one HTML page of a run, or of several; it needs no network.

    python tools/report.py RUN_DIR                      # RUN_DIR/report.html
    python tools/report.py RUN_DIR RUN_DIR -o report.html
    python tools/report.py RUN_DIR --pictures figures   # PNG, one a scene

Of one run: both metrics with baselines and target, what ran where, training
curves, times, the scores of each scene, calibration where the run kept
probabilities, pictures of the worst, the median and the best scene, and the
samples of the machine. Of several runs: a table, curves, and what differs in
their configuration, commit, devices and versions. What a run does not have is
left out, or the page says so: a run that was stopped, or one without labels,
has a report too.
"""

import argparse
import base64
import functools
import hashlib
import json
import logging
import sys
from pathlib import Path

from _command import exit_status
from harness.console import format_duration, log_to_screen, printable, progress
from harness.data.mask_files import mask_files
from harness.errors import UserError
from harness.files import write_text
from harness.records.report import charts, pictures
from harness.records.report.one_run import (
    SCENE_COLUMNS,
    numbers,
    report_of_one,
    scene_folder,
)
from harness.records.saved_runs import differences, labels, measures, number, read_run

TARGET = 0.9  # accuracy, MLCommons Science
RUN_COLUMNS = {  # of harness.records.saved_runs.measures: (heading, digits)
    "accuracy": ("accuracy", 4),
    "valid_accuracy": ("valid accuracy", 4),
    "seconds_per_scene": ("seconds per scene", 3),
    "patches_per_second": ("patches per second", 1),
    "replicas": ("replicas", 0),
    "epochs": ("epochs", 0),
    "seconds_per_epoch": ("seconds per epoch", 2),
    "val_accuracy": ("validation accuracy", 4),
    "val_loss": ("validation loss", 4),
}

log = logging.getLogger("report")


# --- several runs ---------------------------------------------------------------------------


def report_of_several(runs):
    """What the page shows of several runs."""
    names = {name: run for name, run in zip(labels(runs), runs, strict=True)}
    measured = {name: measures(run) for name, run in names.items()}
    rows = [
        (
            name,
            str(m["status"]),
            [(number(m[key]), digits) for key, (_, digits) in RUN_COLUMNS.items()],
        )
        for name, m in measured.items()
    ]
    curves = []
    trained = {name: run for name, run in names.items() if run.history}
    for key in ("val_loss", "val_accuracy") if trained else ():
        values = {
            name: (
                numbers([row.get("epoch") for row in run.history]),
                None,
                numbers([row.get(key) for row in run.history]),
            )
            for name, run in trained.items()
        }
        word = key.replace("val_", "validation ")
        curves.append(
            charts.chart(
                f"curve-{key}",
                f"{word} of each run, epoch by epoch",
                functools.partial(charts.learning_curve, runs=values, key=word),
                height=3,
            )
        )
    chart = None
    if any(number(m["accuracy"]) is not None for m in measured.values()):
        chart = charts.chart(
            "accuracies",
            "accuracy of each run beside its baselines",
            lambda axes: charts.accuracies(axes, measured, TARGET),
            height=1.2 + 0.3 * len(runs),
        )
    return {
        "names": list(names),
        "rows": rows,
        "accuracies": chart,
        "curves": curves,
        "differences": differences(runs),
    }


# --- the page -------------------------------------------------------------------------------


def page(content, title):
    """The HTML page, all that came from files escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(charts.__file__).parent
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters |= {
        "digits": digits, "duration": format_duration, "setting": setting, "svg": Markup,
    }  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        **content,
        title=title,
        target=TARGET,
        scene_columns=SCENE_COLUMNS,
        run_columns=RUN_COLUMNS,
        differences_legend=pictures.DIFFERENCES,
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(digest).decode(),
    )


def digits(value, n=4):
    """A number for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{n}f}"


def setting(value):
    """A value as it stands in a configuration."""
    return value if isinstance(value, str) else json.dumps(value)


# --- the program ----------------------------------------------------------------------------


def write_pictures(run, data, folder):
    """Write the pictures of each masked scene as PNG.

    Raises:
        UserError: If there is no mask, or no scene file of one.
    """
    masks = mask_files(run.folder)
    if not masks:
        raise UserError(
            f"No masks in {run.folder / 'masks'}: RUN_DIR should be the folder of a run of --mode "
            "benchmark or inference."
        )
    where = scene_folder(run, data)
    scenes = pictures.scenes_by_name(where)
    if missing := masks.keys() - scenes.keys():
        raise UserError(
            f"{len(missing)} of {len(masks)} masked scenes are not in {where}, {min(missing)} for "
            "one. Say where the scene files are with --data."
        )
    accuracies = {str(row.get("scene")): number(row.get("accuracy")) for row in run.scenes}
    for name, path in progress(masks.items(), "Drawing", len(masks)):
        scene = pictures.read_masked_scene(path, scenes[name])
        score = accuracies.get(name)
        facts = f"run {run.name}" + ("" if score is None else f", accuracy {score:.4f}")
        pictures.write_png(folder / f"{name}.png", name, facts, pictures.panels(scene))
    log.info("Pictures of %d scene(s) are in %s", len(masks), folder)


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    add("-o", "--output", type=Path, help="file to write (default RUN_DIR/report.html of one run)")
    add("--data", type=Path, help="folder of the scene files (default the run's inference_dir)")
    add("--pictures", type=Path, metavar="DIR", help="write PNG pictures there instead of a page")
    add("--verbose", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) > 1 and (arguments.pictures or not arguments.output):
        parser.error("of several runs, name the file with -o; --pictures takes one run")
    return arguments


def make(arguments):
    """Make the page or the pictures."""
    runs = [read_run(folder) for folder in arguments.runs]
    if len({folder.resolve() for folder in arguments.runs}) < len(runs):
        raise UserError("A run is named twice. Name each RUN_DIR once.")
    if arguments.data and not arguments.data.is_dir():
        raise UserError(f"No directory {arguments.data}. Name that of the scene files with --data.")
    if arguments.pictures:
        write_pictures(runs[0], arguments.data, arguments.pictures)
        return
    output = arguments.output or arguments.runs[0] / "report.html"
    if output.is_dir():
        raise UserError(f"-o takes a file to write, found the folder {output}.")
    if len(runs) == 1:
        content, title = report_of_one(runs[0], arguments.data), runs[0].name
    else:
        content, title = report_of_several(runs), f"{len(runs)} runs"
    write_text(output, page(content, title))
    log.info("The report is %s", output)


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: make(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
