r"""Validate the masks of a run with buoys: the sea surface temperature (SST) of clear pixels.

    python tools/validate_sst.py RUN_DIR sst_matchups.csv
    python tools/validate_sst.py RUN_DIR sst_matchups.h5 --geodetic products/ --minutes 15
    python tools/validate_sst.py RUN_DIR table.csv --column buoy_sst=isst --celsius buoy_sst

A cloud that a mask misses makes the satellite read too cold. Match-ups of satellite and buoy are
selected on clear pixels, by the run's mask and by the Bayesian mask; printed are their number, the
median and the robust standard deviation (1.4826 x median absolute deviation) of satellite - buoy.

The table is CSV with a header, or HDF5 with a dataset (N,) for each of these columns:

time              UTC; ISO 8601 (2019-10-01T11:33:21Z), or in HDF5 also numbers with the attribute
                  `units`: "seconds since 1981-01-01 00:00:00"
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
at its time: between start and end in the product's name, or up to --minutes before or after.
Positions come from the datasets `latitude` and `longitude` of the scene files or from --geodetic;
scenes without positions or `bayes` are skipped. Day and night are the folders of the scene files.

statistics.csv    for day, night and all by each mask: matchups, median [K], robust_std [K]
funnel.csv        number of match-ups left after each step
matchups.csv      those on pixels with data; cloudmask (ours) and bayes are 1 for cloud
differences.png   histograms of satellite - buoy
"""

import collections
import csv
import io
import logging
import math
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import h5py
import numpy as np

from harness.config import load_config
from harness.console import log_to_screen, progress, table
from harness.data.hdf5 import (
    open_hdf5,
    open_numbers,
    read_all,
    read_attribute,
    read_texts,
    unpack,
)
from harness.data.hdf5_links import open_dataset
from harness.data.mask_files import find_masks, measured_pixels, read_mask
from harness.data.positions import check_geodetic, read_positions
from harness.data.scene_files import day_or_night, find_scenes, product_times
from harness.errors import UserError
from harness.files import read_text, replacing, write_csv
from tools.lib.options import add_mask_arguments, command_parser

COLUMNS = (
    "time", "latitude", "longitude", "buoy_sst", "satellite_sst", "quality_level",
    "satellite_zenith",
)  # fmt: skip
TEMPERATURES = ("buoy_sst", "satellite_sst")
LIMITS = {"latitude": (-90, 90), "longitude": (-180, 360), "satellite_zenith": (0, 90)}
ISO_TIME = re.compile(  # without zone or in UTC
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?)\s?(?:Z|UTC|[+-]00:?00)?"
)

# The science group's first system: github.com/stfc-sciml/e2e, case2, comparison of SSTs.
BEST_QUALITY = 5
MAX_ZENITH = 55.0  # [degrees]
LATITUDE_LIMIT = 0.005  # [degrees] between match-up and pixel, exclusive
LONGITUDE_LIMIT = 0.01  # [degrees], exclusive
ROBUST = 1.4826  # standard deviation of a normal distribution over its median absolute deviation

ZERO_CELSIUS = 273.15  # [K]
MEDIANS = (100.0, ZERO_CELSIUS + 100)  # [K] a median outside is in other units
PIXEL = np.dtype(
    [
        ("in_time", bool), ("distance", float), ("mask_file", int), ("row", int), ("col", int),
        ("latitude", float), ("longitude", float),
        ("measured", bool), ("cloudmask", bool), ("bayes", bool),
    ]
)  # fmt: skip
MASKS = {"cloudmask": "our mask", "bayes": "Bayesian mask", "none": "no mask"}
STATISTICS = ("day_night", "mask", "matchups", "median", "robust_std")
MATCHUPS = (
    *COLUMNS, "difference", "scene", "day_night", "row", "col", "pixel_latitude",
    "pixel_longitude", "cloudmask", "bayes",
)  # fmt: skip
BINS = np.linspace(-5, 5, 51)  # [K] of the histograms

log = logging.getLogger("validate_sst")


class SkippedScene(Exception):
    """Why a scene cannot be used."""


# --- the table of match-ups -----------------------------------------------------------------


