"""Judge which of several cloud masks is better when nobody knows the truth.

    python tools/judge.py RUN_DIR RUN_DIR bayes threshold
    python tools/judge.py outputs/* bayes threshold --matchups sst_matchups.csv -o judged
    python tools/judge.py RUN_DIR FOLDER bayes --data data/ssts --consistency 5

A mask is the folder of a run; a folder of mask files, <scene>.h5 with the dataset `mask` (1 is
cloud) and perhaps `probability`; or one that the scene files contain: `bayes`, the label;
`summary`, the summary cloud flag; `threshold`, cloud where S9 is colder than the first run's
MIN_SST. All pixels with data count alike, in the scenes that every mask has. Printed are

agreement     accuracy and balanced accuracy of each mask if another one were the truth
accuracy      of three or more masks: sensitivity, specificity and balanced accuracy, estimated
              from the masks alone by categorical triple collocation (tools/lib/collocation.py),
              the median over all triplets of masks. `95 %` is the range over 1000 resamplings of
              the scenes, `triplets` that over triplets, and of four or more masks `best` the
              share of resamplings in which the mask is the best one
SST           with --matchups: satellite - buoy where a mask is clear; of masks with probabilities
              (S9 for `threshold`) also in as many match-ups as other masks are clear in. The last
              column is the share below -2 K, mostly missed cloud, which the robust standard
              deviation hides. validate_sst.py --help describes the table and which match-ups count
consistency   with --consistency N: share of the pixels that change if a run masks N of the scenes
              shifted by 5 rows and 3 columns, or flipped

The estimates are right if the errors of the masks are independent. They seldom are: networks learn
the errors of their label, and all masks miss thin cloud. Masks that err alike then look better than
the others. Signs of that are printed, but three masks show hardly any: do not trust their order,
add masks of other kinds, and trust SST at equal coverage first, if none of the masks has selected
the match-ups (docs/science.md). If the scene files contain `truth`, as synthetic ones do, the
tables include the true values and how the errors correlate.

-o writes masks.csv, sst.csv, judge.json with all numbers, and judge.md with the tables.
"""

import logging
import sys
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import numpy as np

from harness.config import Config
from harness.console import counted, log_to_screen, progress, table
from harness.data.positions import check_geodetic
from harness.data.scene_files import day_or_night
from harness.errors import UserError
from harness.files import write_csv, write_json, write_text
from tools.lib import collocation, matchups
from tools.lib.collocation import RATES
from tools.lib.markdown import markdown, markdown_columns
from tools.lib.masks import common_scenes, open_masks, read_fields
from tools.lib.options import add_scene_arguments, command_parser, positive

FEW_SCENES = 10  # limits from fewer are rough

log = logging.getLogger("judge")


# --- numbers --------------------------------------------------------------------------------


def count_scenes(n_masks, scenes):
    """Count the patterns of masks and truth in each scene.

    Args:
        n_masks: K.
        scenes: Iterable of the S results of `read_fields`.

    Returns:
        int64 (S, 2, 2**K), in true clear and true cloud; all in the first if a scene has no truth.
    """
    counts, has_truth = [], True
    for fields in scenes:
        images = [fields[f"mask {i}"] for i in range(n_masks)]
        has_truth &= "truth" in fields
        images.append(fields.get("truth", np.zeros_like(images[0])))
        counts.append(collocation.count_patterns(images, fields["measured"]))
    counts = np.array(counts).reshape(len(counts), 2, -1)
    return counts if has_truth else counts.sum(axis=1, keepdims=True) * [[1], [0]]


def accuracy_rows(names, counts, places):
    """Rows of masks.csv: estimated accuracies, and true ones if the truth is known.

    Args:
        names: Names of the K masks.
        counts: Result of `count_scenes`.
        places: Paths of the S scene files.

    Returns:
        List of dictionaries, for day, night and all, for each mask.
    """
    kinds, rows = np.array([day_or_night(path) for path in places]), []
    has_truth = counts[:, 1].any()
    for kind in (*(k for k in ("day", "night", "unknown") if k in kinds), "all"):
        these = counts[(kinds == kind) | (kind == "all")]
        shown, total = these.sum(axis=1), these.sum(axis=0)
        estimates, best = collocation.estimate(shown) if len(names) > 2 else ({}, None)
        truth = collocation.true_rates(total.ravel()) if has_truth else None
        cloud = shown.sum(axis=0) @ collocation.bits(len(names)) / shown.sum()
        for i, name in enumerate(names):
            row = {"day_night": kind, "mask": name, "scenes": len(these)}
            row |= {"pixels": int(shown.sum()), "cloud_fraction": cloud[i]}
            for j, rate in enumerate(RATES):
                row |= {f"{rate}{end}": values[i, j] for end, values in estimates.items()}
                row |= {} if truth is None else {f"true_{rate}": truth[i, j]}
            # Three masks cannot show that their errors depend on each other, and the best be wrong.
            rows.append(row | ({"best": best[i]} if len(names) > 3 else {}))
    return rows


