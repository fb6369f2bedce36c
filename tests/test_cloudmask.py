"""A scene masked by the function and by a run: the same mask."""

import h5py
import keras
import numpy as np
import pytest
from conftest import HEIGHT, PATCH, WIDTH, start

from cloudmask import predict_scene
from harness.errors import UserError
from harness.networks.model_files import read_model
from tools.make_scenes import make_scene, write_scene

AS_RUN = {"patch_size": PATCH, "crop_size": 10}  # as conftest.settings


@pytest.fixture(scope="module")
def model(finished):
    return finished / "model.keras"


@pytest.fixture(scope="module")
def masked(finished, model, settings, tmp_path_factory):
    """Folders of masks by inference_mode."""
    keys = {**settings, "inference_mode": "scene", "keep_probability": True}
    folder = tmp_path_factory.mktemp("whole_scenes")
    run = start(folder, keys, "--mode", "inference", "--model", str(model))
    assert run.status == 0
    return {"patches": finished / "masks", "scene": run.folder / "masks"}


@pytest.mark.parametrize("mode", ["patches", "scene"])
def test_scene_gets_the_mask_of_a_run(dataset, model, masked, mode):
    paths = sorted((dataset / "ssts").rglob("S3A*.hdf"))
    assert len(paths) == 2
    for path, no_data in zip(paths, ("network", "clear"), strict=True):
        mask, probability = predict_scene(model, path, mode=mode, no_data=no_data, **AS_RUN)
        assert (mask.dtype, probability.dtype) == (np.uint8, np.float32)
        with h5py.File(masked[mode] / f"{path.stem}.h5") as file, h5py.File(path) as scene:
            valid = (np.nan_to_num(scene["bts"][:]) != 0).all(axis=-1)
            ours = file["mask"] & valid if no_data == "clear" else file["mask"][:]
            np.testing.assert_array_equal(mask, ours)
            expected = np.where(valid, file["probability"][:], np.nan)
        np.testing.assert_array_equal(probability, expected)
        assert 0 < np.isnan(probability).mean() < 0.5 and mask.shape == (HEIGHT, WIDTH)


def test_scene_of_any_size_without_label_is_masked_by_a_model_in_memory(model, tmp_path):
    scene = make_scene(np.random.default_rng(5), 45, 61)
    del scene["bayes"]
    write_scene(tmp_path / "mine.hdf", scene)
    network = read_model(model)
    found = predict_scene(str(model), str(tmp_path / "mine.hdf"), **AS_RUN)
    sequential = keras.Sequential([keras.Input((None, None, 9)), network])
    for each in (network, sequential):
        mask, probability = predict_scene(each, tmp_path / "mine.hdf", **AS_RUN)
        assert mask.shape == (45, 61)
        np.testing.assert_array_equal(mask, found[0])
        np.testing.assert_allclose(probability, found[1], atol=1e-5)


def tiny(n_channels, bias=0.0, outputs=1):
    inputs = keras.Input((None, None, n_channels))
    constant = keras.initializers.Constant(bias)
    return keras.Model(inputs, keras.layers.Conv2D(outputs, 1, bias_initializer=constant)(inputs))


@pytest.mark.parametrize(
    ("network", "options", "reason"),
    [
        (tiny(9), {"mode": "strips"}, "'patches' or 'scene', found 'strips'"),
        (tiny(9), {"no_data": "cloud"}, "'network' or 'clear', found 'cloud'"),
        (tiny(9), {"patch_size": 64}, "smaller than patch_size, found 80 and 64"),
        (tiny(9), {"patch_size": 64, "crop_size": 7}, "even .* found 7 and 64"),
        (tiny(5), AS_RUN, r"takes \(rows, columns, 5\), expected \(rows, columns, 9\)\. Choose an"),
        (tiny(9, outputs=2), AS_RUN, r"gives \(rows, columns, 2\) for \(rows, columns, 9\)"),
        (tiny(9, np.nan), AS_RUN, "not finite for .*S3A"),
        ("absent.keras", AS_RUN, "No model file absent.keras"),
    ],
)
def test_what_cannot_be_used_is_reported(dataset, network, options, reason):
    path = next((dataset / "ssts").rglob("S3A*.hdf"))
    with pytest.raises((UserError, FileNotFoundError), match=reason):
        predict_scene(network, path, **options)


def test_file_that_is_no_scene_is_reported(tmp_path):
    (tmp_path / "S3A_x.hdf").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="S3A_x.hdf cannot be used"):
        predict_scene(tiny(9), tmp_path / "S3A_x.hdf")


def test_wrong_path_of_a_scene_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="No scene file .*absent.hdf. Check the path"):
        predict_scene(tiny(9), tmp_path / "absent.hdf")
