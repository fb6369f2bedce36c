"""The network on scenes: cut into windows and predicted on one device, without retracing."""

import contextlib
import functools
import logging
import math
from pathlib import Path

import numpy as np
import psutil
import tensorflow as tf

from harness.clock import active_seconds
from harness.errors import UserError
from harness.inference.windows import StripGrid
from harness.networks.fused_upsampling import fuse_upsampling
from harness.networks.geometry import geometry
from harness.networks.model_files import cast_model, with_views
from model import has_reflectance

MAX_SIZES = 16  # of scenes, whose predictors are kept; SLSTR has 1199 to 1202 rows and two views
STRIPS_TRIED = (1, 2, 4, 8)  # of a scene, until they fit the memory; 8 predict most rows twice

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
            network = fuse_upsampling(with_views(cast_model(model, policy, grid.window)))
            self._n_maps = network.output_shape[-1]  # probability, and uncertainty of two views
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
            The probability of cloud, float32 of the scene's shape without padding; the seconds that
            the network took; and the uncertainty, like the probability: the difference of those by
            two views, NaN where a pixel has only one. It is None for a network of one view.
        """
        begin = active_seconds()
        with tf.device(self.device):
            windows = self._predict(tf.constant(scene)).numpy()
        seconds = active_seconds() - begin
        maps = np.moveaxis(windows[: len(self.grid.corners)], -1, 0)
        probability, *uncertainty = map(self.grid.stitch, maps)
        return probability, seconds, uncertainty[0] if uncertainty else None

    @tf.function
    def _predict(self, scene):
        # The windows are cut on the device, since 63 patches hold twice the pixels of their scene.
        corners = tf.constant(self._corners, tf.int32)
        n_batches = len(self._corners) // self._batch
        shape = (self._batch, *self.grid.window, self._n_maps)
        parts = tf.TensorArray(tf.float32, n_batches, element_shape=shape)
        for i in tf.range(n_batches):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # memory of one
            windows = [
                tf.slice(
                    scene,
                    tf.concat([corners[i * self._batch + j], [0]], axis=0),
                    (*self.grid.window, scene.shape[2]),
                )
                for j in range(self._batch)
            ]
            parts = parts.write(i, self._maps(tf.stack(windows)))
        # parts.concat() would wait for numbers from the device.
        return tf.reshape(parts.stack(), (-1, *shape[1:]))

    def _maps(self, windows):
        """Probability, and uncertainty if there are two views: (batch, rows, cols, 1 or 2)."""
        views = self._network(windows)
        if views.shape[-1] == 1:
            return views
        spread = tf.reduce_max(views, -1, keepdims=True) - tf.reduce_min(views, -1, keepdims=True)
        spread = tf.where(has_reflectance(windows), spread, float("nan"))
        return tf.concat([tf.reduce_mean(views, -1, keepdims=True), spread], axis=-1)


class ScenePredictor:
    """A model on one device, predicting scenes of any size: one Predictor for each size.

    The predictor of the first size is made at once, others when their first scene is read, which
    then takes seconds longer.

    Args:
        make: Function of height and width that returns a Predictor.
        height: Rows of most scenes.
        width: Columns of most scenes.

    Attributes:
        device: Name of the device.
        n_windows: Windows of a scene of the first size.
    """

    def __init__(self, make, height, width):
        self._of_size = functools.lru_cache(MAX_SIZES)(make)
        first = self._of_size(height, width)
        self.device, self.n_windows = first.device, len(first.grid.corners)

    def padding(self, height, width):
        """The zeros that a scene of this size needs around it: ((above, below), (left, right))."""
        return self._of_size(height, width).grid.padding

    def __call__(self, scene):
        """Predict a data_loader.Scene that was read with `padding`; see Predictor."""
        return self._of_size(*scene.valid.shape)(scene.channels)


def predictor_that_fits(model, device, height, width, patch_padding, policy="float32", xla=False):
    """Make a Predictor of whole scenes, or of as few strips as fit the device's memory.

    Args:
        model: Functional keras.Model.
        device: Name of the device, '/GPU:0'.
        height: Rows of a scene.
        width: Columns of a scene.
        patch_padding: `padding` of its PatchGrid.
        policy: Keras dtype policy.
        xla: Whether the network is compiled.

    Raises:
        UserError: If no strip fits, or the model works only on images of one size.
    """
    size = geometry(model)
    for n_strips in STRIPS_TRIED:
        grid = StripGrid(height, width, patch_padding, n_strips, size.margin, size.multiple)
        needed = size.bytes_per_pixel * math.prod(grid.window)
        try:
            if device.startswith("/CPU") and needed > free_memory():
                raise MemoryError
            return Predictor(model, device, grid, 1, policy, xla)
        except (MemoryError, tf.errors.ResourceExhaustedError):
            log.info("%s: too little memory for %d x %d pixels at once.", device, *grid.window)
    raise UserError(
        f"{device} has too little memory for a scene, even in {n_strips} parts. "
        "Use inference_mode: patches."
    )


def free_memory(own_groups="/proc/self/cgroup", all_groups="/sys/fs/cgroup"):
    """Bytes that this process can still allocate, by the system and by its control groups.

    Args:
        own_groups: File that names the control group of this process.
        all_groups: Folder of all control groups, version 2.
    """
    free = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(own_groups).read_text(encoding="utf-8").splitlines()
        group = next(line[3:] for line in lines if line.startswith("0::"))
        folder = Path(all_groups, group.lstrip("/"))
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit, or not readable
                limit = int((level / "memory.max").read_text(encoding="utf-8"))
                # Cached files are not counted: the system drops them where memory is needed.
                held = (level / "memory.stat").read_text(encoding="utf-8").split()
                free.append(limit - int(held[held.index("anon") + 1]))
    return min(free)
