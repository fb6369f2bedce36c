import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from harness.networks.fused_upsampling import fuse_upsampling
from model import unet


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def with_random_biases(model):
    rng = np.random.default_rng(1)
    model.set_weights([w + rng.normal(scale=0.05, size=w.shape) for w in model.get_weights()])
    return model


def in_float64(model):
    """A copy whose every layer computes in float64, where rounding hides nothing."""

    def convert(layer):
        return type(layer).from_config({**layer.get_config(), "dtype": "float64"})

    inputs = keras.Input(model.input_shape[1:], dtype="float64")
    copy = keras.models.clone_model(model, input_tensors=inputs, clone_function=convert)
    copy.set_weights(model.get_weights())
    return copy


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


def test_network_without_upsampling_equals_its_layers():
    model = with_random_biases(unet((48, 64, 9)))
    x = images(2, 48, 64, 9)
    plain = keras.Model(model.input, model.layers[-1].input)  # before the sigmoid
    fast = fuse_upsampling(plain)
    assert "UpSampling2D" not in kinds(fast)
    assert kinds(fast).count("DoublingConvolution") == 3
    np.testing.assert_allclose(fast(x), plain(x), atol=1e-4 * np.abs(plain(x)).max())


def test_gradients_without_upsampling_equal_those_of_the_layers():
    keras.utils.set_random_seed(0)
    model = in_float64(with_random_biases(unet((32, 32, 9))))
    x = images(2, 32, 32, 9).astype(np.float64)
    gradients = []
    for network in (model, fuse_upsampling(model)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(network(x, training=True) ** 2)
        gradients.append(tape.gradient(loss, [v.value for v in model.trainable_variables]))
    for plain, fast in zip(*gradients, strict=True):
        assert plain.dtype == tf.float64 and np.abs(plain).max() > 0
        np.testing.assert_allclose(fast, plain, atol=1e-10 * np.abs(plain).max())


def test_weights_are_shared_and_the_model_stays_as_it_was(tmp_path):
    model = unet((32, 32, 9))
    fast = fuse_upsampling(model)
    assert {id(v) for v in fast.variables} == {id(v) for v in model.variables}
    assert len(model.layers) == 39
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.layers) == 39
    x = images(1, 32, 32, 9)
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("doubling", "convolution"),
    [
        (layers.UpSampling2D(2, interpolation="bilinear"), layers.Conv2D(4, 3, padding="same")),
        (layers.UpSampling2D((2, 2)), layers.Conv2D(4, 5, padding="same")),
        (layers.UpSampling2D((2, 2)), layers.Conv2D(4, 3, padding="same", dilation_rate=2)),
        (layers.UpSampling2D((2, 2)), layers.Conv2D(4, 3, padding="valid")),
        (layers.UpSampling2D((2, 2)), layers.Conv2D(4, 3, strides=2, padding="same")),
        (layers.UpSampling2D((2, 2)), layers.Conv2D(4, 3, padding="same", groups=2)),
        (layers.UpSampling2D((4, 4)), layers.Conv2D(4, 3, padding="same")),
        (layers.Conv2DTranspose(3, 2, strides=2), layers.Conv2D(4, 3, padding="same")),
    ],
)
def test_other_layers_are_left_alone(doubling, convolution):
    inputs = keras.Input((16, 16, 3))
    small = layers.MaxPool2D(getattr(doubling, "size", 2))(inputs)
    output = convolution(layers.Concatenate()([doubling(small), inputs]))
    model = keras.Model(inputs, output)
    fast = fuse_upsampling(model)
    assert "DoublingConvolution" not in kinds(fast)
    x = images(1, 16, 16, 3)
    np.testing.assert_array_equal(fast(x), model(x))


def test_convolution_without_bias_and_with_activation_is_doubled():
    inputs = keras.Input((16, 16, 3))
    doubled = layers.UpSampling2D(2)(layers.MaxPool2D(2)(inputs))
    convolution = layers.Conv2D(4, 3, padding="same", use_bias=False, activation="tanh")
    model = keras.Model(inputs, convolution(layers.Concatenate()([doubled, inputs])))
    fast = fuse_upsampling(model)
    assert kinds(fast).count("DoublingConvolution") == 1
    x = images(1, 16, 16, 3)
    np.testing.assert_allclose(fast(x), model(x), atol=1e-6)


def test_images_joined_side_by_side_are_left_alone():
    inputs = keras.Input((16, 16, 3))
    doubled = layers.UpSampling2D(2)(layers.MaxPool2D(2)(inputs))
    convolution = layers.Conv2D(4, 3, padding="same")
    model = keras.Model(inputs, convolution(layers.Concatenate(axis=2)([doubled, inputs])))
    assert kinds(fuse_upsampling(model)) == kinds(model)


def test_skip_that_comes_first_is_left_alone():
    inputs = keras.Input((16, 16, 3))
    doubled = layers.UpSampling2D(2)(layers.MaxPool2D(2)(inputs))
    convolution = layers.Conv2D(4, 3, padding="same")
    model = keras.Model(inputs, convolution(layers.Concatenate()([inputs, doubled])))
    x = images(1, 16, 16, 3)
    np.testing.assert_allclose(fuse_upsampling(model)(x), model(x), atol=1e-6)