def validate(masks, scenes, min_sst, arguments):
    """Rows of sst.csv, of the match-ups on pixels with data; see `matchups.compare_masks`."""
    found = matchups.read_table(arguments.matchups, arguments.names, set(arguments.celsius))
    chosen, _ = matchups.select(found, arguments.min_sst or min_sst)
    fields = [f"{what} {i}" for what in ("mask", "score") for i in range(len(masks))]

    def read(_, path):
        scene = read_fields(masks, min_sst, path)
        return {field: scene[field] for field in ("measured", *fields)}

    pixels = matchups.find_pixels(
        found, chosen, scenes, arguments.geodetic, 60 * arguments.minutes, read, fields
    )
    if not (measured := pixels["measured"]).any():
        raise UserError(
            "No match-up is on a pixel with data; validate_sst.py prints how many are left after "
            "each step."
        )
    values = np.stack([pixels[field][measured] for field in fields], axis=-1)
    cloud, scores = np.split(values, 2, axis=-1)
    difference = (found["satellite_sst"] - found["buoy_sst"])[measured]
    return matchups.compare_masks([m.name for m in masks], cloud != 0, scores, difference)


# --- tables for people ----------------------------------------------------------------------


def accuracy_table(rows):
    """The rows of masks.csv as people read them: {title: {line: text}}."""
    shown = {
        "balanced": "{balanced_accuracy:.3f}",
        "true": "{true_balanced_accuracy:.3f}",
        "95 %": "{balanced_accuracy_low:.3f} to {balanced_accuracy_high:.3f}",
        "triplets": "{balanced_accuracy_min:.3f} to {balanced_accuracy_max:.3f}",
        "best": "{best:.2f}",
        "sensitivity": "{sensitivity:.3f}",
        "true sens.": "{true_sensitivity:.3f}",
        "specificity": "{specificity:.3f}",
        "true spec.": "{true_specificity:.3f}",
    }
    known = [title for title, text in shown.items() if text[1:].split(":")[0] in rows[0]]
    return {
        title: {f"{row['day_night']}, {row['mask']}": shown[title].format(**row) for row in rows}
        for title in known
    }


def sst_table(rows):
    """The rows of sst.csv as people read them."""
    shown = {
        "matchups": "{matchups:8}", "coverage": "{coverage:8.3f}", "median": "{median:+.3f}",
        "robust_std": "{robust_std:10.3f}", f"< {matchups.COLD:g} K": "{cold_share:6.1%}",
    }  # fmt: skip
    lines = [", as clear as ".join(filter(None, (r["mask"], r["as_clear_as"]))) for r in rows]
    return {
        title: dict(zip(lines, (text.format(**row) for row in rows), strict=True))
        for title, text in shown.items()
    }


def matrix_table(names, matrix):
    """A matrix, of which a row is shown for each name, and a column also for the truth."""
    titles = [*map(str, range(1, len(names) + 1)), "truth"][: len(matrix)]
    return {
        title: {f"{i + 1} {name}": f"{matrix[i, j]:.3f}" for i, name in enumerate(names)}
        for j, title in enumerate(titles)
    }


# --- the command ----------------------------------------------------------------------------


