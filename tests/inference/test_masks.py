import json
import os
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import damage_chunk

from data_loader import PatchGrid
from harness.inference.masks import TIMES, MaskFolder, compare_masks
from harness.inference.scores import SCENE_COLUMNS
from tools.make_scenes import make_scene, write_scene

MASK = np.eye(4, dtype=np.uint8)
VALID = np.arange(16).reshape(4, 4) % 5 > 0  # no data in half of the diagonal: 0, 5, 10, 15


@pytest.fixture
def paths(tmp_path):
    """Scenes whose order by folder is not that by name."""
    paths = [tmp_path / "day/S3A_b.hdf", tmp_path / "night/S3A_a.hdf"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"scene")
    return paths


def open_masks(tmp_path, model="a", no_data="network", check=lambda: None, complete=False):
    (tmp_path / "model.keras").write_text(model)
    masks = MaskFolder(tmp_path / "masks", check, tmp_path / "model.keras", no_data, complete)
    masks.remove_locks()
    return masks


def make_row(path, **changes):
    numbers = dict.fromkeys((*SCENE_COLUMNS, *TIMES, "part"), 1)
    return {**numbers, "scene": path.stem, "day_night": "day", "device": "0", **changes}


def write_all(masks, paths):
    for path in masks.take(paths):
        masks.write(path, MASK, VALID, None, None, make_row(path, seconds=2.0))


def test_rows_are_sorted_by_scene_and_contain_the_seconds_of_writing(tmp_path, paths):
    masks = open_masks(tmp_path)
    write_all(masks, paths)
    rows = masks.collect(paths)
    assert [row["scene"] for row in rows] == ["S3A_a", "S3A_b"]
    assert all(row["seconds"] == 2 + row["write_seconds"] > 2 for row in rows)
    # The lock files are gone.
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["S3A_a.h5", "S3A_b.h5"]


def test_scene_is_taken_once(tmp_path, paths):
    masks, other = open_masks(tmp_path), open_masks(tmp_path)
    assert next(masks.take(paths)) == paths[0]
    assert list(other.take(paths)) == [paths[1]]
    masks.stop()
    assert list(masks.take([tmp_path / "S3A_c.hdf"])) == []


def test_other_ranks_are_checked_once_per_own_scene(tmp_path, paths):
    # A check reads a file of each rank: for all scenes of all ranks that would be quadratic.
    checks = []
    masks, other = open_masks(tmp_path), open_masks(tmp_path, check=lambda: checks.append(1))
    assert next(masks.take(paths)) == paths[0]
    assert list(other.take(3 * paths)) == [paths[1]] and len(checks) == 1


@pytest.mark.parametrize("complete", [False, True])
def test_masks_of_a_complete_run_are_not_read_again(tmp_path, paths, complete):
    write_all(open_masks(tmp_path), paths)
    damage_chunk(tmp_path / "masks/S3A_b.h5", "mask")
    (tmp_path / "masks/S3A_a.h5").unlink()
    masks = open_masks(tmp_path, complete=complete)
    assert list(masks.take(paths)) == (paths[1:] if complete else paths)


@pytest.mark.parametrize(
    "change",
    ["nothing", "size", "modification time", "model", "no_data", "damage", "valid", "version"],
)
def test_mask_is_made_again_if_anything_has_changed(tmp_path, paths, caplog, change):
    write_all(open_masks(tmp_path), paths)
    stat, mask = paths[0].stat(), tmp_path / "masks/S3A_b.h5"
    if change == "size":
        paths[0].write_bytes(b"other scene")
        os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if change == "modification time":
        os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    if change == "damage":
        os.truncate(mask, mask.stat().st_size - 1)
    if change in ("valid", "version"):
        with h5py.File(mask, "a") as file:
            del file["valid"]
            if change == "version":  # as an earlier one wrote it
                del file.attrs["no_data"]
                file.attrs["scores"] = "accuracy f1"
    masks = open_masks(
        tmp_path,
        "b" if change == "model" else "a",
        "clear" if change == "no_data" else "network",
    )
    expected = {"nothing": [], "model": paths, "no_data": paths}.get(change, paths[:1])
    assert list(masks.take(paths)) == expected
    assert len(caplog.messages) == (change in ("damage", "valid"))
    if expected:
        with pytest.raises(
            OSError, match=f"{len(expected)} of 2 scenes are missing .* that of S3A_b"
        ):
            masks.collect(paths)


ROWS = {  # how somebody else has written the row of a mask
    "fraction as count": lambda row: {**row, "tp": 0.5},
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


@pytest.mark.parametrize("no_data", ["network", "clear"])
def test_mask_follows_no_data_and_probability_is_that_of_the_network(tmp_path, paths, no_data):
    masks, row = open_masks(tmp_path, no_data=no_data), make_row(paths[0])
    masks.write(paths[0], MASK, VALID, MASK / np.float32(3), MASK / np.float32(5), row)
    with h5py.File(tmp_path / "masks/S3A_b.h5") as file:
        expected = MASK if no_data == "network" else np.where(VALID, MASK, 0)
        np.testing.assert_array_equal(file["mask"], expected)
        np.testing.assert_array_equal(file["valid"], VALID)
        assert file["mask"].dtype == file["valid"].dtype == np.uint8
        np.testing.assert_array_equal(file["probability"], MASK / np.float32(3))
        np.testing.assert_array_equal(file["uncertainty"], MASK / np.float32(5))
        assert (file.attrs["scene"], file.attrs["no_data"]) == ("S3A_b.hdf", no_data)
        assert file.attrs["model"] == str(tmp_path / "model.keras")


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
