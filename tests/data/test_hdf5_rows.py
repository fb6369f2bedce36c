import contextlib
import ctypes
import itertools
import os
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from harness.data import hdf5_rows

SHAPE = (50, 61, 4)  # chunks of (16, 20, 3) divide no side of it
CHUNKS = (16, 20, 3)
CHUNKED = {"chunks": CHUNKS}
DONT_FILTER_PARTIAL_CHUNKS = 2  # H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS


@pytest.fixture
def numbers():
    return np.random.default_rng(5).integers(-99, 99, SHAPE).astype(np.float64)


def read(dataset, rows=slice(0, 50), cols=slice(0, 61), multiple=1):
    """Put the blocks together again; they must follow one another."""
    parts, row = [], rows.start
    for first, block in hdf5_rows.read_blocks(dataset, rows, cols, multiple):
        assert first == row and len(block) % multiple == 0 and block.dtype == dataset.dtype
        parts.append(block.copy())
        row += len(block)
    assert row == rows.stop
    return np.concatenate(parts)


@pytest.fixture
def without_h5py(monkeypatch):
    """Let any reading of numbers by h5py itself fail."""

    def refuse(*arguments):
        raise AssertionError("h5py was asked for numbers")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    monkeypatch.setattr(h5py.Dataset, "read_direct", refuse)


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", ">f4", "<f2", "u1", "<i2", ">i4", "<u8"])
@pytest.mark.parametrize(
    ("options", "storage"),
    [
        ({}, "contiguous"),
        (CHUNKED, "chunked"),
        (CHUNKED | {"compression": "gzip"}, "chunked"),
        (CHUNKED | {"compression": "gzip", "shuffle": True}, "chunked"),
    ],
    ids=["contiguous", "chunks", "gzip", "shuffle-gzip"],
)
def test_fast_ways_equal_h5py_and_do_without_it(
    tmp_path, numbers, options, storage, dtype, monkeypatch, request
):
    monkeypatch.setattr(hdf5_rows, "BLOCK_BYTES", 5000)  # several blocks
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=np.abs(numbers).astype(dtype), **options)
    with h5py.File(tmp_path / "x.h5") as file:
        dataset, wanted = file["x"], file["x"][:]
        assert hdf5_rows.storage(dataset) == storage
        request.getfixturevalue("without_h5py")
        np.testing.assert_array_equal(read(dataset), wanted)
        for rows, cols, multiple in itertools.product(
            [slice(0, 50), slice(6, 42), slice(16, 32), slice(48, 50)],
            [slice(0, 61), slice(7, 53), slice(20, 40), slice(60, 61)],
            [1, 2],
        ):
            found = read(dataset, rows, cols, multiple)
            np.testing.assert_array_equal(found, wanted[rows, cols])


def make_compact(file, numbers):
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(SHAPE)
    h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_INT8, space, plan)
    file["x"][...] = numbers


def make_virtual(file, numbers):
    with h5py.File(file.filename + ".source", "w") as source:
        source["x"] = numbers
    layout = h5py.VirtualLayout(SHAPE, np.float64)
    layout[:] = h5py.VirtualSource(file.filename + ".source", "x", SHAPE)
    file.create_virtual_dataset("x", layout)


def make_external(file, numbers):
    file.create_dataset("x", data=numbers, external=file.filename + ".bin")


def make_with(**options):
    return lambda file, numbers: file.create_dataset("x", data=numbers, **options)


@pytest.mark.parametrize(
    "make",
    [
        make_compact,
        make_virtual,
        make_external,
        make_with(**CHUNKED, compression="lzf"),
        make_with(**CHUNKED, fletcher32=True),
        make_with(**CHUNKED, shuffle=True),
        make_with(**CHUNKED, scaleoffset=0, dtype="i4"),
        lambda file, numbers: file.create_dataset("x", SHAPE, "f4", fillvalue=7),
    ],
    ids=[
        "compact",
        "virtual",
        "external",
        "lzf",
        "fletcher32",
        "shuffle",
        "scaleoffset",
        "unwritten",
    ],
)
def test_h5py_reads_all_else(tmp_path, numbers, make):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        make(file, numbers)
    with h5py.File(tmp_path / "x.h5") as file:
        assert hdf5_rows.storage(file["x"]) == "h5py"
        rows, cols = slice(6, 42), slice(7, 53)
        np.testing.assert_array_equal(read(file["x"], rows, cols, 2), file["x"][rows, cols])


