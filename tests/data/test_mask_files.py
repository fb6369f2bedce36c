import h5py
import numpy as np
import pytest

from harness.data.mask_files import find_masks, measured_pixels, read_mask
from harness.errors import UserError


@pytest.fixture
def run(tmp_path):
    """A run with two masks, and what a killed process left of a third."""
    (tmp_path / "masks").mkdir()
    for name in ("S3A_b.h5", "S3A_a.h5", ".S3A_c.12-34.part.h5"):
        (tmp_path / "masks" / name).touch()
    return tmp_path


def test_masks_are_listed_by_name_without_unfinished_ones(run):
    assert [path.name for path in find_masks(run, [])] == ["S3A_a.h5", "S3A_b.h5"]
    assert [path.name for path in find_masks(run, ["S3A_b"])] == ["S3A_b.h5"]


@pytest.mark.parametrize(
    ("folder", "names", "words"),
    [(".", ["S3A_a", "S3A_c"], "no mask of the scene 'S3A_c'"), ("masks", [], "No masks in")],
)
def test_missing_masks_are_named(run, folder, names, words):
    with pytest.raises(UserError, match=words):
        find_masks(run / folder, names)


def test_pixels_are_measured_where_no_temperature_is_missing(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["bts"] = [[[280, 280, 280], [280, np.nan, 280], [np.inf, 280, 280], [280, 280, 0]]]
        assert measured_pixels(file, (1, 4)).tolist() == [[True, False, False, False]]
        file["mask"] = np.zeros((1, 4), np.int16)
        with pytest.raises(ValueError, match="'mask' should hold bytes, found int16"):
            read_mask(file)
