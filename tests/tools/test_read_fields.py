"""The tools read scene files as the benchmark does; the truth is scored where there is one."""

import json

import h5py
import numpy as np
import pytest

from data_loader import read_scene
from harness.errors import UserError
from harness.records.report.pictures import read_masked_scene
from tools.lib.masks import Mask, open_masks, read_fields
from tools.lib.truth import score_truth
from tools.make_scenes import write_scene
from tools.validate_sst import read_masks

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
    fields = read_fields([Mask("bayes"), Mask("threshold")], 273.15, packed)
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


def write_other_scene(path, labelled, shape=SHAPE):
    """A scene without data in 3 rows, with cloud in a few pixels of its label."""
    arrays = {"bts": np.full((*shape, 3), 260.0), "refs": np.zeros((*shape, 6))}
    arrays["bts"][:3] = 0
    write_scene(path, arrays | ({"bayes": np.eye(*shape)[..., None] * 255} if labelled else {}))


def write_mask(path, scene):
    """The mask of a scene as a run writes it: cloud everywhere."""
    with h5py.File(scene) as file, h5py.File(path, "w") as mask:
        mask["mask"] = np.ones(file["bts"].shape[:2], np.uint8)
        mask["valid"] = (file["bts"][:] > 0).all(axis=-1).astype(np.uint8)
        accuracy = (file["bayes"][:] != 0).mean() if "bayes" in file else None
        mask.attrs["row"] = json.dumps({"accuracy": accuracy})
        mask.attrs["scene_bytes"] = scene.stat().st_size


def other_label(path):
    with h5py.File(path, "a") as file:
        file["bayes"][5, :9] = 255


def other_data(path):
    with h5py.File(path, "a") as file:
        file["bts"][9, 9] = 0


OTHER_SCENES = {  # whether it has a label, what it becomes
    "another label": (True, other_label),
    "other pixels without data": (False, other_data),
    "another size of the file": (False, lambda path: path.write_bytes(path.read_bytes() + b"0")),
    "another shape": (True, lambda path: write_other_scene(path, True, (24, 30))),
    "another shape, without label": (False, lambda path: write_other_scene(path, False, (24, 30))),
}


@pytest.mark.parametrize("what", OTHER_SCENES)
@pytest.mark.parametrize(
    "read",
    [
        lambda mask, scene: read_fields(open_masks([str(mask.parent)]), 273.15, scene),
        lambda mask, scene: read_masks(mask, scene),
        lambda mask, scene: read_masked_scene(mask, scene),
    ],
    ids=["judge, contact_sheet, study", "validate_sst", "report"],
)
def test_mask_of_another_scene_with_the_same_name_is_an_error(tmp_path, what, read):
    labelled, change = OTHER_SCENES[what]
    scene, mask = tmp_path / "night/S3A_x.hdf", tmp_path / "masks/S3A_x.h5"
    mask.parent.mkdir()
    write_other_scene(scene, labelled)
    write_mask(mask, scene)
    change(scene)
    with pytest.raises(UserError, match=f"{scene} is not the file that was masked: {mask} is"):
        read(mask, scene)


@pytest.mark.parametrize("labelled", [True, False])
def test_mask_is_read_with_a_moved_scene_and_without_what_an_earlier_version_lacks(
    tmp_path, labelled
):
    scene, mask = tmp_path / "night/S3A_x.hdf", tmp_path / "masks/S3A_x.h5"
    mask.parent.mkdir()
    write_other_scene(scene, labelled)
    write_mask(mask, scene)
    scene = scene.rename(tmp_path / scene.name)
    fields = read_fields(open_masks([str(mask.parent)]), 273.15, scene)
    assert fields["mask 0"].all() and not fields["measured"][:3].any()
    with h5py.File(mask, "a") as file:
        del file["valid"], file.attrs["row"], file.attrs["scene_bytes"]
    (other_label if labelled else other_data)(scene)
    assert read_fields(open_masks([str(mask.parent)]), 273.15, scene)["mask 0"].all()
