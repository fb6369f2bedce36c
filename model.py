"""The networks of CloudMask: the table NETWORKS, from which the key `network` chooses one.

A network is a function of (input_shape, dtype) that returns a functional keras.Model:

    input_shape: (rows, cols, channels) of one patch, for example (256, 256, 9); rows and cols are
        None where they vary.
    dtype: Keras dtype policy of all layers but the last and those of `spectral_features`:
        'float32', 'mixed_bfloat16' or 'mixed_float16'. The last one computes in float32: in half
        precision the sigmoid rounds to 0 or 1 and the loss stops falling.
    Returns: keras.Model from float32 (batch, rows, cols, channels), normalised, to the probability
        of cloud, float32 (batch, rows, cols, 1).

The costs in the docstrings are for 9 channels; tests/test_model.py counts them from the layers. A
receptive field of 103 pixels is a square of 103 x 103 with the pixel in its middle.
docs/networks.md compares the networks.
"""

import itertools

import keras
import numpy as np
from keras import layers

FILTERS = (32, 64, 128, 256)  # per stage going down; mlcommons/science v1.1
HALF_FILTERS = tuple(n // 2 for n in FILTERS)
SPECTRAL_FEATURES = "spectral_features"  # begin of the names of layers
N_THERMAL = 3  # channels of brightness temperature, the last ones; those before are reflectances
# Per stage of the context branch, each at half the resolution of the one before.
CONTEXT_FILTERS = (32, 48, 64, 96)  # behind a stem of 2 x 2
SMALL_CONTEXT_FILTERS = (48, 64, 96)  # behind a stem of 4 x 4
DETAIL_FILTERS = 16  # of its branch at full resolution
NO_REFLECTANCE = -0.5  # normalised: 0 in the file, by night or where it is missing


def conv_block(x, filters, dtype):
    """Two 3x3 same-padded convolutions, each followed by ReLU."""
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal", dtype=dtype)(
            x
        )
        x = layers.ReLU(dtype=dtype)(x)
    return x


def unet(input_shape, dtype="float32", filters=FILTERS, block=conv_block, name="unet"):
    """The U-Net of mlcommons/science v1.1, the reference: 39 layers.

    Cost: 1,948,609 parameters, 163,904 multiplications per pixel, receptive field of 103 pixels.
    Source: Ronneberger et al. 2015, arXiv:1505.04597.

    39 layers = Input + 14 x (Conv2D + ReLU) + 3 MaxPool + 3 UpSampling + 3 Concatenate + 1.
    Rows and columns must divide by 8, since they are halved three times.
    """
    inputs = keras.Input(input_shape, dtype="float32")
    x, skips = inputs, []
    for n in filters[:-1]:
        x = block(x, n, dtype)  # 256 x 256 x 32, 128 x 128 x 64, 64 x 64 x 128
        skips.append(x)
        x = layers.MaxPool2D(2, dtype=dtype)(x)

    x = block(x, filters[-1], dtype)  # 32 x 32 x 256

    for n, skip in zip(reversed(filters[:-1]), reversed(skips), strict=True):
        x = layers.UpSampling2D(2, dtype=dtype)(x)
        x = layers.Concatenate(dtype=dtype)([x, skip])
        x = block(x, n, dtype)
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")(x)
    return keras.Model(inputs, outputs, name=f"cloudmask_{name}")


def unet_half(input_shape, dtype="float32"):
    """The U-Net with half of the filters: what width contributes, as opposed to design.

    Cost: 488,161 parameters, 41,632 multiplications per pixel, receptive field of 103 pixels.
    """
    return unet(input_shape, dtype, HALF_FILTERS, name="unet_half")


def separable_block(x, filters, dtype):
    """Two separable 3x3 convolutions: of each channel by itself, then 1x1 across channels."""
    for _ in range(2):
        x = layers.SeparableConv2D(
            filters, 3, padding="same", activation="relu", dtype=dtype,
            # Each of the 9 weights of one channel has variance 1/9; he_normal divides by all
            # channels, so that the signal would vanish after a few layers.
            depthwise_initializer=keras.initializers.RandomNormal(stddev=1 / 3),
            pointwise_initializer="he_normal",
        )(x)  # fmt: skip
    return x


