"""Scene files in, patches out; and patches back into a scene.

    scene file -> normalised channels -> patches -> batches      (training)
    scene file -> normalised channels -> overlapping patches     (inference)
    trimmed probability patches -> probability of every pixel    (inference)

A scene is one SLSTR product on the 1 km grid: 1200 rows x 1500 columns x 9 channels, the six
reflectances S1-S6 first, then the three brightness temperatures S7-S9.
"""

import contextlib
import hashlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from sklearn.model_selection import train_test_split

from harness.data.hdf5_files import ForbiddenSource, open_dataset, open_file
from harness.data.hdf5_rows import check_storage, read_blocks, storage
from harness.data.prefetch import Readers
from harness.data.scene_files import SceneError, day_or_night, find_scenes  # noqa: F401 (for callers)

REFLECTANCE_OFFSET = 0.5  # [1], mlcommons/science v1.1
BT_OFFSET = 270.0  # [K], mlcommons/science v1.1
BT_SCALE = 22.0  # [K], mlcommons/science v1.1
# Wider than what can be: what lies outside is in other units, or damaged. A low sun makes clouds
# brighter than white; no cloud top was seen below 161 K, and S7 to S9 saturate below 330 K.
REFLECTANCE_RANGE = (-0.5, 10.0)  # [1]
BT_RANGE = (150.0, 350.0)  # [K]
SPLIT_SEED = 42  # mlcommons/science v1.1; apart from `seed`, so that every run has one split
MAX_NAME = 200  # bytes of a scene's file name, which becomes part of others
READER_THREADS = 4
STRANGE_TOLD = 10  # scenes with values out of range that are named in the log of a training
SCENES_MIXED = 8  # in a batch, at least; 49 MB each at full size
SCENES_AHEAD = 3  # scenes read before they are needed

STRANGE = "%s holds %d numbers that no reflectance or brightness temperature has."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        channels: float32 (H, W, 9), normalised; reflectances first.
        cloud: uint8 (H, W, 1), 1 where the Bayesian mask says cloud; missing became 0. None where
            the file has no such mask.
        valid: bool (H, W), False where a brightness temperature is missing.
        bt_12um: float32 (H, W), brightness temperature of S9 [K]; 0 where missing.
        out_of_range: Numbers outside REFLECTANCE_RANGE or BT_RANGE, which are kept as they are.
    """

    channels: np.ndarray
    cloud: np.ndarray | None
    valid: np.ndarray
    bt_12um: np.ndarray
    out_of_range: int


# --- which scenes ---------------------------------------------------------------------------


def split_scenes(paths, train_split):
    """Divide scenes, never patches, into a training and a validation set.

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
            f"train_split {train_split} of {len(paths)} scenes leaves {n_train} to train on and "
            f"{len(paths) - n_train} for validation; both need one at least. Change train_split "
            "or add scenes."
        )
    return train_test_split(paths, train_size=train_split, random_state=SPLIT_SEED)


