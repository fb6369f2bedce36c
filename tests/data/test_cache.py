import os

import numpy as np
import pytest

from harness.data.cache import cached


class Reader:
    """A `read` that counts; the patches tell the file's first byte and their index."""

    def __init__(self):
        self.calls = []

    def __call__(self, path, patches):
        self.calls.append(list(patches))
        for i, (channels, cloud) in patches.items():
            channels[:], cloud[:] = path.read_bytes()[0] + i / 8, i
        return 5


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "S3A_x.hdf"
    path.write_bytes(b"\1\2\3")
    return path


def fill(read, path, indices=(0, 1, 2)):
    """Read patches, and check them against the file."""
    patches = {i: (np.zeros((4, 4, 9), np.float32), np.zeros((4, 4, 1), np.uint8)) for i in indices}
    out_of_range = read(path, patches)
    for i, (channels, cloud) in patches.items():
        assert (channels == path.read_bytes()[0] + i / 8).all() and (cloud == i).all()
    return out_of_range


def test_every_patch_is_read_once(scene, tmp_path):
    read = cached(source := Reader(), tmp_path / "cache", "a")
    assert fill(read, scene, [1]) == 5
    fill(read, scene)
    assert fill(read, scene) == 0
    fill(cached(source, tmp_path / "cache", "a"), scene)  # of another run
    assert source.calls == [[1], [0, 2]]


@pytest.mark.parametrize("change", ["modification time", "size", "path", "key"])
def test_other_file_or_key_is_read_anew(scene, tmp_path, change):
    read = cached(source := Reader(), tmp_path / "cache", "a")
    fill(read, scene)
    stat = scene.stat()
    if change == "modification time":
        scene.write_bytes(b"\7\2\3")
        os.utime(scene, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    if change == "size":
        scene.write_bytes(b"\7\2\3\4")
        os.utime(scene, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if change == "path":
        (tmp_path / "b").mkdir()
        other = tmp_path / "b" / scene.name
        other.write_bytes(b"\7\2\3")
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        scene = other
    if change == "key":
        read = cached(source, tmp_path / "cache", "b")
    fill(read, scene)
    assert source.calls == [[0, 1, 2], [0, 1, 2]]


def test_damaged_cache_file_is_replaced(scene, tmp_path):
    read = cached(source := Reader(), tmp_path / "cache", "a")
    fill(read, scene)
    (copy,) = (tmp_path / "cache").glob("*-1.raw")
    copy.write_bytes(copy.read_bytes()[:-1])
    fill(read, scene)
    fill(read, scene)
    assert source.calls == [[0, 1, 2], [1]]


def test_user_may_have_another_number_on_the_file_system(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    read = cached(source := Reader(), tmp_path / "cache", "a")
    fill(read, scene)
    fill(read, scene)
    assert source.calls == [[0, 1, 2]]


def foreign(copy, other):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(copy, 12345, -1)


FOREIGN = {
    "pipe": lambda copy, other: copy.unlink() or os.mkfifo(copy),
    "link": lambda copy, other: copy.unlink() or copy.symlink_to(other),
    "hard link": lambda copy, other: copy.unlink() or copy.hardlink_to(other),
    "another user": foreign,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_cache_file_that_others_may_have_made_is_replaced(scene, tmp_path, name):
    read = cached(source := Reader(), tmp_path / "cache", "a")
    fill(read, scene, [0, 1])
    other, copy = sorted((tmp_path / "cache").glob("*.raw"))
    if name == "hard link":
        other = other.rename(tmp_path / "other")
    FOREIGN[name](copy, other)
    fill(read, scene, [1])
    fill(read, scene, [1])
    assert source.calls == [[0, 1], [1]]


def test_links_in_a_shared_cache_are_not_written_through(scene, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda n: "guessed")
    read = cached(Reader(), tmp_path / "cache", "a")
    fill(read, scene, [0])
    (copy,) = (tmp_path / "cache").iterdir()
    copy.unlink()
    copy.with_suffix(".guessed.part").symlink_to(precious)
    fill(read, scene, [0])
    assert precious.read_text() == "precious"


def test_cache_that_cannot_be_written_is_no_error(scene, tmp_path, caplog):
    read = cached(source := Reader(), tmp_path / "cache", "a")
    (tmp_path / "cache").rmdir()
    fill(read, scene)
    fill(read, scene)
    assert len(source.calls) == 2 and "Could not write the cache file" in caplog.text


def test_cache_file_that_cannot_be_replaced_is_no_error(scene, tmp_path, caplog):
    """Such as a damaged file of another user; here a folder, as root may replace any file."""
    read = cached(source := Reader(), tmp_path / "cache", "a")
    fill(read, scene)
    (copy,) = (tmp_path / "cache").glob("*-1.raw")
    copy.unlink()
    copy.mkdir()
    fill(read, scene)
    assert source.calls == [[0, 1, 2], [1]] and "Could not write the cache file" in caplog.text
    assert len(list((tmp_path / "cache").iterdir())) == 3  # no temporary file remains


def test_missing_scene_is_left_to_the_reader(tmp_path):
    with pytest.raises(FileNotFoundError):
        fill(cached(Reader(), tmp_path / "cache", "a"), tmp_path / "absent")