def unet_separable(input_shape, dtype="float32"):
    """The U-Net with depthwise separable convolutions.

    It has an eighth of the multiplications and is only twice as fast, because the depthwise half
    waits for memory (tensorflow issues 12132, 42172, 46217).

    Cost: 232,274 parameters, 21,003 multiplications per pixel, receptive field of 103 pixels.
    Source: Howard et al. 2017 (MobileNets), arXiv:1704.04861.
    """
    return unet(input_shape, dtype, block=separable_block, name="unet_separable")


def spectral_features(x, n_thermal=N_THERMAL):
    """Combinations of channels in which cloud differs from clear sky by about 1.

    Thin cloud changes the difference of two brightness temperatures by 1 K, which is 0.05 of
    normalised channels that vary by 100 K. A network that is given the channels alone needs most of
    its training to find that. These are the weights with which a 1x1 convolution starts; training
    changes them. It always computes in float32 (`keeps_float32`): bfloat16 would round a brightness
    temperature by 0.1 K.

    Args:
        x: (batch, rows, cols, C), normalised.
        n_thermal: How many of the channels are brightness temperatures, the last ones.

    Returns:
        (batch, rows, cols, 15) for 9 channels: S1-S6 and the differences of neighbours among them,
        in units of 0.2; S7 - S8, S7 - S9 and S8 - S9 in units of 2 K; S9 in units of 11 K.
    """
    refs, bts = np.split(np.eye(x.shape[-1]), [x.shape[-1] - n_thermal])
    differences = [11 * (one - other) for one, other in itertools.combinations(bts, 2)]
    rows = [*(5 * refs), *(5 * np.diff(refs, axis=0)), *differences, *(2 * bts[-1:])]
    layer = layers.Conv2D(len(rows), 1, dtype="float32", name=f"{SPECTRAL_FEATURES}_{n_thermal}")
    features = layer(x)
    layer.set_weights([np.stack(rows, axis=-1)[None, None], np.zeros(len(rows))])
    return features


def keeps_float32(layer):
    """Whether a layer computes in float32 in every precision, besides the last one."""
    return layer.name.startswith(SPECTRAL_FEATURES)


def pixel(input_shape, dtype="float32"):
    """Two 1x1 convolutions: every pixel by itself, to see what its surroundings contribute.

    Cost: 1,751 parameters, 1,671 multiplications per pixel, receptive field of 1 pixel.
    """
    inputs = keras.Input(input_shape, dtype="float32")
    x = spectral_features(inputs)
    for _ in range(2):
        x = convolution(x, 32, 1, dtype)
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")(x)
    return keras.Model(inputs, outputs, name="cloudmask_pixel")


def convolution(x, filters, size, dtype, activation="relu", strides=1, initializer="he_normal"):
    """A same-padded convolution with ReLU or without activation."""
    return layers.Conv2D(
        filters, size, strides, "same", activation=activation, kernel_initializer=initializer,
        dtype=dtype,
    )(x)  # fmt: skip


def upsample(x, filters, dtype, factor=2):
    """Every pixel becomes factor x factor pixels, each with weights of its own."""
    return layers.Conv2DTranspose(
        filters, factor, factor, kernel_initializer="he_normal", dtype=dtype
    )(x)


def residual_block(x, filters, dtype):
    """Two 3x3 convolutions whose result is added to their input.

    The second starts at 0, so that deep networks learn without normalisation: every block is at
    first the identity (Zhang et al. 2019, arXiv:1901.09321).
    """
    y = convolution(x, filters, 3, dtype)
    y = convolution(y, filters, 3, dtype, activation=None, initializer="zeros")
    return layers.ReLU(dtype=dtype)(layers.Add(dtype=dtype)([x, y]))


