from collections import Counter

import keras
import numpy as np
import pytest

from harness.networks.geometry import geometry
from harness.networks.model_files import cast_model
from harness.training.trainer import check_trainable
from model import NETWORKS, unet

P = 64  # a patch that all networks of the table take
everything = pytest.mark.parametrize("name", NETWORKS)


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@everything
def test_network_gives_a_float32_probability_for_each_pixel(name):
    x = images(2, P, 2 * P, 5) / 10  # or the sigmoid gives 1
    for shape in ((P, 2 * P, 5), (None, None, 5)):
        y = NETWORKS[name](shape)(x)
        assert y.shape == (2, P, 2 * P, 1) and y.dtype == np.float32
        assert (y.numpy() > 0).all() and (y.numpy() < 1).all()


@everything
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_begins_with_spectral_features_and_ends_in_float32(name, policy):
    """As built for training, and as cast for masking from a model trained in float32."""
    for model in (NETWORKS[name]((P, P, 9), policy), cast_model(NETWORKS[name]((P, P, 9)), policy)):
        dtypes = {layer.name: layer.compute_dtype for layer in model.layers[1:]}
        half = {key for key, dtype in dtypes.items() if dtype == policy.removeprefix("mixed_")}
        in_float32 = {key for key in dtypes if key.startswith("spectral_features")}
        assert in_float32 or name.startswith("unet")
        assert half == dtypes.keys() - in_float32 - {model.layers[-1].name}
        assert model(images(1, P, P, 9)).dtype == np.float32
        assert all(variable.dtype == "float32" for variable in model.trainable_variables)


@everything
def test_network_can_be_trained_and_applied_to_whole_scenes(name):
    model = NETWORKS[name]((P, P, 9))
    check_trainable(model)
    assert P % geometry(model).multiple == 0


@everything
def test_costs_in_the_docstring_are_those_of_the_layers(name):
    size = geometry(NETWORKS[name]((None, None, 9)))
    text = " ".join(NETWORKS[name].__doc__.split())
    assert (
        f"Cost: {size.n_parameters:,} parameters, {size.multiplications_per_pixel:,.0f} "
        f"multiplications per pixel, receptive field of {2 * size.radius + 1} pixel"
    ) in text


@everything
def test_network_can_be_saved_without_its_code(name, tmp_path):
    model = NETWORKS[name]((P, P, 4))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded(images(1, P, P, 4)), model(images(1, P, P, 4)))


def test_unet_has_39_layers_and_1948609_parameters():
    model = unet((256, 256, 9))
    # Input + 14 x (Conv2D + ReLU) + 3 pool + 3 up + 3 concat + 1 sigmoid conv = 39
    assert len(model.layers) == 39
    assert model.count_params() == sum(w.size for w in map(np.array, model.get_weights()))
    assert model.count_params() == 1_948_609
    kinds = Counter(type(layer).__name__ for layer in model.layers)
    assert kinds == {
        "InputLayer": 1, "Conv2D": 15, "ReLU": 14, "MaxPooling2D": 3, "UpSampling2D": 3,
        "Concatenate": 3,
    }  # fmt: skip


def test_unet_starts_from_he_normal_kernels_without_bias():
    for layer in unet((256, 256, 9)).layers:
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (3, 3):
            kernel, bias = layer.get_weights()
            assert kernel.std() == pytest.approx((2 / kernel[..., 0].size) ** 0.5, rel=0.05)
            assert not bias.any()


def test_two_views_share_nothing_and_are_one_without_reflectances():
    model = NETWORKS["two_views"]((P, P, 9))
    both = keras.Model(model.input, model.get_layer("views").output)
    day = np.abs(images(1, P, P, 9)) / 10
    views = both(day).numpy()
    np.testing.assert_allclose(model(day)[..., 0], views.mean(axis=-1), rtol=1e-6)
    for changed, same in ((np.s_[..., :6], 1), (np.s_[..., 6:], 0)):
        other = day.copy()
        other[changed] += 0.1
        differs = both(other).numpy() != views
        assert not differs[..., same].any() and differs[..., 1 - same].mean() > 0.9
    day[:, :, : P // 2, :6] = -0.5  # as by night
    views = both(day).numpy()
    is_same = views[..., 0] == views[..., 1]
    assert is_same[:, :, : P // 2].all() and is_same[:, :, P // 2 :].mean() < 0.1