# --- scene file -> normalised channels ------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A rectangle of a scene that is to be read, and the arrays (h, w, ...) that receive it.

    Attributes:
        row: First row on the 1 km grid.
        col: First column on the 1 km grid.
        channels: float32 (h, w, C), normalised; the last axis is contiguous.
        cloud: uint8 (h, w, 1).
        valid: As in Scene, or None.
        bt_12um: As in Scene, or None.
    """

    row: int
    col: int
    channels: np.ndarray
    cloud: np.ndarray
    valid: np.ndarray | None = None
    bt_12um: np.ndarray | None = None


def read_scene(path, shape, padding=((0, 0), (0, 0)), labelled=True):
    """Read a scene and normalise its channels.

    Not-a-number and infinity count as missing and become the fill value 0 before normalisation.

    Args:
        path: Scene file (HDF5) with the datasets `refs`, `bts` and `bayes`.
        shape: (H, W, C) that the configuration demands of every scene.
        padding: ((above, below), (left, right)), pixels of 0 around the normalised channels only.
        labelled: Whether a scene without `bayes` is an error.

    Returns:
        Scene.

    Raises:
        SceneError: If the file is no HDF5 file or not a scene of that shape.
    """
    (height, width, n_channels), ((above, below), (left, right)) = shape, padding
    channels = np.zeros((above + height + below, left + width + right, n_channels), np.float32)
    cloud = np.empty((height, width, 1), np.uint8)
    valid = np.empty((height, width), bool)
    bt_12um = np.empty((height, width), np.float32)
    inside = channels[above : above + height, left : left + width]
    with _open_scene(path, shape, labelled) as datasets:
        out_of_range = _read_datasets(datasets, [Tile(0, 0, inside, cloud, valid, bt_12um)])
        return Scene(channels, cloud if "bayes" in datasets else None, valid, bt_12um, out_of_range)


def check_scene(path, shape, labelled=True):
    """See that a file is a scene of that shape, by its headers; no pixel is read.

    Returns:
        How each dataset is stored, {'refs': 'float64 contiguous', ...}.

    Raises:
        SceneError: As `read_scene`, but for damage inside the numbers.
    """
    if len(os.fsencode(path.name)) > MAX_NAME or not path.name.isprintable():
        raise SceneError(
            f"{path} should have a name of at most {MAX_NAME} bytes that can be printed: masks are "
            "named after their scenes. Give it another name."
        )
    with _open_scene(path, shape, labelled) as datasets:
        for dataset in datasets.values():
            check_storage(dataset)
        return {name: f"{d.dtype} {storage(d)}" for name, d in datasets.items()}


def read_tiles(path, shape, tiles):
    """Read rectangles of a scene into their arrays, in one pass over the rows that they need.

    A block of rows is read, freed of missing values and normalised while it is in the cache of a
    core, and goes from there to the tiles: no array of the whole scene comes into being.

    Returns:
        How many of the numbers read are out of range; see Scene.

    Raises:
        SceneError: As `read_scene`.
    """
    with _open_scene(path, shape) as datasets:
        return _read_datasets(datasets, tiles)


@contextlib.contextmanager
def _open_scene(path, shape, labelled=True):
    """Open `refs`, `bts` and `bayes` of a scene; whatever goes wrong with them is a SceneError.

    Without `labelled`, a scene may lack `bayes`.
    """
    try:
        with open_file(path) as file:
            has_label = file.id.links.exists(b"bayes")  # a link out of the file is not followed
            names = ("refs", "bts", "bayes") if labelled or has_label else ("refs", "bts")
            datasets = {name: _dataset(file, path, name) for name in names}
            _check_shapes(path, shape, datasets)
            yield datasets
    except SceneError:
        raise
    except ForbiddenSource as error:
        raise SceneError(str(error)) from error
    # All of these mean damage in h5py; a type that NumPy lacks is a TypeError.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        advice = "Download it again or remove it."
        if "unable to lock file" in reason:
            advice = (
                "Another program writes it. If none does, its file system has no locks: set the "
                "environment variable HDF5_USE_FILE_LOCKING to FALSE."
            )
        raise SceneError(f"{path} cannot be read as a scene (HDF5): {reason}. {advice}") from error


def _dataset(file, path, name):
    dataset = open_dataset(file, name)
    if dataset is None:
        found = list(itertools.islice(file, 8))  # names; there may be millions
        raise SceneError(
            f"{path} has no dataset '{name}', found {found or 'none'}. A scene has 'refs', "
            "'bts' and 'bayes'; remove the file or make it again."
        )
    if dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        raise SceneError(
            f"{path}: dataset '{name}' should hold numbers of 8 bytes at most, found "
            f"{str(dataset.dtype)[:99]}. Remove the file or make it again."
        )
    return dataset


def _check_shapes(path, shape, datasets):
    height, width, n_channels = shape
    demands = {  # reflectances may be on the 500 m grid
        "refs": {(height, width, n_channels - 3), (2 * height, 2 * width, n_channels - 3)},
        "bts": {(height, width, 3)},
        "bayes": {(height, width, 1)},
    }
    for name, dataset in datasets.items():
        found, wanted = dataset.shape, demands[name]
        if found not in wanted:
            raise SceneError(
                f"{path}: dataset '{name}' has shape {found}, wanted "
                f"{' or '.join(map(str, sorted(wanted)))} by IMAGE_H, IMAGE_W and N_CHANNELS. "
                "Change these or remove the file."
            )


def _read_datasets(datasets, tiles):
    refs, bts = datasets["refs"], datasets["bts"]
    n_refs, n_bts = refs.shape[2], bts.shape[2]
    # Pixels are moved as one piece of bytes each, 24 and 12: twice as fast as float by float.
    pixel = np.dtype([("refs", f"V{4 * n_refs}"), ("bts", f"V{4 * n_bts}")])
    pixels = [tile.channels.view(pixel)[..., 0] for tile in tiles]  # (h, w)
    fold = refs.shape[0] // bts.shape[0]  # 2 where reflectances are on the 500 m grid
    out_of_range = 0

    reflectances = _blocks(refs, tiles, REFLECTANCE_RANGE, fold)
    for first, col, _, n_outside, values in _normalised(reflectances, REFLECTANCE_OFFSET):
        out_of_range += n_outside
        _share(tiles, first, col, values.view(pixel["refs"])[..., 0], [p["refs"] for p in pixels])
    temperatures = _blocks(bts, tiles, BT_RANGE)
    for first, col, block, n_outside, values in _normalised(temperatures, BT_OFFSET, BT_SCALE):
        out_of_range += n_outside
        _share(tiles, first, col, values.view(pixel["bts"])[..., 0], [p["bts"] for p in pixels])
        _share(tiles, first, col, block[..., -1], [tile.bt_12um for tile in tiles])
        if any(tile.valid is not None for tile in tiles):
            valid = np.logical_and.reduce([block[..., i] != 0 for i in range(n_bts)])
            _share(tiles, first, col, valid, [tile.valid for tile in tiles])
    if "bayes" in datasets:
        for first, col, block, _ in _blocks(datasets["bayes"], tiles, (-np.inf, np.inf)):
            _share(tiles, first, col, block[..., 0] != 0, [tile.cloud[..., 0] for tile in tiles])
    return out_of_range


def _blocks(dataset, tiles, limits, fold=1):
    """Yield (first row, first column, block, n_outside) of what tiles need, missing values as 0.

    A block has shape (n, m, C); `n_outside` of its numbers are outside the limits and not missing.

    Args:
        dataset: h5py.Dataset (fold * H, fold * W, C).
        tiles: List of Tile, all on the 1 km grid.
        limits: Lowest and highest number that can be.
        fold: 2 for a dataset on the 500 m grid, of which 2 x 2 pixels are averaged; else 1.
    """
    row, col = min(tile.row for tile in tiles), min(tile.col for tile in tiles)
    last_row = max(tile.row + tile.cloud.shape[0] for tile in tiles)
    last_col = max(tile.col + tile.cloud.shape[1] for tile in tiles)
    rows, cols = slice(fold * row, fold * last_row), slice(fold * col, fold * last_col)
    for first, block in read_blocks(dataset, rows, cols, fold):
        # Two numbers tell of anything odd in a block, at a tenth of the cost of a look at each.
        with np.errstate(over="ignore", invalid="ignore"):
            extremes = np.array([block.min(), block.max()])
            complete = np.isfinite(extremes.astype(np.float32)).all()
        # What float32 cannot hold is as good as infinite.
        present = True if complete else np.abs(block) <= np.finfo(np.float32).max
        n_outside, (low, high) = 0, limits
        if not (low <= extremes[0] and extremes[1] <= high):
            outside = ((block < low) | (block > high)) & (block != 0) & present
            n_outside = int(np.count_nonzero(outside))
        if fold > 1:
            block = _average(block, present, fold)
        elif not complete:
            block = np.where(present, block, 0)
        yield first // fold, col, block, n_outside


def _average(block, present, fold):
    """Mean over fold x fold pixels of those that are present; 0 where none is."""
    h, w, c = block.shape
    cells = (h // fold, fold, w // fold, fold, c)
    total = np.where(present, block, 0).reshape(cells).sum(axis=(1, 3))
    count = np.broadcast_to(present, block.shape).reshape(cells).sum(axis=(1, 3))
    return total / np.maximum(count, 1)


def _normalised(blocks, offset, scale=1):
    """Add float32 (block - offset) / scale to `_blocks`; the next block overwrites it."""
    space = np.empty(0, np.float32)
    for first, col, block, n_outside in blocks:
        if space.size < block.size:  # one space for all blocks: new memory costs more than the sums
            space = np.empty(block.size, np.float32)
        values = space[: block.size].reshape(block.shape)
        # The difference has the file's own precision, or that of float32 if this is better.
        precision = np.result_type(block.dtype, np.float32)
        np.subtract(block, offset, out=values, dtype=precision, casting="same_kind")
        if scale != 1:
            values /= np.float32(scale)
        yield first, col, block, n_outside, values


def _share(tiles, first, col, values, targets):
    """Put values (n, m) from a row and column on into those targets (h, w) that want them."""
    for tile, target in zip(tiles, targets, strict=True):
        if target is None:
            continue
        begin, stop = max(first, tile.row), min(first + len(values), tile.row + len(target))
        if begin < stop:
            west = tile.col - col
            target[begin - tile.row : stop - tile.row] = values[
                begin - first : stop - first, west : west + target.shape[1]
            ]


# --- patches of training --------------------------------------------------------------------


def training_crop(height, width, patch_size):
    """The middle rectangle that whole patches cover: (rows, cols) as two slices.

    1200 rows hold 4 patches of 256, 1024 rows, from row (1200 mod 256) // 2 = 88;
    1500 columns hold 5, 1280 columns, from column (1500 mod 256) // 2 = 110.
    """
    return tuple(
        slice(
            length % patch_size // 2, length % patch_size // 2 + length // patch_size * patch_size
        )
        for length in (height, width)
    )


def read_patches(path, patches, shape, patch_size):
    """Read training patches of a scene to where they belong; patches count along rows first.

    Args:
        path: Scene file.
        patches: Arrays by number of patch, (channels, cloud): float32 (P, P, C), which become
            normalised, and uint8 (P, P, 1).
        shape: (H, W, C) that the configuration demands of every scene.
        patch_size: Rows and columns of a patch.

    Returns:
        How many of the numbers read are out of range; see Scene.

    Raises:
        SceneError: As `read_scene`.
    """
    rows, cols = training_crop(*shape[:2], patch_size)
    corners = itertools.product(*(range(cut.start, cut.stop, patch_size) for cut in (rows, cols)))
    return read_tiles(
        path,
        shape,
        [Tile(*corner, *patches[i]) for i, corner in enumerate(corners) if i in patches],
    )


def epoch_steps(n_scenes, patches_per_scene, batch_size, n_lanes, seed, epoch=None):
    """Say which patches each global batch of an epoch takes, for any number of replicas.

    The scenes, dealt out once by `seed`, make a row of patches that is cut into `n_lanes` lanes.
    Every step takes the next few patches of each lane, so that a batch mixes `n_lanes` scenes and
    a rank that feeds some of its slots reads the scenes of these lanes only, in every epoch. An
    epoch shuffles the scenes of each lane and the patches of each scene.

    Args:
        n_scenes: Number of scenes.
        patches_per_scene: Patches in each.
        batch_size: Global batch size. The last batch holds what is left.
        n_lanes: Scenes mixed in one batch, at most `batch_size`.
        seed: Of the run.
        epoch: Number of the epoch; None keeps everything in order, as for validation.

    Returns:
        int64 (steps, batch_size, 2): scene and patch for each slot; -1 where the last batch has
        no patch. A slot belongs to the same lane in every step.
    """
    scenes = np.arange(n_scenes)
    patches = np.tile(np.arange(patches_per_scene), (n_scenes, 1))
    if epoch is not None:
        scenes = np.random.default_rng(seed).permutation(n_scenes)
        rng = np.random.default_rng([seed, epoch])
        patches = rng.permuted(patches, axis=1)
    row = np.stack([np.repeat(scenes, patches_per_scene), patches.ravel()], axis=1)  # (N, 2)

    n_steps = -(-len(row) // batch_size)
    slots = _balanced(batch_size, n_lanes)  # 32 slots in 8 lanes: 4 each
    first_slots = np.cumsum(slots) - slots
    in_last = _balanced(len(row) - (n_steps - 1) * batch_size, batch_size).astype(bool)
    last_slots = np.add.reduceat(in_last, first_slots, dtype=int)
    lane_ends = np.cumsum(slots * (n_steps - 1) + last_slots)

    steps = np.full((n_steps, batch_size, 2), -1)
    for lane, n, n_last, first in zip(
        np.split(row, lane_ends[:-1]), slots, last_slots, first_slots, strict=True
    ):
        if epoch is not None:
            place = rng.permutation(n_scenes)
            lane = lane[np.argsort(place[lane[:, 0]], kind="stable")]
        here = slice(first, first + n)
        steps[:-1, here] = lane[: len(lane) - n_last].reshape(n_steps - 1, n, 2)
        steps[-1, here][in_last[here]] = lane[len(lane) - n_last :]
    return steps


def _balanced(total, parts):
    """Whole numbers that add up to `total` and differ by at most one."""
    return np.diff(np.arange(parts + 1) * total // parts)


def replica_slots(batch_size, n_replicas, replica):
    """The slots of the global batch that one replica takes, as a slice."""
    ends = np.arange(n_replicas + 1) * batch_size // n_replicas
    return slice(int(ends[replica]), int(ends[replica + 1]))


@dataclass
class Batch:
    """What feeds one replica for one step; see PatchBatches."""

    channels: np.ndarray
    cloud: np.ndarray
    weight: np.ndarray
    n_missing: int  # patches that are still to be read

    @classmethod
    def of(cls, size, patch_size, n_channels, n_patches):
        """A batch of `size` places, of which the first `n_patches` are to be filled."""
        channels = aligned((size, patch_size, patch_size, n_channels), np.float32)
        cloud = aligned((size, patch_size, patch_size, 1), np.uint8)
        channels[n_patches:], cloud[n_patches:] = 0, 0
        return cls(channels, cloud, (np.arange(size) < n_patches).astype(np.float32), n_patches)


def aligned(shape, dtype):
    """An empty array on a border of 64 bytes: TensorFlow copies all others."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    space = np.empty(n_bytes + 63, np.uint8)
    return space[-space.ctypes.data % 64 :][:n_bytes].view(dtype).reshape(shape)


