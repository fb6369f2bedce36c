import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf

from data_loader import PatchGrid
from harness.errors import UserError
from harness.inference import predictor as prediction
from harness.inference.predictor import Predictor, predictor_that_fits
from harness.inference.windows import StripGrid
from harness.networks.geometry import geometry
from model import NETWORKS, unet

EVEN = ((0, 0), (0, 0))  # the padding of patches that begin with the scene


def with_strong_weights(model):
    """Give a model weights by which its output depends visibly on all that it can see."""
    rng = np.random.default_rng(3)
    model.set_weights([w + rng.normal(scale=0.01, size=w.shape) for w in model.get_weights()])
    return model


def padded_scene(grid, height, width):
    scene = np.random.default_rng(0).normal(size=(height, width, 9)).astype(np.float32)
    return np.pad(scene, [*grid.padding, (0, 0)])


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_patches_equal_a_plain_loop_over_the_model(batch):
    model = with_strong_weights(unet((32, 32, 9)))
    grid = PatchGrid(50, 70, 32, 8)  # stride 24: 3 x 3 patches of 32, padded to 80 x 80
    padded = padded_scene(grid, 50, 70)
    expected = np.zeros((72, 72))
    for row in range(3):
        for col in range(3):
            patch = padded[24 * row : 24 * row + 32, 24 * col : 24 * col + 32]
            inner = model(patch[None]).numpy()[0, 4:28, 4:28, 0]
            expected[24 * row : 24 * row + 24, 24 * col : 24 * col + 24] = inner
    probability, seconds, _ = Predictor(model, "/CPU:1", grid, batch)(padded)
    np.testing.assert_allclose(probability, expected[11:61, 1:71], atol=1e-4)
    assert seconds > 0


def test_one_pass_equals_the_model_on_the_padded_scene():
    model = with_strong_weights(unet((None, None, 9)))
    grid = StripGrid(50, 70, ((19, 0), (9, 0)), 1, 56, 8)
    assert grid.window == (56, 72) and grid.padding == ((3, 3), (1, 1))
    padded = padded_scene(grid, 50, 70)
    probability, *_ = Predictor(model, "/CPU:0", grid, 1)(padded)
    np.testing.assert_allclose(probability, model(padded[None])[0, 3:53, 1:71, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "patch_size", "crop_size", "padding"),
    [
        ((1200, 1500), 256, 80, ((0, 0), (2, 2))),  # of patches: 56 above, 82 on the left
        ((300, 375), 64, 24, ((6, 6), (0, 1))),  # of patches: 22 and 24
    ],
)
def test_one_pass_has_the_remainder_of_the_padding_of_patches(size, patch_size, crop_size, padding):
    patches = PatchGrid(*size, patch_size, crop_size)
    assert StripGrid(*size, patches.padding, 1, 56, 8).padding == padding


def test_normalisation_uses_its_moving_averages():
    inputs = keras.Input((None, None, 9))
    x = keras.layers.Conv2D(1, 1)(keras.layers.BatchNormalization()(inputs))
    model = with_strong_weights(keras.Model(inputs, x))
    grid = PatchGrid(40, 40, 32, 8)
    padded = padded_scene(grid, 40, 40)
    probability, *_ = Predictor(model, "/CPU:0", grid, 4)(padded)
    (above, below), (left, right) = grid.padding
    expected = model(padded[None], training=False)[0, above:-below, left:-right, 0]
    np.testing.assert_allclose(probability, expected, atol=1e-4)


def strided(shape):
    """Another multiple (4) than the U-Net's, and a receptive field that is wider than high."""
    inputs = x = keras.Input(shape)
    for stride in (2, 2):
        x = keras.layers.Conv2D(8, (3, 7), strides=stride, padding="same", activation="relu")(x)
    x = keras.layers.UpSampling2D(4)(x)
    return keras.Model(inputs, keras.layers.Conv2D(1, 3, padding="same")(x), name="strided")


@pytest.mark.parametrize("build", [*NETWORKS.values(), strided])
def test_strips_agree_with_the_whole_scene(build, monkeypatch):
    model = with_strong_weights(build((None, None, 9)))
    size = geometry(model)
    height, width = 8 * size.margin or 40, 30
    monkeypatch.setattr(prediction, "free_memory", lambda: 1e9)
    whole = predictor_that_fits(model, "/CPU:0", height, width, EVEN)
    padded = padded_scene(whole.grid, height, width)
    expected, *_ = whole(padded)
    for n in (2, 3):
        grid = StripGrid(height, width, EVEN, n, size.margin, size.multiple)
        assert len(grid.corners) == n and grid.window[0] < 0.7 * height
        probability, *_ = Predictor(model, "/CPU:0", grid, 1)(padded)
        np.testing.assert_allclose(probability, expected, atol=1e-4)


