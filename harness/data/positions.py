"""Read the latitude and longitude of a scene's pixels."""

import glob

import numpy as np

from harness.data.hdf5 import open_hdf5, open_numbers, unpack
from harness.data.scene_files import PRODUCT_NAME
from harness.errors import UserError

MAX_DEGREES = {"latitude": 90, "longitude": 360}


def read_positions(scene_file, geodetic, scene, shape):
    """Read the positions of a scene's pixels.

    Args:
        scene_file: Path of the scene's file, or None.
        geodetic: Sentinel-3 geodetic_in.nc, or a folder of products; used instead of the positions
            in the scene file. None if there is none.
        scene: Name of the scene.
        shape: (H, W).

    Returns:
        `latitude` [degrees north] and `longitude` [degrees east], float64 (H, W) with NaN where
        missing; an empty dictionary if no file has them.

    Raises:
        UserError: If a file is not what it should be.
    """
    if geodetic:
        with open_hdf5(_geodetic_file(geodetic, scene)) as file:
            if not (positions := _positions(file, shape, "{}_in")):
                raise ValueError("it should have variables latitude_in and longitude_in")
            return positions
    if scene_file is None:
        return {}
    with open_hdf5(scene_file) as file:
        return _positions(file, shape, "{}")


def check_geodetic(geodetic, masks):
    """Check that one geodetic file is not used for several scenes.

    Raises:
        UserError: If it is.
    """
    if geodetic and geodetic.is_file() and len(masks) > 1:
        raise UserError(
            f"{geodetic} is the file of one scene, but there are {len(masks)}. Choose one with "
            "--scene NAME."
        )


def _geodetic_file(geodetic, scene):
    """The file itself, or PRODUCT.SEN3/geodetic_in.nc in a folder of products.

    The product has the scene's satellite, start and stop; its last reprocessing is taken.
    """
    if geodetic.is_file():
        return geodetic
    product = PRODUCT_NAME.match(scene)
    same = f"{glob.escape(scene[: product.end(3)] if product else scene)}*/geodetic_in.nc"
    if not (found := sorted(geodetic.glob(same))):
        raise UserError(
            f"No {geodetic}/{same}. --geodetic should be a Sentinel-3 geodetic_in.nc or a folder "
            "of products, one for each scene; --scene chooses scenes."
        )
    return found[-1]


def _positions(file, shape, pattern):
    """Latitude and longitude as `read_positions` returns them; empty if one of them is absent."""
    datasets = {
        name: open_numbers(file, pattern.format(name), shape, optional=True) for name in MAX_DEGREES
    }
    if None in datasets.values():
        return {}
    return {name: _degrees(dataset, MAX_DEGREES[name]) for name, dataset in datasets.items()}


def _degrees(dataset, most):
    values = unpack(dataset)
    if (np.abs(values) > most).any() or not np.isfinite(values).any():
        raise ValueError(f"'{dataset.name}' should hold degrees from -{most} to {most}")
    return values
