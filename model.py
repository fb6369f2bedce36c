"""The networks of CloudMask: the table NETWORKS, from which the key `network` chooses one.

A network is a function of (input_shape, dtype) that returns a functional keras.Model:

    input_shape: (rows, cols, channels) of one patch, for example (256, 256, 9); rows and cols are
        None where they vary.
    dtype: Keras dtype policy of all layers but the last: 'float32', 'mixed_bfloat16' or
        'mixed_float16'. The last one computes in float32: in half precision the sigmoid rounds to
        0 or 1 and the loss stops falling.
    Returns: keras.Model from float32 (batch, rows, cols, channels), normalised, to the probability
        of cloud, float32 (batch, rows, cols, 1).

The costs in the docstrings are for 9 channels; tests/test_model.py counts them from the layers. A
receptive field of 103 pixels is a square of 103 x 103 with the pixel in its middle.
docs/networks.md compares the networks.
"""

import keras
from keras import layers

FILTERS = (32, 64, 128, 256)  # per stage going down; mlcommons/science v1.1
HALF_FILTERS = tuple(n // 2 for n in FILTERS)
N_THERMAL = 3  # channels of brightness temperature, the last ones; those before are reflectances
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
    x = u_shape(inputs, dtype, filters, block)
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")(x)
    return keras.Model(inputs, outputs, name=f"cloudmask_{name}")


def u_shape(x, dtype, filters=FILTERS, block=conv_block):
    """All layers of a U-Net but the first and the last: 256 x 256 x channels to 256 x 256 x 32."""
    skips = []
    for n in filters[:-1]:
        x = block(x, n, dtype)  # 256 x 256 x 32, 128 x 128 x 64, 64 x 64 x 128
        skips.append(x)
        x = layers.MaxPool2D(2, dtype=dtype)(x)

    x = block(x, filters[-1], dtype)  # 32 x 32 x 256

    for n, skip in zip(reversed(filters[:-1]), reversed(skips), strict=True):
        x = layers.UpSampling2D(2, dtype=dtype)(x)
        x = layers.Concatenate(dtype=dtype)([x, skip])
        x = block(x, n, dtype)
    return x


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


def pixel(input_shape, dtype="float32"):
    """Two 1x1 convolutions: every pixel by itself, to see what its surroundings contribute.

    Cost: 1,409 parameters, 1,344 multiplications per pixel, receptive field of 1 pixel.
    """
    inputs = x = keras.Input(input_shape, dtype="float32")
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


def enlarge(x, filters, factor, dtype):
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


def large_kernel_block(x, filters, dtype):
    """A depthwise 7x7 convolution and a 1x1 network of three times the width, added to the input.

    Source: Liu et al. 2022 (ConvNeXt), arXiv:2201.03545.
    """
    y = layers.DepthwiseConv2D(
        7, padding="same", dtype=dtype,
        depthwise_initializer=keras.initializers.RandomNormal(stddev=1 / 7),  # of 49 weights
    )(x)  # fmt: skip
    y = layers.LayerNormalization(dtype=dtype)(y)
    y = convolution(y, 3 * filters, 1, dtype)
    y = convolution(y, filters, 1, dtype, activation=None, initializer="zeros")
    return layers.Add(dtype=dtype)([x, y])


def two_branches(
    input_shape, dtype, stem, filters, block, name, blocks=1, join=layers.Add, detail=(16, 1)
):
    """A U-shaped context branch at low resolution beside a thin branch at full resolution.

    A third of the U-Net's work is at full resolution, where convolutions have few channels and wait
    for memory. Here only the thin branch is there, which sees the spectrum of each pixel.
    Source: Yu et al. 2018 (BiSeNet), arXiv:1808.00897.

    Args:
        input_shape: See above.
        dtype: See above.
        stem: The context branch starts with one pixel for each stem x stem pixels: a space-to-depth
            and a matrix product, written as a convolution with stride.
        filters: Of each stage of the context branch, which has half the resolution of the last.
        block: Function of (x, filters, dtype).
        name: In NETWORKS.
        blocks: In each stage going down; there is one in each going up.
        join: Layer that joins two images, of a skip connection and of both branches.
        detail: Filters and kernel size of the thin branch.
    """
    inputs = keras.Input(input_shape, dtype="float32")

    x, stages = inputs, []
    for n in filters:
        stride = 2 if stages else stem
        x = convolution(x, n, stride, dtype, strides=stride)
        for _ in range(blocks):
            x = block(x, n, dtype)
        stages.append(x)
    for n, skip in zip(filters[-2::-1], stages[-2::-1], strict=True):
        x = join(dtype=dtype)([enlarge(x, n, 2, dtype), skip])
        x = block(x, n, dtype)
    context = enlarge(x, detail[0], stem, dtype)

    full = convolution(inputs, *detail, dtype)
    full = convolution(full, *detail, dtype, activation=None)
    x = layers.ReLU(dtype=dtype)(join(dtype=dtype)([context, full]))
    if detail[1] > 1:
        x = convolution(x, *detail, dtype)
    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")(x)
    return keras.Model(inputs, outputs, name=f"cloudmask_{name}")


def stem_2x2(input_shape, dtype="float32"):
    """Residual blocks behind a 2x2 stem: a fast network.

    Cost: 234,737 parameters, 17,920 multiplications per pixel, receptive field of 95 pixels.
    """
    return two_branches(input_shape, dtype, 2, (32, 48, 64), residual_block, "stem_2x2")


def stem_4x4(input_shape, dtype="float32"):
    """Residual blocks behind a 4x4 stem: as fast, twice the surroundings, coarser shapes of clouds.

    Cost: 949,009 parameters, 18,720 multiplications per pixel, receptive field of 191 pixels.
    Source of the stem: Ridnik et al. 2020 (TResNet), arXiv:2003.13630.
    """
    return two_branches(input_shape, dtype, 4, (64, 96, 128), residual_block, "stem_4x4")


def large_kernel(input_shape, dtype="float32"):
    """Large depthwise kernels behind a 2x2 stem: wide surroundings at few multiplications.

    Cost: 885,489 parameters, 36,812 multiplications per pixel, receptive field of 219 pixels.
    """
    filters = 48, 96, 192
    return two_branches(input_shape, dtype, 2, filters, large_kernel_block, "large_kernel", 2)


def stem_2x2_wide(input_shape, dtype="float32"):
    """Wide U-Net blocks behind a 2x2 stem: meant to be more accurate than the U-Net at its cost.

    The work of the U-Net moves from full resolution to where convolutions are wide, and a stage
    more sees twice as far. The branch at full resolution has 3x3 kernels.

    Cost: 3,360,929 parameters, 118,352 multiplications per pixel, receptive field of 209 pixels.
    """
    return two_branches(
        input_shape, dtype, 2, (48, 96, 192, 192), conv_block, "stem_2x2_wide",
        join=layers.Concatenate, detail=(32, 3),
    )  # fmt: skip


def has_reflectance(channels):
    """Where a pixel has any reflectance: bool (..., 1), for normalised channels (..., C)."""
    reflectances, _ = split_views(channels)
    return keras.ops.any(reflectances > NO_REFLECTANCE, axis=-1, keepdims=True)


def split_views(channels):
    """Reflectances (..., C - 3) and brightness temperatures (..., 3) of channels (..., C)."""
    return keras.ops.split(channels, [channels.shape[-1] - N_THERMAL], axis=-1)


def two_views(input_shape, dtype="float32"):
    """Two networks of which one sees S1-S6 and the other S7-S9; they share nothing.

    Both are a unet_half. The layer `views` gives both probabilities, (batch, rows, cols, 2); that
    of the network is their mean. Without reflectances, as by night, a pixel has only the thermal
    view: its probability stands for both. Each view is trained by a loss of its own, and
    `label_correction: co_teaching` lets each teach the other (harness/training/label_noise.py).

    Cost: 975,026 parameters, 81,968 multiplications per pixel, receptive field of 103 pixels.
    Source: Blum and Mitchell 1998 (co-training), doi:10.1145/279943.279962.
    """
    inputs = keras.Input(input_shape, dtype="float32")
    visible, thermal = (
        layers.Conv2D(1, 1, dtype=dtype)(u_shape(view, dtype, HALF_FILTERS))
        for view in split_views(inputs)
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
    "large_kernel": large_kernel,
    "stem_2x2_wide": stem_2x2_wide,
    "two_views": two_views,
}
