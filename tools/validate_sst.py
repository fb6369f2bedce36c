r"""Validate the masks of a run with buoys: the sea surface temperature of clear pixels.

    python tools/validate_sst.py RUN_DIR sst_matchups.csv
    python tools/validate_sst.py RUN_DIR sst_matchups.h5 --geodetic products/ --minutes 15
    python tools/validate_sst.py RUN_DIR table.csv --column buoy_sst=isst --celsius buoy_sst

A cloud that a mask misses makes the satellite read too cold. So of match-ups of the satellite with
buoys those on clear pixels are kept, for the run's mask and for the Bayesian one, and their number
is told with the median and the robust standard deviation (1.4826 x median absolute deviation) of
satellite minus buoy.

The table is CSV with a header, or HDF5 with a dataset (N,) for each of these columns:

time              UTC; ISO 8601 (2019-10-01T11:33:21Z), or in HDF5 also numbers with the attribute
                  `units`: "seconds since 1981-01-01 00:00:00"
latitude          degrees north
longitude         degrees east, -180 to 360
buoy_sst          sea surface temperature of the buoy [K]
satellite_sst     sea surface temperature of the satellite [K]
quality_level     of the satellite's, 0 to 5, as GHRSST has it
satellite_zenith  zenith angle of the satellite [degrees]

Other columns may be there. Other names are told with --column, temperatures in Celsius with
--celsius. Empty fields, NaN, times NaT and in HDF5 `_FillValue` and `missing_value` are missing
values. What pandas wrote as HDF5 is read after pandas.read_hdf(FILE).to_csv(OTHER).

As in the science group's first system a match-up counts with quality level 5, a zenith angle of 55
degrees at most, both temperatures above MIN_SST of the run, and less than 0.005 degrees of latitude
and 0.01 degrees of longitude from its pixel (close to a pole that is a few metres). Its pixel is
the nearest one of the scenes that were measured at its time: between start and end of the product's
name, or --minutes before or after. Positions come from the datasets `latitude` and `longitude` of
the scene files or from --geodetic, as in export_masks.py; scenes without them or without `bayes`
take no part. Pixels without a brightness temperature are neither clear nor cloudy. Day and night
are the folders of the scene files.

statistics.csv    for day, night and all by each mask: matchups, median [K], robust_std [K]
funnel.csv        how many match-ups were left after each step
matchups.csv      those on pixels with data; cloudmask (ours) and bayes are 1 where they say cloud
differences.png   histograms of satellite minus buoy
"""

import argparse
import collections
import csv
import itertools
import logging
import math
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import h5py
import numpy as np

from _command import exit_status
from harness.config import load_config
from harness.console import log_to_screen, progress, table
from harness.data.hdf5 import open_hdf5, open_numbers, unpack
from harness.data.hdf5_links import open_dataset
from harness.data.hdf5_rows import check_storage
from harness.data.mask_files import find_masks, measured_pixels, read_mask
from harness.data.positions import check_geodetic, read_positions
from harness.data.scene_files import day_or_night, find_scenes, product_times
from harness.errors import UserError
from harness.files import replacing, write_csv
from tools.lib.options import add_mask_options

COLUMNS = (
    "time", "latitude", "longitude", "buoy_sst", "satellite_sst", "quality_level",
    "satellite_zenith",
)  # fmt: skip
TEMPERATURES = ("buoy_sst", "satellite_sst")
LIMITS = {"latitude": (-90, 90), "longitude": (-180, 360), "satellite_zenith": (0, 90)}
ISO_TIME = r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d)?(\.\d+)?\s?(?:Z|UTC|[+-]00:?00)?"
SINCE = re.compile(rf"seconds since (\d{{4}}-\d\d-\d\d|{ISO_TIME})")

# The science group's first system: github.com/stfc-sciml/e2e, case2, comparison of SSTs.
BEST_QUALITY = 5
MOST_ZENITH = 55.0  # [degrees]
LATITUDE_LIMIT = 0.005  # [degrees] between match-up and pixel, exclusive
LONGITUDE_LIMIT = 0.01  # [degrees], exclusive
ROBUST = 1.4826  # standard deviation of a normal distribution over its median absolute deviation

