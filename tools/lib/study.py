"""The table, the charts and the page of a study, from the folders of its runs."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from harness.config import Config
from harness.console import counted, table
from harness.files import write_csv
from harness.inference.scores import SCENE_PARTS
from harness.records import report
from harness.records.report import one_run
from harness.records.report.charts import chart
from harness.records.saved_runs import Run, read_run
from tools.lib.masks import Mask, open_masks
from tools.lib.truth import score_truth

PAGE, RUNS = "study.html", "runs.csv"


@dataclass(frozen=True)
class Measure:
    """A column of the table of a study."""

    label: str
    show: Callable[[float], str]
    meaning: str


def _accuracy(label, meaning):
    return Measure(label, "{:.4f}".format, meaning)


LABEL, TRUTH = "accuracy", "truth_accuracy"
MEASURES = {
    "parameters": Measure("parameters", "{:,.0f}".format, "Weights of the network."),
    "multiplications_per_pixel": Measure(
        "multiplications", "{:,.0f}".format, "Of one pass, per pixel of the scene."
    ),
    "seconds_per_scene": Measure(
        "s/scene", "{:.3f}".format, "Masking a scene, from its file to its mask [s]."
    ),
    "masking_speed": Measure("masking", "{:.2f} x".format, "Scenes per second over the first row."),
    **{
        f"{part}_share": Measure(
            word,
            "{:.0%}".format,
            "Share of the seconds per scene; reading, network with stitching, and scoring with "
            "writing run at the same time.",
        )
        for part, word in SCENE_PARTS.items()
    },
    "patches_per_second": Measure(
        "patches/s", "{:.1f}".format, "Training without the first epoch, all replicas."
    ),
    "training_speed": Measure("training", "{:.2f} x".format, "Patches/s over the first row."),
    "training_seconds": Measure(
        "training [s]", "{:.0f}".format, "Training and validation of all epochs."
    ),
    "epochs": Measure("epochs", "{:.0f}".format, "Epochs trained."),
    LABEL: _accuracy(
        "accuracy (all pixels)", "Agreement with the label, all pixels: the science metric."
    ),
    "accuracy_day": _accuracy("day (all pixels)", "The same, scenes by day."),
    "accuracy_night": _accuracy("night (all pixels)", "The same, scenes at night."),
    "valid_balanced_accuracy": _accuracy(
        "balanced (with data)", "Balanced accuracy against the label, pixels with data."
    ),
    TRUTH: _accuracy("truth (with data)", "Agreement with the truth, pixels with data."),
    "truth_day": _accuracy("truth, day (with data)", "The same, scenes by day."),
    "truth_night": _accuracy("truth, night (with data)", "The same, scenes at night."),
    "truth_balanced_accuracy": _accuracy(
        "truth, balanced (with data)", "Balanced accuracy against the truth, pixels with data."
    ),
}
SPEEDS = (  # over the first case: key, what it is calculated from, and 1 if more of that is better
    ("masking_speed", "seconds_per_scene", -1), ("training_speed", "patches_per_second", 1),
)  # fmt: skip
AXES = {"seconds_per_scene": "seconds per scene", "training_seconds": "training seconds"}


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run of a study.

    Attributes:
        case: Name of what was run, without the seed.
        run: Run.
        config: Config of the run.
        values: {key of MEASURES: number}, without those that the run does not have.
        groups: {title: {name: accuracy against the truth among these pixels}}, see `score_truth`.
        scenes: Names of the masked scenes.
    """

    case: str
    run: Run
    config: Config
    values: dict
    groups: dict
    scenes: set


def measure(case, folder):
    """Read a finished run and score it; UserError if a file of it is damaged."""
    run = read_run(folder)
    results = run.clean_results
    network, training, inference = (results[k] for k in ("network", "training", "inference"))
    (mask,) = open_masks([str(run.folder)])
    truth, groups = measure_truth(mask, mask.config)
    values = {
        **{key: network.get(key) for key in ("parameters", "multiplications_per_pixel")},
        "seconds_per_scene": inference.get("seconds_per_scene"),
        **{f"{part}_share": inference.get("shares", {}).get(part) for part in SCENE_PARTS},
        "patches_per_second": training.get("patches_per_second"),
        "training_seconds": training.get("seconds"),
        "epochs": training.get("epochs_run"),
        LABEL: inference.get("accuracy"),
        **{
            f"accuracy_{part}": inference.get(part, {}).get("accuracy") for part in ("day", "night")
        },
        "valid_balanced_accuracy": inference.get("valid_balanced_accuracy"),
        **truth,
    }
    known = {key: value for key, value in values.items() if value is not None}
    return MeasuredRun(case, run, mask.config, known, groups, set(mask.files))


