import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from harness.errors import UserError
from harness.networks.geometry import geometry
from model import NETWORKS, unet


def chain(*parts):
    """A network of layers one after the other, ending in one channel."""

    def build(shape):
        inputs = x = keras.Input(shape)
        for part in parts:
            x = part()(x)
        return keras.Model(inputs, layers.Conv2D(1, 1)(x))

    return build


def conv(size=3, stride=1, dilation=1, padding="same"):
    return lambda: layers.Conv2D(
        2, size, strides=stride, dilation_rate=dilation, padding=padding, activation="relu"
    )


def residual(shape):
    inputs = keras.Input(shape)
    x = layers.Conv2D(2, 3, padding="same")(inputs)
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(2, 5, padding="same")(x)))
    return keras.Model(inputs, layers.Conv2D(1, 1)(layers.Add()([x, y])))


def operators(shape):
    inputs = keras.Input(shape)
    x = layers.Conv2D(2, 3, padding="same")(inputs)
    return keras.Model(inputs, layers.Conv2D(1, 3, padding="same")(x * 2.0 + x))


def strided_skip(shape):
    """A skip connection around two strides, one of 2 and one of 3."""
    inputs = keras.Input(shape)
    x = layers.Conv2D(2, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.MaxPool2D(3)(x)
    x = layers.UpSampling2D(6, interpolation="bilinear")(x)
    return keras.Model(inputs, layers.Conv2D(1, 1)(layers.Concatenate()([inputs, x])))


# name: network, radius, multiple; the arithmetic of the radius beside it
SMALL = {
    "3x3 and 5x5": (chain(conv(3), conv(5)), 1 + 2, 1),
    "rows and columns": (chain(conv((1, 7)), conv((3, 1))), 3, 1),
    "even kernel": (chain(conv(4)), 2, 1),  # one pixel before, two after
    "dilation": (chain(conv(3, dilation=4), conv(3)), 4 + 1, 1),
    "depthwise": (chain(lambda: layers.DepthwiseConv2D(5, padding="same")), 2, 1),
    "separable": (chain(lambda: layers.SeparableConv2D(2, 5, padding="same")), 2, 1),
    "valid": (chain(lambda: layers.ZeroPadding2D(2), conv(5, padding="valid")), 2, 1),
    "cropping": (
        chain(conv(3), lambda: layers.ZeroPadding2D(3), lambda: layers.Cropping2D(3)), 1, 1,
    ),
    "shifted": (  # by two pixels; the even kernel sees one before and two after
        chain(
            lambda: layers.ZeroPadding2D(((2, 0), (2, 0))),
            lambda: layers.Cropping2D(((0, 2), (0, 2))), conv(4),
        ), 2 + 1, 1,
    ),
    "pool": (chain(lambda: layers.MaxPool2D(2), lambda: layers.UpSampling2D(2)), 1, 2),
    "bilinear": (  # half of the pixels see the small one before their own, half that after it
        chain(
            lambda: layers.AveragePooling2D(2),
            lambda: layers.UpSampling2D(2, interpolation="bilinear"),
        ), 2, 2,
    ),
    "overlapping pool": (
        chain(lambda: layers.AveragePooling2D(3, 2, "same"), lambda: layers.UpSampling2D(2)), 2, 2,
    ),
    "transposed": (
        chain(conv(3, 2), lambda: layers.Conv2DTranspose(2, 3, strides=2, padding="same")), 2, 2,
    ),
    "transposed 2x2": (
        chain(conv(2, 2), lambda: layers.Conv2DTranspose(2, 2, strides=2)), 1, 2,
    ),
    "residual": (residual, 1 + 2, 1),
    "operators": (operators, 2, 1),
    "dense": (chain(conv(3), lambda: layers.Dense(3), layers.LayerNormalization), 1, 1),
    "strided skip": (strided_skip, None, 6),
    "DeepLab": (
        chain(
            conv(3, 2), conv(3, dilation=2), layers.BatchNormalization, conv(3, dilation=4),
            lambda: layers.UpSampling2D(2, interpolation="bilinear"),
        ), None, 2,
    ),
}  # fmt: skip
N_CHANNELS = 4  # one reflectance and three brightness temperatures: the fewest
CASES = SMALL | {name: (build, None, None) for name, build in NETWORKS.items()}


def reach(build, size):
    """How far a pixel reaches, by the gradients of outputs in the middle: all phases of `size`.

    Kernels are positive, so that nothing that is seen cancels; and a mean, unlike a maximum, has
    gradients at all its pixels.
    """

    def average(layer):
        kind = layers.AveragePooling2D if type(layer) is layers.MaxPooling2D else type(layer)
        return kind.from_config(layer.get_config())

    n, short = 4 * size.margin + 8 * size.multiple, 8 * size.multiple
    first = n // 2 // size.multiple * size.multiple
    distances = [0]
    for axis, shape in enumerate(((n, short), (short, n))):
        model = keras.models.clone_model(build((*shape, N_CHANNELS)), clone_function=average)
        model.set_weights([np.abs(w) + 1e-2 for w in model.get_weights()])
        final = model.layers[-1]
        if hasattr(final, "activation"):
            final.activation = keras.activations.linear  # a sigmoid of large values has no gradient
        x = tf.Variable(np.random.default_rng(0).random((1, *shape, N_CHANNELS), np.float32) + 1)
        for pixel in range(first, first + size.multiple):
            with tf.GradientTape() as tape:
                value = tf.reduce_sum(tf.gather(model(x)[0], pixel, axis=axis))
            seen = np.nonzero(np.abs(tape.gradient(value, x)[0]).sum((1 - axis, 2)))[0]
            distances += [pixel - seen.min(), seen.max() - pixel]
    return max(distances)


@pytest.mark.parametrize("name", CASES)
def test_radius_is_that_of_gradients(name):
    build, radius, multiple = CASES[name]
    size = geometry(build((None, None, N_CHANNELS)))
    assert size.radius == reach(build, size)
    assert radius in (None, size.radius) and multiple in (None, size.multiple)
    assert size.margin % size.multiple == 0 and 0 <= size.margin - size.radius < size.multiple


@pytest.mark.parametrize("name", CASES)
def test_crop_agrees_with_the_whole_image_beyond_the_margin(name):
    build, _, _ = CASES[name]
    model = build((None, None, N_CHANNELS))
    rng = np.random.default_rng(1)
    model.set_weights([w + rng.normal(scale=0.05, size=w.shape) for w in model.get_weights()])
    size = geometry(model)
    m, margin = size.multiple, size.margin
    shape = 1, 2 * margin + 6 * m, 2 * margin + 4 * m, N_CHANNELS
    image = rng.normal(size=shape).astype(np.float32)
    whole = model(image).numpy()
    assert whole.shape[1:3] == image.shape[1:3]
    # The lowest rows, from a multiple of m on: all but the margin agree.
    crop = model(image[:, 2 * m :]).numpy()
    np.testing.assert_allclose(crop[:, margin:], whole[:, 2 * m + margin :], atol=1e-4)


def test_geometry_of_the_unet():
    size = geometry(unet((256, 256, 9)))
    # 51 is checked by gradients above; 56 is the next multiple of 8.
    assert (size.radius, size.multiple, size.margin) == (51, 8, 56)
    assert (size.n_layers, size.n_parameters) == (39, 1_948_609)
    # Weights of each convolution, times its share of the pixels: 1, 1/4, 1/16 and 1/64.
    assert size.multiplications_per_pixel == 163_904
    # 9 channels of the scene and of the window; skip, its convolution and that of the doubled
    # image, 32 channels each; 64 channels of a quarter of the pixels: 4 bytes each.
    assert size.bytes_per_pixel == 4 * (9 + 9 + 3 * 32 + 64 / 4)


@pytest.mark.parametrize(
    ("build", "bytes_per_pixel"),
    [
        # Scene and window; what goes into and comes out of a convolution.
        (chain(conv(3), conv(3)), 4 * (2 + 2 + 2 + 2)),
        # ReLU and Add write over their input: the skip, and the two images of the convolution.
        (residual, 4 * (2 + 2 + 2 + 2)),
        # The concatenation and both its parts, one of them the image, and the convolution of it.
        (strided_skip, 4 * (2 + 2 + 2 + (2 + 2) + 1)),
        # The normalisation is written over its input, but calculates with two images of its size.
        (chain(conv(3), layers.LayerNormalization), 4 * (2 + 2 + 2 + 2 * 2)),
    ],
)
def test_memory_is_that_of_all_images_needed_at_once(build, bytes_per_pixel):
    assert geometry(build((None, None, 2))).bytes_per_pixel == bytes_per_pixel


@pytest.mark.parametrize(
    ("build", "multiplications"),
    [
        (chain(conv(3), lambda: layers.Dense(5)), 9 * 2 * 2 + 2 * 5 + 5),
        (chain(lambda: layers.SeparableConv2D(3, 3, padding="same")), 9 * 2 + 2 * 3 + 3),
        (chain(conv(2, 2), lambda: layers.Conv2DTranspose(3, 2, strides=2)),
         (4 * 2 * 2 + 4 * 2 * 3) / 4 + 3),
    ],
)  # fmt: skip
def test_multiplications_are_those_of_kernels(build, multiplications):
    assert geometry(build((None, None, 2))).multiplications_per_pixel == multiplications


@keras.saving.register_keras_serializable("tests")
class Own(layers.Layer):
    def call(self, x):
        return x


class Rescaling(layers.Layer):
    """Has the name of a layer of Keras, but looks at the whole image."""

    def call(self, x):
        return x - keras.ops.mean(x)


def squeeze(shape):
    inputs = keras.Input(shape)
    x = layers.Conv2D(2, 3, padding="same")(inputs)
    scale = layers.GlobalAveragePooling2D(keepdims=True, name="mean")(x)
    return keras.Model(inputs, layers.Multiply()([x, scale]))


def mean_of_image(shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, inputs - keras.ops.mean(inputs, axis=(1, 2), keepdims=True))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (mean_of_image, r"layer mean\S* \(Mean\)"),
        (squeeze, r"layer mean \(GlobalAveragePooling2D\)"),
        (chain(lambda: Own(name="own")), r"layer own \(Own\)"),
        (chain(lambda: Rescaling(name="own")), r"layer own \(Rescaling\)"),
        (
            chain(lambda: layers.UpSampling2D(2, interpolation="bicubic", name="up")),
            "layer up",
        ),
        (
            chain(lambda: layers.Conv2DTranspose(2, 3, 2, "same", output_padding=1, name="up")),
            "layer up",
        ),
        (chain(lambda: layers.GroupNormalization(1, name="norm")), r"layer norm"),
        (chain(lambda: layers.LayerNormalization(axis=(1, 2), name="norm")), r"layer norm"),
        (chain(lambda: layers.MaxPool2D(2)), "another size"),
        (chain(conv(3, padding="valid")), "rows or columns of its input give"),
    ],
)
def test_network_that_is_not_local_is_rejected_with_advice(build, reason):
    with pytest.raises(UserError, match=rf"{reason}.*inference_mode: patches"):
        geometry(build((32, 32, 2)))
