"""Read blocks of rows of an HDF5 dataset, after checking how it is stored.

HDF5 has one lock per process for all it does, so its threads read one after the other. Where the
numbers are plain bytes in the file, as in the published scenes, HDF5 is asked only for their
offset, and threads read the bytes here in parallel. h5py reads all other datasets.

The sizes in a file are claims. They are checked before memory is allocated, and gzip chunks are
inflated here once before HDF5 does, which has no limit (see `_chunk_checker`).
"""

import contextlib
import itertools
import math
import os
import zlib

import h5py
import numpy as np

# Bytes of a contiguous dataset that are read at once. The arithmetic that follows should find them
# in the processor's cache, but threads wait for the lock of Python after each of its steps: with 1,
# 2 and 4 MiB one thread took 0.82, 0.86 and 0.85 ms for a patch, two took 0.74, 0.60 and 0.54; in
# half precision, 1.1, 1.0 and 1.2 ms, and 1.08, 0.75 and 0.75.
BLOCK_BYTES = 1 << 21
MAX_CHUNKS_AT_ONCE = 1 << 13  # in a call of h5py: HDF5 allocates 6 kB for each
MAX_CHUNKS = 1 << 20  # of a dataset, also those never written: each takes time, 10 us
MAX_CHUNK_RATIO = 4  # numbers of a chunk per number of its dataset; it may reach past its edges
FILTERS = {  # in the order in which h5py applies them
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",  # appends a checksum of 4 bytes
}


class MissingFilter(OSError):
    """A filter that this HDF5 lacks; the file may be good."""


def storage(dataset):
    """How a dataset is stored: "contiguous", "chunked", "chunked shuffle gzip", "virtual", ..."""
    properties = dataset.id.get_create_plist()
    if dataset.is_virtual:
        return "virtual"
    if properties.get_external_count():
        return "external"
    if properties.get_layout() == h5py.h5d.CHUNKED:
        return " ".join(["chunked", *_filters(dataset)])
    return "compact" if properties.get_layout() == h5py.h5d.COMPACT else "contiguous"


def check_storage(dataset):
    """Check that the numbers of a dataset can be where its file says, without reading any.

    Raises:
        OSError: If the file is too short, a chunk of absurd size, or a filter not available
            (MissingFilter).
    """
    file_bytes = os.stat(dataset.file.filename).st_size
    if (offset := _byte_offset(dataset)) is not None and offset + dataset.nbytes > file_bytes:
        raise OSError(f"'{dataset.name}' ends after the end of the file: it is truncated")
    if not dataset.chunks:
        return
    if not 0 < math.prod(dataset.chunks) <= MAX_CHUNK_RATIO * math.prod(dataset.shape):
        raise OSError(
            f"'{dataset.name}' of {dataset.shape} has chunks of {dataset.chunks}, expected at most "
            f"{MAX_CHUNK_RATIO} times its numbers"
        )
    if (n_chunks := _chunks_in(dataset, dataset.shape)) > MAX_CHUNKS:
        raise OSError(f"'{dataset.name}' has {n_chunks} chunks, expected at most {MAX_CHUNKS}")
    filters, n_bytes = _check_filters(dataset), _chunk_bytes(dataset)
    is_plain = {*filters} <= {"shuffle", "fletcher32"}  # which leave the number of bytes as it is
    sizes = (n_bytes, n_bytes + 4 * ("fletcher32" in filters))
    most = 2 * n_bytes + 4096  # a chunk that cannot be compressed may grow a little

    def check(chunk):
        if chunk.size > most or (is_plain and chunk.size not in sizes):
            raise OSError(
                f"'{dataset.name}' has a chunk of {chunk.size} bytes in the file, expected "
                f"{n_bytes}{'' if is_plain else ' or less'}"
            )
        if chunk.byte_offset + chunk.size > file_bytes:
            raise OSError(f"'{dataset.name}' ends after the end of the file: it is truncated")

    dataset.id.chunk_iter(check)


def read_blocks(dataset, rows, cols, multiple=1):
    """Read a rectangle of a dataset in blocks of rows.

    Args:
        dataset: h5py.Dataset (H, W, C) of numbers in an open file, which passed `check_storage`.
        rows: Slice with a start and a stop, both multiples of `multiple`.
        cols: Slice with a start and a stop.
        multiple: The rows of a block are a multiple of this.

    Yields:
        First row in the dataset, and a block (n, cols.stop - cols.start, C) of the dataset's
        dtype, which the next one may overwrite.

    Raises:
        OSError: If the file is truncated or damaged.
    """
    offset = _byte_offset(dataset)
    if offset is None:
        return _h5py_blocks(dataset, (rows, cols, slice(0, dataset.shape[2])), multiple)
    return _contiguous_blocks(dataset, offset, rows, cols, multiple)


def read_all(dataset):
    """Read all of a dataset that passed `check_storage`.

    Raises:
        OSError: If the file is truncated or damaged.
    """
    if not dataset.chunks:
        return dataset[...]
    values = np.empty(dataset.shape, dataset.dtype)
    for first, block in _h5py_blocks(dataset, [slice(0, n) for n in dataset.shape], 1):
        values[first : first + len(block)] = block
    return values


def _filters(dataset):
    """The filters that a chunk passes when it is written, by name or number."""
    properties = dataset.id.get_create_plist()
    numbers = (properties.get_filter(i)[0] for i in range(properties.get_nfilters()))
    return [FILTERS.get(number, f"filter-{number}") for number in numbers]


