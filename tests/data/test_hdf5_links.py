import os
import shutil

import h5py
import numpy as np
import pytest

from harness.data.hdf5_links import MAX_PLACES, open_dataset

NUMBERS = np.arange(24.0).reshape(2, 3, 4)


@pytest.fixture
def path(tmp_path):
    """A file with `x` and `deep/x` in a folder of its own, beside a folder with such a file."""
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "a.h5", "w") as file:
            file["x"], file["deep/x"] = NUMBERS, NUMBERS
    return tmp_path / "own" / "a.h5"


def add(path, name, what):
    with h5py.File(path, "r+") as file:
        file[name] = what


def add_external(path, target, n_files=1):
    shape, places = (n_files, *NUMBERS.shape), [(str(target), 0, NUMBERS.nbytes)] * n_files
    with h5py.File(path, "r+") as file:
        file.create_dataset("e", shape if n_files > 1 else NUMBERS.shape, "f8", external=places)


def add_virtual(path, source, source_name="x", n_sources=1):
    with h5py.File(path, "r+") as file:
        layout = h5py.VirtualLayout((n_sources, *NUMBERS.shape), "f8")
        for i in range(n_sources):
            layout[i] = h5py.VirtualSource(str(source), source_name, NUMBERS.shape)
        file.create_virtual_dataset("v", layout)


def read(path, name):
    with h5py.File(path) as file:
        dataset = open_dataset(file, name)
        return None if dataset is None else dataset[:]


def read_with_h5py(path, name):
    with h5py.File(path) as file:
        return file[name][:]


# --- links


@pytest.mark.parametrize("name", ["x", "/x", "deep/x", "deep/./x", "soft", "relative", "up/deep/x"])
def test_dataset_is_found_by_name_and_soft_links(path, name):
    add(path, "soft", h5py.SoftLink("/deep/x"))
    add(path, "relative", h5py.SoftLink("deep/x"))
    add(path, "up", h5py.SoftLink("/"))
    np.testing.assert_array_equal(read(path, name), NUMBERS)


@pytest.mark.parametrize(
    "name", ["y", "deep", "x/y", "deep/y", "/", "deep/x/y", "dangling", "parent", "type"]
)
def test_other_objects_are_none(path, name):
    add(path, "dangling", h5py.SoftLink("/nowhere"))
    add(path, "parent", h5py.SoftLink("deep/../x"))  # HDF5 has no '..'
    add(path, "type", np.dtype("f8"))
    assert read(path, name) is None


def test_circle_of_soft_links_ends(path):
    add(path, "a", h5py.SoftLink("b"))
    add(path, "b", h5py.SoftLink("a"))
    with pytest.raises(ValueError, match="too many links"):
        read(path, "a")


@pytest.mark.parametrize("name", ["link", "soft", "group/x"])
def test_link_out_of_the_file_is_not_followed(path, name):
    other = path.parent.parent / "other" / "a.h5"
    add(path, "link", h5py.ExternalLink(str(other), "x"))
    add(path, "soft", h5py.SoftLink("link"))
    add(path, "group", h5py.ExternalLink(str(other), "/"))
    np.testing.assert_array_equal(read_with_h5py(path, name), NUMBERS)  # h5py follows it
    other.unlink()
    os.mkfifo(other)  # opening it would block
    with pytest.raises(ValueError, match="found a link out of the file"):
        read(path, name)


# --- external storage


@pytest.mark.parametrize("target", ["e.bin", "below/e.bin"])
def test_external_storage_in_the_own_folder_is_read(path, target):
    (path.parent / target).parent.mkdir(exist_ok=True)
    NUMBERS.tofile(path.parent / target)
    add_external(path, path.parent / target)
    np.testing.assert_array_equal(read(path, "e"), NUMBERS)


def test_name_of_external_storage_is_relative_to_the_working_directory(path, monkeypatch):
    NUMBERS.tofile(path.parent / "e.bin")
    add_external(path, "e.bin")
    monkeypatch.chdir(path.parent)
    np.testing.assert_array_equal(read(path, "e"), NUMBERS)
    monkeypatch.chdir(path.parent.parent)
    NUMBERS.tofile("e.bin")  # HDF5 would read this one
    with pytest.raises(ValueError, match="e.bin"):
        read(path, "e")


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "{own}/../other/a.h5", "{own}/link", "{own}/no", "{own}/folder/../a.h5"],
)
def test_external_storage_elsewhere_is_an_error(path, target):
    (path.parent / "link").symlink_to(path.parent.parent / "other" / "a.h5")
    (path.parent / "folder").symlink_to(path.parent.parent / "other" / "deep")
    (path.parent.parent / "other" / "deep").mkdir()
    target = target.format(own=path.parent)
    add_external(path, target)
    with pytest.raises(ValueError, match="'/e' should have its numbers in this file") as error:
        read(path, "e")
    assert repr(target) in str(error.value)


