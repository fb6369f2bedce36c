import os
import shutil

import h5py
import numpy as np
import pytest

from harness.data import hdf5_files
from harness.data.hdf5_files import ForbiddenSource, open_dataset, open_file

NUMBERS = np.arange(24.0).reshape(2, 3, 4)


@pytest.fixture
def path(tmp_path):
    """A file in a folder of its own, with `x`, beside a folder with another such file."""
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "a.h5", "w") as file:
            file["x"], file["deep/x"] = NUMBERS, NUMBERS
    return tmp_path / "own" / "a.h5"


def add(path, name, what):
    with h5py.File(path, "r+") as file:
        file[name] = what


def add_virtual(path, source, source_name="x", shape=NUMBERS.shape):
    with h5py.File(path, "r+") as file:
        layout = h5py.VirtualLayout(shape, "f8")
        layout[:] = h5py.VirtualSource(str(source), source_name, shape)
        file.create_virtual_dataset("v", layout)


def read(path, name):
    with open_file(path) as file:
        dataset = open_dataset(file, name)
        return None if dataset is None else dataset[:]


# --- files


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / "a.h5")
    with pytest.raises(OSError, match="not a regular file"):
        open_file(tmp_path / "a.h5")


def test_links_to_regular_files_are_opened(path):
    (path.parent / "link.h5").symlink_to(path)
    np.testing.assert_array_equal(read(path.parent / "link.h5", "x"), NUMBERS)


# --- links


@pytest.mark.parametrize("name", ["x", "/x", "deep/x", "deep/./x"])
def test_dataset_is_found_by_name(path, name):
    np.testing.assert_array_equal(read(path, name), NUMBERS)


@pytest.mark.parametrize(
    "name", ["y", "deep", "x/y", "deep/y", "/", "deep/x/y", "dangling", "type"]
)
def test_what_is_no_dataset_is_none(path, name):
    add(path, "dangling", h5py.SoftLink("/nowhere"))
    add(path, "type", np.dtype("f8"))
    assert read(path, name) is None


@pytest.mark.parametrize("target", ["/x", "x", "deep/x", "/deep/up/x"])
def test_soft_links_are_followed(path, target):
    add(path, "deep/up", h5py.SoftLink("/"))
    add(path, "link", h5py.SoftLink(target))
    np.testing.assert_array_equal(read(path, "link"), NUMBERS)


def test_circle_of_soft_links_ends(path):
    add(path, "a", h5py.SoftLink("b"))
    add(path, "b", h5py.SoftLink("deep/../b/a"))
    add(path, "c", h5py.SoftLink("c"))
    assert read(path, "a") is None  # HDF5 knows no '..'
    with pytest.raises(ForbiddenSource, match="one link too many"):
        read(path, "c")


@pytest.mark.parametrize("name", ["link", "soft", "group/x"])
def test_link_out_of_the_file_is_not_followed(path, name):
    other = path.parent.parent / "other" / "a.h5"
    add(path, "link", h5py.ExternalLink(str(other), "x"))
    add(path, "soft", h5py.SoftLink("link"))
    add(path, "group", h5py.ExternalLink(str(other), "/"))
    with h5py.File(path) as file:  # h5py follows it
        np.testing.assert_array_equal(file[name], NUMBERS)
    other.unlink()
    os.mkfifo(other)  # whoever opens it waits for ever
    with pytest.raises(ForbiddenSource, match="found a link out of the file") as error:
        read(path, name)
    assert str(path) in str(error.value)


# --- external storage


def add_external(path, target):
    with h5py.File(path, "r+") as file:
        file.create_dataset("e", NUMBERS.shape, "f8", external=[(str(target), 0, NUMBERS.nbytes)])


@pytest.mark.parametrize("target", ["e.bin", "below/e.bin"])
def test_external_storage_in_the_own_folder_is_read(path, target):
    (path.parent / target).parent.mkdir(exist_ok=True)
    NUMBERS.tofile(path.parent / target)
    add_external(path, path.parent / target)
    np.testing.assert_array_equal(read(path, "e"), NUMBERS)


def test_name_of_external_storage_counts_from_the_working_directory(path, monkeypatch):
    NUMBERS.tofile(path.parent / "e.bin")
    add_external(path, "e.bin")
    monkeypatch.chdir(path.parent)
    np.testing.assert_array_equal(read(path, "e"), NUMBERS)
    monkeypatch.chdir(path.parent.parent)
    NUMBERS.tofile("e.bin")  # HDF5 would read this one
    with pytest.raises(ForbiddenSource):
        read(path, "e")


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "{own}/../other/a.h5", "{own}/link", "{own}/no", "{own}/folder/../a.h5"],
)
def test_external_storage_elsewhere_is_refused(path, target):
    (path.parent / "link").symlink_to(path.parent.parent / "other" / "a.h5")
    (path.parent / "folder").symlink_to(path.parent.parent / "other" / "deep")
    (path.parent.parent / "other" / "deep").mkdir()
    target = target.format(own=path.parent)
    add_external(path, target)
    with pytest.raises(ForbiddenSource, match="'/e' should have its numbers in this file") as error:
        read(path, "e")
    assert str(path) in str(error.value) and repr(target) in str(error.value)


