"""What belongs to a scene, and where: its file, its name and times, its mask, its positions.

Nothing here needs TensorFlow.
"""

import contextlib
import fnmatch
import glob
import itertools
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from harness.data.hdf5_files import ForbiddenSource, open_dataset, open_file
from harness.data.hdf5_rows import check_storage
from harness.errors import UserError
from harness.files import walk_files

SCENE_NAME = "S3[A-D]*.hdf"  # the published scenes are all of S3A
PRODUCT_NAME = re.compile(r"(S3[A-D])_SL_1_RBT_+(\d{8}T\d{6})_(\d{8}T\d{6})_\d{8}T\d{6}_\w*")
MOST_NUMBERS = 200_000_000  # of one dataset; a scene's reflectances on 500 m are 43 million
MOST_DEGREES = {"latitude": 90, "longitude": 360}


class SceneError(UserError):
    """Scenes that cannot be used; the message names the file, or the number, and what is wrong."""


# --- scenes ---------------------------------------------------------------------------------


def find_scenes(directory):
    """List the scene files below a directory, in an order that every file system gives.

    Raises:
        FileNotFoundError: If the directory is missing or holds no scene.
        SceneError: If two scenes have one name.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"No directory {directory}. Set train_dir and inference_dir in the configuration; "
            "see 'Data' in README.md."
        )
    paths = sorted(walk_scenes(directory), key=lambda path: path.relative_to(directory).parts)
    if not paths:
        raise FileNotFoundError(
            f"No scenes matching '{SCENE_NAME}' under {directory}. Set train_dir and inference_dir "
            "in the configuration; see 'Data' in README.md."
        )
    names = Counter(path.name for path in paths)
    if twice := [name for name, n in names.items() if n > 1]:
        raise SceneError(
            f"{len(twice)} scene(s) stand twice under {directory}, {twice[0]} for one. "
            "Masks are named after their scenes: remove one of each pair."
        )
    return paths


def walk_scenes(directory):
    """Yield the scene files below a directory, through linked folders too, each folder once."""
    return (path for path in walk_files(directory) if fnmatch.fnmatch(path.name, SCENE_NAME))


def day_or_night(path):
    """The folder's word for a scene, `day` or `night`; `unknown` in any other folder."""
    return next((part for part in reversed(path.parts[:-1]) if part in ("day", "night")), "unknown")


