import keras
import numpy as np
import pytest
import tensorflow as tf

from data_loader import PatchGrid
from harness.errors import UserError
from harness.inference import predictor as prediction
from harness.inference.predictor import Predictor, cast_model, predictor_that_fits
from harness.inference.windows import StripGrid
from model import DOWNSCALING, RECEPTIVE_RADIUS, unet


def model_with_strong_weights(shape=(32, 32, 9)):
    """A U-Net whose output depends visibly on all that it can see."""
    model = unet(shape)
    rng = np.random.default_rng(3)
    model.set_weights([w + rng.normal(scale=0.01, size=w.shape) for w in model.get_weights()])
    return model


def padded_scene(grid, height, width):
    scene = np.random.default_rng(0).normal(size=(height, width, 9)).astype(np.float32)
    return np.pad(scene, [*grid.padding, (0, 0)])


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_patches_equal_a_plain_loop_over_the_model(batch):
    model = model_with_strong_weights()
    grid = PatchGrid(50, 70, 32, 8)  # stride 24: 3 x 3 patches of 32, padded to 80 x 80
    padded = padded_scene(grid, 50, 70)
    expected = np.zeros((72, 72))
    for row in range(3):
        for col in range(3):
            patch = padded[24 * row : 24 * row + 32, 24 * col : 24 * col + 32]
            inner = model(patch[None]).numpy()[0, 4:28, 4:28, 0]
            expected[24 * row : 24 * row + 24, 24 * col : 24 * col + 24] = inner
    probability, seconds = Predictor(model, "/CPU:1", grid, batch)(padded)
    np.testing.assert_allclose(probability, expected[11:61, 1:71], atol=1e-4)
    assert seconds > 0


def test_one_pass_equals_the_model_on_the_padded_scene():
    model = model_with_strong_weights((None, None, 9))
    grid = StripGrid(50, 70, 1, RECEPTIVE_RADIUS, DOWNSCALING)
    assert grid.window == (56, 72)
    padded = padded_scene(grid, 50, 70)
    probability, _ = Predictor(model, "/CPU:0", grid, 1)(padded)
    np.testing.assert_allclose(probability, model(padded[None])[0, 3:53, 1:71, 0], atol=1e-4)


def test_strips_agree_with_the_whole_scene():
    model = model_with_strong_weights((None, None, 9))
    whole = StripGrid(400, 30, 1, RECEPTIVE_RADIUS, DOWNSCALING)
    padded = padded_scene(whole, 400, 30)
    expected, _ = Predictor(model, "/CPU:0", whole, 1)(padded)
    for n in (2, 3):
        grid = StripGrid(400, 30, n, RECEPTIVE_RADIUS, DOWNSCALING)
        assert len(grid.corners) == n and grid.window[0] < 300
        probability, _ = Predictor(model, "/CPU:0", grid, 1)(padded)
        np.testing.assert_allclose(probability, expected, atol=1e-4)
    short, _ = Predictor(model, "/CPU:0", StripGrid(400, 30, 2, 16, DOWNSCALING), 1)(padded)
    assert np.abs(short - expected).max() > 1e-3  # a smaller overlap would show


def test_scenes_that_do_not_fit_are_predicted_in_strips(monkeypatch):
    grids = [StripGrid(480, 32, n, RECEPTIVE_RADIUS, DOWNSCALING) for n in (1, 2, 4)]
    model = unet((32, 32, 9))
    monkeypatch.setattr(prediction, "free_memory", lambda: 1e9)
    assert predictor_that_fits(model, "/CPU:0", grids).grid is grids[0]
    monkeypatch.setattr(prediction, "free_memory", lambda: 300 * 32 * prediction.PASS_BYTES)
    assert predictor_that_fits(model, "/CPU:0", grids).grid is grids[1]  # of 296 rows
    monkeypatch.setattr(prediction, "free_memory", lambda: 0)
    with pytest.raises(UserError, match="too little memory .* 4 parts.*inference_mode: patches"):
        predictor_that_fits(model, "/CPU:0", grids)


def test_memory_error_of_the_device_leads_to_strips(monkeypatch):
    grids = [StripGrid(480, 32, n, RECEPTIVE_RADIUS, DOWNSCALING) for n in (1, 2)]

    class SmallDevice(Predictor):
        def __call__(self, scene):
            if self.grid is grids[0]:
                raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
            return super().__call__(scene)

    monkeypatch.setattr(prediction, "Predictor", SmallDevice)
    assert predictor_that_fits(unet((32, 32, 9)), "/CPU:0", grids).grid is grids[1]


def test_free_memory_is_positive_and_below_the_machine():
    with open("/proc/meminfo", encoding="utf-8") as info:
        total = int(info.readline().split()[1]) * 1024
    assert 0 < prediction.free_memory() <= total


def test_model_of_one_size_is_refused_with_a_reason():
    inputs = keras.Input((32, 32, 9))
    x = keras.layers.Dense(32 * 32)(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, keras.layers.Reshape((32, 32, 1))(x))
    with pytest.raises(UserError, match=r"\(48, 48, 9\).*inference_mode: patches"):
        Predictor(model, "/CPU:0", StripGrid(48, 48, 1, 56, 8), 1)


def test_cast_model_keeps_weights_and_ends_in_float32():
    model = unet((32, 32, 9))
    half = cast_model(model, "mixed_bfloat16")
    assert half.layers[1].compute_dtype == "bfloat16"
    assert half.layers[-1].compute_dtype == "float32"
    for a, b in zip(model.get_weights(), half.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_receptive_radius_covers_what_the_network_sees():
    model = unet((192, 192, 9))  # positive weights: nothing that is seen cancels
    model.set_weights([np.abs(w) + 1e-3 for w in model.get_weights()])
    logits = keras.Model(model.inputs, model.layers[-1].input)
    x = tf.Variable(np.random.default_rng(0).random((1, 192, 192, 9), np.float32))
    reach = 0
    for pixel in range(96, 96 + DOWNSCALING):  # the pools' grid repeats every 8 pixels
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(logits(x)[0, pixel, pixel])
        seen = np.nonzero(np.abs(tape.gradient(value, x).numpy()).sum((0, 2, 3)))[0]
        reach = max(reach, pixel - seen.min(), seen.max() - pixel)
    assert reach == 51
    assert RECEPTIVE_RADIUS == -(-reach // DOWNSCALING) * DOWNSCALING
