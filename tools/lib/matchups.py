"""Match-ups of satellite and buoy: read their table, find their pixels.

`tools/validate_sst.py --help` describes the table and which match-ups count.
"""

import collections
import csv
import io
import logging
import math
import re

import h5py
import numpy as np

from harness.console import progress
from harness.data.hdf5 import (
    open_hdf5,
    open_numbers,
    read_attribute,
    read_texts,
    unpack,
)
from harness.data.hdf5_links import open_dataset
from harness.data.positions import read_positions
from harness.data.scene_files import product_times
from harness.errors import UserError
from harness.files import read_text

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
# [K] satellite - buoy. Colder is mostly cloud: where the sky is clear, errors of retrieval and buoy
# are 0.3 to 0.5 K and the skin is 0.2 K colder than the water at the buoy.
COLD = -2.0
STATISTICS = ("median", "robust_std", "mean", "std", "cold_share")  # of satellite - buoy
ROBUST = 1.4826  # standard deviation of a normal distribution over its median absolute deviation

ZERO_CELSIUS = 273.15  # [K]
MEDIANS = (100.0, ZERO_CELSIUS + 100)  # [K] a median outside is in other units
PIXEL = np.dtype(
    [
        ("in_time", bool), ("distance", float), ("scene", int), ("row", int), ("col", int),
        ("latitude", float), ("longitude", float), ("measured", bool),
    ]
)  # fmt: skip

log = logging.getLogger(__name__)


class SkippedScene(Exception):
    """Why a scene cannot be used."""


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
    advice = "tools/validate_sst.py --help describes the table of match-ups."
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


def find_pixels(matchups, chosen, scenes, geodetic, tolerance, read, masks):
    """Find the pixel of each match-up, in all scenes that were measured at its time.

    Args:
        matchups: Result of `read_table`.
        chosen: bool (n,), which of them to look for.
        scenes: Paths of scene files by name, without suffix; None where there is none.
        geodetic: File or folder given by --geodetic, or None.
        tolerance: [s] before the start and after the end of a scene.
        read: Function of the name and the path of a scene, {field: (H, W)}: `measured`, where it
            has data, and each of `masks`. Raises SkippedScene if it cannot be used.
        masks: Names of fields.

    Returns:
        PIXEL and a float32 field for each of `masks`, (n,), with an infinite distance where no
        pixel is near enough; `scene` counts `scenes`.
    """
    pixels = np.zeros(chosen.size, [*PIXEL.descr, *((name, np.float32) for name in masks)])
    pixels["distance"] = np.inf
    skipped = collections.defaultdict(list)  # scenes by reason
    for number, (name, path) in enumerate(progress(scenes.items(), "Matching", len(scenes))):
        if not (times := product_times(name)):
            raise UserError(
                f"The mask {name} should be named after a product, with start and end of its "
                "measurement. Rename it, and its scene file, or select others with --scene."
            )
        start, end = (time.timestamp() for time in times)
        time = matchups["time"]
        in_time = chosen & (time >= start - tolerance) & (time <= end + tolerance)
        pixels["in_time"] |= in_time
        if not (these := np.flatnonzero(in_time)).size:
            continue
        try:
            if path is None:
                raise SkippedScene("no scene file (give its folder with --data)")
            fields = read(name, path)
            positions = _positions(path, geodetic, name, fields["measured"].shape)
        except SkippedScene as reason:
            skipped[str(reason)].append(f"{name} ({these.size} match-ups)")
            continue
        at = matchups["latitude"][these], matchups["longitude"][these]
        found = nearest_pixels(*at, **positions)
        nearer = found["distance"] < pixels["distance"][these]
        these, found = these[nearer], found[nearer]
        for field in ("distance", "row", "col", "latitude", "longitude"):
            pixels[field][these] = found[field]
        for field, values in fields.items():
            pixels[field][these] = values[found["row"], found["col"]]
        pixels["scene"][these] = number
    for reason, names in skipped.items():
        log.warning("Skipped scenes: %d, %s. The first is %s.", len(names), reason, names[0])
    return pixels


def _positions(scene, geodetic, name, shape):
    if not (positions := read_positions(scene, geodetic, name, shape)):
        raise SkippedScene("neither latitude and longitude nor --geodetic")
    if not np.isfinite(positions["latitude"] + positions["longitude"]).any():
        raise SkippedScene("no pixel with both latitude and longitude")
    return positions


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


def statistics(values):
    """STATISTICS of differences [K], float64 (n,); NaN without values.

    The robust standard deviation is 1.4826 times the median distance from the median: it hides up
    to half of the values, however cold. `std` and `cold_share`, the share below COLD, do not.
    """
    if not len(values):
        return dict.fromkeys(STATISTICS, math.nan)
    median = np.median(values)
    robust_std = ROBUST * np.median(np.abs(values - median))
    numbers = median, robust_std, values.mean(), values.std(), (values < COLD).mean()
    return dict(zip(STATISTICS, map(float, numbers), strict=True))


def compare_masks(names, cloud, scores, difference):
    """Statistics of satellite - buoy where masks are clear, at their own and at equal coverage.

    Args:
        names: Names of the K masks.
        cloud: bool (n, K), what they say of n match-ups.
        scores: float (n, K), rising with the probability of cloud; NaN where unknown.
        difference: float64 (n,), satellite - buoy [K].

    Returns:
        List of dictionaries with `mask`, `as_clear_as`, `matchups`, `coverage` (share of the n)
        and STATISTICS. Each mask with scores is also taken to be clear in as many match-ups as
        each mask without; if all have scores, as the mask with the fewest.
    """

    def row(name, reference, values):
        about = {"mask": name, "as_clear_as": reference, "matchups": len(values)}
        about["coverage"] = len(values) / len(difference)
        return about | statistics(values)

    rows = [row(name, "", difference[~cloud[:, i]]) for i, name in enumerate(names)]
    n_clear, has_scores = (~cloud).sum(axis=0), ~np.isnan(scores).any(axis=0)
    for reference in [n_clear.argmin()] if has_scores.all() else np.flatnonzero(~has_scores):
        for i in np.flatnonzero(has_scores):
            clearest = np.argsort(scores[:, i], kind="stable")[: n_clear[reference]]
            rows.append(row(names[i], names[reference], difference[clearest]))
    return rows


# --- the command line -----------------------------------------------------------------------


def add_matchup_arguments(add):
    """Add the options that say how a table is read, by the add_argument of a parser."""
    lists = {"nargs": "+", "action": "extend", "default": []}
    add("--minutes", type=float, default=0.0, help="tolerance before and after a scene (default 0)")
    add("--min-sst", type=float, metavar="K", help="of both temperatures (default: MIN_SST)")
    add("--column", metavar="OURS=THEIRS", **lists, help="names that the table has for our columns")
    add("--celsius", choices=TEMPERATURES, **lists, help="columns that the table has in Celsius")


def check_matchup_arguments(parser, arguments):
    """Check these options, and set `arguments.names` to the names in the table by our names."""
    if not 0 <= arguments.minutes < math.inf:
        parser.error(f"--minutes should be 0 or more, found {arguments.minutes}")
    if arguments.min_sst is not None and not 0 < arguments.min_sst < math.inf:
        parser.error(f"--min-sst should be above 0 K, found {arguments.min_sst}")
    names = dict(text.partition("=")[::2] for text in arguments.column)
    if unknown := [ours for ours in names if ours not in COLUMNS or not names[ours]]:
        parser.error(f"--column should be OURS=THEIRS, OURS of {', '.join(COLUMNS)}: {unknown[0]}")
    arguments.names = {column: names.get(column, column) for column in COLUMNS}
