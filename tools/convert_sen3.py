r"""Turn Sentinel-3 SLSTR products into scene files that the benchmark reads.

    python tools/convert_sen3.py S3A_SL_1_RBT____*.SEN3 -o data/mine
    python tools/convert_sen3.py products/*.zip -o data/mine --positions --jobs 2

A product is a Level-1 RBT product (S3A_SL_1_RBT____..., or S3B, S3C), a folder or a zip file as it
is downloaded. It becomes DIR/day/<product>.hdf where every measured pixel has the flag `day` of
its `confidence_in`, else DIR/night/<product>.hdf, with

refs     (H, W, 6) reflectance of S1 to S6, pi L / (E0 cos(solar zenith)), of stripe A
bts      (H, W, 3) brightness temperature of S7 to S9 [K]
bayes    (H, W, 1) 255 where any flag of `bayes_in` is set, its spare ones aside; else 0, "clear"
rads     (H, W, 6) radiance L of S1 to S6 [mW m-2 sr-1 nm-1]
summary  (H, W, 1) 255 where `confidence_in` has the flag `summary_cloud`

E0 is the irradiance of the detector that saw the pixel, from the product's quality files; pixels of
no known detector take the mean of all. The cosine of the solar zenith, bilinear between the tie
points in the product's own x and y, turns into reflectance 0 where it is not above 0: by night.
Radiances are taken as the product gives them, without factors of vicarious calibration. A 1 km
pixel is the mean of those of its four 500 m pixels that were measured. Missing is 0; with
--refs-grid 500m it is NaN in refs and rads, which the benchmark leaves out of its mean.

`day` is asked of pixels that are not `unfilled`: the borders of an image have no flags. Where a
product has no `bayes_in` the scene has no `bayes`; it can be masked but not scored or trained on.
A scene that exists is skipped; a product that cannot be read is named, and the others go on.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# NetCDF-4 is HDF5: h5py reads it, where netCDF4 would bring a second HDF5 library.
import h5py
import numpy as np
from scipy.interpolate import make_interp_spline
from scipy.ndimage import map_coordinates

from _command import exit_status
from harness.console import log_to_screen
from harness.data.hdf5 import is_fill, open_hdf5, open_numbers, unpack
from harness.data.hdf5_links import open_dataset
from harness.data.scene_files import PRODUCT_NAME
from harness.errors import Failure, UserError, one_line
from harness.files import replacing
from harness.signals import Interrupted, install_handlers

REFLECTIVE, THERMAL = range(1, 7), range(7, 10)  # channels S1 to S6, S7 to S9
MOST_BYTES = 4_000_000_000  # that a zip file may unpack to; a product needs 0.5 GB

log = logging.getLogger("convert_sen3")


@dataclass(frozen=True)
class Outcome:
    """What became of a product: `kind` is converted, skipped or failed, `text` tells it."""

    kind: str
    text: str


# --- the files of a product -----------------------------------------------------------------


def files_of(view, positions):
    """Names of the files that are read.

    Args:
        view: "nadir" or "oblique".
        positions: Whether latitude and longitude are wanted.
    """
    v = view[0]
    return [
        *(f"S{i}_{kind}_a{v}.nc" for i in REFLECTIVE for kind in ("radiance", "quality")),
        *(f"S{i}_BT_i{v}.nc" for i in THERMAL),
        *(f"flags_i{v}.nc", f"indices_a{v}.nc", f"geometry_t{v}.nc"),
        *(f"cartesian_a{v}.nc", "cartesian_tx.nc"),
        *([f"geodetic_i{v}.nc"] if positions else []),
    ]


def product_name(path):
    """Name of a product, without .SEN3: that of its folder, which may lie in a zip file.

    Raises:
        UserError: If it is no SLSTR Level-1 product.
    """
    if path.is_dir():
        folder = Path(os.path.abspath(path))
    else:
        with _unzipping(path) as archive:
            folder = _folder_in(archive)
    name = folder.name.removesuffix(".SEN3")
    if not PRODUCT_NAME.fullmatch(name):
        raise UserError(
            "it should be an SLSTR Level-1 product, by its name S3A_SL_1_RBT____... (or S3B, S3C), "
            f"found {folder.name!r}. Leave it out or give it its name."
        )
    return name


@contextlib.contextmanager
def unzipped(path, names):
    """Give the folder that holds these files of a product; of a zip file, a temporary one.

    Raises:
        UserError: If one is missing, or the zip file is damaged.
    """
    if path.is_dir():
        _check_complete(names, lambda name: (path / name).is_file())
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sen3-") as temporary:
        with _unzipping(path) as archive:
            folder = _folder_in(archive)
            found = {info.filename: info for info in archive.infolist()}
            _check_complete(names, lambda name: str(folder / name) in found)
            members = {name: found[str(folder / name)] for name in names}
            if (size := sum(info.file_size for info in members.values())) > MOST_BYTES:
                raise ValueError(f"it unpacks to {size} bytes, {MOST_BYTES} at most are wanted")
            for name, info in members.items():  # under names of ours, whatever the archive's are
                with archive.open(info) as source, Path(temporary, name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        yield Path(temporary)


def _check_complete(names, has):
    if missing := [name for name in names if not has(name)]:
        raise UserError(
            f"it has no {', '.join(missing[:4])}{' and others' if missing[4:] else ''}, so that it "
            "is no whole product. Download it again."
        )


@contextlib.contextmanager
def _unzipping(path):
    """Open a zip file; whatever goes wrong with it is the user's to mend."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is neither")
        with zipfile.ZipFile(path) as archive:
            yield archive
    # All of these mean damage in zipfile, or what it cannot read.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"it should be the folder of a product or a whole zip file: {error}. Download it again."
        ) from error


