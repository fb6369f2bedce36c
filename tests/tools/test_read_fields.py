"""The tools read scene files as the benchmark does; the truth is scored where there is one."""

import h5py
import numpy as np
import pytest

from data_loader import read_scene
from harness.errors import UserError
from harness.records.report.pictures import read_masked_scene
from tools.lib.masks import Mask, read_fields
from tools.lib.truth import score_truth
from tools.make_scenes import write_scene

SHAPE = (20, 30)
NAMES = ("S3A_SL_1_RBT____20180701T000000_NT_003", "S3A_SL_1_RBT____20180702T000000_NT_003")
FILL = -32768


@pytest.fixture
def packed(tmp_path):
    """A scene whose numbers are packed by the NetCDF conventions, some of them missing."""
    rng = np.random.default_rng(0)
    bts = rng.integers(-3000, 9000, (*SHAPE, 3)).astype(np.int16)
    bts[:3], bts[5, :4] = FILL, 0  # 0 is 200 K
    label = rng.integers(0, 2, (*SHAPE, 1)).astype(np.int16)
    label[10:12] = FILL
    path = tmp_path / "S3A_x.hdf"
    refs = np.full((*SHAPE, 6), 5000, np.int16)
    write_scene(path, {"bts": bts, "refs": refs, "bayes": label})
    scales = {"bts": (0.01, 200.0), "refs": (1e-4, 0.0), "bayes": (2.0, 0.0)}
    with h5py.File(path, "a") as file:
        for name, (scale, offset) in scales.items():
            attributes = {"scale_factor": scale, "add_offset": offset, "_FillValue": np.int16(FILL)}
            file[name].attrs.update(attributes)
    return path


def test_tools_unpack_numbers_like_the_benchmark(packed):
    scene = read_scene(packed, (*SHAPE, 9))
    assert 0 < scene.valid.mean() < 1
    fields = read_fields([Mask("bayes"), Mask("threshold")], 273.15, packed.stem, packed)
    np.testing.assert_array_equal(fields["measured"], scene.valid)
    np.testing.assert_array_equal(fields["mask 0"], scene.cloud[..., 0] != 0)
    np.testing.assert_array_equal(fields["mask 1"], scene.bt_12um < 273.15)


def test_report_unpacks_numbers_like_the_benchmark(packed, tmp_path):
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file["mask"] = np.ones(SHAPE, np.uint8)
    scene, shown = read_scene(packed, (*SHAPE, 9)), read_masked_scene(tmp_path / "mask.h5", packed)
    np.testing.assert_array_equal(shown.label, scene.cloud[..., 0] != 0)
    np.testing.assert_array_equal(np.isfinite(shown.temperatures).all(axis=-1), scene.valid)
    np.testing.assert_array_equal(np.nan_to_num(shown.temperatures[..., 2]), scene.bt_12um)
    np.testing.assert_allclose(shown.reflectances, 0.5)


@pytest.fixture
def scenes(tmp_path):
    """Two scenes with truth by night: one half cloud, one cloud everywhere; the label is cloud."""
    for name, share in zip(NAMES, (0.5, 1.0), strict=True):
        truth = np.zeros((*SHAPE, 1), np.uint8)
        truth[: int(share * SHAPE[0])] = 1
        arrays = {"bts": np.full((*SHAPE, 3), 260.0), "truth": truth}
        write_scene(tmp_path / f"night/{name}.hdf", {**arrays, "bayes": np.ones((*SHAPE, 1))})
    return tmp_path


def test_scores_ignore_scenes_for_which_they_are_not_defined(scenes):
    scores, _ = score_truth(Mask("bayes"), scenes, 273.15)
    # The scene that is cloud everywhere has no balanced accuracy.
    assert scores == {"accuracy": 0.75, "night": 0.75, "balanced_accuracy": 0.5}


def test_scores_that_no_scene_defines_are_absent(scenes):
    scores, _ = score_truth(Mask("bayes"), scenes, 273.15, {NAMES[1]})
    assert scores == {"accuracy": 1.0, "night": 1.0}


def test_damaged_scene_that_is_not_scored_is_not_read(scenes):
    (scenes / f"night/{NAMES[1]}.hdf").write_bytes(b"damaged")
    with pytest.raises(UserError, match=NAMES[1]):
        score_truth(Mask("bayes"), scenes, 273.15)
    scores, _ = score_truth(Mask("bayes"), scenes, 273.15, {NAMES[0]})
    assert scores["accuracy"] == 0.5