def measure_truth(mask, config, scenes=None):
    """Score a mask against the truth: {key of MEASURES: number}, and groups as of MeasuredRun.

    Args:
        mask: Mask.
        config: Config of its run.
        scenes: Names of the scenes to score; None for all that have a mask.
    """
    scores, groups = score_truth(mask, config.inference_dir, config.min_sst, scenes)
    return {f"truth_{name}": score for name, score in scores.items()}, groups


def measure_baselines(runs):
    """Score the label and the threshold baseline against the truth, as `measure_truth` does.

    Args:
        runs: MeasuredRuns.

    Returns:
        {name: result of `measure_truth`}, for each folder of scenes; empty without a truth.
    """
    folders = {}
    for run in runs:
        if {LABEL, TRUTH} <= run.values.keys():
            folders.setdefault(run.config.inference_dir, []).append(run)
    found = {}
    for folder, members in folders.items():
        scenes = set.intersection(*(run.scenes for run in members))  # some may have been skipped
        for name, dataset in {"label": "bayes", "threshold": "threshold"}.items():
            title = f"{name} of {folder}" if len(folders) > 1 else name
            found[title] = measure_truth(Mask(dataset), members[0].config, scenes)
    return found


def by_case(runs):
    """The runs of each case, in the order of the first of each."""
    cases = {}
    for run in runs:
        cases.setdefault(run.case, []).append(run)
    return cases


