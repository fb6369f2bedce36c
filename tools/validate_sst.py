r"""Validate the masks of a run with buoys: the sea surface temperature (SST) of clear pixels.

    python tools/validate_sst.py RUN_DIR sst_matchups.csv
    python tools/validate_sst.py RUN_DIR sst_matchups.h5 --geodetic products/ --minutes 15
    python tools/validate_sst.py RUN_DIR table.csv --column buoy_sst=isst --celsius buoy_sst

A cloud that a mask misses makes the satellite read too cold. Match-ups of satellite and buoy are
selected on clear pixels, by the run's mask and by the Bayesian mask; printed are their number, the
median and the robust standard deviation (1.4826 x median absolute deviation) of satellite - buoy,
and what these two hide: mean, standard deviation and the share below -2 K, which is mostly cloud.

The table is CSV with a header, or HDF5 with a dataset (N,) for each of these columns:

time              UTC, when the satellite measured; ISO 8601 (2019-10-01T11:33:21Z), or in HDF5 also
                  numbers with the attribute `units`: "seconds since 1981-01-01 00:00:00"
latitude          degrees north
longitude         degrees east, -180 to 360
buoy_sst          SST of the buoy [K]
satellite_sst     SST of the satellite [K]
quality_level     of the satellite's SST, 0 to 5, as in GHRSST
satellite_zenith  zenith angle of the satellite [degrees]

Other columns are ignored. Use --column for other names and --celsius for temperatures in Celsius.
Empty fields, NaN, times NaT and in HDF5 `_FillValue` and `missing_value` are missing values.
Convert HDF5 files written by pandas with pandas.read_hdf(FILE).to_csv(OTHER).

As in the science group's first system a match-up needs quality level 5, a zenith angle of at most
55 degrees, both temperatures above the run's MIN_SST, and a pixel with data at less than 0.005
degrees of latitude and 0.01 degrees of longitude. This is the nearest pixel of the scenes measured
at its time: between start and end in the product's name, or up to --minutes before or after. If a
table only has the buoy's time, --minutes should be what its match-ups differ by. MIN_SST, 273.15 K,
removes fill values, and sea water of -1.8 to 0 degrees Celsius: near ice, use --min-sst 271.
Positions come from the datasets `latitude` and `longitude` of the scene files or from --geodetic;
scenes without positions or `bayes` are skipped. Day and night are the folders of the scene files.

statistics.csv    for day, night and all by each mask: matchups; median, robust_std, mean, std [K];
                  cold_share, the share below -2 K
funnel.csv        number of match-ups left after each step
matchups.csv      those on pixels with data; cloudmask (ours) and bayes are 1 for cloud
differences.png   histograms of satellite - buoy
"""

import logging
import sys
from datetime import datetime, timezone
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import numpy as np

from harness.config import load_config
from harness.console import log_to_screen, table
from harness.data.hdf5 import open_hdf5, open_numbers, read_numbers
from harness.data.mask_files import find_masks, measured_pixels
from harness.data.positions import check_geodetic
from harness.data.scene_files import day_or_night, find_scenes
from harness.errors import UserError
from harness.files import replacing, write_csv
from harness.records.saved_masks import read_mask_and_label
from tools.lib.matchups import (
    COLD,
    COLUMNS,
    STATISTICS,
    SkippedScene,
    add_matchup_arguments,
    check_matchup_arguments,
    find_pixels,
    read_table,
    select,
    statistics,
)
from tools.lib.options import add_mask_arguments, command_parser

MASKS = {"cloudmask": "our mask", "bayes": "Bayesian mask", "none": "no mask"}
MATCHUPS = (
    *COLUMNS, "difference", "scene", "day_night", "row", "col", "pixel_latitude",
    "pixel_longitude", "cloudmask", "bayes",
)  # fmt: skip
BINS = np.linspace(-5, 5, 51)  # [K] of the histograms

log = logging.getLogger("validate_sst")


def read_masks(mask_file, scene):
    """Read the masks of a scene, as `find_pixels` takes them; NaN in `bayes` is not measured."""
    mask, _ = read_mask_and_label(mask_file, scene)
    with open_hdf5(scene) as file:
        measured = measured_pixels(file, mask.shape)
        bayes = open_numbers(file, "bayes", (*mask.shape, 1), optional=True)
        if measured is None:
            raise ValueError("it should have a dataset 'bts'")
        if bayes is None:
            raise SkippedScene("no Bayesian mask 'bayes'")
        label = read_numbers(bayes)[..., 0]
    measured &= np.isfinite(label)
    return {"measured": measured, "cloudmask": mask, "bayes": label != 0}


# --- statistics -----------------------------------------------------------------------------


