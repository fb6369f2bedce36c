"""The CloudMask network: a U-Net of 39 layers and 1,948,609 trainable parameters."""

import keras
from keras import layers

FILTERS = (32, 64, 128, 256)  # per stage going down; mlcommons/science v1.1
DOWNSCALING = 2 ** (len(FILTERS) - 1)  # rows and columns of an input divide by 8
RECEPTIVE_RADIUS = 56  # pixels that the network sees around one: 51, up to a multiple of 8


def conv_block(x, filters, dtype):
    """Two 3x3 same-padded convolutions, each followed by ReLU."""
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal", dtype=dtype)(
            x
        )
        x = layers.ReLU(dtype=dtype)(x)
    return x


def unet(input_shape, dtype="float32"):
    """Build the U-Net that maps normalised channels to the probability of cloud.

    The layers and their order are those of mlcommons/science v1.1.
    39 layers = Input + 14 x (Conv2D + ReLU) + 3 MaxPool + 3 UpSampling + 3 Concatenate + 1.

    Args:
        input_shape: (rows, cols, channels) of one patch, for example (256, 256, 9). Rows and
            cols divide by 8, or are None where they vary.
        dtype: Keras dtype policy of all layers but the last: 'float32', 'mixed_bfloat16' or
            'mixed_float16'. The last one computes in float32: in half precision the sigmoid
            rounds to 0 or 1 and the loss stops falling.

    Returns:
        keras.Model from (batch, rows, cols, channels) to float32 (batch, rows, cols, 1).

    Raises:
        ValueError: If rows or cols do not divide by 8.
    """
    rows, cols, _ = input_shape
    if any(length is not None and length % DOWNSCALING for length in (rows, cols)):
        raise ValueError(
            f"The U-Net halves its input {len(FILTERS) - 1} times: rows and columns must divide "
            f"by {DOWNSCALING}, found {rows} x {cols}. Choose another PATCH_SIZE."
        )
    inputs = x = keras.Input(input_shape, dtype="float32")

    skips = []
    for filters in FILTERS[:-1]:
        x = conv_block(x, filters, dtype)  # 256 x 256 x 32, 128 x 128 x 64, 64 x 64 x 128
        skips.append(x)
        x = layers.MaxPool2D(2, dtype=dtype)(x)

    x = conv_block(x, FILTERS[-1], dtype)  # 32 x 32 x 256

    for filters, skip in zip(reversed(FILTERS[:-1]), reversed(skips), strict=True):
        x = layers.UpSampling2D(2, dtype=dtype)(x)
        x = layers.Concatenate(dtype=dtype)([x, skip])
        x = conv_block(x, filters, dtype)

    outputs = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")(x)
    return keras.Model(inputs, outputs, name="cloudmask_unet")