@dataclass
class PatchBatches:
    """Batches of training patches for the replicas of one process, in the order of `epoch_steps`.

    Each element feeds one replica for one step:
        channels: float32 (S, P, P, 9), normalised.
        cloud: uint8 (S, P, P, 1).
        weight: float32 (S,), 1 for a patch and 0 for padding, which comes last.
    S is fixed: the largest share of the global batch, rounded up to whole micro-batches.

    Threads read ahead, scene after scene in the order in which steps need them, each patch straight
    into its place in its batch. Memory depends on `n_lanes` and the batch size alone: a batch comes
    into being with its first patch and is handed on with its last. Leaving it as a context, or
    `close`, ends the reading.

    Attributes:
        paths: Scene files.
        read: Function of a path and of places for patches, which it fills as `read_patches` does.
        patch_size: Rows and columns of a patch.
        patches_per_scene: Patches in a cropped scene.
        n_channels: Channels of a scene.
        batch_size: Global batch size.
        replicas: Numbers of the replicas that this process feeds, among all.
        n_replicas: Number of replicas in all processes.
        n_lanes: Scenes mixed in a global batch.
        seed: Of the run.
        shuffle: Another order each epoch; else the order of `paths`, epoch after epoch.
        multiple: S is a multiple of this (the micro-batch).
        read_timeout: Seconds after which a scene's file hangs; None waits for ever.
        leave_out: Called with the path and the SceneError of a scene that cannot be read; its
            patches get weight 0. None: such a scene ends the reading.
        first: Epoch and step to begin with, both counted from 0.
    """

    paths: list
    read: Callable
    patch_size: int
    patches_per_scene: int
    n_channels: int
    batch_size: int
    replicas: range = range(1)
    n_replicas: int = 1
    n_lanes: int = SCENES_MIXED
    seed: int = 0
    shuffle: bool = True
    multiple: int = 1
    read_timeout: float | None = None
    leave_out: Callable | None = None
    first: tuple = (0, 0)

    def __post_init__(self):
        self.slots = [replica_slots(self.batch_size, self.n_replicas, r) for r in self.replicas]
        largest = -(-self.batch_size // self.n_replicas)
        self.replica_batch = -(-largest // self.multiple) * self.multiple
        self.n_patches = len(self.paths) * self.patches_per_scene
        self.n_steps = -(-self.n_patches // self.batch_size)
        self._strange = set()  # scenes with values out of range
        self.error = None  # what ended the reading: tf.data would keep only its text
        self._readers = Readers(READER_THREADS, self.read_timeout)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Read no more, and wait for what is being read: tf.data reads on after it is dropped."""
        self._readers.close()

    def dataset(self):
        """The batches of all epochs, without end, as a prefetching tf.data.Dataset.

        It is a mapped counter and no `from_generator`: that sets the C library's M_TRIM_THRESHOLD
        for the whole process, after which every large array is new memory from the system: 120
        instead of 50 page faults a patch.
        """
        p = self.patch_size
        shapes = (self.replica_batch, p, p, self.n_channels), (self.replica_batch, p, p, 1)
        shapes = *shapes, (self.replica_batch,)
        elements = iter(())

        def element(number):
            nonlocal elements
            if number == 0:  # the dataset is iterated anew
                elements = iter(self)
            return next(elements)

        def tensors(number):
            kinds = tf.float32, tf.uint8, tf.float32
            arrays = tf.numpy_function(element, [number], kinds)
            return tuple(map(tf.ensure_shape, arrays, shapes))

        options = tf.data.Options()
        # Its own threads: `deterministic` leaves TensorFlow's common pool a single one.
        options.threading.private_threadpool_size = 2
        # Nothing is left to it; and to drop an iterator waits for its thread, up to a minute.
        options.autotune.enabled = False
        return tf.data.Dataset.counter().map(tensors).with_options(options).prefetch(1)

    def __iter__(self):
        try:
            yield from self._batches()
        except Exception as error:
            self.error = error
            raise

    def scenes_of(self, epoch, step):
        """The scenes of a global batch, all replicas together."""
        return [self.paths[i] for i in np.unique(self._steps(epoch)[step][:, 0]) if i >= 0]

    def _steps(self, epoch):
        return epoch_steps(
            len(self.paths),
            self.patches_per_scene,
            self.batch_size,
            min(self.n_lanes, self.batch_size),
            self.seed,
            epoch if self.shuffle else None,
        )

    def _shares(self, epoch):
        """The patches of each element of an epoch: list of int64 (s, 2), scene and patch."""
        first_epoch, first_step = self.first
        steps = self._steps(epoch)[first_step if epoch == first_epoch else 0 :]
        shares = (step[slots] for step in steps for slots in self.slots)
        return [share[share[:, 0] >= 0] for share in shares]

    def _batches(self):
        begun = {}  # batches by (epoch, number), from the first patch read to the last
        first, _ = self.first
        scenes = itertools.chain.from_iterable(
            self._scenes(epoch, begun) for epoch in itertools.count(first)
        )
        reading = self._readers.ahead(self._read, scenes, SCENES_AHEAD, name=lambda job: job[0])
        with contextlib.closing(reading) as done:
            for epoch in itertools.count(first):
                for number, share in enumerate(self._shares(epoch)):
                    if not len(share):
                        begun[epoch, number] = self._batch(0)
                    while (epoch, number) not in begun or begun[epoch, number].n_missing:
                        for key in next(done):
                            begun[key].n_missing -= 1
                    batch = begun.pop((epoch, number))
                    yield batch.channels, batch.cloud, batch.weight
                    del batch  # or it would wait in memory for the next one

    def _scenes(self, epoch, begun):
        """Yield (path, patches, weights, keys of batches) of scenes in the order of first use.

        Patches and weights are places in batches that are to be filled, by number of patch.
        """
        shares = self._shares(epoch)
        scenes = {}
        for number, share in enumerate(shares):
            for slot, (scene, patch) in enumerate(share.tolist()):
                scenes.setdefault(scene, []).append((number, slot, patch))
        for scene, uses in scenes.items():
            patches, weights = {}, {}
            for number, slot, patch in uses:
                key = epoch, number
                if key not in begun:
                    begun[key] = self._batch(len(shares[number]))
                batch = begun[key]
                patches[patch] = batch.channels[slot], batch.cloud[slot]
                weights[patch] = batch.weight[slot : slot + 1]
            keys = [(epoch, number) for number, _, _ in uses]
            yield self.paths[scene], patches, weights, keys

    def _batch(self, n_patches):
        return Batch.of(self.replica_batch, self.patch_size, self.n_channels, n_patches)

    def _read(self, job):
        path, patches, weights, keys = job
        try:
            self._tell_of_strange(path, self.read(path, patches))
        except SceneError as error:
            if self.leave_out is None:
                raise
            self.leave_out(path, error)
            for place in itertools.chain(*patches.values(), weights.values()):
                place[:] = 0
        return keys

    def _tell_of_strange(self, path, out_of_range):
        if out_of_range and path not in self._strange and len(self._strange) < STRANGE_TOLD:
            self._strange.add(path)
            log.warning(STRANGE, path, out_of_range)


def cached(read, cache_dir, key):
    """Let `read` keep the patches it makes on a local disk and take them from there.

    A patch's file holds its channels, then its cloud. It is written under a temporary name and
    renamed, so that it is whole or absent; one that cannot be read is dropped and made again.

    Args:
        read: Function of a path and of places for patches, as `read_patches` is.
        cache_dir: Local directory, made if absent.
        key: Whatever the result depends on besides the file: the crop, say.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)

    def read_cached(path, patches):
        try:
            stat = path.stat()
        except OSError:
            return read(path, patches)  # which says what is wrong
        identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {key}"
        name = f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        copies = {i: cache_dir / f"{name}-{i}.raw" for i in patches}
        absent = {i: patch for i, patch in patches.items() if not _load(copies[i], patch)}
        out_of_range = read(path, absent) if absent else 0
        for i, patch in absent.items():
            _store(copies[i], patch)
        return out_of_range

    return read_cached


def _load(copy, patch):
    """Fill a patch from its cache file; False if that does not work."""
    try:
        with copy.open("rb", buffering=0) as file:
            if sum(file.readinto(part) for part in patch) != sum(part.nbytes for part in patch):
                raise EOFError("it ends early")
        return True
    except FileNotFoundError:
        return False
    except (EOFError, OSError) as error:
        log.warning("Dropped the damaged cache file %s: %s", copy, error)
        copy.unlink(missing_ok=True)
        return False


def _store(copy, patch):
    temporary = copy.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with temporary.open("wb") as file:
            file.writelines(patch)
        temporary.replace(copy)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.warning("Could not write the cache file %s: %s", copy, error)


# --- patches of inference, and back ---------------------------------------------------------


def same_padding(length, patch_size, stride):
    """TensorFlow's SAME rule along one axis: (number of patches, padding before, padding after).

    1200 rows at stride 176: 7 patches, 112 rows of padding, 56 above and 56 below.
    """
    n = -(-length // stride)
    total = (n - 1) * stride + patch_size - length
    return n, total // 2, total - total // 2


class PatchGrid:
    """The overlapping patches that a scene is predicted in: `inference_mode: patches`.

    Args:
        height: Rows of the scene.
        width: Columns of the scene.
        patch_size: Rows and columns of a patch.
        crop_size: Pixels by which neighbours overlap, even; half of it is trimmed from each side
            of a prediction.

    Attributes:
        padding: Zeros that the scene needs around it, ((above, below), (left, right)).
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


class StripGrid:
    """The strips of all columns that a scene is predicted in: `inference_mode: scene`.

    Strips overlap by twice what the network sees around a pixel, so that they agree with the whole
    scene; one strip is the whole scene.

    Args:
        height: Rows of the scene.
        width: Columns of the scene.
        n_strips: Number of strips.
        radius: How far the network sees from a pixel; a multiple of `multiple`.
        multiple: What the rows and columns of the network's input divide by.

    Attributes:
        As those of PatchGrid.
    """

    def __init__(self, height, width, n_strips, radius, multiple):
        missing = (-height % multiple, -width % multiple)  # 1500 columns: 4 to 1504
        self.padding = tuple((n // 2, n - n // 2) for n in missing)
        padded, cols = height + missing[0], width + missing[1]
        n = n_strips
        rows = multiple * -(-(padded + 2 * radius * (n - 1)) // (multiple * n))
        first = [multiple * (i * (padded - rows) // (multiple * max(n - 1, 1))) for i in range(n)]
        self.window, self.corners = (rows, cols), np.array([(row, 0) for row in first])
        # Each strip is used up to the middle of its overlap with the next.
        borders = [0, *((a + rows + b) // 2 for a, b in itertools.pairwise(first)), padded]
        self._used = [
            slice(begin - row, stop - row)
            for row, (begin, stop) in zip(first, itertools.pairwise(borders), strict=True)
        ]
        self._shape = (height, width)

    def stitch(self, strips):
        """Put predictions (n_strips, rows, cols) together: (height, width)."""
        whole = np.concatenate([s[used] for s, used in zip(strips, self._used, strict=True)])
        (above, _), (left, _) = self.padding
        return whole[above : above + self._shape[0], left : left + self._shape[1]]


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
