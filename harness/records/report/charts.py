"""Charts as inline SVG, in one style that can be read on a light and on a dark page.

matplotlib runs inside the benchmark's process. That is safe: only its `Figure` is used and never
pyplot, so that no window system, global figure or signal handler is touched; settings are restored
after each chart; it is imported when the first chart of a finished run is drawn. Charts contain no
text from files, and the page sets font and colour of all text.
"""

import io
import logging
import textwrap

import numpy as np

WIDTH = 4.7  # [inches]; the page scales charts to its columns
MAX_POINTS = 300  # of a line
MAX_NAME = 40  # characters in a line of the legend; so many are as wide as the chart
GREY = "#7e8896"
# Contrast with a white and with a dark page is at least 3, WCAG 2.
SERIES = ("#2f80c9", "#c8641b", "#1f9068", "#b85c9e", "#87801a", "#7d6fd0")
DASHES, MARKERS = ("-", "--", ":", "-."), "ovsx"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "cloudmask",  # the same file for the same data
    "font.size": 11,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GREY),
    "grid.alpha": 0.3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
}


def chart(
    title, x_label, y_label, lines, *, points=False, best=None, diagonal=None,
    height=2.5, note="", joined=(), **settings,
):  # fmt: skip
    """Draw lines, or points.

    Args:
        title: For readers who do not see the chart.
        x_label: Of the horizontal axis; epochs are whole numbers.
        y_label: Of the vertical axis.
        lines: {name: (x, y)}; y may have several columns, all drawn alike.
        points: Whether to draw a mark for each pair and no lines.
        best: Epoch to mark, or None.
        diagonal: Name of the line from (0, 0) to (1, 1), or None for no such line.
        height: [inches] without legend.
        note: A caption.
        joined: (x, y) pairs that a thin line joins.
        settings: More for `Axes.set`.

    Returns:
        Dictionary with `title`, `svg` and `note`.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # not that it builds a font cache
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (x, y)) in enumerate(lines.items()):
            style = {"color": SERIES[i % len(SERIES)], "label": name}
            if points:
                axes.plot(x, y, MARKERS[i % len(MARKERS)], markersize=5, **style)
                continue
            style |= {"linestyle": DASHES[i % len(DASHES)], "markersize": 3.5}
            axes.plot(thin(x), thin(y), marker="o" if len(x) <= 30 else "", **style)
        if joined:
            axes.plot(*zip(*joined, strict=True), color=GREY, linewidth=1, zorder=1)
        if best is not None:
            axes.axvline(best, color=GREY, linestyle=":", label=f"best: {best}")
        if diagonal:
            axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label=diagonal)
        if x_label == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=x_label, ylabel=y_label, **settings)
        if axes.get_xscale() == "log":  # 0.2, 0.5, 1 instead of powers of ten, also within one
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if len(entries) > 1:
            names = [textwrap.fill(name, MAX_NAME) for name in entries]
            for n_cols in (3, 2, 1):
                legend = figure.legend(
                    entries.values(), names, loc="outside upper left", ncols=n_cols
                )
                box = legend.get_window_extent()
                if n_cols == 1 or box.width <= figure.bbox.width:
                    break
                legend.remove()
            figure.set_figheight(height + box.height / figure.dpi)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    return {"title": title, "svg": svg[svg.index("<svg") :], "note": note}


def thin(values):
    """Means of equal stretches of a series, at most MAX_POINTS of them; means ignore NaN.

    Args:
        values: (n,) or (n, columns).
    """
    values = np.ma.masked_invalid(np.asarray(values, float))
    step = max(1, -(-len(values) // MAX_POINTS))
    parts = [values[i : i + step].mean(axis=0) for i in range(0, len(values), step)]
    return np.ma.stack(parts).filled(np.nan)