def _folder_in(archive):
    """Folder of an archive that holds its NetCDF files, as a PurePosixPath."""
    paths = [PurePosixPath(name) for name in archive.namelist()]
    for place in paths:
        if place.is_absolute() or ".." in place.parts:
            raise UserError(
                f"it holds the name {str(place)!r}, which leads out of its folder. Such a zip file "
                "is made to do harm: remove it."
            )
    folders = {place.parent for place in paths if place.suffix == ".nc"}
    if len(folders) != 1:
        raise UserError(
            "it should hold the NetCDF files of one product in one folder, found "
            f"{len(folders)} such folders. Download it again, or unpack it."
        )
    return folders.pop()


def _reading(path):
    return open_hdf5(path, path.name, "Download the product again.")


def read_variable(path, name, shape):
    """Unpack a variable by its scale_factor, add_offset, _FillValue and missing_value.

    Args:
        path: NetCDF-4 file.
        name: Of the variable.
        shape: The shape that it should have, None for any length.

    Returns:
        float64, NaN where missing.

    Raises:
        UserError: If it cannot be read.
    """
    with _reading(path) as file:
        return unpack(open_numbers(file, name, shape))


# --- flags ----------------------------------------------------------------------------------


def read_flags(path, name, shape, needed=()):
    """Read a variable of bits by its own flag_masks and flag_meanings.

    Args:
        path: NetCDF-4 file.
        name: Of the variable.
        shape: (H, W).
        needed: Meanings that must be among the flags.

    Returns:
        bool (H, W) by meaning, without the spare ones; False where the variable is missing.

    Raises:
        UserError: If it cannot be read or lacks a flag.
    """
    with _reading(path) as file:
        dataset = open_numbers(file, name, shape)
        if dataset.dtype.kind == "f":
            raise ValueError(f"'{name}' should hold bits, found {dataset.dtype}")
        text = np.ravel(dataset.attrs["flag_meanings"])[0]
        meanings = (text.decode() if isinstance(text, bytes) else str(text)).split()
        masks = np.ravel(dataset.attrs["flag_masks"]).astype(dataset.dtype)
        named = [meaning for meaning in meanings if not meaning.startswith("spare")]
        if len(meanings) != len(masks) or not named or not {*needed} <= {*named}:
            raise ValueError(
                f"'{name}' should have a mask for each meaning, {' '.join(needed) or 'any'} among "
                f"them, found {len(masks)} masks for '{' '.join(meanings)}'"
            )
        packed = dataset[:]
        present = ~is_fill(dataset, packed)
    return {
        meaning: (packed & mask != 0) & present
        for meaning, mask in zip(meanings, masks, strict=True)
        if meaning in named
    }


