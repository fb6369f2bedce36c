import os
import zlib

import h5py
import numpy as np
import pytest

from harness.data.hdf5 import (
    MAX_NUMBERS,
    open_hdf5,
    open_numbers,
    read_all,
    read_attribute,
    read_texts,
    unpack,
)
from harness.errors import UserError


class OwnError(UserError):
    pass


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(6, dtype="i2").reshape(2, 3)
        file["text"] = "text"
        file["complex"] = np.zeros((2, 3), "c8")
        file["empty"] = np.zeros((0, 3))
        file.create_dataset("large", (MAX_NUMBERS + 1, 1), "u1", chunks=(1000, 1))
        file["link"] = h5py.ExternalLink("/etc/passwd", "x")
    return tmp_path / "a.h5"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / "a.h5")
    with pytest.raises(UserError, match="a.h5 cannot be used: .* is not a regular file"):
        with open_hdf5(tmp_path / "a.h5"):
            pass


def test_links_to_regular_files_are_opened(path):
    (path.parent / "link.h5").symlink_to(path)
    with open_hdf5(path.parent / "link.h5") as file:
        assert open_numbers(file, "x", (2, None))[1, 2] == 5


@pytest.mark.parametrize("error", [OSError("a\nb"), RuntimeError("a"), KeyError("a"), TypeError()])
def test_faults_become_one_line_of_the_chosen_error(path, error):
    with pytest.raises(OwnError, match=r"^it cannot be used: '?a?'?\. Copy it\.$"):
        with open_hdf5(path, "it", "Copy it.", OwnError):
            raise error


def test_errors_for_the_user_are_passed_on(path):
    with pytest.raises(UserError, match="^own$"):
        with open_hdf5(path, "it", "Copy it.", OwnError):
            raise UserError("own")


def test_locked_file_has_its_own_advice(path):
    with pytest.raises(UserError, match="cannot be used: unable to lock file.*USE_FILE_LOCKING"):
        with open_hdf5(path):
            raise OSError("unable to lock file, errno = 11")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("absent", None, "it has no dataset 'absent', found ['complex', 'empty',"),
        ("text", None, "'text' should hold numbers of at most 8 bytes, found object"),
        ("complex", (2, 3), "'complex' should hold numbers of at most 8 bytes, found complex64"),
        ("x", (2, 3, None), "'x' has shape (2, 3), expected (2, 3, any)"),
        ("x", (2, 4), "'x' has shape (2, 3), expected (2, 4)"),
        ("empty", None, "'empty' should hold 1 to 200000000 numbers, found shape (0, 3)"),
        ("large", None, "'large' should hold 1 to 200000000 numbers"),
        ("link", None, "a link out of the file"),
    ],
)
def test_dataset_that_is_not_as_expected_is_named(path, name, shape, words):
    with h5py.File(path) as file:
        with pytest.raises(ValueError) as error:
            open_numbers(file, name, shape)
        assert words in str(error.value)
        assert open_numbers(file, "absent", shape, optional=True) is None


@pytest.mark.parametrize("fill", ["_FillValue", "missing_value"])
def test_packed_numbers_are_scaled_and_fill_values_are_missing(path, fill):
    with h5py.File(path, "r+") as file:
        file["x"].attrs.update({"scale_factor": [0.5], "add_offset": 10, fill: np.int16(3)})
        np.testing.assert_array_equal(unpack(file["x"]), [[10, 10.5, 11], [np.nan, 12, 12.5]])
        file["x"].attrs["scale_factor"] = np.inf
        with pytest.raises(ValueError, match="finite scale_factor"):
            unpack(file["x"])


