"""Masks that a run has written, and whether a scene file is the one that was masked."""

import json

import numpy as np

from harness.data.hdf5 import open_hdf5, open_numbers, read_attribute
from harness.data.mask_files import measured_pixels, read_label, read_mask, read_valid
from harness.errors import UserError
from harness.records.saved_runs import clean_row


def read_row(mask_path):
    """Read the row of scenes.csv in a mask file, see `clean_row`; empty if there is none."""
    with open_hdf5(mask_path) as file:
        return _row_of(file)


def _row_of(file):
    return clean_row(dict(json.loads(read_attribute(file, "row", "{}"))))


def read_mask_and_label(mask_path, scene_path):
    """Read a mask and the label of its scene, and check that it is the scene that was masked.

    The accuracy that the mask file records identifies it; a scene without a label, its size and the
    pixels that have data. A mask file that records none of them may be of any scene of its shape.

    Returns:
        Mask and Bayesian mask, bool (H, W), the latter None if the scene has none.

    Raises:
        UserError: If it is another scene, or a file is damaged.
    """
    with open_hdf5(mask_path) as file:
        row = _row_of(file)
        mask = read_mask(file) != 0
        is_cleared = read_attribute(file, "no_data", "network") == "clear"
        size = int(read_attribute(file, "scene_bytes", -1))
        valid = read_valid(file, mask.shape)
    accuracy = row.get("no_data_clear_accuracy" if is_cleared else "accuracy", np.nan)
    label = None
    with open_hdf5(scene_path) as file:
        bts = open_numbers(file, "bts", optional=True)
        is_same = bts is None or bts.shape[:2] == mask.shape
        if is_same:
            bayes = open_numbers(file, "bayes", (*mask.shape, None), optional=True)
            label = None if bayes is None else read_label(bayes)
        if label is not None and np.isfinite(accuracy):
            is_same = abs(np.mean(mask == label) - accuracy) < 1e-6
        elif is_same:
            is_same = size in (-1, scene_path.stat().st_size)
            if is_same and valid is not None and bts is not None:
                is_same = np.array_equal(valid, measured_pixels(file, mask.shape))
    if not is_same:
        raise UserError(
            f"{scene_path} is not the file that was masked: {mask_path} is the mask of another "
            "scene file. Give the folder of the masked files (--data, if the command has it)."
        )
    return mask, label
