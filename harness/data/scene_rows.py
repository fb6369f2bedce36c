"""Open the datasets of a scene file, and read the rows that rectangles of the scene need."""

import contextlib
from dataclasses import dataclass

import numpy as np

from harness.data.half_precision import ToFloat16
from harness.data.hdf5 import is_packed, open_hdf5, open_numbers, read_attribute, unpacked
from harness.data.hdf5_rows import read_blocks
from harness.data.scene_files import SceneError


@dataclass(frozen=True)
class Tile:
    """A rectangle of a scene that is to be read, and the arrays (h, w, ...) that receive it.

    Attributes:
        row: First row on the 1 km grid.
        col: First column on the 1 km grid.
        channels: float32 or float16 (h, w, C), normalised; the last axis is contiguous.
        cloud: uint8 (h, w, 1).
        valid: bool (h, w), or None if not needed.
        bt_12um: float32 (h, w), or None if not needed.
    """

    row: int
    col: int
    channels: np.ndarray
    cloud: np.ndarray
    valid: np.ndarray | None = None
    bt_12um: np.ndarray | None = None


@contextlib.contextmanager
def open_scene(path, shape, labelled=True):
    """Open `refs`, `bts` and `bayes` of a scene file.

    Args:
        path: Scene file (HDF5).
        shape: (H, W, C) that the configuration demands of every scene, (None, None, C) for any
            size; `refs` may be on the 500 m grid, with 2 H rows and 2 W columns.
        labelled: Whether a scene without `bayes` is an error.

    Yields:
        h5py.Dataset by name, without `bayes` if the file has none.

    Raises:
        SceneError: If the file is damaged or no such scene, now or while it is read in the context.
    """
    height, width, n_channels = shape
    datasets, source = {}, "IMAGE_H, IMAGE_W and N_CHANNELS. Change these"
    advice = "Download it again, or remove it from its folder or list."
    with open_hdf5(path, advice=advice, error_class=SceneError) as file:
        if height is None:
            height, width, _ = open_numbers(file, "bts", (None, None, 3)).shape
            source = "the size of 'bts' and N_CHANNELS. Make it again"
        expected = {
            "refs": [(height, width, n_channels - 3), (2 * height, 2 * width, n_channels - 3)],
            "bts": [(height, width, 3)],
            "bayes": [(height, width, 1)],
        }
        for name, shapes in expected.items():
            dataset = open_numbers(file, name, optional=name == "bayes")
            if dataset is None and labelled:
                raise SceneError(
                    f"{path} has no dataset 'bayes', the label. Without it, mask scenes with "
                    "--mode inference, and train with --mode train and labels: none."
                )
            if dataset is None:
                continue
            if dataset.shape not in shapes:
                advice = f"by {source} or remove the file."
                if shape[0] and dataset.shape[1:] in [each[1:] for each in shapes]:
                    advice += (
                        f" To give all scenes {height} rows, make them by convert_sen3.py --rows "
                        f"{height}; --mode inference masks scenes of any size."
                    )
                raise SceneError(
                    f"{path}: dataset '{name}' has shape {dataset.shape}, expected "
                    f"{' or '.join(map(str, shapes))} {advice}"
                )
            is_packed(dataset)  # or raises an error before the run
            datasets[name] = dataset
        yield datasets


def is_synthetic(path):
    """Whether a scene file says that it is synthetic, as those of tools/make_scenes.py do."""
    with contextlib.suppress(SceneError), open_hdf5(path, error_class=SceneError) as file:
        return bool(read_attribute(file, "synthetic", False))
    return False


def read_rows(dataset, tiles, limits, fold=1):
    """Read the rows and columns that tiles need, in blocks of rows, missing values as 0.

    Not-a-number and infinity, and what becomes infinite in float32, count as missing. Numbers
    packed by the NetCDF conventions are unpacked, their fill values are missing.

    Args:
        dataset: h5py.Dataset (fold * H, fold * W, C) of `open_scene`.
        tiles: List of Tile.
        limits: Lowest and highest possible number.
        fold: 2 for a dataset on the 500 m grid, of which 2 x 2 pixels are averaged; else 1.

    Yields:
        First row and first column on the 1 km grid; a block (n, m, C), which the next one may
        overwrite; and how many of its numbers are outside the limits and not missing.
    """
    row, col = min(tile.row for tile in tiles), min(tile.col for tile in tiles)
    last_row = max(tile.row + tile.cloud.shape[0] for tile in tiles)
    last_col = max(tile.col + tile.cloud.shape[1] for tile in tiles)
    rows, cols = slice(fold * row, fold * last_row), slice(fold * col, fold * last_col)
    packed = is_packed(dataset)
    for first, block in read_blocks(dataset, rows, cols, fold):
        if packed:
            block = unpacked(dataset, block)
        # Minimum and maximum show whether anything is odd, at a tenth of the cost of a full check.
        with np.errstate(over="ignore", invalid="ignore"):
            extremes = np.array([block.min(), block.max()])
            is_complete = np.isfinite(extremes.astype(np.float32)).all()
        present = True if is_complete else np.abs(block) <= np.finfo(np.float32).max
        n_outside, (low, high) = 0, limits
        if not (low <= extremes[0] and extremes[1] <= high):
            outside = ((block < low) | (block > high)) & (block != 0) & present
            n_outside = int(np.count_nonzero(outside))
        if fold > 1:
            block = _average(block, present, fold)
        elif not is_complete:
            block = np.where(present, block, 0)
        yield first // fold, col, block, n_outside


def normalise(blocks, dtype, offset, scale=1):
    """Add (block - offset) / scale in a dtype to `read_rows`; the next block overwrites it."""
    space, to_float16 = np.empty(0, np.float32), ToFloat16()
    for first, col, block, n_outside in blocks:
        if space.size < block.size:  # one space for all: new memory costs more than the arithmetic
            space = np.empty(block.size, np.float32)
        values = space[: block.size].reshape(block.shape)
        # The difference has the file's own precision, or that of float32 if this is better.
        precision = np.result_type(block.dtype, np.float32)
        np.subtract(block, offset, out=values, dtype=precision, casting="same_kind")
        if scale != 1:
            values /= np.float32(scale)
        if dtype == np.float16:
            values = to_float16(values, may_be_large=n_outside)
        yield first, col, block, n_outside, values


def _average(block, present, fold):
    """Mean over fold x fold pixels of those that are present; 0 if none is."""
    h, w, c = block.shape
    cells = (h // fold, fold, w // fold, fold, c)
    total = np.where(present, block, 0).reshape(cells).sum(axis=(1, 3))
    count = np.broadcast_to(present, block.shape).reshape(cells).sum(axis=(1, 3))
    return total / np.maximum(count, 1)


def copy_to_tiles(first, col, values, tiles, targets):
    """Copy a block of rows to the tiles that it covers.

    Args:
        first: First row of the block on the 1 km grid.
        col: First column of the block.
        values: (n, m), one item per pixel.
        tiles: List of Tile.
        targets: An array (h, w) for each tile, or None for a tile that does not need the values.
    """
    for tile, target in zip(tiles, targets, strict=True):
        if target is None:
            continue
        begin, stop = max(first, tile.row), min(first + len(values), tile.row + len(target))
        if begin < stop:
            west = tile.col - col
            target[begin - tile.row : stop - tile.row] = values[
                begin - first : stop - first, west : west + target.shape[1]
            ]