@pytest.mark.parametrize("read", [read_all, unpack])
def test_chunk_that_inflates_to_another_size_is_not_read(tmp_path, read):
    """HDF5 has no such limit: it inflates a bomb completely, and reads beyond a chunk's end."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        good = file.create_dataset("good", (40, 30), "f4", chunks=(16, 16), compression="gzip")
        good[:] = numbers = np.arange(1200, dtype="f4").reshape(40, 30)
        for name, content in (("bomb", bytes(1 << 20)), ("short", b"abc")):
            bad = file.create_dataset(name, (40, 30), "f4", chunks=(16, 16), compression="gzip")
            bad.id.write_direct_chunk((32, 16), zlib.compress(content))
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(read(open_numbers(file, "good")), numbers)
        with pytest.raises(OSError, match="'/bomb' .* inflates to more than 1024 bytes"):
            read(open_numbers(file, "bomb"))
        with pytest.raises(OSError, match="'/short' .* inflates to 3 bytes, expected 1024"):
            read(open_numbers(file, "short"))


@pytest.mark.parametrize("shape", [(1200, 1500), (1200, 1500, 3), (1_800_000,)])
def test_dataset_of_millions_of_chunks_is_not_read(path, shape):
    """None of them is written: the file has 2 kB, and HDF5 allocates 6 kB for each."""
    with h5py.File(path, "r+") as file:
        file.create_dataset("small", shape, "u1", chunks=(1,) * len(shape))
        with pytest.raises(OSError, match="/small' has [15]?[48]00000 chunks, expected at most"):
            open_numbers(file, "small")


@pytest.mark.parametrize("chunks", [(7,), (3, 5), (2, 3, 5), (1, 1, 1, 2)])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_all_of_a_dataset_of_any_rank_is_read(path, chunks, compression):
    shape = (13, 7, 11, 2)[: len(chunks)]
    numbers = np.arange(np.prod(shape)).reshape(shape)
    with h5py.File(path, "r+") as file:
        file.create_dataset("a", data=numbers, chunks=chunks, compression=compression)
        np.testing.assert_array_equal(read_all(open_numbers(file, "a")), numbers)


TIMES = [f"2019-10-01T11:{minute:02}:21Z" for minute in range(60)]


@pytest.mark.parametrize("kind", ["S20", h5py.string_dtype(), h5py.string_dtype(length=30)])
@pytest.mark.parametrize("options", [{}, {"chunks": (7,)}, {"chunks": (7,), "compression": "gzip"}])
def test_texts_are_read(path, kind, options):
    with h5py.File(path, "r+") as file:
        file.create_dataset("t", data=TIMES, dtype=kind, **options)
        if kind == h5py.string_dtype() and "compression" in options:
            with pytest.raises(ValueError, match="fixed length, or not be compressed"):
                read_texts(file["t"])
        else:
            assert read_texts(file["t"]) == TIMES


TEXTS = {  # of a file that claims too much
    "many": ((1_000_001,), "S20", None, "at most 1000000 texts of at most 64 bytes"),
    "long": ((10,), "S8192", None, "found shape (10,), type |S8192"),
    "matrix": ((10, 2), "S20", None, "found shape (10, 2)"),
    "long of any length": ((3,), h5py.string_dtype(), "x" * 65, "64 characters, found 65"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_too_many_or_too_long_texts_are_not_read(path, name):
    shape, kind, value, words = TEXTS[name]
    with h5py.File(path, "r+") as file:
        dataset = file.create_dataset("t", shape, kind)
        if value:
            dataset[1] = value
        with pytest.raises(ValueError) as error:
            read_texts(dataset)
        assert words in str(error.value)


def test_texts_are_inflated_only_to_their_own_size(path):
    with h5py.File(path, "r+") as file:
        bomb = file.create_dataset("t", (40,), "S20", chunks=(40,), compression="gzip")
        bomb.id.write_direct_chunk((0,), zlib.compress(bytes(1 << 20)))
        with pytest.raises(OSError, match="'/t' .* inflates to more than 800 bytes"):
            read_texts(bomb)


def test_attribute_has_at_most_its_number_of_values(path):
    with h5py.File(path, "r+") as file:
        file.attrs.update({"one": [7], "three": [1, 2, 3], "text": "a", "none": h5py.Empty("f4")})
        assert read_attribute(file, "one") == 7 and read_attribute(file, "text") == "a"
        assert read_attribute(file, "three", most=3).tolist() == [1, 2, 3]
        assert read_attribute(file, "absent", 5) == 5
        for name, most in (("three", 2), ("none", 1), ("absent", 1)):
            with pytest.raises(ValueError, match=name):
                read_attribute(file, name, most=most)
