import os

import h5py
import numpy as np
import pytest

from harness.inference.masks import MaskFolder

ROW = {"scene": "S3A_a", "seconds": 1.0}


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "S3A_a.hdf"
    path.write_bytes(b"as it was")
    return path


@pytest.fixture
def folder(tmp_path, scene):
    folder = MaskFolder(tmp_path / "masks", lambda: None, {"threshold": 0.5})
    folder.write(scene, np.zeros((2, 3), np.uint8), None, ROW)
    return folder


def test_mask_that_is_there_is_not_made_again(folder, scene):
    assert list(folder.deal([scene])) == []
    (row,) = folder.collect([scene])
    assert row["scene"] == "S3A_a" and row["write_seconds"] > 0


def test_mask_of_a_scene_that_changed_is_made_again(folder, scene):
    scene.write_bytes(b"otherwise")
    os.utime(scene, ns=(1, 1))
    assert list(folder.deal([scene])) == [scene]


def test_mask_made_otherwise_is_made_again(folder, scene, tmp_path):
    other = MaskFolder(tmp_path / "masks", lambda: None, {"threshold": 0.6})
    assert list(other.deal([scene])) == [scene]


@pytest.mark.parametrize("kind", ["truncated", "pipe", "folder"])
def test_what_is_no_mask_is_made_again(folder, scene, tmp_path, kind):
    path = tmp_path / "masks" / "S3A_a.h5"
    if kind == "truncated":
        os.truncate(path, 100)
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert list(folder.deal([scene])) == [scene]


def test_mask_holds_what_it_was_made_from(folder, scene, tmp_path):
    with h5py.File(tmp_path / "masks" / "S3A_a.h5") as file:
        assert file.attrs["scene_bytes"] == scene.stat().st_size
