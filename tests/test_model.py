from collections import Counter

import numpy as np
import pytest

from model import unet


def test_network_has_39_layers_and_1948609_parameters():
    model = unet((256, 256, 9))
    # Input + 14 x (Conv2D + ReLU) + 3 pool + 3 up + 3 concat + 1 sigmoid conv = 39
    assert len(model.layers) == 39
    assert model.count_params() == 1_948_609
    kinds = Counter(type(layer).__name__ for layer in model.layers)
    assert kinds == {
        "InputLayer": 1, "Conv2D": 15, "ReLU": 14, "MaxPooling2D": 3, "UpSampling2D": 3,
        "Concatenate": 3,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 48, 9)])
def test_output_is_a_probability_for_each_pixel(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    y = unet(shape)(x).numpy()
    assert y.shape == (2, *shape[:2], 1) and (0 < y).all() and (y < 1).all()


def test_unknown_size_takes_every_scene():
    model = unet((None, None, 2))
    assert model(np.zeros((1, 40, 24, 2), np.float32)).shape == (1, 40, 24, 1)


def test_size_that_does_not_divide_by_8_is_refused():
    with pytest.raises(ValueError, match="36 x 32"):
        unet((36, 32, 9))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_ends_in_float32(policy):
    model = unet((16, 16, 9), policy)
    assert [layer.compute_dtype for layer in model.layers[1:-1]] == [policy[6:]] * 37
    assert model.layers[-1].compute_dtype == "float32"
    assert model(np.zeros((1, 16, 16, 9), np.float32)).dtype == np.float32
