"""Find and read the mask files of a run."""

import os
from pathlib import Path

import numpy as np

from harness.data.hdf5 import MAX_NUMBERS, open_numbers, read_all, read_numbers
from harness.errors import UserError
from harness.files import json_sha256

MAX_PIXELS = MAX_NUMBERS // 6  # of a mask; its scene has more numbers than six for each


def mask_file(folder, scene):
    """The mask file of a scene file, in a folder of masks."""
    return Path(folder) / f"{Path(scene).stem}.h5"


def mask_files(folder):
    """Mask files of a run by scene name; empty if there are none."""
    paths = sorted((Path(folder) / "masks").glob("*.h5"))
    return {path.stem: path for path in paths if not path.name.startswith(".")}


def stamps_sha256(folder, scenes, model_file):
    """Digest of sizes and times of a run's scenes, their masks and its model.

    It shows whether any of them has changed without opening it: 0.4 s for 20,000 scenes.

    Args:
        folder: The run's folder.
        scenes: Paths of the scene files.
        model_file: Path of the model.

    Returns:
        SHA-256; None if a file is missing.
    """
    masks = (mask_file(folder / "masks", scene) for scene in scenes)
    try:
        found = [os.stat(path) for path in (model_file, *scenes, *masks)]
    except FileNotFoundError:
        return None
    return json_sha256([(info.st_size, info.st_mtime_ns) for info in found])


def find_masks(folder, names):
    """List the mask files of a run.

    Args:
        folder: The run's folder.
        names: Names of the scenes to list, without suffix; empty for all.

    Raises:
        UserError: If there are no masks, or one of the names has none.
    """
    if not (paths := mask_files(folder)):
        raise UserError(
            f"No masks in {folder / 'masks'}: RUN_DIR should be the folder of a run of --mode "
            "benchmark or inference."
        )
    if missing := [name for name in names if name not in paths]:
        raise UserError(f"{folder} has no mask of the scene {missing[0]!r}, found {list(paths)}.")
    return [paths[name] for name in names or paths]


def read_mask(file):
    """Read the mask of an open mask file: uint8 (H, W), 1 is cloud.

    Raises:
        ValueError: If the file has no such dataset.
    """
    mask = open_numbers(file, "mask", (None, None), most=MAX_PIXELS)
    if mask.dtype != np.uint8:
        raise ValueError(f"'mask' should hold bytes, found {mask.dtype}")
    return read_all(mask)


def read_valid(file, shape):
    """Read where the scene of an open mask file has data: bool (H, W).

    Args:
        file: h5py.File.
        shape: (H, W) of its mask.

    Returns:
        False where a brightness temperature is missing; None if an earlier version wrote the file.
    """
    valid = open_numbers(file, "valid", shape, optional=True)
    return None if valid is None else read_all(valid) != 0


def measured_pixels(file, shape):
    """Where an open scene file has all three brightness temperatures.

    Args:
        file: h5py.File.
        shape: (H, W).

    Returns:
        bool (H, W), or None if the file has no `bts`.
    """
    temperatures = open_numbers(file, "bts", (*shape, 3), optional=True)
    if temperatures is None:
        return None
    temperatures = read_numbers(temperatures)
    return (np.isfinite(temperatures) & (temperatures != 0)).all(axis=-1)


def read_label(dataset):
    """Read where a mask in a scene file, such as `bayes`, says cloud: bool (H, W).

    Args:
        dataset: h5py.Dataset (H, W, 1). Where it has no value it counts as clear.
    """
    return np.nan_to_num(read_numbers(dataset)[..., 0]) != 0