def make_rows(matchups, pixels, scenes):
    """The rows of matchups.csv: n match-ups, their pixels, PIXEL (n,), and paths of scene files."""
    times = (datetime.fromtimestamp(time, timezone.utc) for time in matchups["time"].tolist())
    columns = {
        **{name: values.tolist() for name, values in matchups.items()},
        **{name: pixels[name].astype(int) for name in ("row", "col", "cloudmask", "bayes")},
        **{f"pixel_{name}": pixels[name].tolist() for name in ("latitude", "longitude")},
        "difference": (matchups["satellite_sst"] - matchups["buoy_sst"]).tolist(),
        "time": [time.isoformat().replace("+00:00", "Z") for time in times],
        "scene": [path.stem for path in scenes],
        "day_night": [day_or_night(path) for path in scenes],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def group_differences(rows):
    """Group the differences in rows of matchups.csv by day or night, and by mask.

    Returns:
        {(kind, mask): differences [K] where that mask is clear, float64 (n,)}, for each mask of
        MASKS; the kinds are those of day, night and unknown that occur, and "all".
    """
    occurring = {row["day_night"] for row in rows}
    kinds = [kind for kind in ("day", "night", "unknown") if kind in occurring]
    groups = {(kind, mask): [] for kind in (*kinds, "all") for mask in MASKS}
    for row in rows:
        for mask in MASKS:
            if not row.get(mask):
                groups[row["day_night"], mask].append(row["difference"])
                groups["all", mask].append(row["difference"])
    return {key: np.array(values) for key, values in groups.items()}


def draw(differences, path):
    """Draw histograms of the grouped differences as PNG, with one panel each for day and night."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in dict.fromkeys(kind for kind, _ in differences) if kind != "all"]
    styles = {  # they differ in brightness and dashes
        "none": {"histtype": "stepfilled", "color": "0.85"},
        "bayes": {"histtype": "step", "color": "#d55e00", "linestyle": "--", "linewidth": 1.5},
        "cloudmask": {"histtype": "step", "color": "#00305a", "linewidth": 1.5},
    }
    figure = Figure(figsize=(4.8 * len(kinds), 4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for mask, style in styles.items():
            values = differences[kind, mask]
            label = "{}: {}, {median:+.2f} K, {robust_std:.2f} K, {cold_share:.1%}".format(
                MASKS[mask], len(values), **statistics(values)
            )
            axes.hist(np.clip(values, BINS[0], BINS[-1]), BINS, label=label, **style)
        axes.axvline(0, color="0.4", linestyle=":", linewidth=1)
        axes.set(title=kind, xlabel="satellite - buoy [K]; the outer bins include all beyond")
        axes.legend(
            title=f"number, median, robust standard deviation, share below {COLD:g} K",
            loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False, fontsize="small",
            title_fontsize="small",
        )  # fmt: skip
    panels[0].set(ylabel="match-ups in 0.2 K", yscale="log", ylim=(0.7, None))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


# --- the command ----------------------------------------------------------------------------


def validate(arguments):
    """Validate the masks of a run."""
    config = load_config(arguments.run / "config.yaml")
    masks = find_masks(arguments.run, arguments.scene)
    check_geodetic(arguments.geodetic, masks)
    found = {path.stem: path for path in find_scenes(arguments.data or config.inference_dir)}
    masks = {path.stem: path for path in masks}
    scenes = {name: found.get(name) for name in masks}
    matchups = read_table(arguments.table, arguments.names, set(arguments.celsius))
    chosen, funnel = select(matchups, arguments.min_sst or config.min_sst)
    tolerance = 60 * arguments.minutes  # [s]
    pixels = find_pixels(
        matchups, chosen, scenes, arguments.geodetic, tolerance,
        lambda name, path: read_masks(masks[name], path), ("cloudmask", "bayes"),
    )  # fmt: skip
    measured = pixels["measured"]
    cloud, label = (pixels[name] != 0 for name in ("cloudmask", "bayes"))
    steps = {
        "in the time of a scene": pixels["in_time"],
        "near a pixel": np.isfinite(pixels["distance"]),
        "on a pixel with data": measured,
        "  clear by our mask": measured & ~cloud,
        "  clear by the Bayesian mask": measured & ~label,
        "  clear by both": measured & ~cloud & ~label,
    }
    funnel |= {step: np.count_nonzero(passed) for step, passed in steps.items()}
    counts = {step: f"{n:9}" for step, n in funnel.items()}
    sys.stdout.write(table({"match-ups": counts}) + "\n\n")
    if not measured.any():
        raise UserError(
            "No match-up is on a pixel with data; the table above shows how many are left after "
            "each step. Try --minutes for a wider time, or --geodetic for positions."
        )
    kept = {name: values[measured] for name, values in matchups.items()}
    paths = list(scenes.values())
    places = [paths[number] for number in pixels["scene"][measured]]
    rows = make_rows(kept, pixels[measured], places)
    differences = group_differences(rows)
    found = [
        {"day_night": kind, "mask": mask, "matchups": len(values), **statistics(values)}
        for (kind, mask), values in differences.items()
    ]
    folder = arguments.output or arguments.run / "sst"
    draw(differences, folder / "differences.png")
    funnel = [{"step": step.strip(), "matchups": n} for step, n in funnel.items()]
    write_csv(folder / "funnel.csv", ("step", "matchups"), funnel)
    write_csv(folder / "matchups.csv", MATCHUPS, rows)
    write_csv(folder / "statistics.csv", ("day_night", "mask", "matchups", *STATISTICS), found)
    shown = {
        "match-ups": "{matchups:9}", "median": "{median:+.3f}", "robust std": "{robust_std:10.3f}",
        "mean": "{mean:+.3f}", "std": "{std:.3f}", f"< {COLD:g} K": "{cold_share:6.1%}",
    }  # fmt: skip
    columns = {
        title: {f"{row['day_night']}, {MASKS[row['mask']]}": text.format(**row) for row in found}
        for title, text in shown.items()
    }
    sys.stdout.write(f"Satellite - buoy [K]\n\n{table(columns)}\n")
    log.info("Wrote statistics.csv, funnel.csv, matchups.csv and differences.png to %s.", folder)


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add_mask_arguments(add)
    add("table", type=Path, metavar="TABLE", help="match-ups, CSV or HDF5")
    add("-o", "--output", type=Path, help="folder for the files (default: RUN_DIR/sst)")
    add_matchup_arguments(add)
    arguments = parser.parse_args(argv)
    check_matchup_arguments(parser, arguments)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: validate(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