def times_of(name):
    """Start and end of a product by its name, in UTC; None where that does not tell."""
    if not (product := PRODUCT_NAME.match(name)):
        return None
    try:
        return tuple(
            datetime.strptime(text, "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
            for text in product.groups()[1:]
        )
    except ValueError:  # of no calendar
        return None


# --- masks ----------------------------------------------------------------------------------


def mask_files(folder):
    """Mask files of a run by name of scene; maybe none."""
    paths = sorted((Path(folder) / "masks").glob("*.h5"))
    return {path.stem: path for path in paths if not path.name.startswith(".")}


def find_masks(folder, names):
    """List the mask files of a run.

    Args:
        folder: The run's folder.
        names: Scenes to list, without suffix; empty for all.

    Raises:
        UserError: If there are none, or one named is missing.
    """
    if not (paths := mask_files(folder)):
        raise UserError(
            f"No masks in {folder / 'masks'}: RUN_DIR should be the folder of a run of --mode "
            "benchmark or inference."
        )
    if missing := [name for name in names if name not in paths]:
        raise UserError(f"{folder} has no mask of the scene {missing[0]!r}, found {list(paths)}.")
    return [paths[name] for name in names or paths]


def mask_of(file):
    """The mask of a mask file that is open, uint8 (H, W), 1 is cloud.

    Raises:
        ValueError: If it has none.
    """
    mask = numbers(file, "mask", (None, None))
    if mask.dtype != np.uint8:
        raise ValueError(f"'mask' should hold bytes, found {mask.dtype}")
    return mask[:]


def measured_pixels(file, shape):
    """Where a scene file that is open has all brightness temperatures.

    Args:
        file: h5py.File.
        shape: (H, W).

    Returns:
        bool (H, W), or None if the file has no `bts`.
    """
    if (temperatures := numbers(file, "bts", (*shape, 3), optional=True)) is None:
        return None
    temperatures = temperatures[:]
    return (np.isfinite(temperatures) & (temperatures != 0)).all(axis=-1)


# --- positions ------------------------------------------------------------------------------


def read_positions(scene_file, geodetic, scene, shape):
    """Read where the pixels of a scene are.

    Args:
        scene_file: Path of the scene's file, or None.
        geodetic: Sentinel-3 geodetic_in.nc, or a folder of products; its positions go before those
            of the scene file. None if there is none.
        scene: Name of the scene.
        shape: (H, W).

    Returns:
        `latitude` [degrees north] and `longitude` [degrees east], float64 (H, W) with NaN where
        missing; an empty dictionary where they are not known.

    Raises:
        UserError: If a file is not what it should be.
    """
    if geodetic:
        with reading(geodetic_file(geodetic, scene)) as file:
            if not (positions := _positions(file, shape, "{}_in")):
                raise ValueError("it should have variables latitude_in and longitude_in")
            return positions
    if scene_file is None:
        return {}
    with reading(scene_file) as file:
        return _positions(file, shape, "{}")


def check_geodetic(geodetic, masks):
    """See that one geodetic file is not taken for several scenes.

    Raises:
        UserError: If it is.
    """
    if geodetic and geodetic.is_file() and len(masks) > 1:
        raise UserError(
            f"{geodetic} is of one scene, and there are {len(masks)}: say --scene NAME."
        )


def geodetic_file(where, scene):
    """The geodetic file of a scene.

    Args:
        where: The file itself; or a folder of products, PRODUCT.SEN3/geodetic_in.nc, one of which
            has the scene's satellite, start and stop. A later processing of the product will do.
        scene: Name of the scene.

    Raises:
        UserError: If there is none.
    """
    if where.is_file():
        return where
    product = PRODUCT_NAME.match(scene)
    same = f"{glob.escape(scene[: product.end(3)] if product else scene)}*/geodetic_in.nc"
    if not (found := sorted(where.glob(same))):
        raise UserError(
            f"No {where}/{same}. --geodetic should be a Sentinel-3 geodetic_in.nc or a folder of "
            "products, one for each scene; --scene chooses scenes."
        )
    return found[-1]


def _positions(file, shape, pattern):
    """Latitude and longitude, as `read_positions`; empty where one of them is absent."""
    datasets = {
        name: numbers(file, pattern.format(name), shape, optional=True) for name in MOST_DEGREES
    }
    if None in datasets.values():
        return {}
    return {name: _degrees(dataset, MOST_DEGREES[name]) for name, dataset in datasets.items()}


def _degrees(dataset, most):
    values = unpacked(dataset)
    if (np.abs(values) > most).any() or not np.isfinite(values).any():
        raise ValueError(f"'{dataset.name}' should hold degrees, -{most} to {most}")
    return values


# --- numbers of a file ----------------------------------------------------------------------


@contextlib.contextmanager
def reading(path, name=None, advice="Make or copy it again."):
    """Open an HDF5 file; whatever goes wrong with it is the user's to mend.

    Args:
        path: HDF5 or NetCDF-4 file.
        name: What the error calls it, if not by its path.
        advice: What the error says is to be done.
    """
    try:
        with open_file(path) as file:
            yield file
    except ForbiddenSource as error:
        raise UserError(str(error)) from error
    # All of these mean damage in h5py; a type that NumPy lacks is a TypeError.
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name or path} cannot be used: {reason}. {advice}") from error


def numbers(file, name, shape=None, optional=False):
    """A dataset of numbers, as h5py.Dataset.

    Args:
        file: Of `reading`.
        name: Of the dataset.
        shape: The shape that it should have, None for any length; None for any shape.
        optional: Whether it may be absent; it is None then.

    Raises:
        ValueError: If it is absent or something else.
    """
    dataset = open_dataset(file, name)
    if dataset is None:
        if optional:
            return None
        raise ValueError(f"it has no '{name}', found {list(itertools.islice(file, 8)) or 'none'}")
    found = dataset.shape
    is_right = shape is None or fits(shape, found)
    if dataset.dtype.kind not in "fiu" or not is_right or not 0 < dataset.size <= MOST_NUMBERS:
        wanted = " x ".join("any" if n is None else str(n) for n in shape or ())
        raise ValueError(
            f"'{name}' should hold numbers, {wanted or 'of any shape'}, found "
            f"{str(dataset.dtype)[:99]} {found}"
        )
    check_storage(dataset)
    return dataset


def fits(shape, found):
    """Whether a shape that was found fits one in which None stands for any length."""
    return len(shape) == len(found) and all(
        n in (None, m) for n, m in zip(shape, found, strict=True)
    )


def unpacked(dataset):
    """The numbers of a dataset, float64, with NaN where missing, by NetCDF's attributes."""
    packed = dataset[:]
    scale, offset = _attribute(dataset, "scale_factor", 1), _attribute(dataset, "add_offset", 0)
    if not np.isfinite([scale, offset]).all():
        raise ValueError(
            f"'{dataset.name}' should have a finite scale_factor and add_offset, found {scale} "
            f"and {offset}"
        )
    values = packed.astype(np.float64)
    values *= scale
    values += offset
    values[is_fill(dataset, packed)] = np.nan
    return values


def is_fill(dataset, packed):
    """Where numbers of a dataset, as they are stored, are its _FillValue or missing_value."""
    fill, missing = (_attribute(dataset, n, np.nan) for n in ("_FillValue", "missing_value"))
    return (packed == fill) | (packed == missing)


def _attribute(dataset, name, default):
    return np.ravel(dataset.attrs.get(name, default))[0]
