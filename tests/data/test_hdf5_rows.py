import contextlib
import ctypes
import os
import subprocess
import sys
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from harness import REPOSITORY
from harness.data.hdf5_rows import MAX_CHUNKS_AT_ONCE, check_storage, read_blocks, storage

SHAPE = (1200, 61, 4)  # 2.3 MB of float64, three blocks; chunks of (16, 20, 3) divide no side of it
CHUNKS = (16, 20, 3)
CHUNK_BYTES = 16 * 20 * 3 * 8
ALL = slice(0, SHAPE[0]), slice(0, SHAPE[1])
DONT_FILTER_PARTIAL_CHUNKS = 2  # H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS


@pytest.fixture
def numbers():
    return np.random.default_rng(5).integers(-99, 99, SHAPE).astype(np.float64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.h5"


def read(dataset, rows=ALL[0], cols=ALL[1], multiple=1):
    """Check the storage and put the blocks together; they must follow one another."""
    check_storage(dataset)
    parts, row = [], rows.start
    for first, block in read_blocks(dataset, rows, cols, multiple):
        assert first == row and len(block) % multiple == 0 and block.dtype == dataset.dtype
        parts.append(block.copy())
        row += len(block)
    assert row == rows.stop
    return np.concatenate(parts)


def write(path, numbers, **options):
    with h5py.File(path, "w", userblock_size=options.pop("userblock_size", 0)) as file:
        file.create_dataset("x", data=numbers, **options)


def create(path, kind=h5py.h5t.IEEE_F64LE, shape=SHAPE, filters=(), layout=None):
    """Create a dataset with properties that h5py's own function does not offer."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if layout is None:
        properties.set_chunk(CHUNKS)
        for name in filters:
            getattr(properties, f"set_{name}")()
    else:
        properties.set_layout(layout)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(file.id, b"x", kind, space, properties)
    return properties


def write_chunk(path, data, corner=(16, 20, 0), filter_mask=0):
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk(corner, data, filter_mask)


CHUNKED = {"chunks": CHUNKS}
STORAGE = {
    "contiguous": {},
    "chunked": CHUNKED,
    "chunked gzip": {**CHUNKED, "compression": "gzip"},
    "chunked shuffle gzip": {**CHUNKED, "compression": "gzip", "shuffle": True},
    "chunked gzip fletcher32": {**CHUNKED, "compression": "gzip", "fletcher32": True},
    "chunked shuffle": {**CHUNKED, "shuffle": True},
    "chunked fletcher32": {**CHUNKED, "fletcher32": True},
    "chunked filter-32000": {**CHUNKED, "compression": "lzf"},
}


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", "u1", "<i2", ">i4", "<u8"])
@pytest.mark.parametrize("name", STORAGE)
def test_rectangles_of_every_storage_equal_those_of_h5py(path, numbers, name, dtype):
    write(path, np.abs(numbers).astype(dtype), **STORAGE[name])
    with h5py.File(path) as file:
        expected = file["x"][:]
        assert storage(file["x"]) == name
        for rows, cols, multiple in [
            (*ALL, 1), (slice(6, 1042), slice(7, 53), 2), (slice(1199, 1200), slice(60, 61), 1),
        ]:  # fmt: skip
            found = read(file["x"], rows, cols, multiple)
            np.testing.assert_array_equal(found, expected[rows, cols])


def make_compact(path, numbers):
    create(path, h5py.h5t.NATIVE_INT8, (16, 61, 4), layout=h5py.h5d.COMPACT)
    with h5py.File(path, "r+") as file:
        file["x"][...] = numbers[:16]


def make_virtual(path, numbers):
    write(path.with_suffix(".source"), numbers)
    layout = h5py.VirtualLayout(SHAPE, np.float64)
    layout[:] = h5py.VirtualSource(path.with_suffix(".source"), "x", SHAPE)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)


def make_12_bit(path, numbers):
    kind = h5py.h5t.STD_I16LE.copy()
    kind.set_precision(12)
    kind.set_offset(3)
    create(path, kind, layout=h5py.h5d.CONTIGUOUS)
    with h5py.File(path, "r+") as file:
        file["x"][...] = numbers


def make_unwritten(path, numbers):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", SHAPE, "f4", fillvalue=7)


def make_partly_written(path, numbers):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", SHAPE, "f8", **STORAGE["chunked gzip"], fillvalue=7.5)
        dataset[16:32, 20:61] = numbers[16:32, 20:61]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_compact, "compact"),
        (make_virtual, "virtual"),
        (make_12_bit, "contiguous"),
        (make_unwritten, "contiguous"),
        (make_partly_written, "chunked gzip"),
        (lambda path, numbers: write(path, numbers, external=f"{path}.bin"), "external"),
        (lambda path, numbers: write(path, numbers, userblock_size=512), "contiguous"),
        (lambda path, numbers: write(path, numbers, userblock_size=512, **CHUNKED), "chunked"),
    ],
)
def test_what_is_not_plain_bytes_is_read_too(path, numbers, make, name):
    make(path, numbers)
    with h5py.File(path) as file:
        assert storage(file["x"]) == name
        rows, cols = slice(0, len(file["x"])), slice(7, 53)
        np.testing.assert_array_equal(read(file["x"], rows, cols, 2), file["x"][rows, cols])


@pytest.mark.parametrize("mask", [0b01, 0b10, 0b11])
def test_chunk_may_skip_filters(path, mask):
    block = np.arange(16 * 20 * 3, dtype=np.float64).reshape(CHUNKS)
    data = np.frombuffer(block.tobytes(), np.uint8)
    if not mask & 0b01:  # the first filter is shuffle
        data = data.reshape(-1, 8).T
    data = data.tobytes() if mask & 0b10 else zlib.compress(data.tobytes())
    create(path, filters=["shuffle", "deflate"])
    write_chunk(path, data, filter_mask=mask)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(read(file["x"])[16:32, 20:40, :3], block)


def test_chunks_at_the_edges_may_pass_no_filter(path, numbers):
    """H5Pset_chunk_opts is not in h5py: it is called in the HDF5 library that h5py has loaded."""
    properties = create(path, filters=["deflate"])
    options = ctypes.CDLL(h5py.h5p.__file__).H5Pset_chunk_opts
    assert options(ctypes.c_int64(properties.id), DONT_FILTER_PARTIAL_CHUNKS) == 0
    with h5py.File(path, "w", libver="latest") as file:
        space = h5py.h5s.create_simple(SHAPE)
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F64LE, space, properties)
        file["x"][...] = numbers
    with h5py.File(path) as file:
        assert file["x"].id.get_chunk_info(0).size < CHUNK_BYTES
        assert file["x"].id.get_chunk_info_by_coord((0, 60, 0)).size == CHUNK_BYTES
        np.testing.assert_array_equal(read(file["x"]), numbers)


def test_chunks_that_do_not_shrink_are_read(path):
    """Random bytes grow in gzip, by 11 bytes here, and HDF5 stores them so."""
    block = np.random.default_rng(0).integers(0, 2**63, CHUNKS).view(np.float64)
    create(path, filters=["deflate"])
    data = zlib.compress(block.tobytes(), 0)
    assert len(data) > CHUNK_BYTES
    write_chunk(path, data)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(read(file["x"])[16:32, 20:40, :3], block)


def test_chunk_with_a_checksum_may_skip_gzip(path, numbers):
    write(path, numbers, chunks=CHUNKS, fletcher32=True)
    with h5py.File(path) as file:
        _, data = file["x"].id.read_direct_chunk((16, 20, 0))
    create(path, filters=["deflate", "fletcher32"])
    write_chunk(path, data, filter_mask=0b01)
    with h5py.File(path) as file:
        found = read(file["x"])[16:32, 20:40, :3]
    np.testing.assert_array_equal(found, numbers[16:32, 20:40, :3])


def test_small_chunks_are_read_in_small_blocks(path):
    """HDF5 allocates 6 kB for each: a file of 5 MB took 2 GB."""
    write(path, np.arange(100 * 60 * 6.0).reshape(100, 60, 6), chunks=(1, 2, 1))  # 180 per row
    with h5py.File(path) as file:
        blocks = [len(block) for _, block in read_blocks(file["x"], slice(0, 100), slice(0, 60))]
    assert sum(blocks) == 100 and max(blocks) == MAX_CHUNKS_AT_ONCE // 180


# --- files that are damaged, or claim too much


BOMB = zlib.compress(bytes(200 << 20), 9)
PLAIN = bytes(CHUNK_BYTES)
DAMAGE = {  # filters and bytes of a chunk: part of the error
    "inflates to more": (["deflate"], BOMB[: 2 * CHUNK_BYTES], "inflates to more than 7680 bytes"),
    "inflates to one more": (["deflate"], zlib.compress(PLAIN + b"x"), "more than 7680 bytes"),
    "inflates to less": (["deflate"], zlib.compress(PLAIN[1:]), "inflates to 7679 bytes"),
    "inflates shuffled": (["shuffle", "deflate"], zlib.compress(b"abc"), "inflates to 3 bytes"),
    "no gzip": (["deflate"], b"no gzip", "'/x' has a damaged chunk"),
    "cut gzip": (["deflate"], zlib.compress(os.urandom(7680))[:-99], "inflates to 7"),
    "gzip twice": (["deflate", "deflate"], zlib.compress(BOMB), "has the filters gzip, gzip"),
    "shuffled gzip": (["deflate", "shuffle"], BOMB[:7680], "has the filters gzip, shuffle"),
    "short": ([], PLAIN[1:], "a chunk of 7679 bytes in the file, expected 7680"),
    "short, shuffled": (["shuffle"], PLAIN[1:], "a chunk of 7679 bytes"),
    "short, checksum": (["fletcher32"], PLAIN[1:], "a chunk of 7679 bytes"),
    "long": (["deflate"], BOMB[:100_000], "a chunk of 100000 bytes in the file, expected 7680"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_chunk_is_an_error(path, name):
    filters, data, words = DAMAGE[name]
    create(path, filters=filters)
    write_chunk(path, data)
    with h5py.File(path) as file, pytest.raises(OSError, match=words), peak_memory(4e6):
        read(file["x"])


def test_short_chunk_without_its_filter_is_an_error(path):
    create(path, filters=["deflate"])
    write_chunk(path, PLAIN[1:], filter_mask=1)
    with h5py.File(path) as file, pytest.raises(OSError, match="7679 bytes"):
        read(file["x"])


def test_bomb_at_an_edge_with_the_size_of_a_plain_chunk_is_an_error(path):
    """HDF5 takes it for one that passed no filter if the dataset says so, else inflates it."""
    create(path, filters=["deflate"])
    write_chunk(path, BOMB[:CHUNK_BYTES], corner=(1184, 60, 3))
    with h5py.File(path) as file, pytest.raises(OSError, match="more than"), peak_memory(4e6):
        read(file["x"])


@contextlib.contextmanager
def peak_memory(most):
    """Bytes that Python and NumPy allocate at most; zlib's results belong to Python."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most


def test_chunk_far_larger_than_the_dataset_is_an_error(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", SHAPE, "f8", chunks=(10_000_000, 1, 1), maxshape=(None,) * 3)
    with h5py.File(path) as file:
        with pytest.raises(OSError, match=r"has chunks of \(10000000, 1, 1\)"):
            check_storage(file["x"])


def test_gzip_in_a_file_with_a_user_block_is_an_error(path, numbers):
    write(path, numbers, userblock_size=512, **STORAGE["chunked gzip"])
    with h5py.File(path) as file, pytest.raises(OSError, match="user block"):
        read(file["x"])


def test_filter_that_is_not_installed_is_named(path):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(CHUNKS)
    properties.set_filter(31999, h5py.h5z.FLAG_OPTIONAL)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(SHAPE)
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F64LE, space, properties)
        with pytest.raises(OSError, match="filter 31999"):
            check_storage(file["x"])


def test_file_that_is_cut_while_it_is_read_is_an_error(path, numbers):
    write(path, numbers)
    with h5py.File(path) as file:
        blocks = read_blocks(file["x"], *ALL)
        next(blocks)
        os.truncate(path, 1_500_000)
        with pytest.raises(OSError, match="truncated"):
            next(blocks)


@pytest.mark.parametrize("name", ["contiguous", "chunked", "chunked gzip"])
def test_file_without_its_last_byte_is_an_error(path, numbers, name):
    """HDF5 itself refuses to open a truncated file: it is cut while it is open."""
    write(path, numbers, **STORAGE[name])
    with h5py.File(path) as file:
        check_storage(file["x"])
        ends = [(file["x"].id.get_offset() or 0) + numbers.nbytes]
        if file["x"].chunks:
            n_chunks = file["x"].id.get_num_chunks()
            chunks = [file["x"].id.get_chunk_info(i) for i in range(n_chunks)]
            ends = [chunk.byte_offset + chunk.size for chunk in chunks]
        os.truncate(path, max(ends) - 1)
        with pytest.raises(OSError, match="ends after the end of the file: it is truncated"):
            check_storage(file["x"])


@pytest.mark.parametrize("where", ["hdf5plugin is installed", "HDF5_PLUGIN_PATH", "nowhere"])
def test_other_filters_are_used_if_they_are_installed(tmp_path, where):
    """Zstandard, which HDF5 itself lacks; each in a process of its own, after TensorFlow."""
    write = (
        "import hdf5plugin, h5py, numpy; file = h5py.File('a.h5', 'w');"
        "file.create_dataset('x', data=numpy.arange(600.), chunks=(50,), **hdf5plugin.Zstd());"
        "print(hdf5plugin.PLUGIN_PATH)"
    )
    read = (
        f"import sys; sys.modules |= {{'hdf5plugin': None}} if {where!r}[0] != 'h' else {{}}\n"
        "sys.path.insert(0, 'fake')\n"
        "import harness.quiet_tensorflow\n"
        "from harness.data.hdf5 import open_hdf5, open_numbers, read_all\n"
        "with open_hdf5('a.h5') as file: print(read_all(open_numbers(file, 'x')).sum())"
    )
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/tensorflow.py").write_text(  # with the line that disables plugins
        "import os; os.environ['HDF5_PLUGIN_PATH'] = 'disable'\n"
        "class config: list_physical_devices = staticmethod(lambda: [])\n"
    )
    (tmp_path / "fake/keras.py").write_text(
        "class config:\n"
        "    set_floatx = set_image_data_format = set_epsilon = staticmethod(lambda value: None)\n"
        "    backend = staticmethod(lambda: 'tensorflow')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
            env=environment, check=False,
        )  # fmt: skip

    folder = run(write).stdout.strip()
    if where == "HDF5_PLUGIN_PATH":
        environment["HDF5_PLUGIN_PATH"] = folder
    done = run(read)
    if where == "nowhere":
        assert "filter 32015" in done.stderr and "pip install hdf5plugin" in done.stderr
    else:
        assert (done.stdout, done.stderr) == (f"{600 * 599 / 2}\n", "")