def read_table(path, names, celsius):
    """Read a table of match-ups.

    Args:
        path: CSV or HDF5 file.
        names: Names in the file by our names, COLUMNS.
        celsius: Columns of temperatures that the file has in Celsius.

    Returns:
        Dictionary of float64 (n,) by our names, NaN where missing; time in seconds since 1970.

    Raises:
        UserError: If the file is not such a table.
    """
    if not path.is_file():  # opening a pipe would block
        raise UserError(f"No file {path}. Give a table of match-ups, CSV or HDF5.")
    advice = "--help describes the table of match-ups."
    try:
        if h5py.is_hdf5(path):
            with open_hdf5(path, advice=advice) as file:
                matchups = _hdf5_columns(file, names)
        else:
            text = read_text(path).removeprefix("\ufeff")  # a byte order mark
            matchups = _csv_columns(io.StringIO(text, newline=""), names)
        if not matchups["time"].size:
            raise ValueError("it has no rows")
        for column in celsius:
            matchups[column] += ZERO_CELSIUS
        _check_values(matchups)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be used: {error}. {advice}") from error
    return matchups


def _csv_columns(file, names):
    reader = csv.DictReader(file, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    _check_names(names, reader.fieldnames)
    rows = list(reader)
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {n} should have {len(reader.fieldnames)} fields, as the header")
    return {column: _parse([row[name] for row in rows], column) for column, name in names.items()}


def _hdf5_columns(file, names):
    datasets = {name: open_dataset(file, name) for name in names.values()}
    _check_names(names, [name for name in datasets if datasets[name] is not None])
    shapes = {name: dataset.shape for name, dataset in datasets.items()}
    if len(set(shapes.values())) > 1 or len(shapes[names["time"]]) != 1:
        raise ValueError(f"its columns should all have the same shape (N,), found {shapes}")
    matchups = {"time": _hdf5_times(datasets[names["time"]])}
    others = {column: name for column, name in names.items() if column != "time"}
    return matchups | {column: unpack(open_numbers(file, name)) for column, name in others.items()}


def _check_names(names, found):
    if missing := [name for name in names.values() if name not in found]:
        raise ValueError(
            f"it has no column {', '.join(missing)}, found {', '.join(found)[:300] or 'none'}; "
            "use --column OURS=THEIRS for other names"
        )
    if duplicate := [name for name in names.values() if found.count(name) > 1]:
        raise ValueError(f"duplicate column {duplicate[0]}")


def _hdf5_times(dataset):
    if h5py.check_string_dtype(dataset.dtype):
        return _parse(read_texts(dataset), "time")
    units = read_attribute(dataset, "units", "")
    units = units.decode() if isinstance(units, bytes) else str(units)
    since = units.strip().removeprefix("seconds since ")
    try:
        epoch = _seconds(since if ":" in since else f"{since}T00:00")
    except ValueError:
        raise ValueError(
            "time should be ISO 8601 texts, or numbers with the attribute units "
            f"'seconds since 1970-01-01 00:00:00', found units {units[:99]!r}"
        ) from None
    return unpack(open_numbers(dataset.file, dataset.name)) + epoch


def _parse(texts, column):
    """Convert texts to float64 (n,), NaN where they are empty."""
    parse, expected = (_seconds, "ISO 8601, UTC") if column == "time" else (float, "a number")
    values = np.full(len(texts), np.nan)
    for i, text in enumerate(texts):
        try:
            values[i] = parse(text.strip() or "nan")
        except ValueError:
            message = f"row {i + 1}: {column} should be {expected}, found {text.strip()[:40]!r}"
            raise ValueError(message) from None
    return values


def _seconds(text):
    """Seconds since 1970 of a time, ISO 8601 in UTC."""
    if text.lower() in ("nan", "nat"):
        return math.nan
    if not (parts := ISO_TIME.fullmatch(text)):
        raise ValueError
    return np.datetime64("T".join(parts.groups()), "ns").astype(np.int64) / 1e9


def _check_values(matchups):
    for column, (low, high) in LIMITS.items():
        values = matchups[column]
        for i in np.flatnonzero((values < low) | (values > high))[:1]:
            raise ValueError(
                f"row {i + 1}: {column} should be {low} to {high}, or empty if missing, found "
                f"{values[i]:g}"
            )
    for column in TEMPERATURES:
        known = matchups[column][np.isfinite(matchups[column])]
        if known.size and not MEDIANS[0] < np.median(known) < MEDIANS[1]:
            raise ValueError(
                f"{column} should be in K, found the median {np.median(known):.2f}. Use --celsius "
                f"{column} if it is in Celsius, and only then"
            )


def select(matchups, min_sst):
    """Select the match-ups of the best quality, with both temperatures above `min_sst` [K].

    Returns:
        bool (n,), and the number left after each step, by the step's name.
    """
    coldest = np.minimum(matchups["satellite_sst"], matchups["buoy_sst"])
    tests = {
        "match-ups read": np.ones(coldest.size, bool),
        "nothing missing": np.isfinite([*matchups.values()]).all(axis=0),
        f"quality level {BEST_QUALITY}": matchups["quality_level"] == BEST_QUALITY,
        f"satellite zenith <= {MAX_ZENITH:g} deg": matchups["satellite_zenith"] <= MAX_ZENITH,
        f"temperatures > {min_sst:g} K": coldest > min_sst,
    }
    passed = np.logical_and.accumulate([*tests.values()])
    return passed[-1], dict(zip(tests, passed.sum(axis=1).tolist(), strict=True))


# --- match-ups and pixels -------------------------------------------------------------------


def find_pixels(matchups, chosen, masks, scenes, geodetic, tolerance):
    """Find the pixel of each match-up, in all scenes that were measured at its time.

    Args:
        matchups: Result of `read_table`.
        chosen: bool (n,), which of them to look for.
        masks: Paths of mask files.
        scenes: Paths of scene files by name, without suffix.
        geodetic: File or folder given by --geodetic, or None.
        tolerance: [s] before the start and after the end of a scene.

    Returns:
        PIXEL (n,), with an infinite distance where no pixel is near enough.
    """
    pixels = np.zeros(chosen.size, PIXEL)
    pixels["distance"] = np.inf
    skipped = collections.defaultdict(list)  # scenes by reason
    for number, path in enumerate(progress(masks, "Matching", len(masks))):
        if not (times := product_times(path.stem)):
            raise UserError(
                f"The mask {path.stem} should be named after a product, with start and end of its "
                "measurement. Rename it, and its scene file, or select others with --scene."
            )
        start, end = (time.timestamp() for time in times)
        time = matchups["time"]
        in_time = chosen & (time >= start - tolerance) & (time <= end + tolerance)
        pixels["in_time"] |= in_time
        if not (these := np.flatnonzero(in_time)).size:
            continue
        try:
            found = _match_scene(
                path, scenes, geodetic, matchups["latitude"][these], matchups["longitude"][these]
            )
        except SkippedScene as reason:
            skipped[str(reason)].append(f"{path.stem} ({these.size} match-ups)")
            continue
        found["mask_file"], found["in_time"] = number, True
        nearer = found["distance"] < pixels["distance"][these]
        pixels[these[nearer]] = found[nearer]
    for reason, names in skipped.items():
        log.warning("Skipped scenes: %d, %s. The first is %s.", len(names), reason, names[0])
    return pixels


def _match_scene(path, scenes, geodetic, latitude, longitude):
    """Find the pixels of match-ups in the scene of a mask file: PIXEL (m,)."""
    if not (scene := scenes.get(path.stem)):
        raise SkippedScene("no scene file (give its folder with --data)")
    with open_hdf5(path) as file:
        mask = read_mask(file)
    if not (positions := read_positions(scene, geodetic, path.stem, mask.shape)):
        raise SkippedScene("neither latitude and longitude nor --geodetic")
    if not np.isfinite(positions["latitude"] + positions["longitude"]).any():
        raise SkippedScene("no pixel with both latitude and longitude")
    found = nearest_pixels(latitude, longitude, **positions)
    pixel = found["row"], found["col"]
    if np.isfinite(found["distance"]).any():
        with open_hdf5(scene) as file:
            measured = measured_pixels(file, mask.shape)
            bayes = open_numbers(file, "bayes", (*mask.shape, 1), optional=True)
            if measured is None:
                raise ValueError("it should have a dataset 'bts'")
            if bayes is None:
                raise SkippedScene("no Bayesian mask 'bayes'")
            label = read_all(bayes)[..., 0][pixel]
        found["measured"] = measured[pixel] & np.isfinite(label)
        found["cloudmask"], found["bayes"] = mask[pixel] != 0, label != 0
    return found


def nearest_pixels(at_latitude, at_longitude, latitude, longitude):
    """Find the pixel nearest to each of m places on the sphere.

    Args:
        at_latitude: float64 (m,) [degrees north].
        at_longitude: float64 (m,) [degrees east].
        latitude: float64 (H, W) [degrees north], NaN where missing.
        longitude: float64 (H, W) [degrees east], NaN where missing.

    Returns:
        PIXEL (m,), with chords of the unit sphere as distances, infinite beyond the limits.
    """
    from scipy.spatial import cKDTree

    known = np.flatnonzero(np.isfinite(latitude) & np.isfinite(longitude))
    shape, latitude, longitude = latitude.shape, latitude.ravel()[known], longitude.ravel()[known]
    # Pixels are evenly spread: an unbalanced tree is as fast, and is built in half the time.
    tree = cKDTree(unit_vectors(latitude, longitude), balanced_tree=False)
    found = np.zeros(len(at_latitude), PIXEL)
    found["distance"], nearest = tree.query(unit_vectors(at_latitude, at_longitude))
    found["row"], found["col"] = np.unravel_index(known[nearest], shape)
    found["latitude"], found["longitude"] = latitude[nearest], longitude[nearest]
    east = (at_longitude - found["longitude"] + 180) % 360 - 180  # the short way round
    off = np.abs([at_latitude - found["latitude"], east])
    # In binary, 10.01 - 10.005 is less than 0.005: round before comparing.
    far = (off.round(9) >= [[LATITUDE_LIMIT], [LONGITUDE_LIMIT]]).any(axis=0)
    found["distance"][far] = np.inf
    return found


def unit_vectors(latitude, longitude):
    """Places on the unit sphere, float64 (n, 3), from degrees."""
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    x, y = np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude)
    return np.stack([x, y, np.sin(latitude)], axis=-1)


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