ZERO_CELSIUS = 273.15  # [K]
NO_KELVIN = 100.0  # [K] a sea with a median below is in Celsius
NO_CELSIUS = 100.0  # [degrees Celsius] one with a median above is not
PIXEL = np.dtype(
    [
        ("distance", float), ("mask_file", int), ("row", int), ("col", int), ("latitude", float),
        ("longitude", float), ("measured", bool), ("cloudmask", bool), ("bayes", bool),
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


class LeftOut(Exception):
    """Why a scene takes no part: the end of a sentence about it."""


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
    if not path.is_file():
        raise UserError(f"No file {path}. Name a table of match-ups, CSV or HDF5.")
    try:
        if h5py.is_hdf5(path):
            with open_hdf5(path, advice="--help says what a table of match-ups holds.") as file:
                matchups = _hdf5_columns(file, names)
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                matchups = _csv_columns(file, names)
        for column in celsius:
            matchups[column] += ZERO_CELSIUS
        _check_numbers(matchups, celsius)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot be used: {reason}. --help says what a table of match-ups holds."
        ) from error
    return matchups


def _csv_columns(file, names):
    lines = csv.reader(file, strict=True)
    header = [name.strip() for name in next(lines, [])]
    _check_names(names, header)
    places = [header.index(name) for name in names.values()]
    rows = []
    for row in filter(None, lines):
        if len(row) != len(header):
            raise ValueError(
                f"line {lines.line_num} has {len(row)} fields, the header has {len(header)}"
            )
        rows.append([row[place] for place in places])  # the others would fill the memory
    if not rows:
        raise ValueError("it has no rows")
    return {column: _parsed([row[i] for row in rows], column) for i, column in enumerate(names)}


def _hdf5_columns(file, names):
    datasets = {column: open_dataset(file, name) for column, name in names.items()}
    present = [names[column] for column, dataset in datasets.items() if dataset is not None]
    others = [name for name in itertools.islice(file, 20) if name not in names.values()]
    _check_names(names, present + others)
    shapes = {names[column]: dataset.shape for column, dataset in datasets.items()}
    if len(set(shapes.values())) > 1 or len(datasets["time"].shape) != 1:
        raise ValueError(f"its columns should be (N,), all of one N, found {shapes}")
    if not datasets["time"].size:
        raise ValueError("it has no rows")
    return {
        column: _times(dataset) if column == "time" else unpack(open_numbers(file, names[column]))
        for column, dataset in datasets.items()
    }


def _check_names(names, found):
    if missing := [name for name in names.values() if name not in found]:
        raise ValueError(
            f"it has no column {', '.join(missing)}, found {', '.join(found)[:300] or 'none'}; "
            "--column OURS=THEIRS takes another name"
        )
    if twice := [name for name in names.values() if found.count(name) > 1]:
        raise ValueError(f"its column {', '.join(twice)} stands twice")


def _times(dataset):
    """Seconds since 1970 of a dataset of texts, or of seconds since what `units` say."""
    if h5py.check_string_dtype(dataset.dtype):
        check_storage(dataset)
        return _parsed(dataset.asstr()[:], "time")
    units = dataset.attrs.get("units", "")
    units = units.decode() if isinstance(units, bytes) else str(units)
    if not (since := SINCE.fullmatch(units.strip())):
        raise ValueError(
            "its time should be texts, ISO 8601, or numbers with the attribute units "
            f"'seconds since 1970-01-01 00:00:00', found {str(dataset.dtype)[:99]} and "
            f"units {units[:99]!r}"
        )
    epoch = _seconds(since[1] if ":" in since[1] else f"{since[1]}T00:00")
    return unpack(open_numbers(dataset.file, dataset.name)) + epoch


def _parsed(texts, column):
    """Texts as numbers, float64 (n,); NaN where they are empty."""
    parse, wanted = (_seconds, "ISO 8601, UTC") if column == "time" else (float, "a number")
    values = np.full(len(texts), np.nan)
    for i, text in enumerate(texts):
        if text := text.strip():
            try:
                values[i] = parse(text)
            except ValueError:
                raise ValueError(
                    f"row {i + 1}: {column} should be {wanted}, found {text[:40]!r}"
                ) from None
    return values


def _seconds(text):
    """Seconds since 1970 of a time, ISO 8601 in UTC; Python 3.10 itself reads less."""
    if text.lower() in ("nan", "nat"):
        return math.nan
    if not (parts := re.fullmatch(ISO_TIME, text)):
        raise ValueError
    date, minutes, seconds, fraction = parts.groups()
    time = datetime.fromisoformat(f"{date}T{minutes}{seconds or ':00'}+00:00")
    return time.timestamp() + float(fraction or 0)


def _check_numbers(matchups, celsius):
    for column, (low, high) in LIMITS.items():
        values = matchups[column]
        for i in np.flatnonzero((values < low) | (values > high))[:1]:
            raise ValueError(
                f"row {i + 1}: {column} should be {low} to {high}, or empty where missing, found "
                f"{values[i]:g}"
            )
    for column in TEMPERATURES:
        known = matchups[column][np.isfinite(matchups[column])]
        median = np.median(known) if known.size else ZERO_CELSIUS
        if column in celsius and median > ZERO_CELSIUS + NO_CELSIUS:
            raise ValueError(
                f"{column} has a median of {median - ZERO_CELSIUS:.2f}, which cannot be Celsius; "
                f"leave out --celsius {column}"
            )
        if column not in celsius and median < NO_KELVIN:
            raise ValueError(
                f"{column} should be in K, found a median of {median:.2f}; if that is Celsius say "
                f"--celsius {column}"
            )


def select(matchups, min_sst):
    """Choose the match-ups of the best quality.

    Args:
        matchups: Of `read_table`.
        min_sst: Both temperatures are above it [K].

    Returns:
        bool (n,), and how many were left after each step, by its name.
    """
    tests = {
        "nothing missing": np.isfinite([*matchups.values()]).all(axis=0),
        f"quality level {BEST_QUALITY}": matchups["quality_level"] == BEST_QUALITY,
        f"satellite zenith <= {MOST_ZENITH:g} deg": matchups["satellite_zenith"] <= MOST_ZENITH,
        f"temperatures > {min_sst:g} K": (
            np.minimum(matchups["satellite_sst"], matchups["buoy_sst"]) > min_sst
        ),
    }
    chosen = np.ones(matchups["time"].size, bool)
    funnel = {"match-ups read": chosen.size}
    for name, passed in tests.items():
        chosen &= passed
        funnel[name] = np.count_nonzero(chosen)
    return chosen, funnel


# --- match-ups and pixels -------------------------------------------------------------------


def find_pixels(matchups, chosen, masks, scenes, geodetic, tolerance):
    """Find the pixel of each match-up, in all scenes that were measured at its time.

    Args:
        matchups: Of `read_table`.
        chosen: bool (n,), which of them to look for.
        masks: Paths of mask files.
        scenes: Paths of scene files by name, without suffix.
        geodetic: File or folder of --geodetic, or None.
        tolerance: [s] before the start and after the end of a scene.

    Returns:
        bool (n,), which ones are in the time of a scene; and PIXEL (n,), with an infinite distance
        where no pixel is near enough.

    Raises:
        UserError: If a file is not what it should be.
    """
    in_time = np.zeros(chosen.size, bool)
    pixels = np.zeros(chosen.size, PIXEL)
    pixels["distance"] = np.inf
    left_out = collections.defaultdict(list)  # match-ups in the times of scenes, by the reason
    for number, path in enumerate(progress(masks, "Matching", len(masks))):
        these = chosen & _in_time(matchups["time"], path.stem, tolerance)
        in_time |= these
        if not (these := np.flatnonzero(these)).size:
            continue
        try:
            found = _match_scene(
                path, scenes, geodetic, matchups["latitude"][these], matchups["longitude"][these]
            )
        except LeftOut as reason:
            left_out[str(reason)].append((these.size, path.stem))
            continue
        found["mask_file"] = number
        nearer = found["distance"] < pixels["distance"][these]
        pixels[these[nearer]] = found[nearer]
    for reason, members in left_out.items():
        log.warning(
            "%d scene(s) %s, %s for one; %d match-ups are in their times.",
            *(len(members), reason, members[0][1], sum(n for n, _ in members)),
        )
    return in_time, pixels


def _in_time(time, scene, tolerance):
    if not (times := product_times(scene)):
        raise UserError(
            f"The mask {scene} should have the name of a product, with start and end of its "
            "measurement. Rename it, and its scene file, or choose others with --scene."
        )
    start, end = (edge.timestamp() for edge in times)
    return (time >= start - tolerance) & (time <= end + tolerance)


def _match_scene(path, scenes, geodetic, latitude, longitude):
    """Match-ups and the pixels of one scene, given by its mask file: PIXEL (m,)."""
    if not (scene := scenes.get(path.stem)):
        raise LeftOut("have no scene file (--data says where)")
    with open_hdf5(path) as file:
        mask = read_mask(file)
    if not (positions := read_positions(scene, geodetic, path.stem, mask.shape)):
        raise LeftOut("have neither latitude and longitude nor --geodetic")
    if not np.isfinite(positions["latitude"] + positions["longitude"]).any():
        raise LeftOut("have no pixel with both latitude and longitude")
    found = nearest_pixels(latitude, longitude, **positions)
    pixel = found["row"], found["col"]
    if np.isfinite(found["distance"]).any():
        with open_hdf5(scene) as file:
            measured = measured_pixels(file, mask.shape)
            bayes = open_numbers(file, "bayes", (*mask.shape, 1), optional=True)
            if measured is None:
                raise ValueError("it should have a dataset 'bts'")
            if bayes is None:
                raise LeftOut("have no Bayesian mask, 'bayes'")
            label = bayes[:][..., 0][pixel]
        found["measured"] = measured[pixel] & np.isfinite(label)
        found["cloudmask"], found["bayes"] = mask[pixel] != 0, label != 0
    return found


def nearest_pixels(at_latitude, at_longitude, latitude, longitude):
    """Find the pixel nearest to each place on the sphere.

    Args:
        at_latitude: float64 (m,) [degrees north].
        at_longitude: float64 (m,) [degrees east].
        latitude: float64 (H, W) [degrees north], NaN where missing.
        longitude: float64 (H, W) [degrees east], NaN where missing.

    Returns:
        PIXEL (m,), with an infinite distance where that pixel is not within LATITUDE_LIMIT and
        LONGITUDE_LIMIT; distances are chords of the unit sphere.
    """
    from scipy.spatial import cKDTree

    known = np.flatnonzero(np.isfinite(latitude) & np.isfinite(longitude))
    shape, latitude, longitude = latitude.shape, latitude.ravel()[known], longitude.ravel()[known]
    # Pixels lie evenly: a tree that is not balanced serves as well, and is made in half the time.
    tree = cKDTree(unit_vectors(latitude, longitude), balanced_tree=False)
    found = np.zeros(len(at_latitude), PIXEL)
    found["distance"], nearest = tree.query(unit_vectors(at_latitude, at_longitude))
    found["row"], found["col"] = np.unravel_index(known[nearest], shape)
    found["latitude"], found["longitude"] = latitude[nearest], longitude[nearest]
    off = np.abs([at_latitude - found["latitude"], across(at_longitude - found["longitude"])])
    # Of 10.01 - 10.005 binary numbers make less than 0.005.
    far = (off.round(9) >= [[LATITUDE_LIMIT], [LONGITUDE_LIMIT]]).any(axis=0)
    found["distance"][far] = np.inf
    return found


def unit_vectors(latitude, longitude):
    """Places on the unit sphere, float64 (n, 3), of degrees."""
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    x, y = np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude)
    return np.stack([x, y, np.sin(latitude)], axis=-1)