def test_name_too_long_for_h5py_is_refused(path):
    """It gives the first 255 bytes, here those of a regular file."""
    folder = path.parent / ("d" * 200)
    folder.mkdir()
    inside = f"{folder}/{'/' * (254 - len(str(folder)) - 6)}e.bin"
    NUMBERS.tofile(inside)
    add_external(path, inside + "/../../../../other/a.h5")
    with pytest.raises(ForbiddenSource, match="over 250 bytes"):
        read(path, "e")


# --- virtual datasets


@pytest.mark.parametrize("source", [".", "b.h5", "{own}/b.h5", "below/b.h5"])
def test_virtual_dataset_of_the_own_folder_is_read(path, source):
    (path.parent / "below").mkdir()
    for copy in ("b.h5", "below/b.h5"):
        shutil.copy(path, path.parent / copy)
    add_virtual(path, source.format(own=path.parent))
    np.testing.assert_array_equal(read(path, "v"), NUMBERS)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{own}/../other/a.h5", "x"),
        ("../other/a.h5", "x"),
        ("link.h5", "x"),
        ("absent.h5", "x"),
        ("b.h5", "absent"),
        ("b.h5", "v"),
        ("b.h5", "out"),
        ("b.h5", "e"),
        (".", "v"),
    ],
)
def test_virtual_dataset_of_elsewhere_is_refused(path, source, name):
    (path.parent / "link.h5").symlink_to(path.parent.parent / "other" / "a.h5")
    beside = path.parent / "b.h5"
    shutil.copy(path, beside)
    add_virtual(beside, ".")
    add(beside, "out", h5py.ExternalLink("../other/a.h5", "x"))
    add_external(beside, "/etc/passwd")
    add_virtual(path, source.format(own=path.parent), name)
    with pytest.raises(ForbiddenSource) as error:
        read(path, "v")
    assert str(path.parent) in str(error.value)


def test_pattern_of_many_sources_is_refused(path):
    """HDF5 makes a0.h5 of a%b.h5 for the first block."""
    shutil.copy(path, path.parent / "a%b.h5")
    (path.parent / "a0.h5").symlink_to(path.parent.parent / "other" / "a.h5")
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    space = h5py.h5s.create_simple((1, 2, 3, 4), (h5py.h5s.UNLIMITED, 2, 3, 4))
    space.select_hyperslab(
        (0, 0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1, 1), stride=(1, 1, 1, 1), block=(1, 2, 3, 4)
    )
    plan.set_virtual(space, b"a%b.h5", b"x", h5py.h5s.create_simple(NUMBERS.shape))
    with h5py.File(path, "r+", libver="latest") as file:
        space = h5py.h5s.create_simple((1, 2, 3, 4), (h5py.h5s.UNLIMITED, 2, 3, 4))
        h5py.h5d.create(file.id, b"v", h5py.h5t.IEEE_F64LE, space, plan)
    with h5py.File(path) as file:  # HDF5 goes there
        np.testing.assert_array_equal(file["v"][0], NUMBERS)
    with pytest.raises(ForbiddenSource, match="the pattern 'a%b.h5'"):
        read(path, "v")


def test_virtual_dataset_of_the_working_directory_is_refused(path, monkeypatch):
    monkeypatch.chdir(path.parent.parent / "other")
    shutil.copy(path, "elsewhere.h5")
    add_virtual(path, "elsewhere.h5")
    with h5py.File(path) as file:  # HDF5 finds it
        np.testing.assert_array_equal(file["v"], NUMBERS)
    with pytest.raises(ForbiddenSource, match="elsewhere.h5"):
        read(path, "v")


def test_source_that_is_no_hdf5_file_is_an_error(path, monkeypatch):
    (path.parent / "b.h5").write_bytes(b"no HDF5")
    monkeypatch.chdir(path.parent.parent / "other")
    shutil.copy(path, "b.h5")
    add_virtual(path, "b.h5")
    with pytest.raises(OSError):
        read(path, "v")


def test_number_of_sources_is_limited(path, monkeypatch):
    monkeypatch.setattr(hdf5_files, "MAX_PLACES", 1)
    with h5py.File(path, "r+") as file:
        layout = h5py.VirtualLayout((2, *NUMBERS.shape), "f8")
        for i in range(2):
            layout[i] = h5py.VirtualSource(".", "x", NUMBERS.shape)
        file.create_virtual_dataset("v", layout)
    with pytest.raises(ForbiddenSource, match="2 sources"):
        read(path, "v")
