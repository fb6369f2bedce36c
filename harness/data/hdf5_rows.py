"""Rows of an HDF5 dataset, read by as many threads as one likes.

HDF5 takes one lock per process for all it does, decompression included. Where a dataset is plain
bytes in its file, or chunks that zlib can decompress, only the places are asked of HDF5; the
bytes are read and decompressed here, where threads run side by side. `storage` says which way a
dataset goes; h5py reads whatever else there is, so that every dataset can be read.

Sizes in a file are claims, and memory is not taken on trust: a chunk is as large as the dataset
and its own shape allow, stored or decompressed, or the dataset is an error.
"""

import contextlib
import itertools
import math
import os
import zlib

import h5py
import numpy as np

with contextlib.suppress(ImportError):  # no wheel for this processor
    from isal import isal_zlib as zlib  # a compressed scene in 0.64 of zlib's time

# Bytes of a contiguous dataset that are read at once. They are read again by the arithmetic that
# follows and should still be in the cache then. Of 64 KiB to 4 MiB, 1 and 2 MiB were the fastest:
# 30 ms a scene of 1200 x 1500; 256 KiB took 43, for calls cost more than caches give.
BLOCK_BYTES = 1 << 20
FILTERS = {h5py.h5z.FILTER_DEFLATE: "gzip", h5py.h5z.FILTER_SHUFFLE: "shuffle"}
PIPELINES = ([], ["gzip"], ["shuffle", "gzip"])  # of filters; h5py reads what has others
MAX_CHUNKS = 1 << 16  # whose places are kept, 20 MB of them; h5py reads what has more
MAX_CHUNKS_AT_ONCE = 1 << 13  # in a call of h5py: HDF5 takes 6 kB of memory for each
MAX_CHUNK_SHARE = 4  # numbers of a chunk per number of its dataset; it may reach past its edges


def storage(dataset):
    """How a dataset is read: "contiguous", "chunked" or "h5py"."""
    plan = dataset.id.get_create_plist()
    if (
        dataset.file.driver != "sec2"  # bytes of one file, which it has open
        or dataset.file.userblock_size  # HDF5's versions disagree on whether offsets count it
        or dataset.is_virtual
        or plan.get_external_count()
        or dataset.dtype.kind not in "fiu"
        or dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype)  # NumPy has no 12-bit number
        or 0 in dataset.shape
        or _filters(plan) not in PIPELINES
    ):
        return "h5py"
    if plan.get_layout() == h5py.h5d.CHUNKED:
        n_chunks = math.prod(_grid(dataset.shape, dataset.chunks))
        return "chunked" if n_chunks <= MAX_CHUNKS else "h5py"
    return "h5py" if dataset.id.get_offset() is None else "contiguous"  # compact, never written


