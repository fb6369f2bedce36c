"""Augmentations of training patches: the table AUGMENTATIONS.

An augmentation is a function of (channels, cloud, rng) that returns another pair of channels and
cloud, and leaves its arguments as they are:

    channels: float32 (P, P, C), normalised.
    cloud: uint8 (P, P, 1), not 0 is cloud.
    rng: numpy.random.Generator of this patch in this epoch, see `patch_rng`.
    Returns: (channels, cloud) of the same shapes and dtypes.

It is applied after the cache, so that a patch changes from epoch to epoch.
"""

import numpy as np


def flips(channels, cloud, rng):
    """One of the 8 symmetries of a square: 0 to 3 quarter turns, mirrored or not."""
    quarter_turns, is_mirrored = divmod(int(rng.integers(8)), 2)

    def turn(image):
        image = np.rot90(image, quarter_turns)
        return image[:, ::-1] if is_mirrored else image

    return turn(channels), turn(cloud)


AUGMENTATIONS = {
    "none": None,
    "flips": flips,
}


def patch_rng(seed, epoch, scene_index, patch_index):
    """Generator of random numbers for a patch in an epoch, whatever rank or thread reads it.

    Args:
        seed: Of the run.
        epoch: Counted from 0.
        scene_index: Number of the scene in the sorted list of training scenes.
        patch_index: Number of the patch in its scene.
    """
    return np.random.default_rng([seed, epoch, scene_index, patch_index])