def _check_filters(dataset):
    properties, filters = dataset.id.get_create_plist(), _filters(dataset)
    for i in range(len(filters)):
        number, *_, name = properties.get_filter(i)
        if not h5py.h5z.filter_avail(number):
            with contextlib.suppress(ImportError):
                import hdf5plugin  # noqa: F401  (adds the filters that it has)
        if not h5py.h5z.filter_avail(number):
            raise MissingFilter(
                f"'{dataset.name}' is compressed with the HDF5 filter {number} "
                f"({os.fsdecode(name)}), which is not installed"
            )
    # `_chunk_checker` understands no other order: data compressed twice, for example.
    if "gzip" in filters and filters != [name for name in FILTERS.values() if name in filters]:
        raise OSError(
            f"'{dataset.name}' has the filters {', '.join(filters)}, expected with gzip at most "
            f"{', '.join(FILTERS.values())} in this order"
        )
    return filters


def _chunks_in(dataset, shape):
    """Number of chunks in an array of this shape at the beginning of the dataset."""
    return math.prod(-(-n // m) for n, m in zip(shape, dataset.chunks, strict=True))


def _chunk_bytes(dataset):
    is_text = dataset.dtype.kind == "O"  # of any length: its length, an address and an index
    return math.prod(dataset.chunks) * (16 if is_text else dataset.id.get_type().get_size())


def _byte_offset(dataset):
    """Where a dataset that is plain bytes begins in its file; None if only HDF5 can read it."""
    if (
        storage(dataset) != "contiguous"
        or dataset.file.driver != "sec2"  # one file, which HDF5 reads through a descriptor
        or dataset.file.userblock_size  # HDF5's versions disagree on whether offsets count it
        or dataset.dtype.kind not in "fiu"
        or dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype)  # NumPy has no 12-bit number
        or 0 in dataset.shape
    ):
        return None
    return dataset.id.get_offset()  # None if nothing was written


def _contiguous_blocks(dataset, offset, rows, cols, multiple):
    # Whole rows are read in one call, with the columns outside the rectangle. Skipping these, 15 %
    # of the training crop, takes a call per row, and 1.2 times as long from a warm cache.
    fd = dataset.file.id.get_vfd_handle()
    step = _rows_in(BLOCK_BYTES, dataset, multiple)
    buffer = np.empty((step, *dataset.shape[1:]), dataset.dtype)
    row_bytes = buffer[0].nbytes
    for first, stop in _steps(rows, step):
        block = buffer[: stop - first]
        n_read = os.preadv(fd, [block.reshape(-1).view(np.uint8)], offset + first * row_bytes)
        if n_read != block.nbytes:
            raise OSError(f"'{dataset.name}' ends after the end of the file: it is truncated")
        yield first, block[:, cols]


def _h5py_blocks(dataset, window, multiple):
    # A compressed chunk is decompressed whole: blocks of whole chunks do that once for each.
    step = math.lcm(dataset.chunks[0], multiple) if dataset.chunks else multiple
    n_steps = -(-_rows_in(2 * BLOCK_BYTES, dataset, 1) // step)
    if dataset.chunks:
        n_chunks = _chunks_in(dataset, (step, *dataset.shape[1:]))
        n_steps = max(min(n_steps, MAX_CHUNKS_AT_ONCE // n_chunks), 1)
    check_chunk = _chunk_checker(dataset) if "gzip" in _filters(dataset) else None
    for first, stop in _steps(window[0], step * n_steps):
        block = slice(first, stop), *window[1:]
        if check_chunk:
            corners = (
                range(each.start - each.start % n, each.stop, n)
                for each, n in zip(block, dataset.chunks, strict=True)
            )
            for corner in itertools.product(*corners):
                check_chunk(corner)
        yield first, dataset[block]


def _chunk_checker(dataset):
    """A function that raises an OSError unless the chunk at a corner inflates to its own size.

    HDF5 1.14 does not check that: it inflates without a limit, up to 1 GB from 1 MB, and reads
    beyond the end of a chunk that inflates to less.
    """
    if dataset.file.userblock_size:  # HDF5's versions disagree on whether offsets count it
        raise OSError(f"'{dataset.name}' has gzip chunks, and the file has a user block")
    fd, n_bytes = dataset.file.id.get_vfd_handle(), _chunk_bytes(dataset)
    gzip_index = _filters(dataset).index("gzip")

    def check(corner):
        chunk = dataset.id.get_chunk_info_by_coord(corner)
        if chunk.byte_offset is None:
            return  # never written: it holds the fill value
        # Not read_direct_chunk: with h5py 3.14 it crashes the process when two threads read.
        data = os.pread(fd, chunk.size, chunk.byte_offset)
        is_gzip = not chunk.filter_mask >> gzip_index & 1
        try:
            size = len(zlib.decompressobj().decompress(data, n_bytes + 1) if is_gzip else data)
        except zlib.error as error:
            if chunk.size == n_bytes:  # one at an edge may have passed no filter: HDF5 knows
                return
            raise OSError(f"'{dataset.name}' has a damaged chunk: {error}") from error
        if size not in (n_bytes, n_bytes + 4 * (not is_gzip)):  # with a checksum
            found = f"more than {n_bytes}" if size > n_bytes else size
            raise OSError(
                f"'{dataset.name}' has a chunk that inflates to {found} bytes, expected {n_bytes}"
            )

    return check


def _steps(rows, step):
    """Cut rows at the multiples of `step`: (first, stop) of each piece."""
    for first in range(rows.start - rows.start % step, rows.stop, step):
        yield max(first, rows.start), min(first + step, rows.stop)


def _rows_in(n_bytes, dataset, multiple):
    """As many rows as hold about `n_bytes`, a multiple of `multiple`."""
    row_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    return max(n_bytes // row_bytes // multiple, 1) * multiple