@pytest.mark.parametrize("grid", [StripGrid(50, 70, EVEN, 1, 112, 16), PatchGrid(50, 70, 64, 8)])
def test_uncertainty_is_the_difference_of_two_views(grid):
    model = with_strong_weights(NETWORKS["two_views"]((None, None, 9)))
    padded = padded_scene(grid, 50, 70)
    first = 30 + grid.padding[1][0]
    padded[..., :6] = np.abs(padded[..., :6])
    padded[:, first:, :6] = -0.5  # no reflectance: one view
    probability, _, uncertainty = Predictor(model, "/CPU:0", grid, 1)(padded)
    views = keras.Model(model.input, model.get_layer("views").output)
    windows = np.array([
        views(padded[None, row : row + grid.window[0], col : col + grid.window[1]])[0]
        for row, col in grid.corners
    ])  # fmt: skip
    visible, thermal = (grid.stitch(windows[..., i]) for i in (0, 1))
    np.testing.assert_allclose(uncertainty[:, :30], abs(visible - thermal)[:, :30], atol=1e-5)
    assert np.isnan(uncertainty[:, 30:]).all() and uncertainty[:, :30].max() > 1e-3
    np.testing.assert_allclose(probability, (visible + thermal) / 2, atol=1e-5)


def test_smaller_overlap_than_the_margin_would_show():
    model = with_strong_weights(unet((None, None, 9)))
    whole, short = (StripGrid(400, 30, EVEN, *n, 8) for n in ((1, 56), (2, 16)))
    padded = padded_scene(whole, 400, 30)
    expected, *_ = Predictor(model, "/CPU:0", whole, 1)(padded)
    assert np.abs(Predictor(model, "/CPU:0", short, 1)(padded)[0] - expected).max() > 1e-3


def test_scene_that_does_not_fit_is_predicted_in_strips(monkeypatch):
    model = unet((32, 32, 9))
    bytes_per_pixel = geometry(model).bytes_per_pixel
    for free, n_strips in ((481 * 32, 1), (479 * 32, 2), (295 * 32, 4)):  # of 480, 296, 208 rows
        monkeypatch.setattr(prediction, "free_memory", lambda free=free: free * bytes_per_pixel)
        found = predictor_that_fits(model, "/CPU:0", 480, 32, EVEN)
        assert len(found.grid.corners) == n_strips
    monkeypatch.setattr(prediction, "free_memory", lambda: 0)
    with pytest.raises(UserError, match="too little memory .* 8 parts.*inference_mode: patches"):
        predictor_that_fits(model, "/CPU:0", 480, 32, EVEN)


def test_memory_error_of_the_device_leads_to_strips(monkeypatch):
    class SmallDevice(Predictor):
        def __call__(self, scene):
            if len(self.grid.corners) == 1:
                raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
            return super().__call__(scene)

    monkeypatch.setattr(prediction, "Predictor", SmallDevice)
    found = predictor_that_fits(unet((32, 32, 9)), "/CPU:0", 480, 32, EVEN)
    assert len(found.grid.corners) == 2


def test_free_memory_is_positive_and_below_the_machine():
    assert 0 < prediction.free_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((9000, "max"), 9000 - 700), (("max", 5000), 5000 - 700), (("max", "max"), None)],
)
def test_free_memory_follows_the_control_groups(tmp_path, limits, expected):
    """The memory in use, without cached files, counts in a group and in those that contain it."""
    for folder, limit in zip(("a", "a/b"), limits, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.stat").write_text("anon 700\nfile 4000\n")
    (tmp_path / "cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    found = prediction.free_memory(tmp_path / "cgroup", tmp_path)
    assert found == expected if expected else found > 10_000


def test_network_that_is_not_local_is_rejected_for_whole_scenes():
    inputs = keras.Input((32, 32, 9))
    x = keras.layers.Dense(32 * 32)(keras.layers.Flatten(name="flat")(inputs))
    model = keras.Model(inputs, keras.layers.Reshape((32, 32, 1))(x))
    with pytest.raises(UserError, match="flat .*inference_mode: patches"):
        predictor_that_fits(model, "/CPU:0", 48, 48, EVEN)
