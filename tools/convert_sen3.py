r"""Convert Sentinel-3 SLSTR products to scene files for the benchmark.

    python tools/convert_sen3.py S3A_SL_1_RBT____*.SEN3 -o data/mine
    python tools/convert_sen3.py products/*.zip -o data/mine --jobs 2

A product is a Level-1 RBT product (S3A_SL_1_RBT____..., or S3B, S3C), a folder or the zip file as
downloaded; its xfdumanifest.xml stands for the folder. It becomes DIR/day/<product>.hdf if every
measured pixel has the flag `day` in its `confidence_in`, else DIR/night/<product>.hdf, with the
datasets

refs     (H, W, 6) reflectance of S1 to S6, pi L / (E0 cos(solar zenith)), of stripe A
bts      (H, W, 3) brightness temperature of S7 to S9 [K]
bayes    (H, W, 1) 255 where `bayes_in` has any flag except spare ones; else 0, "clear"
rads     (H, W, 6) radiance L of S1 to S6 [mW m-2 sr-1 nm-1]
summary  (H, W, 1) 255 where `confidence_in` has the flag `summary_cloud`
latitude, longitude  (H, W) [degrees north and east], NaN where missing

E0 is the irradiance of the detector that saw the pixel, from the product's quality files; pixels
without a known detector get the mean of all detectors. Where the sun is below the horizon the
reflectance is 0. Radiances are those of the product, without vicarious calibration. A 1 km pixel is
the mean of the measured ones of its four 500 m pixels. Missing is 0; with --refs-grid 500m it is
NaN in refs and rads, which the benchmark ignores in its mean.

The scene has the rows of the product, 1199 to 1202 on the 1 km grid, or fewer in products of two
minutes. `--mode inference` masks scenes of any size; a benchmark or training needs IMAGE_H rows in
all of them: convert with `--rows 1200`. Rows of the 500 m grid are assigned to those of the 1 km
grid by the attribute `start_offset`.

Pixels with the flag `unfilled`, at the borders of an image, do not count for day or night. If a
product has no `bayes_in`, the scene has no `bayes`: it can be masked, but not scored or trained on.
Existing scenes are skipped; a product that cannot be read is reported, and the rest is converted.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import zipfile
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath

from _command import exit_status  # isort: skip  (before all packages)

# NetCDF-4 is HDF5: h5py reads it, and netCDF4 would load a second HDF5 library.
import h5py
import numpy as np

from harness.console import counted, log_to_screen
from harness.data.hdf5 import (
    is_fill,
    open_hdf5,
    open_numbers,
    read_all,
    read_attribute,
    unpack,
)
from harness.data.scene_files import PRODUCT_NAME
from harness.errors import Failure, UserError, one_line
from harness.files import replacing
from harness.signals import Interrupted, install_handlers
from tools.lib.options import command_parser, positive

REFLECTIVE, THERMAL = range(1, 7), range(7, 10)  # channels S1 to S6, S7 to S9
MANIFEST = "xfdumanifest.xml"  # of a product, which other programs open instead of its folder
MAX_ROWS_APART = 8  # of 500 m, between the ends of the images of 500 m and 1 km
MAX_PIXELS = 24_000_000  # of an image at 500 m; one of three minutes has 7.2 million
MAX_FLAGS = 64  # bits of the largest integer
MAX_BYTES = 4_000_000_000  # of the files read from a zip file; a product needs 0.5 GB

log = logging.getLogger("convert_sen3")


# --- the files of a product -----------------------------------------------------------------


def required_files(view, positions):
    """Names of the files to read, for the view "nadir" or "oblique", with or without positions."""
    v = view[0]
    return [
        *(f"S{i}_{kind}_a{v}.nc" for i in REFLECTIVE for kind in ("radiance", "quality")),
        *(f"S{i}_BT_i{v}.nc" for i in THERMAL),
        *(f"flags_i{v}.nc", f"indices_a{v}.nc", f"geometry_t{v}.nc"),
        *(f"cartesian_a{v}.nc", "cartesian_tx.nc"),
        *([f"geodetic_i{v}.nc"] if positions else []),
    ]


def list_product(path):
    """The name of a product without .SEN3, and its files by name: paths or entries of the zip file.

    Raises:
        UserError: If it is not an SLSTR Level-1 product, or the zip file is damaged.
    """
    if path.name.lower() == MANIFEST and path.parent.is_dir():
        path = path.parent
    if path.is_dir():
        folder = _product_folder(Path(os.path.abspath(path)))
        name, files = folder.name, {file.name: file for file in folder.iterdir()}
    else:
        with _open_zip(path) as archive:  # Windows may write '\\', a Mac adds a second folder
            entries = {
                PurePosixPath(entry.filename.replace("\\", "/")): entry
                for entry in archive.infolist()
                if "__MACOSX" not in entry.filename
            }
        folders = {file.parent for file in entries if file.suffix == ".nc"}
        if len(folders) != 1:
            raise UserError(
                "expected the NetCDF files of one product in one folder of the zip file, found "
                f"{len(folders)} folders. Download it again, or unpack it."
            )
        (folder,) = folders
        name = folder.name or re.sub(r"\.zip$", "", path.name, flags=re.IGNORECASE)
        files = {file.name: entry for file, entry in entries.items() if file.parent == folder}
    name = re.sub(r"\.sen3$", "", name, flags=re.IGNORECASE)
    if not PRODUCT_NAME.fullmatch(name):
        raise UserError(
            "expected an SLSTR Level-1 product named S3A_SL_1_RBT____... (or S3B, S3C), found "
            f"{name!r}. Remove it from the command, or restore its name."
        )
    return name, files


def _product_folder(folder):
    """The folder itself, or the only product in it if it has no NetCDF files, as `unzip` may do."""
    inner = [path for path in folder.iterdir() if path.is_dir() and PRODUCT_NAME.match(path.name)]
    if not inner or any(folder.glob("*.nc")):
        return folder
    if len(inner) > 1:
        raise UserError(
            f"expected one product, found {len(inner)}. Name each of them in the command: "
            f"{folder.name}/S3*."
        )
    return _product_folder(inner[0])


@contextlib.contextmanager
def _open_zip(path):
    """Open a zip file; whatever is wrong with it becomes a UserError."""
    try:
        if not path.is_file():  # opening a pipe would block
            raise ValueError("it is neither")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    # zipfile raises all of these for damaged or unsupported files.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise UserError(
            f"expected the folder of a product or a complete zip file: {error}. Unpack another "
            "kind of archive, give the folder of a single file, or download it again."
        ) from error


@contextlib.contextmanager
def unpacked(path, files, names):
    """Give the folder with some files of `list_product`; for those of a zip file, a temporary one.

    Raises:
        UserError: If a file is missing, or the zip file is damaged.
    """
    if missing := [name for name in names if name not in files]:
        more = f" and {counted(len(missing) - 4, 'other')}" if missing[4:] else ""
        is_position = all(name.startswith("geodetic") for name in missing)
        advice = "Download it again" + ", or use --no-positions" * is_position
        raise UserError(f"missing in the product: {', '.join(missing[:4])}{more}. {advice}.")
    if isinstance(files[names[0]], Path):
        yield files[names[0]].parent
        return
    with tempfile.TemporaryDirectory(prefix="sen3-") as temporary:
        with _open_zip(path) as archive:
            if (size := sum(files[name].file_size for name in names)) > MAX_BYTES:
                raise ValueError(f"unpacked it would have {size} bytes, limit {MAX_BYTES}")
            # Only these files, under our own names: other names in the archive do no harm.
            for name in names:
                with archive.open(files[name]) as source:
                    with Path(temporary, name).open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        yield Path(temporary)


def _reading(path):
    return open_hdf5(path, path.name, "Download the product again.")


def read_variable(path, name, shape):
    """Read a variable of a NetCDF-4 file as float64, unpacked, with NaN where missing.

    Raises:
        UserError: If it cannot be read or has another shape, in which None is any length.
    """
    with _reading(path) as file:
        return unpack(open_numbers(file, name, shape, most=MAX_PIXELS))


def read_flags(path, name, shape, needed=()):
    """Read a variable of bits by its own flag_masks and flag_meanings.

    Args:
        path: NetCDF-4 file.
        name: Name of the variable.
        shape: (H, W).
        needed: Flags that must exist; without any, the variable may be absent.

    Returns:
        {flag: bool (H, W)}, without spare flags, False where missing; None if it is absent.

    Raises:
        UserError: If it cannot be read or lacks a flag.
    """
    with _reading(path) as file:
        if (dataset := open_numbers(file, name, shape, optional=not needed)) is None:
            return None
        if dataset.dtype.kind == "f":
            raise ValueError(f"'{name}' should hold bits, found {dataset.dtype}")
        text = read_attribute(dataset, "flag_meanings")
        flags = (text.decode() if isinstance(text, bytes) else str(text)).split()
        masks = read_attribute(dataset, "flag_masks", most=MAX_FLAGS).astype(dataset.dtype)
        kept = {flag for flag in flags if not flag.startswith("spare")}
        if len(flags) != len(masks) or not kept or not kept.issuperset(needed):
            raise ValueError(
                f"'{name}' should have one mask for each flag, including "
                f"{' '.join(needed) or 'any'}, found {counted(len(masks), 'mask')} for "
                f"'{' '.join(flags)}'"
            )
        packed = read_all(dataset)
        present = ~is_fill(dataset, packed)
    pairs = zip(flags, masks, strict=True)
    return {flag: (packed & mask != 0) & present for flag, mask in pairs if flag in kept}


# --- the sun --------------------------------------------------------------------------------


def cosine_of_solar_zenith(folder, view, shape):
    """Cosine of the solar zenith angle of each 500 m pixel, bilinear between the tie points.

    The cosine, unlike the angle, is smooth where the sun is overhead: between tie points 16 km
    apart it deviates from a straight line by at most (16 / 6371)^2 / 8 = 8e-7.

    Args:
        folder: Folder of the product.
        view: "nadir" or "oblique".
        shape: (H, W) of the 500 m grid.

    Returns:
        float64 (H, W), NaN where it is unknown.
    """
    v = view[0]
    zenith = read_variable(folder / f"geometry_t{v}.nc", f"solar_zenith_t{v}", (None, None))
    tie_file, file = folder / "cartesian_tx.nc", folder / f"cartesian_a{v}.nc"
    tie_x, tie_y = (read_variable(tie_file, f"{axis}_tx", zenith.shape) for axis in "xy")
    x, y = (read_variable(file, f"{axis}_a{v}", shape) for axis in "xy")
    columns, rows = tie_x.mean(axis=0), tie_y.mean(axis=1)
    for axis in (columns, rows):
        steps = np.diff(axis)
        if not steps.size or not ((steps > 0).all() or (steps < 0).all()):
            raise UserError(
                "cartesian_tx.nc should have rows and columns of tie points, at least two, with "
                f"increasing or decreasing y and x, found {axis[:4]}. Download the product again."
            )
    return interpolate(rows, columns, np.cos(np.radians(zenith)), y, x)


def interpolate(rows, columns, values, y, x):
    """Interpolate linearly between tie points; the outer ones of a row may be missing.

    Args:
        rows: (m,), increasing or decreasing coordinate.
        columns: (n,), increasing or decreasing coordinate.
        values: (m, n), NaN where missing.
        y: (H, W), where to interpolate.
        x: (H, W), where to interpolate.

    Returns:
        (H, W), NaN where a row has less than two values, or where it is more than a step outside
        the grid; nearer to the grid it is the value at the edge.
    """
    from scipy.interpolate import make_interp_spline
    from scipy.ndimage import map_coordinates

    by_row, by_column = np.argsort(rows), np.argsort(columns)
    rows, columns, values = rows[by_row], columns[by_column], values[np.ix_(by_row, by_column)]
    for i, row in enumerate(values):  # continue each row along its first and last two values
        known = np.isfinite(row)
        fit = make_interp_spline(columns[known], row[known], k=1) if known.sum() >= 2 else None
        values[i] = fit(columns) if fit else np.nan
    inside, indices = True, []
    for axis, places in ((rows, y), (columns, x)):
        step = np.diff(axis).max()
        inside &= (places >= axis[0] - step) & (places <= axis[-1] + step)
        indices.append(np.interp(np.nan_to_num(places), axis, np.arange(len(axis))))
    return np.where(inside, map_coordinates(values, indices, order=1, mode="nearest"), np.nan)


# --- from a product to a scene --------------------------------------------------------------


def reflectance(radiance, irradiance, detector, cosine):
    """Reflectance at the top of the atmosphere.

    Args:
        radiance: (H, W) [mW m-2 sr-1 nm-1], NaN where missing.
        irradiance: (n,), of the sun by detector [mW m-2 nm-1], NaN where missing.
        detector: (H, W), from 0 to n - 1, NaN where unknown.
        cosine: (H, W), of the solar zenith angle, NaN where unknown.

    Returns:
        (H, W), fraction of 1; 0 at night, NaN where missing.

    Raises:
        ValueError: If a detector is not in 0 to n - 1, or there are radiances but no irradiances.
    """
    if ((detector < 0) | (detector >= len(irradiance))).any():
        raise ValueError(
            f"detectors from {np.nanmin(detector):.0f} to {np.nanmax(detector):.0f}, expected 0 to "
            f"{len(irradiance) - 1}"
        )
    known = irradiance[irradiance > 0]
    if not known.size and np.isfinite(radiance).any():
        raise ValueError(f"no solar irradiance above 0, found {irradiance}")
    by_detector = np.where(irradiance > 0, irradiance, np.nan)
    by_detector = np.append(by_detector, known.mean() if known.size else np.nan)  # index -1
    received = by_detector[np.nan_to_num(detector, nan=-1).astype(np.intp)] * cosine
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.divide(math.pi * radiance, received)
    result[(cosine <= 0) & np.isfinite(radiance)] = 0
    return result


def halved(values):
    """Mean of the measured ones of each 2 x 2 pixels, (2 H, 2 W) to (H, W); NaN where missing."""
    quarters = np.stack([values[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    present = np.isfinite(quarters)
    count = present.sum(axis=0)
    total = np.where(present, quarters, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def rows_of(values, first, n_rows, fill=np.nan):
    """The rows from `first` to `first` + `n_rows`; those that `values` lacks are `fill`."""
    if first == 0 and len(values) == n_rows:
        return values
    result = np.full((n_rows, *values.shape[1:]), fill, values.dtype)
    begin, stop = max(first, 0), min(first + n_rows, len(values))
    if begin < stop:
        result[begin - first : stop - first] = values[begin:stop]
    return result


def first_fine_row(folder, view):
    """The row of the 500 m grid where the first row of the 1 km grid begins; it may be negative.

    The attribute `start_offset` of a grid counts rows of its own size from a common origin.

    Raises:
        UserError: If the grids do not begin at the same place.
    """
    offsets = []
    for name in (f"S1_radiance_a{view[0]}.nc", f"S7_BT_i{view[0]}.nc"):
        with _reading(folder / name) as file:
            offsets.append(int(np.ravel(file.attrs.get("start_offset", 0))[0]))
    fine, coarse = offsets
    if abs(first := 2 * coarse - fine) > MAX_ROWS_APART:
        raise UserError(
            "the images of 1 km and 500 m should begin at the same row, found start_offset "
            f"{coarse} and {fine}. Download the product again."
        )
    return first


def read_product(folder, view, refs_grid, positions, n_rows=None):
    """Read the files of a product; the arguments are those of `convert`.

    Returns:
        The arrays of the scene by dataset name, in the published dtypes; and whether it is day.

    Raises:
        UserError: If a file cannot be read.
    """
    v = view[0]
    shape, scene = (None, None), {}
    for number, i in enumerate(THERMAL):
        name = f"S{i}_BT_i{v}"
        temperature = read_variable(folder / f"{name}.nc", name, shape)
        if number == 0:
            shape = temperature.shape
            scene["bts"] = np.empty((*shape, len(THERMAL)), np.float32)
        scene["bts"][..., number] = np.nan_to_num(temperature, nan=0)

    flags, needed = folder / f"flags_i{v}.nc", ("day", "unfilled", "summary_cloud")
    confidence = read_flags(flags, f"confidence_i{v}", shape, needed)
    cloud = {"summary": confidence["summary_cloud"]}
    if bayes := read_flags(flags, f"bayes_i{v}", shape):
        cloud["bayes"] = np.logical_or.reduce(list(bayes.values()))
    scene |= {name: 255.0 * mask[..., None] for name, mask in cloud.items()}

    scene |= read_reflective(folder, view, shape, refs_grid)
    if positions:
        for name in ("latitude", "longitude"):
            degrees = read_variable(folder / f"geodetic_i{v}.nc", f"{name}_i{v}", shape)
            scene[name] = degrees.astype(np.float32)
    measured = ~confidence["unfilled"]
    by_day = bool(confidence["day"][measured].all() and measured.any())
    if n_rows:
        with_nan = ("latitude", "longitude", *(("refs", "rads") if refs_grid == "500m" else ()))
        for name, values in scene.items():
            fill, n = np.nan if name in with_nan else 0, n_rows * len(values) // shape[0]
            scene[name] = rows_of(values, 0, n, fill)
    return scene, by_day


def read_reflective(folder, view, shape, refs_grid):
    """Read `refs`, float64, and `rads`, float32, both (H, W, 6) on `refs_grid`.

    `shape` is that of the 1 km grid. Missing is 0 on the 1 km grid and NaN on the 500 m grid.
    """
    v, n_rows = view[0], 2 * shape[0]
    detector = read_variable(folder / f"indices_a{v}.nc", f"detector_a{v}", (None, 2 * shape[1]))
    fine, first = detector.shape, first_fine_row(folder, view)
    if abs(first + n_rows - fine[0]) > MAX_ROWS_APART:
        raise UserError(
            "the images of 1 km and 500 m should end at the same row, found "
            f"{shape[0]} and {fine[0]} rows. Download the product again."
        )
    cosine = cosine_of_solar_zenith(folder, view, fine)
    grid = (n_rows, fine[1]) if refs_grid == "500m" else shape
    grid = (*grid, len(REFLECTIVE))
    scene = {"refs": np.empty(grid), "rads": np.empty(grid, np.float32)}
    for number, i in enumerate(REFLECTIVE):
        name, quality = f"S{i}_radiance_a{v}", folder / f"S{i}_quality_a{v}.nc"
        radiance = read_variable(folder / f"{name}.nc", name, fine)
        irradiance = read_variable(quality, f"S{i}_solar_irradiance_a{v}", (None,))
        try:
            reflected = reflectance(radiance, irradiance, detector, cosine)
        except ValueError as error:
            raise UserError(f"S{i} cannot be used: {error}. Download the product again.") from error
        for key, values in {"refs": reflected, "rads": radiance}.items():
            values = rows_of(values, first, n_rows)
            on_grid = values if refs_grid == "500m" else np.nan_to_num(halved(values), nan=0)
            scene[key][..., number] = on_grid
    return scene


def check_variant(path, view, refs_grid, n_rows):
    """Check that an existing scene is what `convert` would make.

    Raises:
        UserError: If it says that it is another variant of the product.
    """
    wanted = {"view": view, "refs_grid": refs_grid}
    found = dict(wanted)
    with contextlib.suppress(UserError), open_hdf5(path) as file:  # another program's is kept
        found = {name: str(file.attrs.get(name, value)) for name, value in wanted.items()}
        if n_rows and "bts" in file:
            wanted["rows"], found["rows"] = n_rows, len(open_numbers(file, "bts"))
    if wanted != found:
        texts = (", ".join(f"{k} {v}" for k, v in each.items()) for each in (found, wanted))
        raise UserError(
            "{} exists with {}, expected {}. Choose another --output, or use --overwrite.".format(
                path, *texts
            )
        )


def convert(path, output, view, refs_grid, positions, overwrite, n_rows=None):
    """Convert a product, unless its scene exists.

    Args:
        path: Folder or zip file.
        output: Folder for `day` and `night`.
        view: "nadir" or "oblique".
        refs_grid: "1km" or "500m".
        positions: Whether to write latitude and longitude.
        overwrite: Whether to convert again if the scene exists.
        n_rows: Rows of the scene on the 1 km grid; None for those of the product.

    Returns:
        "converted" or "skipped", the path of the scene, and a text about it.

    Raises:
        UserError: If the product cannot be read.
    """
    name, files = list_product(path)
    targets = {part: output / part / f"{name}.hdf" for part in ("day", "night")}
    if existing := [target for target in targets.values() if target.exists() and not overwrite]:
        check_variant(existing[0], view, refs_grid, n_rows)
        return "skipped", existing[0], f"{existing[0]} exists. Use --overwrite to convert it again."
    with unpacked(path, files, required_files(view, positions)) as folder:
        scene, by_day = read_product(folder, view, refs_grid, positions, n_rows)
    part = "day" if by_day else "night"
    try:
        with replacing(targets[part]) as temporary, h5py.File(temporary, "w") as file:
            for key, values in scene.items():
                file.create_dataset(key, data=values, track_times=False)
            file.attrs.update({"product": name, "view": view, "refs_grid": refs_grid})
    except OSError as error:
        error.filename = str(targets[part])  # HDF5 names none
        raise
    targets["night" if by_day else "day"].unlink(missing_ok=True)  # from an earlier processing
    rows, cols = scene["bts"].shape[:2]
    label = "no bayes, as the product has no Bayesian mask"
    if "bayes" in scene:
        label = f"{np.count_nonzero(scene['bayes']) / (rows * cols):.1%} cloud"
    return "converted", targets[part], f"{part}, {rows} x {cols}, {label}: {targets[part]}"


# --- the command ----------------------------------------------------------------------------


def attempt(arguments, path):
    """Convert a product as the command line says; an error becomes ("failed", text)."""
    options = ("output", "view", "refs_grid", "positions", "overwrite", "n_rows")
    try:
        kind, _, text = convert(path, **{name: getattr(arguments, name) for name in options})
        return kind, text
    except Exception as error:
        if arguments.verbose:
            traceback.print_exc()
        return "failed", f"{path}: {one_line(error)}"


def parallel_map(work, paths, jobs):
    """Yield the result of work(path) for each path as it is finished, from `jobs` processes."""
    if jobs == 1:
        yield from map(work, paths)
        return
    try:
        pool = concurrent.futures.ProcessPoolExecutor(
            min(jobs, len(paths)),
            multiprocessing.get_context("spawn"),
            initializer=initialise_worker,
        )
    except (OSError, ImportError) as error:  # of semaphores, which are in /dev/shm
        log.warning("Using one process, --jobs %d failed: %s. Is there /dev/shm?", jobs, error)
        yield from map(work, paths)
        return
    try:
        for future in concurrent.futures.as_completed([pool.submit(work, p) for p in paths]):
            yield future.result()
    except (Interrupted, GeneratorExit):
        ignore_signals()  # a second signal would break the pool, and the command would hang
        raise
    except BrokenProcessPool as error:
        for process in multiprocessing.active_children():  # they ignore the pool's SIGTERM
            process.kill()
        raise Failure(
            f"A process of --jobs {jobs} was killed, perhaps because memory ran out. Scenes that "
            "were written are complete: run the command again with fewer jobs."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def ignore_signals():
    """Ignore SIGINT and SIGTERM, so that the scenes in progress are finished."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def initialise_worker():
    """Leave signals to the parent process, and exit when it does."""
    ignore_signals()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def convert_all(arguments):
    """Convert the products that the command line names."""
    if missing := [path for path in arguments.products if not path.exists()]:
        raise UserError(f"No product {missing[0]}. Give folders (PRODUCT.SEN3) or zip files.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    work = functools.partial(attempt, arguments)
    counts, total = {"converted": 0, "skipped": 0, "failed": 0}, len(arguments.products)
    for kind, text in parallel_map(work, arguments.products, arguments.jobs):
        counts[kind] += 1
        level = logging.ERROR if kind == "failed" else logging.INFO
        log.log(level, "%d of %d, %s: %s", sum(counts.values()), total, kind, text)
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if counts["failed"]:
        raise Failure(f"{summary}. The lines above give the reasons.")
    log.info("%s.", summary)


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("products", type=Path, nargs="+", metavar="PRODUCT.SEN3", help="folder or zip file")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="for day/ and night/")
    add(
        "--view", choices=("nadir", "oblique"), default="nadir",
        help="oblique images are 900 pixels wide: set IMAGE_W (default nadir)",
    )  # fmt: skip
    add("--refs-grid", choices=("1km", "500m"), default="1km", help="grid of refs and rads")
    add(
        "--positions", action=argparse.BooleanOptionalAction, default=True,
        help="store latitude and longitude, for export_masks.py (default)",
    )  # fmt: skip
    add(
        "--rows", type=positive, dest="n_rows", metavar="N",
        help="remove rows at the end, or add rows without data: 1200 for training",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="convert existing scenes again")
    add("--jobs", type=positive, default=1, metavar="N", help="processes, 1.3 GB of memory each")
    arguments = parser.parse_args(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    return exit_status(
        lambda: convert_all(arguments), arguments.verbose, "Scenes that were written are complete."
    )


if __name__ == "__main__":
    sys.exit(main())