@pytest.mark.parametrize("options", [{}, CHUNKED])
@pytest.mark.parametrize("opening", [{"userblock_size": 512}, {"driver": "core"}])
def test_h5py_reads_user_blocks_and_files_in_memory(tmp_path, numbers, options, opening):
    with h5py.File(tmp_path / "x.h5", "w", **opening) as file:
        file.create_dataset("x", data=numbers, **options)
    with h5py.File(tmp_path / "x.h5", driver=opening.get("driver")) as file:
        assert hdf5_rows.storage(file["x"]) == "h5py"
        np.testing.assert_array_equal(read(file["x"]), numbers)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_absent_chunks_hold_the_fill_value(tmp_path, numbers, compression, without_h5py):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset(
            "x", SHAPE, "f8", chunks=CHUNKS, compression=compression, fillvalue=7.5
        )
        dataset[16:32, 20:61] = numbers[16:32, 20:61]
    wanted = np.full(SHAPE, 7.5)
    wanted[16:32, 20:61] = numbers[16:32, 20:61]
    with h5py.File(tmp_path / "x.h5") as file:
        assert hdf5_rows.storage(file["x"]) == "chunked"
        np.testing.assert_array_equal(read(file["x"]), wanted)


@pytest.mark.parametrize("mask", [0b01, 0b10, 0b11])
def test_filters_that_a_chunk_skips_are_skipped(tmp_path, mask, request):
    block = np.arange(16 * 20 * 3, dtype=np.float64).reshape(CHUNKS)
    data = np.frombuffer(block.tobytes(), np.uint8)
    if not mask & 0b01:  # the first filter is shuffle
        data = data.reshape(-1, 8).T
    data = data.tobytes()
    if not mask & 0b10:
        data = zlib.compress(data)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset(
            "x", SHAPE, "f8", chunks=CHUNKS, compression="gzip", shuffle=True
        )
        dataset.id.write_direct_chunk((16, 20, 0), data, mask)
    with h5py.File(tmp_path / "x.h5") as file:
        wanted = file["x"][:]
        np.testing.assert_array_equal(wanted[16:32, 20:40, :3], block)
        request.getfixturevalue("without_h5py")
        np.testing.assert_array_equal(read(file["x"]), wanted)


