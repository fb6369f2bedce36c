"""Scene files in, patches out; and patches back into a scene.

    scene file -> normalised channels -> patches -> batches      (training)
    scene file -> normalised channels -> overlapping patches     (inference)
    trimmed probability patches -> probability of every pixel    (inference)

A scene is one SLSTR product on the 1 km grid: 1200 rows x 1500 columns x 9 channels, the six
reflectances S1-S6 first, then the three brightness temperatures S7-S9.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import tensorflow as tf
from sklearn.model_selection import train_test_split

SCENE_NAME = "S3A*.hdf"
REFLECTANCE_OFFSET = 0.5  # [1], mlcommons/science v1.1
BT_OFFSET = 270.0  # [K], mlcommons/science v1.1
BT_SCALE = 22.0  # [K], mlcommons/science v1.1
SPLIT_SEED = 42  # mlcommons/science v1.1; apart from `seed`, so that every run has one split
READER_THREADS = 4
SCENES_MIXED = 8  # in a batch, at least; 49 MB each at full size
SCENES_AHEAD = 3  # scenes read before they are needed
BLOCK_ROWS = 64  # 64 rows x 1500 columns x 6 channels x 8 bytes = 4.6 MB, stays in cache

log = logging.getLogger(__name__)


class SceneError(ValueError):
    """Scenes that cannot be used; the message names the file, or the number, and what is wrong."""


@dataclass(frozen=True)
class Scene:
    """One scene, or the part of it that was read.

    Attributes:
        channels: float32 (H, W, 9), normalised; reflectances first.
        cloud: uint8 (H, W, 1), 1 where the Bayesian mask says cloud; missing became 0.
        valid: bool (H, W), False where a brightness temperature is missing.
        bt_12um: float32 (H, W), brightness temperature of S9 [K]; 0 where missing.
    """

    channels: np.ndarray
    cloud: np.ndarray
    valid: np.ndarray
    bt_12um: np.ndarray


# --- which scenes ---------------------------------------------------------------------------


def find_scenes(directory):
    """List the scene files below a directory, in an order that every file system gives.

    Raises:
        FileNotFoundError: If the directory is missing or holds no scene.
        SceneError: If two scenes have one name.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"No directory {directory}. Set train_dir and inference_dir in the configuration; "
            "see 'Data' in README.md."
        )
    paths = sorted(_walk(directory), key=lambda path: path.relative_to(directory).parts)
    if not paths:
        raise FileNotFoundError(
            f"No scenes matching 'S3A*.hdf' under {directory}. Set train_dir and inference_dir in "
            "the configuration; see 'Data' in README.md."
        )
    names = Counter(path.name for path in paths)
    if twice := [name for name, n in names.items() if n > 1]:
        raise SceneError(
            f"{len(twice)} scene(s) stand twice under {directory}, {twice[0]} for one. "
            "Masks are named after their scenes: remove one of each pair."
        )
    return paths


def _walk(directory):
    """Yield the scene files below a directory, through linked folders too, each folder once."""
    seen = set()
    for folder, subfolders, files in os.walk(directory, followlinks=True):
        seen.add(os.path.realpath(folder))
        subfolders[:] = [
            name for name in subfolders if os.path.realpath(Path(folder, name)) not in seen
        ]
        yield from (Path(folder, name) for name in fnmatch.filter(files, SCENE_NAME))


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


def day_or_night(path):
    """The folder's word for a scene, `day` or `night`; `unknown` in any other folder."""
    return next((part for part in reversed(path.parts[:-1]) if part in ("day", "night")), "unknown")


# --- scene file -> normalised channels ------------------------------------------------------


def read_scene(path, shape, rows=slice(None), cols=slice(None), padding=((0, 0), (0, 0))):
    """Read a scene, or a rectangle of it, and normalise its channels.

    Not-a-number and infinity count as missing and become the fill value 0 before normalisation.

    Args:
        path: Scene file (HDF5) with the datasets `refs`, `bts` and `bayes`.
        shape: (H, W, C) that the configuration demands of every scene.
        rows: Rows of the 1 km grid to read.
        cols: Columns of the 1 km grid to read.
        padding: ((above, below), (left, right)), pixels of 0 around the normalised channels only.

    Returns:
        Scene.

    Raises:
        SceneError: If the file is no HDF5 file or not a scene of that shape.
    """
    try:
        with h5py.File(path, "r") as file:
            refs, bts, bayes = (_dataset(file, path, name) for name in ("refs", "bts", "bayes"))
            _check_shapes(path, shape, refs, bts, bayes)
            scene = _read_datasets(refs, bts, bayes, rows, cols)
            return replace(scene, channels=np.pad(scene.channels, [*padding, (0, 0)]))
    except SceneError:
        raise
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
    ) as error:  # all of them mean damage in h5py
        reason = str(error).partition("\n")[0]
        raise SceneError(
            f"{path} cannot be read as a scene (HDF5): {reason}. Download it again or remove it."
        ) from error