def has_variable(path, name):
    """Whether a NetCDF-4 file has a variable."""
    with _reading(path) as file:
        return open_dataset(file, name) is not None


def is_day(by_day, unfilled):
    """Whether all pixels with data are by day; no data at all is night.

    Args:
        by_day: bool (H, W), the flag `day`.
        unfilled: bool (H, W), pixels that the instrument did not see.
    """
    return bool(by_day[~unfilled].all() and not unfilled.all())


# --- the sun --------------------------------------------------------------------------------


def cosine_of_solar_zenith(folder, view, shape):
    """Cosine of the solar zenith angle of each 500 m pixel.

    Along a straight line the cosine is as smooth as the Earth is round: between tie points 16 km
    apart it is at most (16 / 6371)^2 / 8 = 8e-7 away from a straight one. The angle itself has a
    kink where the sun is overhead.

    Args:
        folder: Of the product.
        view: "nadir" or "oblique".
        shape: (H, W) of the 500 m grid.

    Returns:
        float64 (H, W), NaN where it is unknown.

    Raises:
        UserError: If a file cannot be read.
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
                "cartesian_tx.nc should have its tie points in rows and columns, two at least, "
                f"with y and x that rise or fall, found {axis[:4]} ... Download the product again."
            )
    return bilinear(rows, columns, filled_rows(columns, np.cos(np.radians(zenith))), y, x)


def filled_rows(columns, values):
    """Go on in each row along its first and last two known values; tie points may be missing.

    Args:
        columns: (n,), rising or falling coordinate.
        values: (m, n), NaN where missing.

    Returns:
        (m, n); rows with less than two values are NaN.
    """
    if columns[0] > columns[-1]:
        return filled_rows(columns[::-1], values[:, ::-1])[:, ::-1]
    filled = np.full(values.shape, np.nan)
    for row, into in zip(values, filled, strict=True):
        if (known := np.isfinite(row)).sum() >= 2:
            into[:] = make_interp_spline(columns[known], row[known], k=1)(columns)
    return filled


def bilinear(rows, columns, values, y, x):
    """Interpolate between the points of a grid.

    Args:
        rows: (m,), rising or falling coordinate.
        columns: (n,), rising or falling coordinate.
        values: (m, n), NaN where missing.
        y: (H, W), where to interpolate.
        x: (H, W), where to interpolate.

    Returns:
        (H, W), NaN where a neighbour is missing or where it lies more than a step outside the
        grid; less far out it is the value at the edge.
    """
    known, places = np.ones(y.shape, bool), []
    for axis, where in ((rows, y), (columns, x)):
        order = np.argsort(axis)
        first, *_, last = axis[order]
        step = np.abs(np.diff(axis)).max()
        known &= (where >= first - step) & (where <= last + step)
        places.append(np.interp(np.where(np.isfinite(where), where, first), axis[order], order))
    found = map_coordinates(values, places, order=1, mode="nearest")
    return np.where(known, found, np.nan)


# --- from a product to a scene --------------------------------------------------------------


def reflectance(radiance, irradiance, detector, cosine):
    """Reflectance at the top of the atmosphere.

    Args:
        radiance: (H, W) [mW m-2 sr-1 nm-1], NaN where missing.
        irradiance: (n,) of the sun, by detector [mW m-2 nm-1], NaN where missing.
        detector: (H, W), from 0 to n - 1, NaN where unknown.
        cosine: (H, W), of the solar zenith angle, NaN where unknown.

    Returns:
        (H, W), fraction of 1; 0 by night, NaN where missing.

    Raises:
        ValueError: If a detector is not in 0 to n - 1, or no irradiance is above 0 where there
            are radiances.
    """
    known = np.isfinite(detector)
    if ((detector < 0) | (detector >= len(irradiance))).any():
        raise ValueError(
            f"detectors from {np.nanmin(detector):.0f} to {np.nanmax(detector):.0f}, irradiances "
            f"of {len(irradiance)}"
        )
    lit = irradiance[irradiance > 0]
    if not lit.size and np.isfinite(radiance).any():
        raise ValueError(f"no irradiance of the sun above 0, found {irradiance}")
    by_detector = np.where(irradiance > 0, irradiance, np.nan)
    by_detector = np.append(by_detector, lit.mean() if lit.size else np.nan)
    received = by_detector[np.where(known, detector, -1).astype(np.intp)] * cosine
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.divide(math.pi * radiance, received)
    result[(cosine <= 0) & np.isfinite(radiance)] = 0
    return result


def halved(values):
    """Mean of those of each 2 x 2 pixels that are present, NaN where none is.

    Args:
        values: (2 H, 2 W), NaN where missing.
    """
    quarters = np.stack([values[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    present = np.isfinite(quarters)
    count = present.sum(axis=0)
    total = np.where(present, quarters, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def read_product(folder, view, refs_grid, positions):
    """Read the files of a product.

    Args:
        folder: Of the files.
        view: "nadir" or "oblique".
        refs_grid: "1km" or "500m", of reflectances and radiances.
        positions: Whether to read latitude and longitude.

    Returns:
        The arrays of the scene by dataset name, in the published dtypes; and whether it is by day.

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
    if has_variable(flags, f"bayes_i{v}"):
        bayes = read_flags(flags, f"bayes_i{v}", shape)
        cloud["bayes"] = np.logical_or.reduce(list(bayes.values()))
    scene |= {name: 255.0 * mask[..., None] for name, mask in cloud.items()}

    scene["refs"], scene["rads"] = read_reflective(folder, view, shape, refs_grid)
    if positions:
        for name in ("latitude", "longitude"):
            degrees = read_variable(folder / f"geodetic_i{v}.nc", f"{name}_i{v}", shape)
            scene[name] = degrees.astype(np.float32)
    return scene, is_day(confidence["day"], confidence["unfilled"])