def across(degrees):
    """A difference of longitudes the short way round, -180 to 180."""
    return (degrees + 180) % 360 - 180


# --- statistics -----------------------------------------------------------------------------


def rows_of(matchups, pixels, scenes):
    """The rows of matchups.csv, dictionaries with the columns MATCHUPS.

    Args:
        matchups: Of `read_table`, those on pixels with data.
        pixels: PIXEL (n,), theirs.
        scenes: Paths of the scene files, (n,).
    """
    columns = {name: values.tolist() for name, values in matchups.items()}
    columns |= {name: pixels[name].tolist() for name in ("row", "col")}
    columns |= {name: pixels[name].astype(int).tolist() for name in ("cloudmask", "bayes")}
    columns |= {f"pixel_{name}": pixels[name].tolist() for name in ("latitude", "longitude")}
    columns["difference"] = (matchups["satellite_sst"] - matchups["buoy_sst"]).tolist()
    columns["time"] = [
        datetime.fromtimestamp(time, timezone.utc).isoformat().replace("+00:00", "Z")
        for time in columns["time"]
    ]
    columns["scene"] = [path.stem for path in scenes]
    columns["day_night"] = [day_or_night(path) for path in scenes]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def differences_by_mask(rows):
    """Sort the differences of match-ups by day and night and by mask.

    Args:
        rows: Of `rows_of`.

    Returns:
        {(kind, mask): differences [K] where that mask is clear, float64 (n,)}, for each mask of
        MASKS, all kinds that occur and "all".
    """
    occur = {row["day_night"] for row in rows}
    return {
        (kind, mask): np.array(
            [
                row["difference"]
                for row in rows
                if kind in (row["day_night"], "all") and not row.get(mask)
            ]
        )
        for kind in (*(kind for kind in ("day", "night", "unknown") if kind in occur), "all")
        for mask in MASKS
    }