@pytest.mark.parametrize("filters", [["deflate"], ["shuffle", "deflate"]])
def test_chunks_at_the_edges_may_pass_no_filter(tmp_path, numbers, filters):
    """H5Pset_chunk_opts is not in h5py: HDF5's own is called."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk(CHUNKS)
    for name in filters:
        getattr(plan, f"set_{name}")()
    set_chunk_opts = hdf5_library().H5Pset_chunk_opts
    assert set_chunk_opts(ctypes.c_int64(plan.id), DONT_FILTER_PARTIAL_CHUNKS) == 0
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as file:
        space = h5py.h5s.create_simple(SHAPE)
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F64LE, space, plan)
        file["x"][...] = numbers
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["x"].id.get_chunk_info(0).size < np.prod(CHUNKS) * 8
        assert file["x"].id.get_chunk_info_by_coord((48, 0, 0)).size == np.prod(CHUNKS) * 8
        assert hdf5_rows.storage(file["x"]) == "chunked"
        np.testing.assert_array_equal(read(file["x"]), numbers)


def hdf5_library():
    """The HDF5 that h5py is linked to; other packages bring libraries of the same name."""
    return ctypes.CDLL(h5py.h5p.__file__)


@pytest.mark.parametrize("damage", [b"\0", b"no zlib", "short"])
def test_damaged_chunk_is_an_error(tmp_path, numbers, damage):
    data = zlib.compress(numbers[:3].tobytes()) if damage == "short" else damage
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=numbers, chunks=CHUNKS, compression="gzip")
        dataset.id.write_direct_chunk((16, 20, 0), data)
    with h5py.File(tmp_path / "x.h5") as file, pytest.raises(OSError, match="'/x' has a"):
        read(file["x"])


@pytest.mark.parametrize("options", [{}, CHUNKED])
def test_truncated_file_is_an_error(tmp_path, numbers, options):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=numbers, **options)
    with h5py.File(path) as file:  # HDF5 itself refuses to open a truncated file
        os.truncate(path, 20_000)
        with pytest.raises(OSError, match="truncated"):
            read(file["x"])


# --- files that claim too much


def bomb(n_bytes):
    return zlib.compress(bytes(n_bytes), 9)


@pytest.mark.parametrize("corner", [(16, 20, 0), (48, 60, 3)], ids=["inside", "edge"])
def test_chunk_that_inflates_beyond_its_size_is_an_error(tmp_path, numbers, corner):
    """One at the edge that has the size of an unfiltered one would be left to HDF5."""
    n_bytes = np.prod(CHUNKS) * 8
    data = bomb(200 << 20)
    data = data[:n_bytes] if corner == (48, 60, 3) else data
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=numbers, chunks=CHUNKS, compression="gzip")
        dataset.id.write_direct_chunk(corner, data[: 2 * n_bytes])
    with h5py.File(tmp_path / "x.h5") as file, peak_memory() as peak:
        with pytest.raises(OSError, match="inflates to over 7680 bytes"):
            read(file["x"])
    assert peak[0] < 4e6


@contextlib.contextmanager
def peak_memory():
    """A list that gets the bytes Python and NumPy allocate; zlib's results are Python's."""
    peak = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [{}, {"fletcher32": True}], ids=["chunked", "h5py"])
def test_stored_chunk_far_over_its_size_is_an_error(tmp_path, numbers, options):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset(
            "x", data=numbers, chunks=CHUNKS, compression="gzip", **options
        )
        dataset.id.write_direct_chunk((16, 20, 0), bytes(100_000))
    with h5py.File(tmp_path / "x.h5") as file:
        with pytest.raises(OSError, match="a chunk of 100000 bytes in the file, of which 7680"):
            read(file["x"])


def test_chunk_far_larger_than_the_dataset_is_an_error(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", SHAPE, "f8", chunks=(10_000_000, 1, 1), maxshape=(None,) * 3)
    with h5py.File(tmp_path / "x.h5") as file:
        with pytest.raises(OSError, match=r"has chunks of \(10000000, 1, 1\)"):
            read(file["x"])


def test_long_chunks_take_no_rows_that_are_not_there(tmp_path):
    """Rows of a chunk times columns of the dataset would be 200 MB."""
    shape = (100, 100, 100)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", shape, "u1", chunks=(20_000, 1, 100), maxshape=(None,) * 3)
        file["x"][:, 7] = 7
    with h5py.File(tmp_path / "x.h5") as file, peak_memory() as peak:
        assert hdf5_rows.storage(file["x"]) == "chunked"
        assert (read(file["x"], slice(0, 100), slice(0, 100)).sum(axis=(0, 2))[:8] > 0).sum() == 1
    assert peak[0] < 20e6


def test_h5py_reads_very_many_chunks(tmp_path, numbers, monkeypatch):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=numbers, chunks=CHUNKS, compression="gzip")
    with h5py.File(tmp_path / "x.h5") as file:
        # 50 rows in chunks of 16, 61 columns in chunks of 20, 4 channels in chunks of 3: 4 x 4 x 2
        monkeypatch.setattr(hdf5_rows, "MAX_CHUNKS", 32)
        assert hdf5_rows.storage(file["x"]) == "chunked"
        monkeypatch.setattr(hdf5_rows, "MAX_CHUNKS", 31)
        assert hdf5_rows.storage(file["x"]) == "h5py"
        np.testing.assert_array_equal(read(file["x"]), numbers)


def test_h5py_reads_few_of_very_small_chunks_at_once(tmp_path):
    """HDF5 takes 6 kB for each: a file of 5 MB once took 2 GB."""
    numbers = np.arange(100 * 60 * 6).reshape(100, 60, 6).astype(np.float64)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=numbers, chunks=(1, 2, 1))  # 180 in a row
    with h5py.File(tmp_path / "x.h5") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5_rows, "MAX_CHUNKS", 0)
        for most, n_rows in ((4 * 180, 4), (180, 2), (1, 2)):
            patch.setattr(hdf5_rows, "MAX_CHUNKS_AT_ONCE", most)
            blocks = hdf5_rows.read_blocks(file["x"], slice(0, 100), slice(0, 60), 2)
            assert {len(block) for _, block in blocks} == {n_rows}
            np.testing.assert_array_equal(read(file["x"], slice(0, 100), slice(0, 60), 2), numbers)


def test_chunk_and_numbers_beyond_the_file_are_an_error(tmp_path, numbers):
    """The file ends after the places were read; no byte beyond it is asked for."""
    for name, options in (("a", {}), ("b", CHUNKED)):
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=numbers, **options)
        with h5py.File(path) as file:
            os.truncate(path, path.stat().st_size - 1)
            with pytest.raises(OSError, match="ends after the file: it is truncated"):
                read(file["x"])


@pytest.mark.parametrize("make", [lambda t: t.set_precision(12), lambda t: t.set_offset(3)])
def test_numbers_that_numpy_lacks_are_left_to_h5py(tmp_path, make):
    kind = h5py.h5t.STD_I16LE.copy()
    kind.set_precision(12)
    make(kind)
    values = np.arange(24, dtype="i2").reshape(2, 3, 4)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple(values.shape))
        file["x"][...] = values
    with h5py.File(tmp_path / "x.h5") as file:
        assert hdf5_rows.storage(file["x"]) == "h5py"
        np.testing.assert_array_equal(read(file["x"], slice(0, 2), slice(0, 3)), values)
