"""From scene files to patches and batches, and from patches back to a scene.

    scene file -> normalised channels -> patches -> batches      (training)
    scene file -> normalised channels -> overlapping patches     (inference)
    trimmed probability patches -> probability of every pixel    (inference)

A scene is one SLSTR product on the 1 km grid: 1200 rows x 1500 columns x 9 channels, the six
reflectances S1-S6 first, then the three brightness temperatures S7-S9.
"""

import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.console import counted
from harness.data.batches import Batch, fill_batches, kept_batches, patch_bytes, raise_error
from harness.data.hdf5_rows import storage
from harness.data.patch_order import epoch_steps, replica_slots, steps_of_scene
from harness.data.prefetch import ReaderPool
from harness.data.reused_memory import ReusedMemory
from harness.data.scene_files import SceneError, day_or_night, find_scenes  # noqa: F401 (for users)
from harness.data.scene_rows import Tile, copy_to_tiles, normalise, open_scene, read_rows

# Normalised channels: reflectance - 0.5 and (brightness temperature - 270 K) / 22 K.
REFLECTANCE_OFFSET = 0.5  # [1], mlcommons/science v1.1
BT_OFFSET = 270.0  # [K], mlcommons/science v1.1
BT_SCALE = 22.0  # [K], mlcommons/science v1.1
# Wider than what is possible: numbers outside are in other units, or damaged. A low sun makes
# clouds brighter than white; no cloud top was seen below 161 K, and S7 to S9 saturate below 330 K.
REFLECTANCE_RANGE = (-0.5, 10.0)  # [1]
BT_RANGE = (150.0, 350.0)  # [K]
OUT_OF_RANGE_MESSAGE = "%s: %d impossible reflectances or temperatures [K] are used as they are."
MAX_WARNINGS = 10  # scenes with numbers out of range that training names in the log
MAX_NAME = 200  # bytes of a scene's file name, which becomes part of others
SPLIT_SEED = 42  # mlcommons/science v1.1; not the run's `seed`, so that all runs have one split
MIXED_SCENES = 8  # in a batch, at least; 49 MB each at full size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        channels: float32 (H, W, 9), normalised; reflectances first.
        cloud: uint8 (H, W, 1), 1 where the Bayesian mask says cloud, 0 where it says clear or is
            missing. None if the file has no such mask.
        valid: bool (H, W), False where a brightness temperature is missing.
        bt_12um: float32 (H, W), brightness temperature of S9 [K]; 0 where missing.
        out_of_range: Numbers outside REFLECTANCE_RANGE or BT_RANGE, which are kept as they are.
    """

    channels: np.ndarray
    cloud: np.ndarray | None
    valid: np.ndarray
    bt_12um: np.ndarray
    out_of_range: int


# --- scene file -> normalised channels ------------------------------------------------------


def split_scenes(paths, train_split):
    """Divide scenes, never patches, into a training and a validation set, as v1.1 does.

    Args:
        paths: Scene files, sorted.
        train_split: Share of the scenes to train on, between 0 and 1.

    Returns:
        Two lists of paths.

    Raises:
        SceneError: If either set would be empty.
    """
    n_train = int(len(paths) * train_split)
    if not 0 < n_train < len(paths):
        raise SceneError(
            f"train_split {train_split} of {counted(len(paths), 'scene')} leaves {n_train} for "
            f"training and {len(paths) - n_train} for validation; both need at least one. Change "
            "train_split or add scenes."
        )
    from sklearn.model_selection import train_test_split  # its import takes a second

    return train_test_split(paths, train_size=train_split, random_state=SPLIT_SEED)


def check_scene(path, shape, labelled=True):
    """Check the headers of a scene file; no pixel is read.

    Args:
        path: Scene file.
        shape: (H, W, C) that the configuration demands of every scene; (None, None, C): any size.
        labelled: Whether a scene without `bayes` is an error.

    Returns:
        How each dataset is stored, {'refs': 'float64 contiguous', ...}.

    Raises:
        SceneError: As `read_scene`, but not for damage inside the numbers.
    """
    if len(os.fsencode(path.name)) > MAX_NAME or not path.name.isprintable():
        raise SceneError(
            f"{path} should have a printable name of at most {MAX_NAME} bytes, as masks are named "
            "after their scenes. Rename it."
        )
    with open_scene(path, shape, labelled) as datasets:
        return {name: f"{dataset.dtype} {storage(dataset)}" for name, dataset in datasets.items()}


def read_scene(path, shape, padding=((0, 0), (0, 0)), labelled=True):
    """Read a scene and normalise its channels.

    Not-a-number and infinity count as missing and become the fill value 0 before normalisation.

    Args:
        path: Scene file (HDF5) with the datasets `refs`, `bts` and `bayes`.
        shape: (H, W, C) that the configuration demands of every scene; (None, None, C): any size.
        padding: ((above, below), (left, right)), zeros around `channels`; or a function of H and W.
        labelled: Whether a scene without `bayes` is an error.

    Returns:
        Scene.

    Raises:
        SceneError: If the file is not an HDF5 file, or not a scene of that shape.
    """
    with open_scene(path, shape, labelled) as datasets:
        height, width = datasets["bts"].shape[:2]
        (above, below), (left, right) = padding(height, width) if callable(padding) else padding
        channels = np.zeros((above + height + below, left + width + right, shape[2]), np.float32)
        cloud = np.empty((height, width, 1), np.uint8)
        valid, bt_12um = np.empty((height, width), bool), np.empty((height, width), np.float32)
        inside = channels[above : above + height, left : left + width]
        out_of_range = _read_tiles(datasets, [Tile(0, 0, inside, cloud, valid, bt_12um)])
        return Scene(channels, cloud if "bayes" in datasets else None, valid, bt_12um, out_of_range)


def read_patches(path, patches, shape, patch_size, labelled=True):
    """Read training patches of a scene into their arrays.

    Args:
        path: Scene file.
        patches: Arrays by index of the patch, counted along rows first, (channels, cloud): float32
            or float16 (P, P, C), which receive normalised channels, and uint8 (P, P, 1).
        shape: (H, W, C) that the configuration demands of every scene.
        patch_size: Rows and columns of a patch.
        labelled: Whether the Bayesian mask is read; otherwise the cloud arrays do not change.

    Returns:
        How many of the numbers read are out of range; see Scene.

    Raises:
        SceneError: As `read_scene`.
    """
    corners = patch_corners(*shape[:2], patch_size)
    tiles = [Tile(*corners[i], *arrays) for i, arrays in patches.items()]
    with open_scene(path, shape, labelled) as datasets:
        return _read_tiles(datasets, tiles, labelled)


def _read_tiles(datasets, tiles, labelled=True):
    """Fill the arrays of tiles, and return how many numbers are out of range.

    A block of rows is read, normalised and copied to the tiles while it is in the processor's
    cache; no array of the whole scene is allocated for that.
    """
    refs, bts = datasets["refs"], datasets["bts"]
    n_refs, n_bts, dtype = refs.shape[2], bts.shape[2], tiles[0].channels.dtype
    # Pixels are copied as one item of bytes each, 24 and 12: twice as fast as float by float.
    size = dtype.itemsize
    pixel = np.dtype([("refs", f"V{size * n_refs}"), ("bts", f"V{size * n_bts}")])
    pixels = [tile.channels.view(pixel)[..., 0] for tile in tiles]  # (h, w)
    out_of_range, fold = 0, refs.shape[0] // bts.shape[0]  # 2 if refs are on the 500 m grid

    blocks = read_rows(refs, tiles, REFLECTANCE_RANGE, fold)
    for first, col, _, n_outside, values in normalise(blocks, dtype, REFLECTANCE_OFFSET):
        out_of_range += n_outside
        values = values.view(pixel["refs"])[..., 0]
        copy_to_tiles(first, col, values, tiles, [p["refs"] for p in pixels])
    blocks = read_rows(bts, tiles, BT_RANGE)
    for first, col, block, n_outside, values in normalise(blocks, dtype, BT_OFFSET, BT_SCALE):
        out_of_range += n_outside
        values = values.view(pixel["bts"])[..., 0]
        copy_to_tiles(first, col, values, tiles, [p["bts"] for p in pixels])
        copy_to_tiles(first, col, block[..., -1], tiles, [tile.bt_12um for tile in tiles])
        if any(tile.valid is not None for tile in tiles):
            valid = np.logical_and.reduce([block[..., i] != 0 for i in range(n_bts)])
            copy_to_tiles(first, col, valid, tiles, [tile.valid for tile in tiles])
    if labelled and "bayes" in datasets:
        clouds = [tile.cloud[..., 0] for tile in tiles]
        for first, col, block, _ in read_rows(datasets["bayes"], tiles, (-np.inf, np.inf)):
            copy_to_tiles(first, col, block[..., 0] != 0, tiles, clouds)
    return out_of_range


# --- patches of training -> batches ---------------------------------------------------------


def training_crop(height, width, patch_size):
    """The middle rectangle that whole patches cover: (rows, cols) as two slices, as v1.1 crops.

    1200 rows hold 4 patches of 256, 1024 rows, from row (1200 mod 256) // 2 = 88;
    1500 columns hold 5, 1280 columns, from column (1500 mod 256) // 2 = 110.
    """
    begins = (length % patch_size // 2 for length in (height, width))
    sizes = (length // patch_size * patch_size for length in (height, width))
    return tuple(slice(begin, begin + n) for begin, n in zip(begins, sizes, strict=True))


def patch_corners(height, width, patch_size):
    """First row and column of each training patch, along rows first: (88, 110), (88, 366)..."""
    cuts = training_crop(height, width, patch_size)
    return list(itertools.product(*(range(cut.start, cut.stop, patch_size) for cut in cuts)))


@dataclass
class PatchBatches:
    """Batches of training patches for the replicas of one process, in the order of `epoch_steps`.

    Each element feeds one replica for one step:
        channels: float32 or float16 (S, P, P, 9), normalised.
        cloud: uint8 (S, P, P, 1).
        weight: float32 (S,), 1 for a patch and 0 for padding, which comes last.
        n_used: int32 (), slots up to the last one of weight 1; computed on the host, so that
            no step waits for a copy from its device.
    S is the same in all steps: the largest share of the global batch, rounded up to `multiple`.

    Threads read ahead, scene after scene in the order in which steps need them, each patch
    directly into its slot. Memory does not depend on the number of scenes, see `max_bytes`; that of
    batches to which nothing refers is used again.
    Leaving the object as a context, or `close`, ends the reading.

    Attributes:
        paths: Scene files.
        read: Function of a path and of arrays for patches, such as `read_patches`.
        patch_size: Rows and columns of a patch.
        patches_per_scene: Patches in a cropped scene.
        n_channels: Channels of a scene.
        batch_size: Global batch size.
        replicas: Indices of the replicas that this process feeds, among those of all processes.
        n_replicas: Number of replicas of all processes.
        n_mixed_scenes: Scenes mixed in a global batch.
        seed: Of the run.
        shuffle: Whether each epoch has its own order, as in training; else that of `paths`.
        multiple: S is a multiple of this (the micro-batch).
        read_timeout: Seconds after which reading a scene is an error; None waits without end.
        n_threads: Threads that read scenes; one scene more is read ahead.
        on_bad_scene: Called with the path and the SceneError of a scene that cannot be read. If it
            returns, the scene's patches get weight 0.
        augment: Function (channels, cloud, key) -> (channels, cloud) of one patch, applied if
            `shuffle`. The key (seed, epoch, scene, patch) makes random numbers that depend neither
            on ranks nor on threads nor on resuming.
        dtype: Of the channels, 'float32' or 'float16', which halves memory and copies. It rounds
            brightness temperatures by at most 0.043 K, reflectances below 1 by 0.00013.
        on_device: Whether each patch is read and copied once, because the devices keep it.
    """

    paths: list
    read: Callable
    patch_size: int
    patches_per_scene: int
    n_channels: int
    batch_size: int
    replicas: range = range(1)
    n_replicas: int = 1
    n_mixed_scenes: int = MIXED_SCENES
    seed: int = 0
    shuffle: bool = True
    multiple: int = 1
    read_timeout: float | None = None
    n_threads: int = 2
    on_bad_scene: Callable = raise_error
    augment: Callable | None = None
    dtype: str = "float32"
    on_device: bool = False

    def __post_init__(self):
        self.slots = [replica_slots(self.batch_size, self.n_replicas, r) for r in self.replicas]
        largest = -(-self.batch_size // self.n_replicas)
        self.replica_batch = -(-largest // self.multiple) * self.multiple
        self.n_patches = len(self.paths) * self.patches_per_scene
        self.n_steps = -(-self.n_patches // self.batch_size)
        self._warned = set()  # scenes with numbers out of range
        self._memory = ReusedMemory()
        self._pool = ReaderPool(self.n_threads, self.read_timeout)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stop reading, and wait for what is being read."""
        self._pool.close()

    def batches(self, start_epoch=0, start_step=0):
        """Yield the elements of all epochs, without end, as arrays, or KeptBatch if `on_device`.

        Args:
            start_epoch: First epoch, from 0.
            start_step: First step of that epoch, from 0.
        """
        epochs = (
            (epoch, self._shares(epoch, start_step if epoch == start_epoch else 0))
            for epoch in itertools.count(start_epoch)
        )
        if self.on_device:
            yield from kept_batches(epochs, len(self.slots), self.replica_batch, self._fill)
        for batch in self._fill(epochs):
            yield batch.element
            del batch

    def _fill(self, epochs):
        return fill_batches(
            epochs, len(self.slots), self._empty_batch, self._read, self._pool, self.n_threads + 1,
            lambda job: self.paths[job.scene],
        )  # fmt: skip

    @property
    def max_bytes(self):
        """Memory that batches take at most while they are filled, and the one in use [bytes]."""
        n_lanes = min(self.n_mixed_scenes, self.batch_size)
        own_lanes = -(-n_lanes * len(self.slots) // self.n_replicas)
        ahead = -(-(self.n_threads + 1) // own_lanes)  # scenes of a lane, at most
        n_steps = steps_of_scene(self.patches_per_scene, self.batch_size, n_lanes) * (1 + ahead) + 1
        patches = n_steps * len(self.slots) * self.replica_batch
        return patches * patch_bytes(self.patch_size, self.n_channels, self.dtype)

    def scenes_of(self, epoch, step):
        """The scenes of a global batch, of all replicas."""
        return [self.paths[i] for i in np.unique(self._steps(epoch)[step][:, 0]) if i >= 0]

    def _steps(self, epoch):
        return epoch_steps(
            len(self.paths),
            self.patches_per_scene,
            self.batch_size,
            min(self.n_mixed_scenes, self.batch_size),
            self.seed,
            epoch if self.shuffle else None,
        )

    def _shares(self, epoch, start_step):
        """The patches of each element of an epoch: list of int64 (s, 2), scene and patch."""
        shares = (step[slots] for step in self._steps(epoch)[start_step:] for slots in self.slots)
        return [share[share[:, 0] >= 0] for share in shares]

    def _empty_batch(self, n_patches):
        size = n_patches if self.on_device else self.replica_batch
        shape = size, self.patch_size, self.n_channels
        return Batch.empty(*shape, n_patches, self.dtype, self._memory)

    def _read(self, job):
        """Read the patches of a SceneJob, in one of the threads."""
        path = self.paths[job.scene]
        try:
            self._warn_of(path, self.read(path, job.patches))
        except SceneError as error:
            self.on_bad_scene(path, error)
            for array in itertools.chain(*job.patches.values(), job.weights.values()):
                array[:] = 0
            return
        if self.augment and self.shuffle:
            for i, (channels, cloud) in job.patches.items():
                key = self.seed, job.epoch, job.scene, i
                channels[:], cloud[:] = self.augment(channels, cloud, key)

    def _warn_of(self, path, out_of_range):
        if out_of_range and path not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(path)
            log.warning(OUT_OF_RANGE_MESSAGE, path, out_of_range)


# --- patches of inference -> scene ----------------------------------------------------------


def same_padding(length, patch_size, stride):
    """TensorFlow's SAME rule along one axis: (number of patches, padding before, padding after).

    mlcommons/science v1.1 extracts patches with it. 1200 rows at stride 176: 7 patches, 112 rows
    of padding, 56 above and 56 below.
    """
    n = -(-length // stride)
    total = (n - 1) * stride + patch_size - length
    return n, total // 2, total - total // 2


class PatchGrid:
    """The overlapping patches in which a scene is predicted: `inference_mode: patches`.

    Args:
        height: Rows of the scene.
        width: Columns of the scene.
        patch_size: Rows and columns of a patch.
        crop_size: Pixels by which neighbours overlap, even; half of it is trimmed from each side
            of a prediction.

    Attributes:
        padding: Pixels of 0 that the scene needs around it, ((above, below), (left, right)).
        window: (rows, cols) of a patch.
        corners: int (n, 2), first row and column of each patch in the padded scene; 63 patches.
    """

    def __init__(self, height, width, patch_size, crop_size):
        stride = patch_size - crop_size
        (n_rows, *above_below), (n_cols, *left_right) = (
            same_padding(length, patch_size, stride) for length in (height, width)
        )
        self.padding = (tuple(above_below), tuple(left_right))
        self.window = (patch_size, patch_size)
        self.corners = stride * np.mgrid[:n_rows, :n_cols].reshape(2, -1).T
        self._shape, self._grid, self._trim = (height, width), (n_rows, n_cols), crop_size // 2

    def stitch(self, patches):
        """Put predictions (n, patch_size, patch_size) together: (height, width)."""
        kept = slice(self._trim, self.window[0] - self._trim)
        trimmed = patches[:, kept, kept, None]  # (63, 176, 176, 1)
        return reconstruct(trimmed.reshape(*self._grid, *trimmed.shape[1:]), *self._shape)


def reconstruct(patches, height, width):
    """Stitch a grid of trimmed patches into one scene and crop the padding.

    Args:
        patches: (n_rows, n_cols, p, p, 1), cloud probability; p is the stride of the grid.
        height: Rows of the scene; 1200 on the SLSTR 1 km grid.
        width: Columns of the scene; 1500 on the SLSTR 1 km grid.

    Returns:
        (height, width), of the patches' dtype.

    Raises:
        ValueError: If the grid is smaller than the scene.
    """
    n_rows, n_cols, p = patches.shape[:3]
    if n_rows * p < height or n_cols * p < width:
        raise ValueError(
            f"{n_rows} x {n_cols} patches of {p} x {p} cover {n_rows * p} x {n_cols * p} pixels, "
            f"less than the scene's {height} x {width}."
        )
    mosaic = patches[..., 0].transpose(0, 2, 1, 3).reshape(n_rows * p, n_cols * p)  # (1232, 1584)
    top, left = (n_rows * p - height) // 2, (n_cols * p - width) // 2  # 16, 42
    return mosaic[top : top + height, left : left + width]