def _grid(shape, chunks):
    """How many chunks there are along each dimension."""
    return [-(-n // step) for n, step in zip(shape, chunks, strict=True)]


def _filters(plan):
    """Names of the filters that chunks pass when they are written; None for an unknown one."""
    return [FILTERS.get(plan.get_filter(i)[0]) for i in range(plan.get_nfilters())]


def check_storage(dataset):
    """See that the numbers of a dataset can be where its file says, without reading any.

    Raises:
        OSError: If the file is too short, a chunk of absurd size, or a filter not to be had.
    """
    _check_chunks(dataset)
    plan, file_bytes = dataset.id.get_create_plist(), os.stat(dataset.file.filename).st_size
    for i in range(plan.get_nfilters()):
        number, *_, name = plan.get_filter(i)
        if not h5py.h5z.filter_avail(number):
            raise OSError(
                f"'{dataset.name}' is compressed with the filter {number} ({os.fsdecode(name)}), "
                "which this HDF5 lacks"
            )
    ends = [0]
    if storage(dataset) == "contiguous":
        ends.append(dataset.id.get_offset() + dataset.nbytes)
    _stored_chunks(dataset, lambda chunk: ends.append(chunk.byte_offset + chunk.size))
    if max(ends) > file_bytes:
        raise OSError(f"'{dataset.name}' ends after the file: it is truncated")


def read_blocks(dataset, rows, cols, multiple=1):
    """Read a rectangle of a dataset in blocks of rows.

    Args:
        dataset: h5py.Dataset (H, W, C) of numbers, in an open file.
        rows: Slice with a start and a stop, both multiples of `multiple`.
        cols: Slice with a start and a stop.
        multiple: The rows of a block are a multiple of this.

    Yields:
        First row in the dataset, and a block (n, cols.stop - cols.start, C) of the dataset's
        dtype, which the next one may overwrite.

    Raises:
        OSError: If the file is truncated or damaged.
    """
    _check_chunks(dataset)
    readers = {"contiguous": _contiguous_blocks, "chunked": _chunked_blocks, "h5py": _h5py_blocks}
    return readers[storage(dataset)](dataset, rows, cols, multiple)


def _check_chunks(dataset):
    most = MAX_CHUNK_SHARE * math.prod(dataset.shape)
    if dataset.chunks and not 0 < math.prod(dataset.chunks) <= most:
        raise OSError(
            f"'{dataset.name}' of {dataset.shape} has chunks of {dataset.chunks}, wanted "
            f"{MAX_CHUNK_SHARE} times its numbers at most"
        )


def _steps(rows, step):
    """Cut rows at the multiples of `step`: (first, stop) of each piece."""
    for first in range(rows.start - rows.start % step, rows.stop, step):
        yield max(first, rows.start), min(first + step, rows.stop)


def _rows_in(n_bytes, dataset, multiple):
    """As many rows as hold about `n_bytes`, a multiple of `multiple`."""
    row_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    return max(n_bytes // row_bytes // multiple, 1) * multiple


def _h5py_blocks(dataset, rows, cols, multiple):
    # A compressed chunk is decompressed whole: blocks of whole chunks do that once for each.
    step = math.lcm(dataset.chunks[0], multiple) if dataset.chunks else multiple
    n_steps = -(-_rows_in(4 * BLOCK_BYTES, dataset, 1) // step)
    if dataset.chunks:
        n_chunks = math.prod(_grid((step, *dataset.shape[1:]), dataset.chunks))
        n_steps = max(min(n_steps, MAX_CHUNKS_AT_ONCE // n_chunks), 1)
    step *= n_steps
    _stored_chunks(dataset, lambda chunk: None)
    for first, stop in _steps(rows, step):
        yield first, dataset[first:stop, cols]


def _contiguous_blocks(dataset, rows, cols, multiple):
    # Whole rows come in one call, columns outside the rectangle with them. Skipping these, 15 % of
    # the training crop, takes a call a row, and 1.2 times as long from a warm cache.
    fd, offset = dataset.file.id.get_vfd_handle(), dataset.id.get_offset()
    if offset + dataset.nbytes > os.fstat(fd).st_size:
        raise OSError(f"'{dataset.name}' ends after the file: it is truncated")
    step = _rows_in(BLOCK_BYTES, dataset, multiple)
    buffer = np.empty((step, *dataset.shape[1:]), dataset.dtype)
    row_bytes = buffer[0].nbytes
    for first, stop in _steps(rows, step):
        block = buffer[: stop - first]
        n_read = os.preadv(fd, [block.reshape(-1).view(np.uint8)], offset + first * row_bytes)
        if n_read != block.nbytes:
            raise OSError(f"'{dataset.name}' ends early: the file is truncated")
        yield first, block[:, cols]


def _chunked_blocks(dataset, rows, cols, multiple):
    height, width, depth = dataset.chunks
    decode = _chunk_decoder(dataset)
    step = math.lcm(height, multiple)
    left = cols.start - cols.start % width
    n_rows = min(step, rows.stop - rows.start)
    buffer = np.empty((n_rows, cols.stop - cols.start, dataset.shape[2]), dataset.dtype)
    for first, stop in _steps(rows, step):
        block = buffer[: stop - first]
        corners = itertools.product(
            range(first - first % height, stop, height),
            range(left, cols.stop, width),
            range(0, dataset.shape[2], depth),
        )
        for row, col, channel in corners:
            begin, end = max(row, first), min(row + height, stop)
            west, east = max(col, cols.start), min(col + width, cols.stop)
            chunk = decode((row, col, channel))[:, :, : dataset.shape[2] - channel]
            block[
                begin - first : end - first,
                west - cols.start : east - cols.start,
                channel : channel + depth,
            ] = chunk[begin - row : end - row, west - col : east - col]
        yield first, block


def _chunk_decoder(dataset):
    """A function from the corner of a chunk to its numbers inside the dataset."""
    fd, shape = dataset.file.id.get_vfd_handle(), dataset.chunks
    filters = _filters(dataset.id.get_create_plist())
    n_bytes = math.prod(shape) * dataset.dtype.itemsize
    places = {}
    _stored_chunks(dataset, lambda chunk: places.update({chunk.chunk_offset: chunk}))
    file_bytes = os.fstat(fd).st_size

    def decode(corner):
        if corner not in places:  # nobody wrote to it
            return np.full(shape, dataset.fillvalue, dataset.dtype)
        chunk = places[corner]
        if chunk.byte_offset + chunk.size > file_bytes:
            raise OSError(f"'{dataset.name}' ends after the file: it is truncated")
        data = os.pread(fd, chunk.size, chunk.byte_offset)
        if len(data) != chunk.size:
            raise OSError(f"'{dataset.name}' ends early: the file is truncated")
        reach = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
        at_edge = any(r.stop > n for r, n in zip(reach, dataset.shape, strict=True))
        if filters and at_edge and chunk.size == n_bytes:
            # It may have passed no filter, which HDF5 alone knows. HDF5 decompresses without end.
            with contextlib.suppress(zlib.error):
                _inflate(dataset, data, n_bytes)
            return dataset[reach]
        for i, name in reversed(list(enumerate(filters))):
            if chunk.filter_mask >> i & 1:  # not applied to this chunk
                continue
            try:
                inflates = name == "gzip"
                data = _inflate(dataset, data, n_bytes) if inflates else _unshuffle(dataset, data)
            except zlib.error as error:
                raise OSError(f"'{dataset.name}' has a damaged chunk: {error}") from error
        if len(data) != n_bytes:
            raise OSError(f"'{dataset.name}' has a chunk of {len(data)} bytes, wanted {n_bytes}")
        return np.frombuffer(data, dataset.dtype).reshape(shape)

    return decode


def _stored_chunks(dataset, visit):
    """Call visit(chunk) with the place of every stored chunk; one of absurd size is an error."""
    if not dataset.chunks:
        return
    n_bytes = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
    most = 2 * n_bytes + 4096  # what a filter cannot compress may grow a little

    def check(chunk):
        if chunk.size > most:
            raise OSError(
                f"'{dataset.name}' has a chunk of {chunk.size} bytes in the file, of which "
                f"{n_bytes} should come"
            )
        visit(chunk)

    dataset.id.chunk_iter(check)


def _inflate(dataset, data, n_bytes):
    """Decompress to n_bytes at most: a little more is enough to know that there is more."""
    decompressor = zlib.decompressobj()
    inflated = decompressor.decompress(data, n_bytes + 1)
    if len(inflated) > n_bytes:
        raise OSError(f"'{dataset.name}' has a chunk that inflates to over {n_bytes} bytes")
    if not decompressor.eof:
        raise zlib.error("its compressed bytes end early")
    return inflated


def _unshuffle(dataset, data):
    """Put the bytes of each number together again; shuffle stored all first bytes first."""
    size = dataset.dtype.itemsize
    planes = np.frombuffer(data, np.uint8).reshape(size, -1)
    numbers = np.empty(planes.shape[::-1], np.uint8)
    for i in range(size):  # 0.6 of the time of copying planes.T
        numbers[:, i] = planes[i]
    return numbers.reshape(-1).data
