"""Charts as inline SVG, in colours that the page gives: one file for light, dark and print.

matplotlib draws with the placeholders of COLOURS, which become variables of the page's style.
Texts stay texts. Charts are as wide as a phone: the page enlarges them on greater screens.
"""

import io
import math
import os
import re
import warnings
from xml.etree import ElementTree

import numpy as np

from harness.console import printable

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
WIDTH = 4.7  # [inches], 338 points
FONT_SIZE = 11  # [points] on a phone
LEGEND_ROW = 0.24  # [inches]
MOST_POINTS = 300  # of a line
MOST_DOTS = 1000  # of scenes
COLOURS = {  # placeholder: of the page's style
    "#010101": "currentColor",
    "#010102": "var(--faint)",
    "#010103": "var(--band)",
    "#010104": "var(--page)",
    "#0101a1": "var(--series-1)",
    "#0101a2": "var(--series-2)",
    "#0101a3": "var(--series-3)",
    "#0101a4": "var(--series-4)",
    "#0101a5": "var(--series-5)",
    "#0101a6": "var(--series-6)",
}
TEXT, FAINT, BAND, PAGE, *SERIES = COLOURS
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def chart(name, title, draw, height=2.5):
    """Draw a chart.

    Args:
        name: Unique in the page; the SVG's own names begin with it.
        title: For those who do not see it.
        draw: Function of matplotlib's Axes.
        height: [inches], with a legend of two rows at most; more of them make it higher.

    Returns:
        SVG as text; nothing in it comes from a file but what matplotlib has escaped.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",  # texts
        "svg.hashsalt": "cloudmask",  # the same names in each report
        "font.size": FONT_SIZE,
        "text.color": TEXT,
        "text.parse_math": False,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": FAINT,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has others
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        draw(axes)
        if (handles := axes.get_legend_handles_labels())[0]:
            n_cols = max(1, min(4, 48 // (max(map(len, handles[1])) + 6)))
            n_rows = -(-len(handles[1]) // n_cols)
            figure.set_figheight(height + LEGEND_ROW * max(0, n_rows - 2))
            figure.legend(
                *handles, loc="outside upper left", ncols=n_cols, handlelength=2.2,
                columnspacing=1.2, borderaxespad=0.2,
            )  # fmt: skip
        space = io.StringIO()
        figure.savefig(space, format="svg", transparent=True, metadata={"Date": None})
    return _inline(space.getvalue(), name, title)


def _inline(svg, name, title):
    """What of an SVG file goes into a page, with the page's colours and fonts."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        values = element.attrib
        if "id" in values:
            values["id"] = f"{name}-{values['id']}"
        if target := values.pop(f"{{{XLINK}}}href", None):
            values["href"] = f"#{name}-{target[1:]}"
        for key, value in values.items():
            value = value.replace("url(#", f"url(#{name}-")
            value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
            for placeholder, colour in COLOURS.items():
                value = value.replace(placeholder, colour)
            values[key] = value
        if (element.tail or "").isspace():
            element.tail = None
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": title})
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(rf"#({name}-[\w-]+)", text))
    return re.sub(
        rf' id="({name}-[^"]*)"', lambda found: found[0] if found[1] in used else "", text
    )


def thinned(values, most=MOST_POINTS):
    """Means of equal stretches of a series, most of them at most; NaN is left out of its mean."""
    values = np.asarray(values, float)
    if len(values) <= most:
        return values
    edges = np.linspace(0, len(values), most + 1).astype(int)
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0), edges[:-1])
    count = np.add.reduceat(known.astype(float), edges[:-1])
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def shortened(name):
    """A name as it fits into a chart."""
    name = printable(name)
    return name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}"


def short_names(names):
    """Names of runs as they fit into a chart, without the words that all of them begin with."""
    names = list(names)
    common = os.path.commonprefix(names) if len(names) > 1 else ""
    start = len(re.sub(r"[^-_./ ]*$", "", common))
    return [shortened(name[start:] or name) for name in names]


# --- training -------------------------------------------------------------------------------


def learning_curve(axes, runs, key, best=None):
    """Draw a measure of each epoch, of training and validation.

    Args:
        axes: Of matplotlib.
        runs: {name: (epochs, training values, validation values)}; of several runs None for
            training values.
        key: What is drawn: 'loss' or 'accuracy'.
        best: The epoch whose model is kept, or None.
    """
    for i, (name, values) in enumerate(zip(short_names(runs), runs.values(), strict=True)):
        epochs, trained, validated = values
        marker = {"marker": "o", "markersize": 3.5} if len(epochs) <= 30 else {}
        x = thinned(epochs)
        if trained is None:
            axes.plot(
                x, thinned(validated), color=SERIES[i % len(SERIES)],
                linestyle=DASHES[i % len(DASHES)], label=name, **marker,
            )  # fmt: skip
            continue
        axes.plot(x, thinned(trained), color=SERIES[1], linestyle=DASHES[1], label="training")
        axes.plot(x, thinned(validated), color=SERIES[0], label="validation", **marker)
        if best in epochs:
            y = validated[epochs.index(best)]
            axes.plot(best, y, "*", color=SERIES[0], markersize=12, label=f"best, {best}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel=key)


def epoch_times(axes, parts):
    """Draw the seconds of each epoch, its parts upon one another.

    Args:
        axes: Of matplotlib.
        parts: {name: seconds of each epoch}.
    """
    n_epochs = len(next(iter(parts.values())))
    edges = np.linspace(0, n_epochs, min(n_epochs, MOST_POINTS) + 1) + 0.5
    base = np.zeros(len(edges) - 1)
    colours = [SERIES[0], FAINT] if len(parts) < 3 else [SERIES[0], SERIES[1], FAINT]
    for (name, seconds), colour in zip(parts.items(), colours, strict=False):
        top = base + np.nan_to_num(thinned(seconds))
        axes.stairs(
            top, edges, baseline=base, fill=True, facecolor=colour, edgecolor=PAGE,
            linewidth=0.8 * (n_epochs <= 60),
            label=name,
        )  # fmt: skip
        base = top
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="seconds", ylim=(0, None))


