"""Compare runs: what they reached, what they took, and in what they differ.

    python tools/compare.py RUN_DIR RUN_DIR ...
    python tools/compare.py outputs/* -o runs.csv     # or runs.md

Prints a column a run, below it the mean and the standard deviation (that of a sample, n - 1) over
repeats, and what differs between the runs: configuration, commit, devices, versions, scenes.
Repeats are runs that ended in success and differ in none of these; with --any-seed in the seed at
most. Runs that are under way or were stopped are shown as far as they came.

A .csv holds a line for each run, then two for each group of repeats, `mean` and `sd`, all digits,
and a column for all that differs; a .md the same tables as the terminal.

s/epoch is the mean over all epochs, validation included; patches/s are those of training without
the first epoch; accuracy and what follows are means over the masked scenes, and all cloud and
threshold the baselines that accuracy has to beat. Peak memory is that of the first rank's process.
"""

import argparse
import json
import logging
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from _command import exit_status
from harness.console import format_bytes, log_to_screen, printable, table
from harness.errors import UserError
from harness.files import write_csv, write_text
from harness.records.saved_runs import MEASURES, differences, labels, measures, read_run, repeats

LONGEST = 30  # characters of a value on the terminal; the files have all

# Of each measure: its name for people, and how it is written for them.
SHOWN = {
    "status": ("status", str),
    "replicas": ("replicas", "{:g}".format),
    "epochs": ("epochs", "{:g}".format),
    "seconds_per_epoch": ("s/epoch", "{:.2f}".format),
    "patches_per_second": ("patches/s", "{:.1f}".format),
    "seconds_per_scene": ("s/scene", "{:.3f}".format),
    "val_loss": ("val_loss", "{:.4f}".format),
    "val_accuracy": ("val_accuracy", "{:.4f}".format),
    "accuracy": ("accuracy", "{:.4f}".format),
    "valid_accuracy": ("valid_accuracy", "{:.4f}".format),
    "all_cloud_accuracy": ("all cloud", "{:.4f}".format),
    "threshold_accuracy": ("threshold", "{:.4f}".format),
    "peak_rss": ("peak memory", format_bytes),
    "peak_gpu_memory": ("peak GPU memory", format_bytes),
    "energy_joules": ("energy [J]", "{:.0f}".format),
}

log = logging.getLogger("compare")


@dataclass(frozen=True)
class Comparison:
    """Runs beside one another; run n of the tables is number n - 1 here.

    Attributes:
        runs: Runs.
        groups: Those that repeat one another, as lists of their numbers, from 1.
        measured: The measures of each run.
        means: Of each group, measures that all its runs have.
        deviations: Likewise, the standard deviations.
        differing: Of `differences`, the names printable.
    """

    runs: list
    groups: list
    measured: list
    means: list
    deviations: list
    differing: dict


def compare(folders, any_seed=False):
    """Read runs and compare them.

    Raises:
        UserError: If a folder is no run's, or stands twice.
    """
    seen = {}
    for folder in folders:
        if seen.setdefault(folder.resolve(), folder) is not folder:
            raise UserError(f"{folder} stands twice. Name each run once.")
    runs = [read_run(folder) for folder in folders]
    measured = [measures(run) for run in runs]
    numbers = {id(run): number for number, run in enumerate(runs, 1)}
    groups = [
        [numbers[id(run)] for run in group]
        for group in repeats(runs, {"config.seed"} if any_seed else ())
        if len(group) > 1
    ]
    means, deviations = [], []
    for group in groups:
        columns = {name: [measured[n - 1][name] for n in group] for name in MEASURES}
        columns = {name: values for name, values in columns.items() if None not in values}
        means.append({name: statistics.mean(values) for name, values in columns.items()})
        deviations.append({name: statistics.stdev(values) for name, values in columns.items()})
    differing = {printable(name): values for name, values in differences(runs).items()}
    return Comparison(runs, groups, measured, means, deviations, differing)


def run_columns(comparison):
    """The measures of each run for people: {number: {name: text}}; what no run has is left out."""
    has = [name for name in SHOWN if any(m[name] is not None for m in comparison.measured)]
    return {
        str(number): {SHOWN[name][0]: shown(name, measured[name]) for name in has}
        for number, measured in enumerate(comparison.measured, 1)
    }


def repeat_columns(comparison):
    """Mean and standard deviation of each group for people: {numbers of its runs: {name: text}}."""
    columns = {}
    for group, means, deviations in zip(
        comparison.groups, comparison.means, comparison.deviations, strict=True
    ):
        columns[", ".join(map(str, group))] = {
            SHOWN[name][0]: f"{shown(name, mean)} ± {shown(name, deviations[name])}"
            for name, mean in means.items()
        }
    return columns


def difference_columns(comparison, longest=None):
    """What differs: {number of a run: {place in results.json: value}}."""
    return {
        str(number + 1): {
            name: as_text(values[number], longest) for name, values in comparison.differing.items()
        }
        for number in range(len(comparison.runs))
    }


