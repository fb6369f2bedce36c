"""Repeated measurements and the rows of the table that bench.py makes of them."""

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from harness.console import table

log = logging.getLogger("bench")


@dataclass(frozen=True)
class Row:
    """One row of the table; absent values are None."""

    name: str  # words separated by slashes
    unit: str  # ends in '/s' where more is better
    value: float  # median of the repeats
    min: float
    max: float
    baseline: str | None = None  # name of the row or program that this one is compared with
    baseline_value: float | None = None  # its median
    ratio: float | None = None  # how many times better than the baseline
    limit_share: float | None = None  # rate over the limit of the machine


@dataclass(frozen=True)
class Plan:
    """How to measure one row; its name is the key."""

    unit: str
    function: Callable[[], float]  # one measurement, in the unit
    baseline: str | None = None  # name of a row measured with it, or of `target`
    target: float | None = None  # a baseline that is not measured
    limit: str | None = None  # name of the row measured with it that is the machine's limit, or
    precision: str | None = None  # of the matrix products that are the limit, and
    gflop: float | None = None  # the operations, 10^9, of one unit: of a patch or a scene


def make_row(name, unit, values, baseline=None, baseline_values=(), limit_share=None):
    """Make the row of repeated measurements; one that is its own baseline has none."""
    value, span = statistics.median(values), (min(values), max(values))
    if not baseline_values or baseline == name:
        return Row(name, unit, value, *span, limit_share=limit_share)
    base = statistics.median(baseline_values)
    ratio = value / base if unit.endswith("/s") else base / value
    return Row(name, unit, value, *span, baseline, base, ratio, limit_share)


def alternate(functions, repeats, seconds=math.inf):
    """Call functions in turn (a, b, a, b, ...), so that a slow minute affects all of them.

    Args:
        functions: Functions without arguments, by name.
        repeats: Number of rounds.
        seconds: Time limit; a round after the first starts only if it is expected to end in time.

    Returns:
        {name: list of what the function returned}.
    """
    results = {name: [] for name in functions}
    begin = time.perf_counter()
    for done in range(repeats):
        if done and (time.perf_counter() - begin) * (done + 1) / done > seconds:
            log.info("    %d of %d repeats, to stay within %d s", done, repeats, seconds)
            break
        for name, function in functions.items():
            results[name].append(function())
    return results


def timed(function):
    """Wrap a function so that it returns the seconds that it takes instead of its result."""

    def run():
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return run


def rate(function, work):
    """Wrap a function so that it returns the work that it does per second."""
    seconds = timed(function)
    return lambda: work / seconds()


def is_wanted(name, only):
    """Whether a row, or a row below it, starts with one of the names; all do if none is given.

    `train_step` is wanted if `train_step/float32` is, because it may contain it.
    """
    return not only or any(name.startswith(o) or o.startswith(f"{name}/") for o in only)


def text_table(rows):
    """Format rows as text."""
    columns = {title: {} for title in ("unit", "value", "min - max", "better", "than", "limit")}
    for row in rows:
        group = row.name.partition("/")[0] + "/"  # not repeated in the name of the baseline
        cells = (
            row.unit,
            f"{format_number(row.value):>7}",
            f"{format_number(row.min)} - {format_number(row.max)}",
            "" if row.ratio is None else f"{row.ratio:5.2f}",
            (row.baseline or "").removeprefix(group),
            "" if row.limit_share is None else f"{row.limit_share:5.0%}",
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column[row.name] = cell
    return table(columns)


def format_number(value):
    """Three significant digits without exponent."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"