def two_branches(inputs, dtype, n_thermal=N_THERMAL, stem=2, filters=CONTEXT_FILTERS):
    """A U-shaped context branch at low resolution beside a thin branch at full resolution.

    A third of the U-Net's work is at full resolution, where convolutions have few channels and wait
    for memory. Here only the thin branch is there, which sees the spectrum of each pixel.
    The context branch starts with one pixel for each square of the stem: a space-to-depth and a
    matrix product, written as a convolution with stride.

    Args:
        inputs: (batch, rows, cols, C), normalised.
        dtype: See above.
        n_thermal: See spectral_features.
        stem: Side of the stem [pixels].
        filters: Of the context branch, per stage.

    Returns:
        (batch, rows, cols, 16).

    Source: Yu et al. 2018 (BiSeNet), arXiv:1808.00897.
    """
    features = spectral_features(inputs, n_thermal)

    x, stages = features, []
    for n in filters:
        size = 2 if stages else stem
        x = residual_block(convolution(x, n, size, dtype, strides=size), n, dtype)
        stages.append(x)
    for n, skip in zip(filters[-2::-1], stages[-2::-1], strict=True):
        x = layers.Add(dtype=dtype)([upsample(x, n, dtype), skip])
        x = residual_block(x, n, dtype)
    context = upsample(x, DETAIL_FILTERS, dtype, stem)

    detail = convolution(features, DETAIL_FILTERS, 1, dtype)
    detail = convolution(detail, DETAIL_FILTERS, 1, dtype, activation=None)
    return layers.ReLU(dtype=dtype)(layers.Add(dtype=dtype)([context, detail]))


def stem_2x2(input_shape, dtype="float32", stem=2, filters=CONTEXT_FILTERS, name="stem_2x2"):
    """Residual blocks behind a 2x2 stem, for speed.

    On synthetic scenes it is more accurate than the U-Net, see docs/networks.md.

    Cost: 524,999 parameters, 20,335 multiplications per pixel, receptive field of 207 pixels.
    """
    inputs = keras.Input(input_shape, dtype="float32")
    x = two_branches(inputs, dtype, stem=stem, filters=filters)
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")(x)
    return keras.Model(inputs, outputs, name=f"cloudmask_{name}")


def stem_4x4(input_shape, dtype="float32"):
    """The same behind a 4x4 stem: half of the work.

    Cost: 495,495 parameters, 10,847 multiplications per pixel, receptive field of 191 pixels.
    """
    return stem_2x2(input_shape, dtype, 4, SMALL_CONTEXT_FILTERS, "stem_4x4")


def has_reflectance(channels):
    """Where a pixel has any reflectance: bool (..., 1), for normalised channels (..., C)."""
    reflectances, _ = split_views(channels)
    return keras.ops.any(reflectances > NO_REFLECTANCE, axis=-1, keepdims=True)


def split_views(channels):
    """Reflectances (..., C - 3) and brightness temperatures (..., 3) of channels (..., C)."""
    return keras.ops.split(channels, [channels.shape[-1] - N_THERMAL], axis=-1)


def two_views(input_shape, dtype="float32"):
    """Two networks of which one sees S1-S6 and the other S7-S9; they share nothing.

    Both are a stem_2x2. The layer `views` gives both probabilities, (batch, rows, cols, 2); that
    of the network is their mean. Without reflectances, as by night, a pixel has only the thermal
    view: its probability stands for both. Each view is trained by a loss of its own, and
    `label_correction: co_teaching` lets each teach the other (harness/training/label_noise.py).

    Cost: 1,047,631 parameters, 39,758 multiplications per pixel, receptive field of 207 pixels.
    Source: Blum and Mitchell 1998 (co-training), doi:10.1145/279943.279962.
    """
    inputs = keras.Input(input_shape, dtype="float32")
    visible, thermal = (
        layers.Conv2D(1, 1, dtype=dtype)(two_branches(view, dtype, n_thermal))
        for view, n_thermal in zip(split_views(inputs), (0, N_THERMAL), strict=True)
    )
    visible = keras.ops.where(has_reflectance(inputs), visible, thermal)
    logits = layers.Concatenate(dtype=dtype)([visible, thermal])
    views = layers.Activation("sigmoid", dtype="float32", name="views")(logits)
    outputs = keras.ops.mean(views, axis=-1, keepdims=True)
    return keras.Model(inputs, outputs, name="cloudmask_two_views")


NETWORKS = {
    "unet": unet,
    "unet_half": unet_half,
    "unet_separable": unet_separable,
    "pixel": pixel,
    "stem_2x2": stem_2x2,
    "stem_4x4": stem_4x4,
    "two_views": two_views,
}