def median_and_robust_std(values):
    """The median, and 1.4826 times the median distance from it; NaN without values."""
    if not len(values):
        return math.nan, math.nan
    median = np.median(values)
    return float(median), float(ROBUST * np.median(np.abs(values - median)))


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
            median, robust_std = median_and_robust_std(values)
            label = f"{MASKS[mask]}: {len(values)}, {median:+.2f} K, {robust_std:.2f} K"
            axes.hist(np.clip(values, BINS[0], BINS[-1]), BINS, label=label, **style)
        axes.axvline(0, color="0.4", linestyle=":", linewidth=1)
        axes.set(title=kind, xlabel="satellite - buoy [K]; the outer bins include all beyond")
        axes.legend(
            title="number, median, robust standard deviation", loc="lower center",
            bbox_to_anchor=(0.5, 1.08), frameon=False, fontsize="small", title_fontsize="small",
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
    scenes = {path.stem: path for path in find_scenes(arguments.data or config.inference_dir)}
    matchups = read_table(arguments.table, arguments.names, set(arguments.celsius))
    chosen, funnel = select(matchups, config.min_sst)
    tolerance = 60 * arguments.minutes  # [s]
    pixels = find_pixels(matchups, chosen, masks, scenes, arguments.geodetic, tolerance)
    measured, cloud, label = (pixels[name] for name in ("measured", "cloudmask", "bayes"))
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
    places = [scenes[masks[number].stem] for number in pixels["mask_file"][measured]]
    rows = make_rows(kept, pixels[measured], places)
    differences = group_differences(rows)
    statistics = [
        dict(zip(STATISTICS, (*key, len(values), *median_and_robust_std(values)), strict=True))
        for key, values in differences.items()
    ]
    folder = arguments.output or arguments.run / "sst"
    draw(differences, folder / "differences.png")
    funnel = [{"step": step.strip(), "matchups": n} for step, n in funnel.items()]
    write_csv(folder / "funnel.csv", ("step", "matchups"), funnel)
    write_csv(folder / "matchups.csv", MATCHUPS, rows)
    write_csv(folder / "statistics.csv", STATISTICS, statistics)
    lines = {f"{row['day_night']}, {MASKS[row['mask']]}": row for row in statistics}
    columns = {
        "match-ups": {line: f"{row['matchups']:9}" for line, row in lines.items()},
        "median [K]": {line: f"{row['median']:+10.3f}" for line, row in lines.items()},
        "robust std [K]": {line: f"{row['robust_std']:14.3f}" for line, row in lines.items()},
    }
    sys.stdout.write(table(columns) + "\n")
    log.info("Wrote statistics.csv, funnel.csv, matchups.csv and differences.png to %s.", folder)


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    add, lists = parser.add_argument, {"nargs": "+", "action": "extend", "default": []}
    add_mask_arguments(add)
    add("table", type=Path, metavar="TABLE", help="match-ups, CSV or HDF5")
    add("-o", "--output", type=Path, help="folder for the files (default: RUN_DIR/sst)")
    add("--minutes", type=float, default=0.0, help="tolerance before and after a scene (default 0)")
    add("--column", metavar="OURS=THEIRS", **lists, help="names that the table has for our columns")
    add("--celsius", choices=TEMPERATURES, **lists, help="columns that the table has in Celsius")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.minutes < math.inf:
        parser.error(f"--minutes should be 0 or more, found {arguments.minutes}")
    names = dict(text.partition("=")[::2] for text in arguments.column)
    if unknown := [ours for ours in names if ours not in COLUMNS or not names[ours]]:
        parser.error(f"--column should be OURS=THEIRS, OURS of {', '.join(COLUMNS)}: {unknown[0]}")
    arguments.names = {column: names.get(column, column) for column in COLUMNS}
    log_to_screen(arguments.verbose)
    return exit_status(lambda: validate(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
