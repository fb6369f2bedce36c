"""Compare runs: their scores, speed and resources, and how the runs differ.

    python tools/compare.py RUN_DIR RUN_DIR ...
    python tools/compare.py outputs/* -o runs.csv     # or runs.md

Prints a column per run, then mean and standard deviation (of a sample, n - 1) over repeats, then
the differences between the runs: configuration, commit, devices, versions, scenes. Repeats are
runs that ended in success and differ in none of these; with --any-seed they may differ in the seed.
Other runs are shown with the values that they have. What looked wrong in a run comes last. A .csv
file has a row per run, two rows (`mean` and `sd`) per group of repeats, all digits, and a column
per difference; a .md file has the tables of the terminal.

Baselines stand below the score of the same pixels. `valid` are the pixels with data; in scores
where `no data is clear` all masks are clear where there are none. All cloud has a balanced accuracy
of 0.5.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from _command import exit_status
from harness.console import log_to_screen, printable, table
from harness.errors import UserError
from harness.files import write_csv, write_text
from harness.records.mlperf_log import value_at
from harness.records.saved_runs import MEASURES, differences, labels, measures, read_run, repeats
from tools.lib.markdown import markdown, markdown_table

# Characters of a differing value on the terminal: fewer if the runs would not fit side by side
# otherwise. Files contain all of them.
MIN_LENGTH, MAX_LENGTH = 14, 30
# What describes a run, and its place in results.json; runs before 0.2.0 have only the status.
DESCRIPTIONS = {
    "status": "status",
    "network": "network.name",
    "parameters": "network.parameters",
    "loss": "training.loss_function",
    "labels": "config.labels",
}
LABELS = {n: n for n in DESCRIPTIONS} | {n: measure.label for n, measure in MEASURES.items()}


@dataclass(frozen=True)
class Comparison:
    """What the tables show.

    Attributes:
        runs: Runs, numbered from 1 below.
        values: DESCRIPTIONS and MEASURES of each run, {name: value or None}.
        spreads: {numbers of repeats: {name: (mean, standard deviation)}}, for the MEASURES that all
            these runs have.
        differing: `differences` of the runs, the names printable.
    """

    runs: list
    values: list
    spreads: dict
    differing: dict


def compare(folders, any_seed=False):
    """Read runs and compare them.

    Raises:
        UserError: If a folder is not that of a run, or is given twice.
    """
    for n, folder in enumerate(folders):
        if folder.resolve() in map(Path.resolve, folders[:n]):
            raise UserError(f"{folder} is given twice. Name each run once.")
    runs = [read_run(folder) for folder in folders]
    values = [
        {name: value_at(run.results, place) for name, place in DESCRIPTIONS.items()} | measures(run)
        for run in runs
    ]
    numbers, spreads = {id(run): number for number, run in enumerate(runs, 1)}, {}
    for group in repeats(runs, {"config.seed"} if any_seed else ()):
        if len(group) > 1:
            group = tuple(numbers[id(run)] for run in group)
            columns = {name: [values[n - 1][name] for n in group] for name in MEASURES}
            spreads[group] = {
                name: (statistics.mean(column), statistics.stdev(column))
                for name, column in columns.items()
                if None not in column
            }
    differing = {printable(name): values for name, values in differences(runs).items()}
    return Comparison(runs, values, spreads, differing)


def run_columns(comparison):
    """The values of each run: {number: {label: text}}, without measures that no run has."""
    present = {name for v in comparison.values for name in v if v[name] is not None}
    shown = [name for name in LABELS if name in present | DESCRIPTIONS.keys()]
    return {
        str(number): {LABELS[name]: show(name, values[name]) for name in shown}
        for number, values in enumerate(comparison.values, 1)
    }


def repeat_columns(comparison):
    """Mean and standard deviation of each group: {numbers of its runs: {label: text}}."""
    return {
        ", ".join(map(str, group)): {
            LABELS[name]: f"{show(name, mean)} ± {show(name, sd)}"
            for name, (mean, sd) in spread.items()
        }
        for group, spread in comparison.spreads.items()
    }


def show(name, value):
    """A description or measure for people; a dash if there is none."""
    if value is None:
        return "-"
    return MEASURES[name].show(value) if name in MEASURES else as_text(value)


def as_text(value, max_length=1_000_000):
    """A value of results.json on one line; of a text that is too long both ends."""
    text, half = printable(value if isinstance(value, str) else json.dumps(value)), max_length // 2
    return text if len(text) <= max_length else f"{text[:half]}…{text[1 - half :]}"


def to_terminal(comparison, width):
    """All tables as text; a table that is too wide is split into several."""
    names = [printable(str(run.folder)) for run in comparison.runs]
    parts = ["\n".join(f"{number:>3}  {name}" for number, name in enumerate(names, 1))]
    parts += split_table(run_columns(comparison), width)
    if columns := repeat_columns(comparison):
        parts += ["Mean and standard deviation over repeats", *split_table(columns, width)]
    if comparison.differing:
        fitting = (width - max(map(len, comparison.differing))) // len(names) - 2
        length = max(MIN_LENGTH, min(fitting, MAX_LENGTH))
        columns = {
            str(n + 1): {k: as_text(v[n], length) for k, v in comparison.differing.items()}
            for n in range(len(names))
        }
        parts += ["Differences", *split_table(columns, width)]
    elif len(names) > 1:
        parts += ["Nothing differs in configuration, commit, devices, versions and scenes."]
    texts = [*remarks(comparison), *map(printable, run_warnings(comparison))]
    parts += [textwrap.fill(text, width) for text in texts]
    return "\n\n".join(parts) + "\n"


def split_table(columns, width):
    """Tables of as many columns as fit the width, at least one each."""
    parts = [{}]
    for title, column in columns.items():
        wider = {**parts[-1], title: column}
        if parts[-1] and max(map(len, table(wider).splitlines())) > width:
            parts.append({title: column})
        else:
            parts[-1] = wider
    return list(map(table, parts))


def remarks(comparison):
    """What the reader should know about the runs, as a list of texts."""
    texts, logs = [], {}
    for number, run in enumerate(comparison.runs, 1):
        first = logs.setdefault(str(run.results.get("mlperf_sha256") or run.folder), number)
        if first != number:
            texts.append(f"Runs {first} and {number} have the same MLPerf log: one is a copy.")
    commits = [comparison.runs[n - 1].results.get("git_commit") for n, *_ in comparison.spreads]
    if not all(re.fullmatch("[0-9a-f]{40}", str(commit)) for commit in commits):
        texts.append("The code of repeats may differ: a commit is unknown or had changes (-dirty).")
    if numbers := [str(n) for n, run in enumerate(comparison.runs, 1) if run.is_synthetic]:
        noun = "Run" if len(numbers) == 1 else "Runs"
        texts.append(f"{noun} {', '.join(numbers)}: the scenes are synthetic.")
    return texts


def run_warnings(comparison):
    """What looked wrong in each run, as a list of texts."""
    runs = enumerate(comparison.runs, 1)
    return [f"Run {number}: {text}" for number, run in runs for text in run.warnings]


def to_markdown(comparison):
    """All tables in Markdown: a row per run, per group of repeats and per difference."""
    columns, names = run_columns(comparison), labels(comparison.runs)
    heads = list(columns["1"])
    rows = [[n, name, *columns[n].values()] for n, name in zip(columns, names, strict=True)]
    for numbers, column in repeat_columns(comparison).items():
        rows.append([numbers, "mean ± sd", *(column.get(head, "-") for head in heads)])
    parts = [markdown_table(["", "run", *heads], rows), *remarks(comparison)]
    parts += map(markdown, run_warnings(comparison))
    if comparison.differing:
        rows = [[name, *map(as_text, values)] for name, values in comparison.differing.items()]
        parts.append(markdown_table(["difference", *columns], rows))
    return "\n\n".join(parts) + "\n"


def csv_rows(comparison):
    """The rows of the CSV file: each run, then mean and standard deviation of each group."""
    groups = {n: i for i, group in enumerate(comparison.spreads, 1) for n in group}
    for n, name in enumerate(labels(comparison.runs), 1):
        differing = {place: as_text(v[n - 1]) for place, v in comparison.differing.items()}
        about = {"row": "run", "run": name, "repeats": groups.get(n, "")}
        yield {**about, **comparison.values[n - 1], **differing}
    for i, spread in enumerate(comparison.spreads.values(), 1):
        for row, which in (("mean", 0), ("sd", 1)):
            yield {"row": row, "repeats": i} | {name: pair[which] for name, pair in spread.items()}


def parse_arguments(argv):
    """The command line."""
    meanings = "".join(f"  {m.label:20}{m.meaning}\n" for m in MEASURES.values())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"measures:\n{meanings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    add("-o", "--output", type=Path, metavar="FILE", help="table.csv or table.md to write")
    add("--any-seed", action="store_true", help="count runs with other seeds as repeats")
    add("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def work(arguments):
    """Compare runs as the command line says."""
    output = arguments.output
    if output and output.suffix not in (".csv", ".md"):
        raise UserError(f"-o takes a file name that ends in .csv or .md, found {output}.")
    comparison = compare(arguments.runs, arguments.any_seed)
    sys.stdout.reconfigure(errors="replace")  # ± on terminals whose encoding lacks it
    sys.stdout.write(to_terminal(comparison, shutil.get_terminal_size().columns))
    if output and output.suffix == ".csv":
        columns = ("row", "run", "repeats", *DESCRIPTIONS, *MEASURES, *comparison.differing)
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
