"""The networks of CloudMask: the table NETWORKS, from which the key `network` chooses one.

A network is a function of (input_shape, dtype) that returns a functional keras.Model:

    input_shape: (rows, cols, channels) of one patch, for example (256, 256, 9); rows and cols are
        None where they vary.
    dtype: Keras dtype policy of all layers but the last: 'float32', 'mixed_bfloat16' or
        'mixed_float16'. The last one computes in float32: in half precision the sigmoid rounds to
        0 or 1 and the loss stops falling.
    Returns: keras.Model from float32 (batch, rows, cols, channels), normalised, to the probability
        of cloud, float32 (batch, rows, cols, 1).
"""

import keras
from keras import layers

FILTERS = (32, 64, 128, 256)  # per stage going down; mlcommons/science v1.1


def conv_block(x, filters, dtype):
    """Two 3x3 same-padded convolutions, each followed by ReLU."""
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal", dtype=dtype)(
            x
        )
        x = layers.ReLU(dtype=dtype)(x)
    return x


def unet(input_shape, dtype="float32"):
    """Build the U-Net of mlcommons/science v1.1: 39 layers, 1,948,609 trainable parameters.

    39 layers = Input + 14 x (Conv2D + ReLU) + 3 MaxPool + 3 UpSampling + 3 Concatenate + 1.
    Rows and columns must divide by 8, since they are halved three times.
    """
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


NETWORKS = {
    "unet": unet,
}
