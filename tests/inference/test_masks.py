import json
import os
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from data_loader import PatchGrid
from harness.inference.masks import TIMES, MaskFolder, compare_masks
from harness.inference.scores import SCENE_COLUMNS
from tools.make_scenes import make_scene, write_scene

MASK = np.eye(4, dtype=np.uint8)


@pytest.fixture
def paths(tmp_path):
    """Scenes whose order by folder is not that by name."""
    paths = [tmp_path / "day/S3A_b.hdf", tmp_path / "night/S3A_a.hdf"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"scene")
    return paths


def open_masks(tmp_path, model="a"):
    masks = MaskFolder(tmp_path / "masks", lambda: None, model)
    masks.remove_locks()
    return masks


def make_row(path, **changes):
    numbers = dict.fromkeys((*SCENE_COLUMNS, *TIMES, "part"), 1)
    return {**numbers, "scene": path.stem, "day_night": "day", "device": "0", **changes}


def write_all(masks, paths):
    for path in masks.take(paths):
        masks.write(path, MASK, None, make_row(path, seconds=2.0))


def test_rows_are_sorted_by_scene_and_contain_the_seconds_of_writing(tmp_path, paths):
    masks = open_masks(tmp_path)
    write_all(masks, paths)
    rows = masks.collect(paths)
    assert [row["scene"] for row in rows] == ["S3A_a", "S3A_b"]
    assert all(row["seconds"] == 2 + row["write_seconds"] > 2 for row in rows)
    # The lock files are gone.
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["S3A_a.h5", "S3A_b.h5"]


def test_scene_is_taken_once(tmp_path, paths):
    masks, other = open_masks(tmp_path), MaskFolder(tmp_path / "masks", lambda: None, "a")
    assert next(masks.take(paths)) == paths[0]
    assert list(other.take(paths)) == [paths[1]]
    masks.stop()
    assert list(masks.take([tmp_path / "S3A_c.hdf"])) == []


@pytest.mark.parametrize("change", ["nothing", "size", "modification time", "model", "damage"])
def test_mask_is_made_again_if_anything_has_changed(tmp_path, paths, change):
    write_all(open_masks(tmp_path), paths)
    stat, mask = paths[0].stat(), tmp_path / "masks/S3A_b.h5"
    if change == "size":
        paths[0].write_bytes(b"other scene")
        os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if change == "modification time":
        os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    if change == "damage":
        os.truncate(mask, mask.stat().st_size - 1)
    masks = open_masks(tmp_path, "b" if change == "model" else "a")
    expected = {"nothing": [], "model": paths}.get(change, paths[:1])
    assert list(masks.take(paths)) == expected
    if expected:
        with pytest.raises(
            OSError, match=f"{len(expected)} of 2 scenes are missing .* that of S3A_b"
        ):
            masks.collect(paths)


ROWS = {  # how somebody else has written the row of a mask
    "number as text": lambda row: {**row, "accuracy": "0.9"},
    "text as number": lambda row: {**row, "day_night": 1},
    "too large": lambda row: {**row, "seconds": 10**400},
    "nothing": lambda row: None,
    "list": lambda row: [*row],
    "no column": lambda row: {name: value for name, value in row.items() if name != "tp"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_mask_with_a_row_of_other_types_is_made_again(tmp_path, paths, kind):
    write_all(open_masks(tmp_path), paths)
    with h5py.File(tmp_path / "masks/S3A_b.h5", "a") as file:
        file.attrs["row"] = json.dumps(ROWS[kind](json.loads(file.attrs["row"])))
    assert list(open_masks(tmp_path).take(paths)) == paths[:1]


def test_mask_that_leads_to_another_file_is_made_again(tmp_path, paths):
    write_all(open_masks(tmp_path), paths)
    with h5py.File(tmp_path / "masks/S3A_b.h5", "a") as file:
        del file["mask"]
        file["mask"] = h5py.ExternalLink("S3A_a.h5", "mask")
    assert list(open_masks(tmp_path).take(paths)) == paths[:1]


def test_probability_is_stored_if_it_is_given(tmp_path, paths):
    masks, row = open_masks(tmp_path), make_row(paths[0])
    masks.write(paths[0], MASK, MASK / np.float32(3), row, model="a.keras")
    with h5py.File(tmp_path / "masks/S3A_b.h5") as file:
        np.testing.assert_array_equal(file["mask"], MASK)
        np.testing.assert_array_equal(file["probability"], MASK / np.float32(3))
        assert (file.attrs["scene"], file.attrs["model"]) == ("S3A_b.hdf", "a.keras")


def test_masks_of_two_predictors_are_compared_without_labels(tmp_path):
    scene = make_scene(np.random.default_rng(3), 50, 60)
    del scene["bayes"]
    write_scene(tmp_path / "S3A_x.hdf", scene)
    probability = np.full((50, 60), 0.5)  # not cloud: it is not above the threshold
    other = probability.copy()
    other[0, :6] = 0.51

    def predictor(result):
        return type("Fixed", (SimpleNamespace,), {"__call__": lambda self, scene: (result, 0.1)})(
            padding=lambda *size: PatchGrid(*size, 32, 8).padding
        )

    found = compare_masks(predictor(probability), predictor(other), tmp_path / "S3A_x.hdf", 9)
    assert found == {"scene": "S3A_x", "pixels": 6, "share": 6 / 3000}