# --- scenes ---------------------------------------------------------------------------------


def scene_accuracies(axes, points):
    """Draw the accuracy of each scene over the cloud in its label, day and night apart.

    Args:
        axes: Of matplotlib.
        points: {kind of scene: list of (share of cloud in the label, accuracy)}.

    Above the line a mask beats the one that calls all pixels cloud.
    """
    axes.plot([0, 1], [0, 1], color=TEXT, linestyle=(0, (1, 2)), linewidth=1, label="all cloud")
    markers = ("o", "v", "s")
    n_points = sum(map(len, points.values()))
    for (kind, pairs), marker, colour in zip(points.items(), markers, SERIES, strict=False):
        pairs = sorted(pairs, key=lambda pair: pair[1])
        pairs = pairs[:: -(-n_points // MOST_DOTS)]
        axes.plot(
            *zip(*pairs, strict=True), marker, color=colour, label=shortened(kind),
            markersize=5 if n_points <= 200 else 3,
            markerfacecolor="none" if marker == "o" else colour,
        )  # fmt: skip
    lowest = min(pair[1] for pairs in points.values() for pair in pairs)
    axes.set(
        xlabel="share of cloud in the label", ylabel="accuracy", xlim=(-0.02, 1.02),
        ylim=(min(0.5, math.floor(lowest * 10) / 10) - 0.02, 1.02),
    )  # fmt: skip


def reliability(axes, probabilities, shares):
    """Draw how often there is cloud where the network gives a probability."""
    axes.plot([0, 1], [0, 1], color=TEXT, linestyle=(0, (1, 2)), linewidth=1, label="ideal")
    axes.plot(probabilities, shares, "o-", color=SERIES[0], markersize=4, label="network")
    axes.set(xlabel="probability of cloud", ylabel="share of cloud", xlim=(0, 1), ylim=(0, 1))


def roc(axes, false_alarms, hits, at_threshold):
    """Draw hits over false alarms for every threshold, and mark the one that masks are made with.

    Args:
        axes: Of matplotlib.
        false_alarms: False positive rates.
        hits: True positive rates.
        at_threshold: The pair at the threshold, or None.
    """
    axes.plot([0, 1], [0, 1], color=TEXT, linestyle=(0, (1, 2)), linewidth=1, label="chance")
    axes.plot(false_alarms, hits, color=SERIES[0], label="network")
    axes.plot(*at_threshold, "s", color=SERIES[1], markersize=6, label="threshold 0.5")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))


# --- several runs ---------------------------------------------------------------------------


def accuracies(axes, runs, target):
    """Draw the accuracy of each run beside its baselines.

    Args:
        axes: Of matplotlib.
        runs: {name: {'accuracy': number, baseline: number, ...}} with None where unknown.
        target: Accuracy to reach.
    """
    axes.axvline(target, color=TEXT, linestyle=(0, (1, 2)), linewidth=1, label=f"target {target:g}")
    styles = {
        "accuracy": ("o", SERIES[0], SERIES[0], 8),
        "all_cloud_accuracy": ("|", TEXT, TEXT, 10),
        "threshold_accuracy": ("x", SERIES[1], SERIES[1], 6),
    }
    rows = range(len(runs))
    for key, (marker, edge, face, size) in styles.items():
        values = [math.nan if r.get(key) is None else r[key] for r in runs.values()]
        axes.plot(
            values, rows, marker, markeredgecolor=edge, markerfacecolor=face, markersize=size,
            label=key.removesuffix("_accuracy").replace("_", " "), linestyle="none",
        )  # fmt: skip
    axes.set(
        yticks=rows,
        yticklabels=short_names(runs),
        xlabel="accuracy",
        ylim=(len(runs) - 0.5, -0.5),
    )


# --- the machine ----------------------------------------------------------------------------


def over_time(axes, times, lines, phases, label):
    """Draw samples over time, with the phases of the run behind them.

    Args:
        axes: Of matplotlib.
        times: [minutes] since the first sample or phase.
        lines: {name: values}.
        phases: List of (kind, begin, end) [minutes], kind 'training',
            'validation' or 'inference'.
        label: Of the vertical axis.
    """
    heights = {"training": [(0, 1, BAND)], "validation": [(0, 1, FAINT)]}
    heights["inference"] = [(0, 1, BAND), (0.96, 0.04, TEXT)]
    for kind, strips in heights.items():
        spans = [(begin, end - begin) for k, begin, end in phases if k == kind]
        for bottom, height, colour in strips if spans else ():
            axes.broken_barh(
                spans, (bottom, height), transform=axes.get_xaxis_transform(), facecolor=colour,
                linewidth=0, zorder=0.5,
            )  # fmt: skip
    times = thinned(times)
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(
            times, thinned(values), color=SERIES[i % len(SERIES)],
            linestyle=DASHES[i // len(SERIES) % len(DASHES)] if len(lines) > 3 else DASHES[i],
            linewidth=1.4, label=name if len(lines) > 1 else None,
        )  # fmt: skip
    axes.grid(axis="x", visible=False)
    top = max(np.nanmax(values) for values in lines.values())
    axes.set(xlabel="minutes", ylabel=label, ylim=(0, 1.15 * top or 1))  # below inference's mark