def spread(values):
    """Mean and standard deviation (n - 1) of numbers; the latter is None for one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spreads(runs):
    """`spread` of all measures of each case that all its runs have: {case: {key: spread}}."""
    found = {}
    for case, members in by_case(runs).items():
        columns = {key: [run.values.get(key) for run in members] for key in MEASURES}
        found[case] = {k: spread(column) for k, column in columns.items() if None not in column}
    first = next(iter(found.values()))
    for row in found.values():
        for key, source, power in SPEEDS:
            if source in row and source in first:
                row[key] = (row[source][0] / first[source][0]) ** power, None
    return found


def show(pair, text):
    """Mean and standard deviation for people; a dash if there are none."""
    if pair is None:
        return "–"
    mean, sd = pair
    return text(mean) if not sd else f"{text(mean)} ± {text(sd)}"


def columns(found):
    """The table of a study by column: {label: {case: text}}, without empty columns."""
    return {
        measure.label: {case: show(row.get(key), measure.show) for case, row in found.items()}
        for key, measure in MEASURES.items()
        if any(key in row for row in found.values())
    }


def pareto_front(points):
    """The points that no other one dominates: none is both faster and at least as accurate.

    Args:
        points: (seconds, accuracy) pairs.

    Returns:
        Those on the Pareto front, by seconds.
    """
    best, found = -1.0, []
    for seconds, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > best:
            best = accuracy
            found.append((seconds, accuracy))
    return found


def charts(runs):
    """Accuracy over seconds, a mark per run; for the label, and for the truth if there is one."""
    for x, x_label in AXES.items():
        for y, of in ((LABEL, "label"), (TRUTH, "truth")):
            with_both = [run for run in runs if {x, y} <= run.values.keys()]
            if not with_both:
                continue
            cases = by_case(with_both)
            marks = {
                case: ([run.values[x] for run in members], [run.values[y] for run in members])
                for case, members in cases.items()
            }
            means = [(statistics.fmean(a), statistics.fmean(b)) for a, b in marks.values()]
            yield chart(
                f"Agreement with the {of} over {x_label}", x_label, f"agreement with the {of}",
                marks, points=True, height=3.6, xscale="log", joined=pareto_front(means),
                note="A mark per run. The line joins the cases of which no other one is better in "
                "both, by their means.",
            )  # fmt: skip


def group_tables(groups):
    """A table of accuracies against the truth for each group, such as the regimes of clouds.

    Args:
        groups: {case: `groups` of its MeasuredRuns}.
    """
    everything = [one for of_case in groups.values() for one in of_case]
    for title in dict.fromkeys(title for one in everything for title in one):
        names = dict.fromkeys(name for one in everything for name in one.get(title, {}))
        rows = []
        for case, of_case in groups.items():
            values = [[g[title][n] for g in of_case if n in g.get(title, {})] for n in names]
            rows.append([case, *(show(spread(v) if v else None, "{:.3f}".format) for v in values)])
        yield from one_run.table(f"Agreement with the truth by {title}", (title, *names), rows)


def write_study(name, runs, budget, varied, output, missing=()):
    """Write the page and the table of the runs of a study, and return the table as text.

    Args:
        name: Of the study.
        runs: MeasuredRuns, of the first case first.
        budget: One line on what each run was given.
        varied: Keys of the configuration that the runs differ in.
        output: Folder.
        missing: Names of planned runs that have not finished.
    """
    found, baselines = spreads(runs), measure_baselines(runs)
    for mask, (scores, _) in baselines.items():
        found[mask] = {key: (score, None) for key, score in scores.items()}
    groups = {case: [run.groups for run in members] for case, members in by_case(runs).items()}
    groups |= {mask: [of_mask] for mask, (_, of_mask) in baselines.items()}
    shown = columns(found)
    notes = [f"{counted(len(missing), 'run')} missing: {', '.join(missing)}."] * bool(missing)
    if any(run.run.is_synthetic for run in runs):
        notes.append("The scenes are synthetic: accuracies say nothing about real ones.")
    warnings = [[run.run.name, text] for run in runs for text in run.run.warnings]
    if warnings:
        notes.append(f"{counted(len(warnings), 'warning')} of the runs are at the end.")
    first = runs[0].run.results
    facts = {
        "budget of a run": budget,
        "seeds": ", ".join(sorted({str(_seed(run)) for run in runs})),
        "devices": first["devices"].get("description"),
        "commits": ", ".join(sorted({str(run.run.results.get("git_commit")) for run in runs})),
        "versions": ", ".join(f"{k} {v}" for k, v in first["versions"].items()),
    }
    counts = {case: str(len(members)) for case, members in by_case(runs).items()}
    counts |= dict.fromkeys(baselines, "–")
    costs = list(MEASURES)[: list(MEASURES).index(LABEL)]
    content = {
        "name": name,
        "notes": notes,
        "sections": {
            "Results": {
                "text": "Mean ± standard deviation over the seeds.",
                "tables": [
                    *_measure_table("Cost", found, costs, counts),
                    *_measure_table("Agreement", found, MEASURES.keys() - set(costs), counts),
                ],
            },
            "Pareto front": {"charts": list(charts(runs))},
            "Where masks are right": {"tables": list(group_tables(groups))},
            "Circumstances": {
                "facts": facts,
                "tables": one_run.table("Warnings", ("run", "warning"), warnings),
            },
        },
    }
    report.write_page(output / PAGE, content)
    rows = [csv_row(run, varied) for run in runs]
    measures = [key for key in MEASURES if not key.endswith("_speed")]
    groups = dict.fromkeys(key for row in rows for key in row)  # and columns that come before
    names = dict.fromkeys(("case", "run", "seed", *varied, *measures, *groups))
    write_csv(output / RUNS, list(names), rows)
    return table({"runs": counts, **shown})


def csv_row(run, varied):
    """A row of runs.csv: values of the varied keys, measures, accuracies of groups of pixels."""
    config = run.run.results["config"]
    row = {"case": run.case, "run": run.run.name, "seed": _seed(run)}
    row |= {key: one_run.setting(config.get(key)) for key in varied}
    row |= {
        f"truth_{title}_{name}".replace(" ", "_"): accuracy
        for title, group in run.groups.items()
        for name, accuracy in group.items()
    }
    return row | run.values


def _measure_table(title, found, keys, counts):
    """A table of the page with some of MEASURES, those that any case has."""
    keys = [key for key in MEASURES if key in keys and any(key in row for row in found.values())]
    found = {case: row for case, row in found.items() if row.keys() & keys}
    headings = {"": "", "runs": "Finished runs."}
    headings |= {MEASURES[key].label: MEASURES[key].meaning for key in keys}
    rows = [
        [case, counts[case], *(show(row.get(key), MEASURES[key].show) for key in keys)]
        for case, row in found.items()
    ]
    return one_run.table(title, headings, rows)


def _seed(run):
    return run.run.results["config"].get("seed")
