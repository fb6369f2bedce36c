import os
import zlib

import h5py
import numpy as np
import pytest

from harness.data.hdf5 import MAX_NUMBERS, open_hdf5, open_numbers, read_all, unpack
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