def test_number_of_external_files_is_limited(path):
    NUMBERS.tofile(path.parent / "e.bin")
    add_external(path, path.parent / "e.bin", n_files=MAX_PLACES + 1)
    with pytest.raises(ValueError, match="1001 files"):
        read(path, "e")


def test_name_too_long_for_h5py_is_an_error(path):
    """It returns the first 255 bytes, here those of a regular file in the folder."""
    folder = path.parent / ("d" * 200)
    folder.mkdir()
    inside = f"{folder}/{'/' * (254 - len(str(folder)) - 6)}e.bin"
    NUMBERS.tofile(inside)
    add_external(path, inside + "/../../../../other/a.h5")
    with pytest.raises(ValueError, match="more than 250 bytes"):
        read(path, "e")


# --- virtual datasets


@pytest.mark.parametrize("source", [".", "b.h5", "{own}/b.h5", "below/b.h5"])
def test_virtual_dataset_of_the_own_folder_is_read(path, source):
    (path.parent / "below").mkdir()
    for copy in ("b.h5", "below/b.h5"):
        shutil.copy(path, path.parent / copy)
    add_virtual(path, source.format(own=path.parent))
    np.testing.assert_array_equal(read(path, "v")[0], NUMBERS)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{own}/../other/a.h5", "x"), ("../other/a.h5", "x"), ("link.h5", "x"), ("absent.h5", "x"),
        ("b.h5", "absent"), ("b.h5", "v"), ("b.h5", "out"), ("b.h5", "e"), (".", "v"),
    ],
)  # fmt: skip
def test_virtual_dataset_of_other_sources_is_an_error(path, source, name):
    (path.parent / "link.h5").symlink_to(path.parent.parent / "other" / "a.h5")
    beside = path.parent / "b.h5"
    shutil.copy(path, beside)
    add_virtual(beside, ".")
    add(beside, "out", h5py.ExternalLink("../other/a.h5", "x"))
    add_external(beside, "/etc/passwd")
    add_virtual(path, source.format(own=path.parent), name)
    with pytest.raises(ValueError, match="found"):
        read(path, "v")


def test_pattern_of_many_sources_is_an_error(path):
    """HDF5 opens a0.h5 for the first block of a%b.h5."""
    shutil.copy(path, path.parent / "a%b.h5")
    (path.parent / "a0.h5").symlink_to(path.parent.parent / "other" / "a.h5")
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    unlimited = h5py.h5s.UNLIMITED
    space = h5py.h5s.create_simple((1, 2, 3, 4), (unlimited, 2, 3, 4))
    space.select_hyperslab(
        (0, 0, 0, 0), (unlimited, 1, 1, 1), stride=(1, 1, 1, 1), block=(1, 2, 3, 4)
    )
    properties.set_virtual(space, b"a%b.h5", b"x", h5py.h5s.create_simple(NUMBERS.shape))
    with h5py.File(path, "r+", libver="latest") as file:
        space = h5py.h5s.create_simple((1, 2, 3, 4), (unlimited, 2, 3, 4))
        h5py.h5d.create(file.id, b"v", h5py.h5t.IEEE_F64LE, space, properties)
    np.testing.assert_array_equal(read_with_h5py(path, "v")[0], NUMBERS)  # h5py goes there
    with pytest.raises(ValueError, match="the pattern 'a%b.h5'"):
        read(path, "v")


def test_virtual_dataset_of_the_working_directory_is_an_error(path, monkeypatch):
    monkeypatch.chdir(path.parent.parent / "other")
    shutil.copy(path, "elsewhere.h5")
    add_virtual(path, "elsewhere.h5")
    np.testing.assert_array_equal(read_with_h5py(path, "v")[0], NUMBERS)  # HDF5 finds it
    with pytest.raises(ValueError, match="elsewhere.h5"):
        read(path, "v")


def test_source_that_is_no_hdf5_file_is_an_error(path, monkeypatch):
    (path.parent / "b.h5").write_bytes(b"no HDF5")
    monkeypatch.chdir(path.parent.parent / "other")
    shutil.copy(path, "b.h5")  # which HDF5 would read
    add_virtual(path, "b.h5")
    with pytest.raises(OSError, match="file signature not found"):
        read(path, "v")


def test_number_of_sources_is_limited(path):
    add_virtual(path, ".", n_sources=MAX_PLACES + 1)
    with pytest.raises(ValueError, match="1001 sources"):
        read(path, "v")