def read_reflective(folder, view, shape, refs_grid):
    """Reflectances, float64, and radiances, float32, of S1 to S6: (H, W, 6) on the grid wanted.

    Args:
        folder: Of the product.
        view: "nadir" or "oblique".
        shape: (H, W) of the 1 km grid.
        refs_grid: "1km", where missing is 0; or "500m", where it is NaN.

    Raises:
        UserError: If a file cannot be read.
    """
    v = view[0]
    fine = (2 * shape[0], 2 * shape[1])
    cosine = cosine_of_solar_zenith(folder, view, fine)
    detector = read_variable(folder / f"indices_a{v}.nc", f"detector_a{v}", fine)
    grid = (*(fine if refs_grid == "500m" else shape), len(REFLECTIVE))
    refs, rads = np.empty(grid), np.empty(grid, np.float32)
    for number, i in enumerate(REFLECTIVE):
        name, quality = f"S{i}_radiance_a{v}", folder / f"S{i}_quality_a{v}.nc"
        radiance = read_variable(folder / f"{name}.nc", name, fine)
        irradiance = read_variable(quality, f"S{i}_solar_irradiance_a{v}", (None,))
        try:
            reflected = reflectance(radiance, irradiance, detector, cosine)
        except ValueError as error:
            raise UserError(f"S{i} cannot be used: {error}. Download the product again.") from error
        for into, values in ((refs, reflected), (rads, radiance)):
            if refs_grid == "1km":
                values = np.nan_to_num(halved(values), nan=0)
            into[..., number] = values
    return refs, rads