def judge(arguments):
    """Judge masks as the command line says."""
    masks = open_masks(arguments.masks)
    if not 2 <= len(masks) <= collocation.MAX_MASKS:
        raise UserError(f"Give 2 to {collocation.MAX_MASKS} masks, found {len(masks)}.")
    scenes = common_scenes(masks, arguments.data, arguments.scene)
    check_geodetic(arguments.geodetic, scenes)
    names = [mask.name for mask in masks]
    min_sst = next((mask.config for mask in masks if mask.config), Config()).min_sst
    read = (read_fields(masks, min_sst, path) for path in scenes.values())
    counts = count_scenes(len(masks), progress(read, "Comparing", len(scenes)))
    has_data = counts.any(axis=(1, 2))
    if not has_data.any():
        raise UserError("The scenes have no pixel with all brightness temperatures.")
    places = [path for path, has in zip(scenes.values(), has_data, strict=True) if has]
    counts = counts[has_data]

    total = counts.sum(axis=0)
    has_truth = total[1].any()
    accuracy, balanced = collocation.agreement(total.ravel() if has_truth else total[0])
    same = accuracy[: len(names), : len(names)] > 1 - 1e-10  # 1 but for rounding
    for i, j in np.argwhere(np.triu(same, 1)):
        raise UserError(f"{names[i]} and {names[j]} are the same mask. Leave one of them out.")
    rows = accuracy_rows(names, counts, places)
    results = {"masks": names, "scenes": [*scenes], "accuracies": rows}
    results |= {"agreement": accuracy.tolist(), "balanced_agreement": balanced.tolist()}
    tables = {
        "Accuracy if the column were the truth": matrix_table(names, accuracy),
        "Balanced accuracy if the column were the truth": matrix_table(names, balanced),
        "Accuracy, estimated and true": accuracy_table(rows),
    }
    results["warnings"] = warnings_of(masks, len(places), total.sum(axis=0), rows)
    if has_truth:
        matrix = collocation.error_correlations(total.ravel())
        results["error_correlations"] = matrix.tolist()
        tables["Correlation of the errors"] = matrix_table(names, matrix)
    if arguments.matchups:
        results["sst"] = validate(masks, scenes, min_sst, arguments)
        tables["SST, satellite - buoy [K]"] = sst_table(results["sst"])
    if arguments.consistency:
        from tools.lib.consistency import masks_that_change

        results["consistency"] = masks_that_change(masks, places, arguments.consistency)
        tables["Share of pixels that change"] = {
            name: {change: f"{share:.4f}" for change, share in shares.items()}
            for name, shares in results["consistency"].items()
        }
    for title, columns in tables.items():
        sys.stdout.write(f"{title}\n\n{table(columns)}\n\n" if columns else "")
    for text in results["warnings"]:
        log.warning("%s", text)
    if arguments.output:
        write_results(arguments.output, results, tables)


def impossible_masks(rows):
    """The masks that have an estimate or a limit below 0, above 1 or NaN in rows of masks.csv."""
    ends = ("", "_min", "_max", "_low", "_high")
    keys = [f"{rate}{end}" for rate in RATES for end in ends]
    return list(
        dict.fromkeys(
            row["mask"] for row in rows if not all(0 <= round(row[key], 3) <= 1 for key in keys)
        )
    )


def warnings_of(masks, n_scenes, counts, rows):
    """What the reader should know about the estimates, as texts.

    Args:
        masks: List of K Mask.
        n_scenes: Number of scenes with data.
        counts: Of all patterns, (2**K,).
        rows: Result of `accuracy_rows`.
    """
    if len(masks) < 3:
        return ["Accuracies are estimated with three masks or more."]
    rates = collocation.all_triplets(counts)
    texts = collocation.signs_of_dependence([mask.name for mask in masks], rates)
    if impossible := impossible_masks(rows):
        texts.append(
            f"Estimates or limits below 0, above 1 or nan are impossible: {', '.join(impossible)}. "
            "The errors of masks depend on each other, or there are too few scenes."
        )
    if len(masks) == 3:
        texts.append(
            "Three masks cannot show whether their errors are independent: do not trust the order "
            "of the estimates. Add masks of other kinds."
        )
    learned = [mask.name for mask in masks if mask.config or mask.name == "bayes"]
    if len(learned) > 1:
        texts.append(
            f"Do not trust the order of {', '.join(learned)}: the errors of networks depend on "
            "each other and on their label."
        )
    if n_scenes < FEW_SCENES:
        texts.append(f"The limits of 95 % are rough: they come from {counted(n_scenes, 'scene')}.")
    return texts


def write_results(folder, results, tables):
    """Write the files of -o."""
    for name, rows in (("masks", results["accuracies"]), ("sst", results.get("sst"))):
        if rows:
            write_csv(folder / f"{name}.csv", [*rows[0]], rows)
    parts = [f"## {markdown(t)}\n\n{markdown_columns(c)}" for t, c in tables.items() if c]
    parts += [f"- {markdown(text)}" for text in results["warnings"]]
    write_text(folder / "judge.md", "\n\n".join(parts) + "\n")
    write_json(folder / "judge.json", results)
    log.info("Wrote the results to %s.", folder)


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("masks", nargs="+", metavar="MASKS", help="runs, folders, bayes, summary, threshold")
    add_scene_arguments(add, "the first run")
    add("-o", "--output", type=Path, metavar="DIR", help="folder for the files")
    add("--matchups", type=Path, metavar="TABLE", help="match-ups with buoys, CSV or HDF5")
    matchups.add_matchup_arguments(add)
    add("--consistency", type=positive, metavar="N", help="mask N scenes shifted and flipped")
    arguments = parser.parse_args(argv)
    matchups.check_matchup_arguments(parser, arguments)
    names = "geodetic", "minutes", "min_sst", "column", "celsius"
    if not arguments.matchups and any(getattr(arguments, name) for name in names):
        options = ", ".join(f"--{name}".replace("_", "-") for name in names)
        parser.error(f"{options} need --matchups TABLE")
    log_to_screen(arguments.verbose)
    return exit_status(lambda: judge(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
