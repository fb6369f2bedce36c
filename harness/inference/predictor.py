"""The network on scenes: cut into windows and predicted on one device, without retracing."""

import contextlib
import logging
import math
import os
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from harness.errors import UserError
from harness.networks.fused_upsampling import without_upsampling

# In one pass of the U-Net at most four images of 32 channels live at once at full resolution, in
# four bytes each: measured as 530 bytes a pixel of 1200 x 1504.
PASS_BYTES = 4 * 32 * 4

log = logging.getLogger(__name__)


class Predictor:
    """A model on one device, predicting scenes window by window.

    A window is an overlapping patch, a strip of a scene or all of it, as `grid` says. The model is
    traced when this is made, so that no scene waits for it.

    Args:
        model: keras.Model.
        device: Name of the device, '/GPU:0'.
        grid: `data_loader.PatchGrid` or `harness.inference.windows.StripGrid`.
        batch: Windows that pass through the network at once.
        policy: Keras dtype policy.
        xla: Whether the network is compiled.

    Raises:
        UserError: If the model does not take windows of that shape.
    """

    def __init__(self, model, device, grid, batch, policy="float32", xla=False):
        self.device, self.grid = device, grid
        self._batch = min(batch, len(grid.corners))
        with tf.device(device):
            network = without_upsampling(cast_model(model, policy, grid.window))
            self._network = tf.function(
                lambda x: network(x, training=False), jit_compile=xla or None
            )
        missing = -len(grid.corners) % self._batch
        self._corners = np.concatenate([grid.corners, np.repeat(grid.corners[:1], missing, axis=0)])
        shape = np.max(grid.corners, axis=0) + grid.window
        self(np.zeros((*shape, model.input_shape[3]), np.float32))

    def __call__(self, scene):
        """Predict a scene.

        Args:
            scene: float32 (H, W, C), normalised, with the zeros around it that `grid.padding` says.

        Returns:
            The probability of cloud, float32 of the scene's shape without padding, and the seconds
            that the network took.
        """
        begin = time.perf_counter()
        with tf.device(self.device):
            windows = self._predict(tf.constant(scene)).numpy()
        seconds = time.perf_counter() - begin
        return self.grid.stitch(windows[: len(self.grid.corners)]), seconds

    @tf.function
    def _predict(self, scene):
        # The windows are cut on the device: 63 patches hold twice the pixels of their scene.
        corners = tf.constant(self._corners, tf.int32)
        n_batches = len(self._corners) // self._batch
        shape = (self._batch, *self.grid.window)
        parts = tf.TensorArray(tf.float32, n_batches, element_shape=shape)
        for i in tf.range(n_batches):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # one's memory
            windows = [
                tf.slice(
                    scene,
                    tf.concat([corners[i * self._batch + j], [0]], axis=0),
                    (*self.grid.window, scene.shape[2]),
                )
                for j in range(self._batch)
            ]
            parts = parts.write(i, self._network(tf.stack(windows))[..., 0])
        return parts.concat()


def predictor_that_fits(model, device, grids, policy="float32", xla=False):
    """Make a Predictor with the first grid whose windows fit the device's memory.

    Raises:
        UserError: If none fits, or the model does not take them.
    """
    for grid in grids:
        try:
            if device.startswith("/CPU") and PASS_BYTES * math.prod(grid.window) > free_memory():
                raise MemoryError
            return Predictor(model, device, grid, 1, policy, xla)
        except (MemoryError, tf.errors.ResourceExhaustedError):
            log.info("%s: too little memory for %d x %d pixels at once.", device, *grid.window)
    raise UserError(
        f"{device} has too little memory for a scene, even in {len(grid.corners)} parts. "
        "Use inference_mode: patches."
    )


def cast_model(model, policy, window=None):
    """Copy a model of one input to another Keras dtype policy and size of image.

    Args:
        model: keras.Model.
        policy: Keras dtype policy of all layers but the last, which computes in float32.
        window: (rows, cols) of the copy's input; the model's own by default.

    Raises:
        UserError: If the model does not take images of that size.
    """

    def convert(layer):
        values = layer.get_config()
        if layer is not model.layers[-1]:
            values["dtype"] = policy
        return type(layer).from_config(values)

    shape = (*(window or model.input_shape[1:3]), model.input_shape[3])
    inputs = keras.Input(shape, dtype="float32")
    try:
        copy = keras.models.clone_model(model, input_tensors=inputs, clone_function=convert)
        copy.set_weights(model.get_weights())
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"The model cannot take images of {shape}: {reason}. Use inference_mode: patches, or a "
            "model of convolutions alone."
        ) from error
    return copy


def free_memory():
    """Bytes that this process can still take, by the system and by its control groups."""
    free = [_meminfo()]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        group = next(line[3:] for line in lines if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup", group.lstrip("/"))
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit, or not ours to see
                limit = int((level / "memory.max").read_text(encoding="utf-8"))
                # What it holds besides cached files, which make room.
                held = (level / "memory.stat").read_text(encoding="utf-8").split()
                free.append(limit - int(held[held.index("anon") + 1]))
    return min(free)


def _meminfo():
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
