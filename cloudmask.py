"""Mask a scene in three lines, from a program or a notebook.

from cloudmask import predict_scene

mask, probability = predict_scene("outputs/RUN/model.keras", "data/mine/day/S3A_...hdf")
"""

import logging
from pathlib import Path

import numpy as np

from data_loader import OUT_OF_RANGE_MESSAGE, PatchGrid, SceneError, read_scene
from harness.data.hdf5 import open_hdf5, open_numbers
from harness.errors import UserError
from harness.inference.scores import THRESHOLD

N_CHANNELS = 9  # S1 to S9
BATCH = 4  # patches that pass through the network at once; as a run on a CPU

log = logging.getLogger(__name__)


def predict_scene(model, path, mode="patches", patch_size=256, crop_size=80, no_data="network"):
    """Mask one scene of any size, as `--mode inference` does with the same settings.

    The model is read and traced anew in each call, which takes a few seconds.

    Args:
        model: Path of a model file (.keras or .h5) or a keras.Model, from float32
            (batch, rows, cols, 9) to the probability of cloud (batch, rows, cols, 1).
        path: Scene file: HDF5 with the datasets `refs` and `bts`; `bayes` is not needed.
        mode: 'patches', overlapping patches, or 'scene', one pass of the network over the whole
            scene; see inference_mode in config.yaml.
        patch_size: Rows and columns of a patch; PATCH_SIZE in config.yaml.
        crop_size: Overlap of neighbouring patches, even; CROP_SIZE in config.yaml.
        no_data: What the mask is where a brightness temperature is missing: 'network', what the
            network says of 0 K, as in the benchmark; or 'clear'; no_data in config.yaml.

    Returns:
        mask: uint8 (H, W), 1 is cloud.
        probability: float32 (H, W), probability of cloud, NaN where one is missing.

    Raises:
        UserError: If the model, the scene or the settings cannot be used; a ValueError.
        FileNotFoundError: If there is no such model or scene file.
    """
    if mode not in ("patches", "scene"):
        raise UserError(f"mode should be 'patches' or 'scene', found {mode!r}.")
    if no_data not in ("network", "clear"):
        raise UserError(f"no_data should be 'network' or 'clear', found {no_data!r}.")
    if not 0 <= crop_size < patch_size or crop_size % 2:
        raise UserError(
            f"crop_size should be even and smaller than patch_size, found {crop_size} and "
            f"{patch_size}."
        )
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No scene file {path}. Check the path.")
    with open_hdf5(path, error_class=SceneError) as file:
        height, width, _ = open_numbers(file, "bts", (None, None, 3)).shape

    import harness.quiet_tensorflow  # noqa: F401  (before any other import of TensorFlow)

    # isort: split
    import tensorflow as tf

    from harness.inference.predictor import Predictor, predictor_that_fits
    from harness.networks.model_files import as_functional, check_model, read_model

    source, is_path = model, isinstance(model, str | Path)
    model = read_model(Path(model)) if is_path else as_functional(model)
    shape = (*model.input_shape[1:3], N_CHANNELS)
    check_model(model, source if is_path else model.name, shape, "Choose another model.")
    device = "/GPU:0" if tf.config.list_physical_devices("GPU") else "/CPU:0"
    grid = PatchGrid(height, width, patch_size, crop_size)
    if mode == "patches":
        predictor = Predictor(model, device, grid, BATCH)
    else:
        predictor = predictor_that_fits(model, device, height, width, grid.padding)
    shape = (height, width, N_CHANNELS)
    scene = read_scene(path, shape, predictor.grid.padding, labelled=False)
    if scene.out_of_range:
        log.warning(OUT_OF_RANGE_MESSAGE, path, scene.out_of_range)
    probability, *_ = predictor(scene.channels)
    if not np.isfinite(probability).all():
        raise UserError(f"The model gives probabilities that are not finite for {path}.")
    mask = probability > THRESHOLD
    if no_data == "clear":
        mask &= scene.valid
    return mask.astype(np.uint8), np.where(scene.valid, probability, np.float32(np.nan))