def _dataset(file, path, name):
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise SceneError(
            f"{path} has no dataset '{name}', found {sorted(file) or 'none'}. A scene has 'refs', "
            "'bts' and 'bayes'; remove the file or make it again."
        )
    if dataset.dtype.kind not in "fiu":
        raise SceneError(f"{path}: dataset '{name}' should hold numbers, found {dataset.dtype}.")
    return dataset


def _check_shapes(path, shape, refs, bts, bayes):
    height, width, n_channels = shape
    demands = {  # reflectances may be on the 500 m grid
        "refs": (
            refs.shape,
            {(height, width, n_channels - 3), (2 * height, 2 * width, n_channels - 3)},
        ),
        "bts": (bts.shape, {(height, width, 3)}),
        "bayes": (bayes.shape, {(height, width, 1)}),
    }
    for name, (found, wanted) in demands.items():
        if found not in wanted:
            raise SceneError(
                f"{path}: dataset '{name}' has shape {found}, wanted "
                f"{' or '.join(map(str, sorted(wanted)))} by IMAGE_H, IMAGE_W and N_CHANNELS. "
                "Change these or remove the file."
            )


def _read_datasets(refs, bts, bayes, rows, cols):
    n_rows, n_cols = (
        len(range(*cut.indices(n))) for cut, n in zip((rows, cols), bts.shape, strict=False)
    )
    n_refs, n_bts = refs.shape[2], bts.shape[2]
    scene = Scene(
        channels=np.empty((n_rows, n_cols, n_refs + n_bts), np.float32),
        cloud=np.empty((n_rows, n_cols, 1), np.uint8),
        valid=np.empty((n_rows, n_cols), bool),
        bt_12um=np.empty((n_rows, n_cols), np.float32),
    )
    for here, block in _row_blocks(refs, rows, cols, fold=refs.shape[0] // bts.shape[0]):
        np.subtract(
            block, REFLECTANCE_OFFSET, out=scene.channels[here, :, :n_refs], casting="same_kind"
        )
    for here, block in _row_blocks(bts, rows, cols):
        scene.valid[here] = (block != 0).all(axis=-1)
        scene.bt_12um[here] = block[..., -1]
        np.divide(
            block - BT_OFFSET, BT_SCALE, out=scene.channels[here, :, n_refs:], casting="same_kind"
        )
    for here, block in _row_blocks(bayes, rows, cols):
        scene.cloud[here] = block != 0
    return scene


def _row_blocks(dataset, rows, cols, fold=1):
    """Yield (slice of output rows, block) over a rectangle of a dataset, missing values as 0.

    Args:
        dataset: h5py.Dataset (fold * H, fold * W, C).
        rows: Rows of the 1 km grid.
        cols: Columns of the 1 km grid.
        fold: 2 for a dataset on the 500 m grid, of which 2 x 2 pixels are averaged; else 1.
    """
    height, width = (length // fold for length in dataset.shape[:2])
    first_row, stop_row, _ = rows.indices(height)
    first_col, stop_col, _ = cols.indices(width)
    read = _contiguous_reader(dataset) or (lambda r: dataset[r])
    # A compressed chunk is decoded whole: blocks of whole chunks decode each of them once.
    chunk_rows = -(-dataset.chunks[0] // fold) if dataset.chunks else 1
    step = -(-BLOCK_ROWS // chunk_rows) * chunk_rows
    for row in range(first_row - first_row % step, stop_row, step):
        begin, stop = max(row, first_row), min(row + step, stop_row)
        block = read(slice(begin * fold, stop * fold))[:, first_col * fold : stop_col * fold]
        missing = ~np.isfinite(block)
        if fold == 1:
            block = np.where(missing, 0, block) if missing.any() else block
        else:
            block = _average(block, ~missing, fold)
        yield slice(begin - first_row, stop - first_row), block


def _average(block, present, fold):
    """Mean over fold x fold pixels of those that are present; 0 where none is."""
    h, w, c = block.shape
    cells = (h // fold, fold, w // fold, fold, c)
    total = np.where(present, block, 0).reshape(cells).sum(axis=(1, 3))
    count = present.reshape(cells).sum(axis=(1, 3))
    return total / np.maximum(count, 1)


def _contiguous_reader(dataset):
    """A function that reads rows of a contiguous dataset with plain file reads, or None.

    HDF5 reads under one lock per process; a positioned read of the bytes needs none, so that
    several threads read at once. Anything but plain bytes in this file is left to h5py.
    """
    plan = dataset.id.get_create_plist()
    offset = dataset.id.get_offset()
    if dataset.chunks or dataset.is_virtual or plan.get_external_count() or offset is None:
        return None
    row_shape = dataset.shape[1:]
    row_bytes = int(np.prod(row_shape)) * dataset.dtype.itemsize
    fd = dataset.file.id.get_vfd_handle()

    def read(rows):
        block = np.empty((rows.stop - rows.start, *row_shape), dataset.dtype)
        n_read = os.preadv(fd, [block.reshape(-1).view(np.uint8)], offset + rows.start * row_bytes)
        if n_read != block.nbytes:
            raise OSError(f"'{dataset.name}' ends early: the file is truncated")
        return block

    return read


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


def read_patches(path, shape, patch_size):
    """Read the training patches of a scene; they count along rows first.

    Args:
        path: Scene file.
        shape: (H, W, C) that the configuration demands of every scene.
        patch_size: Rows and columns of a patch.

    Returns:
        List of (channels, cloud): float32 (P, P, C), normalised, and uint8 (P, P, 1).

    Raises:
        SceneError: As `read_scene`.
    """
    scene = read_scene(path, shape, *training_crop(*shape[:2], patch_size))
    corners = itertools.product(*(range(0, n, patch_size) for n in scene.cloud.shape[:2]))
    cuts = [np.s_[row : row + patch_size, col : col + patch_size] for row, col in corners]
    return [(scene.channels[cut], scene.cloud[cut]) for cut in cuts]


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
class PatchBatches:
    """Batches of training patches for the replicas of one process, in the order of `epoch_steps`.

    Each element feeds one replica for one step:
        channels: float32 (S, P, P, 9), normalised.
        cloud: uint8 (S, P, P, 1).
        weight: float32 (S,), 1 for a patch and 0 for padding, which comes last.
    S is fixed: the largest share of the global batch, rounded up to whole micro-batches.

    Scenes are read ahead in threads, in the order in which steps need them, and are forgotten
    after their last patch: the number in memory depends on `n_lanes` alone.

    Attributes:
        paths: Scene files.
        read: Function from a path to a list of patches, as `read_patches` returns it.
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

    def __post_init__(self):
        self.slots = [replica_slots(self.batch_size, self.n_replicas, r) for r in self.replicas]
        largest = -(-self.batch_size // self.n_replicas)
        self.replica_batch = -(-largest // self.multiple) * self.multiple
        self.n_patches = len(self.paths) * self.patches_per_scene
        self.n_steps = -(-self.n_patches // self.batch_size)
        self.error = None  # what ended the reading: tf.data would keep only its text

    def dataset(self):
        """The batches of all epochs, without end, as a prefetching tf.data.Dataset."""
        p = self.patch_size
        signature = (
            tf.TensorSpec((self.replica_batch, p, p, self.n_channels), tf.float32),
            tf.TensorSpec((self.replica_batch, p, p, 1), tf.uint8),
            tf.TensorSpec((self.replica_batch,), tf.float32),
        )
        batches = tf.data.Dataset.from_generator(lambda: self, output_signature=signature)
        options = tf.data.Options()
        # Its own threads: `deterministic` leaves TensorFlow's common pool a single one.
        options.threading.private_threadpool_size = 2
        # One file per process is a share already; and the data must not end before the steps do.
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        batches = batches.apply(
            tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        )
        return batches.with_options(options).prefetch(2)

    def __iter__(self):
        try:
            yield from self._batches()
        except Exception as error:
            self.error = error
            raise

    def _epoch(self, epoch):
        return epoch_steps(
            len(self.paths),
            self.patches_per_scene,
            self.batch_size,
            min(self.n_lanes, self.batch_size),
            self.seed,
            epoch if self.shuffle else None,
        )

    def _batches(self):
        wanted = (  # (epoch, scene) in the order of first use by this process
            (epoch, scene)
            for epoch in itertools.count()
            for scene in dict.fromkeys(
                int(scene)
                for step in self._epoch(epoch)
                for slots in self.slots
                for scene in step[slots, 0]
                if scene >= 0
            )
        )
        scenes = read_ahead(lambda key: (key, self.read(self.paths[key[1]])), wanted)
        held = {}
        with contextlib.closing(scenes):
            for epoch in itertools.count():
                steps = self._epoch(epoch)
                uses = Counter(
                    int(scene) for slots in self.slots for scene in steps[:, slots, 0].ravel()
                )
                for step, slots in itertools.product(steps, self.slots):
                    yield self._batch(epoch, step[slots], held, scenes, uses)

    def _batch(self, epoch, picks, held, scenes, uses):
        picks = [(int(scene), int(patch)) for scene, patch in picks if scene >= 0]
        p = self.patch_size
        channels = np.zeros((self.replica_batch, p, p, self.n_channels), np.float32)
        cloud = np.zeros((self.replica_batch, p, p, 1), np.uint8)
        weight = np.zeros(self.replica_batch, np.float32)
        for i, (scene, patch) in enumerate(picks):
            while (epoch, scene) not in held:
                held.update([next(scenes)])
            channels[i], cloud[i] = held[epoch, scene][patch]
            weight[i] = 1
            uses[scene] -= 1
            if not uses[scene]:
                del held[epoch, scene]
        return channels, cloud, weight


def read_ahead(read, items, n_ahead=SCENES_AHEAD):
    """Yield read(item) in the order of items, computed by threads up to `n_ahead` items early."""
    items = iter(items)
    with ThreadPoolExecutor(min(READER_THREADS, n_ahead)) as pool:
        pending = deque(pool.submit(read, item) for item in itertools.islice(items, n_ahead))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(read, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def cached(read, cache_dir, key):
    """Let `read` keep the patches it makes on a local disk and take them from there.

    A scene's file is written under a temporary name and renamed, so that it is whole or absent;
    one that cannot be read is dropped and made again. It holds all channels, then all clouds.

    Args:
        read: Function from a path to a list of (channels, cloud).
        cache_dir: Local directory, made if absent.
        key: Whatever the result depends on besides the file: the crop, say.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)

    def read_cached(path):
        stat = path.stat()
        identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {key}"
        copy = cache_dir / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
        patches = _load(copy)
        if patches is None:
            patches = read(path)
            _store(patches, copy)
        return patches

    return read_cached


def _load(copy):
    try:
        with copy.open("rb") as file:
            return list(zip(np.load(file), np.load(file), strict=True))
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError) as error:
        log.warning("Dropped the damaged cache file %s: %s", copy, error)
        copy.unlink(missing_ok=True)
        return None


def _store(patches, copy):
    temporary = copy.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with temporary.open("wb") as file:
            for part in zip(*patches, strict=True):
                np.save(file, np.stack(part))
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


def scene_padding(height, width, patch_size, crop_size):
    """What `overlapping_patches` needs around a scene: ((above, below), (left, right)) [pixels]."""
    stride = patch_size - crop_size
    return tuple(same_padding(length, patch_size, stride)[1:] for length in (height, width))


def overlapping_patches(padded, patch_size, crop_size):
    """Cut a normalised scene into overlapping patches.

    Args:
        padded: float32 (H, W, C), the scene with zeros around it as `scene_padding` says.
        patch_size: Rows and columns of a patch.
        crop_size: Pixels by which neighbours overlap, even; half of it is trimmed from each side
            of a prediction.

    Returns:
        float32 (n_rows, n_cols, patch_size, patch_size, C), a view of the padded scene: the
        63 patches of 256 x 256 of one scene take no memory of their own.
    """
    stride = patch_size - crop_size
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (patch_size, patch_size), axis=(0, 1)
    )
    return windows[::stride, ::stride].transpose(0, 1, 3, 4, 2)  # (7, 9, 256, 256, 9)


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