def convert(path, output, view, refs_grid, positions, overwrite):
    """Convert a product, unless its scene exists.

    Args:
        path: Folder or zip file.
        output: Folder for `day` and `night`.
        view: "nadir" or "oblique".
        refs_grid: "1km" or "500m".
        positions: Whether latitude and longitude go into the scene.
        overwrite: Whether a scene that exists is made anew.

    Returns:
        Outcome.

    Raises:
        UserError: If the product cannot be read.
    """
    name = product_name(path)
    targets = {part: output / part / f"{name}.hdf" for part in ("day", "night")}
    if existing := [target for target in targets.values() if target.exists() and not overwrite]:
        return Outcome("skipped", f"{existing[0]} exists: skipped. --overwrite makes it anew.")
    with unzipped(path, files_of(view, positions)) as folder:
        scene, by_day = read_product(folder, view, refs_grid, positions)
    part = "day" if by_day else "night"
    try:
        with replacing(targets[part]) as temporary, h5py.File(temporary, "w") as file:
            for key, values in scene.items():
                file.create_dataset(key, data=values, track_times=False)
            file.attrs.update({"product": name, "view": view, "refs_grid": refs_grid})
    except OSError as error:
        error.filename = str(targets[part])
        raise
    targets["night" if by_day else "day"].unlink(missing_ok=True)  # of an earlier processing
    rows, cols = scene["bts"].shape[:2]
    label = "no Bayesian mask in the product, hence no bayes"
    if "bayes" in scene:
        label = f"{np.count_nonzero(scene['bayes']) / (rows * cols):.1%} cloud"
    return Outcome("converted", f"{part}, {rows} x {cols}, {label}: {targets[part]}")


# --- the program ----------------------------------------------------------------------------


def attempt(work, verbose, path):
    """Do the work on a product; what goes wrong is an Outcome too."""
    try:
        return work(path)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        return Outcome("failed", f"{path}: {one_line(error)}")


def outcomes(work, paths, jobs):
    """Yield the Outcome of each product, in the order in which they are done."""
    if jobs == 1:
        yield from map(work, paths)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(paths)),
        multiprocessing.get_context("spawn"),
        initializer=begin_worker,
        initargs=(os.getpid(),),
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(work, p) for p in paths]):
            yield future.result()
    except (Interrupted, GeneratorExit):
        ignore_signals()  # a second one would tear the pool, and the program hang
        raise
    except BrokenProcessPool as error:
        for process in multiprocessing.active_children():  # the pool's SIGTERM is not for them
            process.kill()
        raise Failure(
            f"A process of --jobs {jobs} was killed, as happens where memory runs out. Scenes that "
            "are written are whole: go on with fewer jobs."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def ignore_signals():
    """Let what is being written get written."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def begin_worker(parent):
    """Leave signals to the parent, and end when it is gone."""
    ignore_signals()
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("products", type=Path, nargs="+", metavar="PRODUCT.SEN3", help="folder, or zip file")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="for day/ and night/")
    add(
        "--view", choices=("nadir", "oblique"), default="nadir",
        help="oblique images are 900 pixels wide: set IMAGE_W (default nadir)",
    )  # fmt: skip
    add("--refs-grid", choices=("1km", "500m"), default="1km", help="grid of refs and rads")
    add("--positions", action="store_true", help="add latitude and longitude, for export_masks.py")
    add("--overwrite", action="store_true", help="make scenes anew that exist")
    add("--jobs", type=int, default=1, metavar="N", help="products at once, 1.3 GB of memory each")
    add("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def convert_all(arguments):
    """Convert the products that the command line names."""
    if arguments.jobs < 1:
        raise UserError(f"--jobs should be 1 or more, found {arguments.jobs}.")
    if missing := [path for path in arguments.products if not path.exists()]:
        raise UserError(f"No product {missing[0]}: name folders (PRODUCT.SEN3) or zip files.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    options = ("output", "view", "refs_grid", "positions", "overwrite")
    work = functools.partial(convert, **{name: getattr(arguments, name) for name in options})
    work = functools.partial(attempt, work, arguments.verbose)
    kinds, total = [], len(arguments.products)
    for outcome in outcomes(work, arguments.products, arguments.jobs):
        kinds.append(outcome.kind)
        level = logging.ERROR if outcome.kind == "failed" else logging.INFO
        log.log(level, "%d of %d, %s: %s", len(kinds), total, outcome.kind, outcome.text)
    counts = {kind: kinds.count(kind) for kind in ("converted", "skipped", "failed")}
    counts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if "failed" in kinds:
        raise Failure(f"{counts}; the lines above say why.")
    log.info("%s.", counts)


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    return exit_status(
        lambda: convert_all(arguments), arguments.verbose, "Scenes that are written are whole."
    )


if __name__ == "__main__":
    sys.exit(main())