def shown(name, value):
    """A measure as people read it; a dash where there is none."""
    return "-" if value is None else printable(SHOWN[name][1](value))


def as_text(value, longest=None):
    """A value of results.json as text on one line; of what is too long both ends."""
    text = printable(value if isinstance(value, str) else json.dumps(value))
    if longest is None or len(text) <= longest:
        return text
    return f"{text[: longest // 2]}…{text[longest // 2 + 1 - longest :]}"


def to_terminal(comparison, width):
    """All tables as text; one that is too wide goes on below."""
    names = [printable(str(run.folder)) for run in comparison.runs]
    parts = ["\n".join(f"{number:>3}  {name}" for number, name in enumerate(names, 1))]
    parts += folded(run_columns(comparison), width)
    if comparison.groups:
        parts += ["Mean and standard deviation over repeats"]
        parts += folded(repeat_columns(comparison), width)
        parts += unknown_code(comparison)
    if comparison.differing:
        parts += ["What differs"] + folded(difference_columns(comparison, LONGEST), width)
    elif len(names) > 1:
        parts += ["Nothing differs in configuration, commit, devices, versions and scenes."]
    return "\n\n".join(parts) + "\n"


def folded(columns, width):
    """Tables of so many columns each as fit a width, one at least."""
    parts, taken = [], {}
    for title, column in columns.items():
        wider = {**taken, title: column}
        if taken and max(map(len, table(wider).splitlines())) > width:
            parts.append(table(taken))
            wider = {title: column}
        taken = wider
    return [*parts, table(taken)]


def unknown_code(comparison):
    """A remark where repeats may have run other code, as a list of it or empty."""
    commits = {
        comparison.runs[group[0] - 1].results.get("git_commit") for group in comparison.groups
    }
    if not any(commit is None or str(commit).endswith("-dirty") for commit in commits):
        return []
    return ["The code of repeats may differ: a commit is unknown, or was changed (-dirty)."]


def warn_of_copies(runs):
    """Warn where two runs have one MLPerf log: one is a copy of the other."""
    logs = {}
    for run in runs:
        digest = str(run.results.get("mlperf_sha256") or run.folder)
        if (first := logs.setdefault(digest, run)) is not run:
            log.warning(
                "%s and %s have one MLPerf log: copies are no repeats.",
                *(first.folder, run.folder),
            )


def to_markdown(comparison):
    """All tables in Markdown: a row a run, a row a group of repeats, a row a difference."""
    columns = run_columns(comparison)
    heads = list(columns["1"])
    rows = [
        [str(number), name, *column.values()]
        for number, (name, column) in enumerate(
            zip(labels(comparison.runs), columns.values(), strict=True), 1
        )
    ]
    rows += [
        [numbers, "mean ± sd", *(column.get(head, "-") for head in heads)]
        for numbers, column in repeat_columns(comparison).items()
    ]
    parts = [markdown_table(["", "run", *heads], rows), *unknown_code(comparison)]
    if comparison.differing:
        rows = [[name, *map(as_text, values)] for name, values in comparison.differing.items()]
        parts.append(markdown_table(["what differs", *columns], rows))
    return "\n\n".join(parts) + "\n"


def markdown_table(heads, rows):
    """A table in Markdown, its cells escaped."""
    lines = [heads, ["---"] * len(heads), *([markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(text):
    """Text that Markdown shows as it is: names may hold marks and HTML."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#|!~&" else c for c in printable(text))


def csv_rows(comparison):
    """The lines of the CSV file: each run, then mean and standard deviation of each group."""
    groups = {n: str(i) for i, group in enumerate(comparison.groups, 1) for n in group}
    for number, name in enumerate(labels(comparison.runs), 1):
        differing = {k: as_text(v[number - 1]) for k, v in comparison.differing.items()}
        about = {"row": "run", "run": name, "repeats": groups.get(number, "")}
        yield {**about, **comparison.measured[number - 1], **differing}
    for i in range(len(comparison.groups)):
        for row, values in (("mean", comparison.means[i]), ("sd", comparison.deviations[i])):
            yield {"row": row, "repeats": str(i + 1), **values}


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    add("-o", "--output", type=Path, metavar="FILE", help="table.csv or table.md to write")
    add("--any-seed", action="store_true", help="runs with other seeds are repeats too")
    add("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def work(arguments):
    """Compare runs as the command line says."""
    output = arguments.output
    if output and output.suffix not in (".csv", ".md"):
        raise UserError(f"-o takes a file that ends in .csv or .md, found {output}.")
    comparison = compare(arguments.runs, arguments.any_seed)
    warn_of_copies(comparison.runs)
    sys.stdout.reconfigure(errors="replace")  # ± where the terminal's encoding lacks it
    sys.stdout.write(to_terminal(comparison, shutil.get_terminal_size().columns))
    if output and output.suffix == ".csv":
        columns = ("row", "run", "repeats", "status", *MEASURES, *comparison.differing)
        write_csv(output, columns, csv_rows(comparison))
    elif output:
        write_text(output, to_markdown(comparison))


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: work(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
