"""How much the mask of a network changes if its scene is shifted or flipped."""

import functools

import numpy as np

from data_loader import PatchGrid, read_scene
from harness.console import progress
from harness.errors import UserError
from harness.inference.scores import THRESHOLD

BATCH = 4  # patches that pass through the network at once; as a run on a CPU
CHANGES = {  # of an image, (H, W) or (H, W, C)
    # No multiples of the 2, 4 and 8 pixels that the U-Net pools, nor of the distance of patches.
    "shift": lambda image: image[5:, 3:],
    "flip_rows": lambda image: image[::-1],
    "flip_cols": lambda image: image[:, ::-1],
}


def masks_that_change(masks, paths, n_scenes):
    """Mask some scenes again for each mask whose run has its model.

    Args:
        masks: List of `tools.lib.masks.Mask`.
        paths: Scene files, of which `n_scenes` at most are taken at equal distances.
        n_scenes: 1 or more.

    Returns:
        {name of the mask: result of `changed_shares`}.

    Raises:
        UserError: If no mask has a model.
    """
    models = {m.name: (m.folder / m.config.model_file, m.config) for m in masks if m.config}
    if not (models := {name: model for name, model in models.items() if model[0].is_file()}):
        raise UserError("--consistency needs a run with its model file, found none.")
    paths = paths[:: -(-len(paths) // n_scenes)]
    return {name: changed_shares(*model, paths) for name, model in models.items()}


def changed_shares(model_file, config, paths):
    """Mask scenes again after each of CHANGES, and count the pixels whose mask differs.

    Args:
        model_file: Path of a model file.
        config: Configuration of the run that made the masks; its precision does not matter.
        paths: Scene files.

    Returns:
        {change: share of the pixels with data}.
    """
    import harness.quiet_tensorflow  # noqa: F401  (before any other import of TensorFlow)

    # isort: split
    import tensorflow as tf

    from harness.inference.predictor import Predictor, predictor_that_fits
    from harness.networks.model_files import load_model

    model = load_model(model_file, config.patch_shape)
    device = "/GPU:0" if tf.config.list_physical_devices("GPU") else "/CPU:0"

    @functools.cache
    def predictor(height, width):
        grid = PatchGrid(height, width, config.patch_size, config.crop_size)
        if config.inference_mode == "patches":
            return Predictor(model, device, grid, BATCH)
        return predictor_that_fits(model, device, height, width, grid.padding)

    def mask(channels):
        predict = predictor(*channels.shape[:2])
        probability, *_ = predict(np.pad(channels, (*predict.grid.padding, (0, 0))))
        return probability > THRESHOLD

    changed, n_pixels = dict.fromkeys(CHANGES, 0), dict.fromkeys(CHANGES, 0)
    for path in progress(paths, "Changing", len(paths)):
        scene = read_scene(path, (None, None, config.n_channels), labelled=False)
        unchanged = mask(scene.channels)
        for name, change in CHANGES.items():
            valid = change(scene.valid)
            differs = mask(change(scene.channels)) != change(unchanged)
            changed[name] += np.count_nonzero(differs & valid)
            n_pixels[name] += np.count_nonzero(valid)
    return {name: changed[name] / max(n_pixels[name], 1) for name in CHANGES}