def median_and_robust_std(values):
    """The median, and 1.4826 times the median distance from it; NaN of no values."""
    if not len(values):
        return math.nan, math.nan
    median = np.median(values)
    return float(median), float(ROBUST * np.median(np.abs(values - median)))


def statistics_of(differences):
    """The rows of statistics.csv, dictionaries with the columns STATISTICS.

    Args:
        differences: Of `differences_by_mask`.
    """
    return [
        dict(
            zip(STATISTICS, (kind, mask, len(values), *median_and_robust_std(values)), strict=True)
        )
        for (kind, mask), values in differences.items()
    ]


def text_of(statistics):
    """The rows of `statistics_of` for people."""
    lines = {f"{row['day_night']}, {MASKS[row['mask']]}": row for row in statistics}
    return table(
        {
            "match-ups": {line: f"{row['matchups']:9}" for line, row in lines.items()},
            "median [K]": {line: f"{row['median']:+10.3f}" for line, row in lines.items()},
            "robust std [K]": {line: f"{row['robust_std']:14.3f}" for line, row in lines.items()},
        }
    )


def draw(differences, path):
    """Draw histograms of the differences, a panel for day and night each.

    Args:
        differences: Of `differences_by_mask`.
        path: PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in dict.fromkeys(kind for kind, _ in differences) if kind != "all"]
    styles = {  # told apart by brightness and dashes alone
        "none": {"histtype": "stepfilled", "color": "0.85"},
        "bayes": {"histtype": "step", "color": "#d55e00", "linestyle": "--", "linewidth": 1.5},
        "cloudmask": {"histtype": "step", "color": "#00305a", "linewidth": 1.5},
    }
    figure, panels = pyplot.subplots(
        *(1, len(kinds)), figsize=(4.8 * len(kinds), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, kind in zip(panels[0], kinds, strict=True):
        for mask, style in styles.items():
            values = differences[kind, mask]
            median, robust_std = median_and_robust_std(values)
            label = f"{MASKS[mask]}: {len(values)}, {median:+.2f} K, {robust_std:.2f} K"
            axes.hist(np.clip(values, BINS[0], BINS[-1]), BINS, label=label, **style)
        axes.axvline(0, color="0.4", linestyle=":", linewidth=1)
        axes.set(title=kind, xlabel="satellite minus buoy [K]; the outer bins hold all beyond")
        axes.legend(
            title="number, median, robust standard deviation", loc="lower center",
            bbox_to_anchor=(0.5, 1.08), frameon=False, fontsize="small", title_fontsize="small",
        )  # fmt: skip
    panels[0, 0].set(ylabel="match-ups in 0.2 K", yscale="log", ylim=(0.7, None))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


# --- the program ----------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    add("table", type=Path, metavar="TABLE", help="match-ups, CSV or HDF5")
    add("-o", "--output", type=Path, help="folder for the files (default RUN_DIR/sst)")
    add_mask_options(add)
    add(
        "--minutes", type=float, default=0.0,
        help="how far a match-up may be before and after a scene (default 0)",
    )  # fmt: skip
    add(
        "--column", metavar="OURS=THEIRS", nargs="+", action="extend", default=[],
        help="names that the table has for our columns",
    )  # fmt: skip
    add(
        "--celsius", choices=TEMPERATURES, nargs="+", action="extend", default=[],
        help="columns that the table has in Celsius",
    )  # fmt: skip
    add("--verbose", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.minutes < math.inf:
        parser.error(f"--minutes should be 0 or more, found {arguments.minutes}")
    names = dict(text.partition("=")[::2] for text in arguments.column)
    if unknown := [ours for ours in names if ours not in COLUMNS or not names[ours]]:
        parser.error(f"--column should be OURS=THEIRS, OURS of {', '.join(COLUMNS)}: {unknown[0]}")
    arguments.names = {column: names.get(column, column) for column in COLUMNS}
    return arguments


def validate(arguments):
    """Validate the masks of a run."""
    import matplotlib  # noqa: F401  (missing packages are told before the work)
    import scipy  # noqa: F401

    config = load_config(arguments.run / "config.yaml")
    masks = find_masks(arguments.run, arguments.scene)
    check_geodetic(arguments.geodetic, masks)
    scenes = {path.stem: path for path in find_scenes(arguments.data or config.inference_dir)}
    matchups = read_table(arguments.table, arguments.names, set(arguments.celsius))
    chosen, funnel = select(matchups, config.min_sst)
    in_time, pixels = find_pixels(
        matchups, chosen, masks, scenes, arguments.geodetic, 60 * arguments.minutes
    )
    measured, cloud, label = (pixels[name] for name in ("measured", "cloudmask", "bayes"))
    funnel |= {
        "in the time of a scene": np.count_nonzero(in_time),
        "near a pixel": np.count_nonzero(np.isfinite(pixels["distance"])),
        "on a pixel with data": np.count_nonzero(measured),
        "  clear by our mask": np.count_nonzero(measured & ~cloud),
        "  clear by the Bayesian mask": np.count_nonzero(measured & ~label),
        "  clear by both": np.count_nonzero(measured & ~cloud & ~label),
    }
    counts = {step: f"{n:9}" for step, n in funnel.items()}
    sys.stdout.write(table({"match-ups": counts}) + "\n\n")
    if not measured.any():
        raise UserError(
            "No match-up lies on a pixel with data; the table above tells where they were lost. "
            "--minutes widens the times of scenes, --geodetic finds positions."
        )
    folder = arguments.output or arguments.run / "sst"
    steps = [{"step": step.strip(), "matchups": n} for step, n in funnel.items()]
    write_csv(folder / "funnel.csv", ("step", "matchups"), steps)
    kept = {name: values[measured] for name, values in matchups.items()}
    places = [scenes[masks[number].stem] for number in pixels["mask_file"][measured]]
    rows = rows_of(kept, pixels[measured], places)
    write_csv(folder / "matchups.csv", MATCHUPS, rows)
    differences = differences_by_mask(rows)
    statistics = statistics_of(differences)
    write_csv(folder / "statistics.csv", STATISTICS, statistics)
    draw(differences, folder / "differences.png")
    sys.stdout.write(text_of(statistics) + "\n")
    log.info("statistics.csv, funnel.csv, matchups.csv and differences.png are in %s.", folder)


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: validate(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
