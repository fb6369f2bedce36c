"""The network with fewer multiplications than its layers take one by one.

The U-Net doubles an image (UpSampling2D), joins the skip connection to it (Concatenate) and
convolves both (Conv2D): half of all its multiplications. A 3x3 convolution of a doubled image
multiplies equal pixels several times. A transposed convolution of the small image, with the weights
that meet equal pixels added up beforehand, gives the same for 16 instead of 36 multiplications a
small pixel, and neither the doubled image nor the joined one is ever made.
"""

import keras
import tensorflow as tf
from keras import layers


def fuse_upsampling(model):
    """Rebuild a model so that no image is doubled before it is convolved.

    Args:
        model: Functional keras.Model of one input. Layers outside the pattern stay as they are, so
            that any model is accepted.

    Returns:
        keras.Model that shares all weights with `model` and computes the same up to rounding.
    """
    before = {}  # id of an output of UpSampling2D or Concatenate: what it was made from

    def call(layer, *args, **kwargs):
        if type(layer) is layers.Conv2D and (joined := before.get(id(args[0]))) is not None:
            if _joins_doubled(joined, before) and _is_plain(layer):
                small = before[id(joined[0])]
                return DoublingConvolution(layer, name=f"{layer.name}_doubling")(small, joined[1])
        output = layer(*args, **kwargs)
        if _doubles(layer) or _joins_channels(layer):
            before[id(output)] = args[0]
        return output

    return keras.models.clone_model(
        model,
        input_tensors=keras.Input(model.inputs[0].shape[1:], dtype=model.inputs[0].dtype),
        clone_function=lambda layer: layer,
        call_function=call,
    )


def _doubles(layer):
    return (
        type(layer) is layers.UpSampling2D
        and tuple(layer.size) == (2, 2)
        and layer.interpolation == "nearest"
        and layer.data_format == "channels_last"
    )


def _joins_channels(layer):
    return type(layer) is layers.Concatenate and layer.axis in (-1, 3)


def _joins_doubled(joined, before):
    """Whether two images were joined, the first of them a doubled one."""
    return isinstance(joined, list | tuple) and len(joined) == 2 and id(joined[0]) in before


def _is_plain(layer):
    return (
        (layer.kernel_size, layer.strides, layer.dilation_rate) == ((3, 3), (1, 1), (1, 1))
        and (layer.padding, layer.groups, layer.data_format) == ("same", 1, "channels_last")
    )  # fmt: skip


class DoublingConvolution(layers.Layer):
    """`convolution(concatenate(upsampling(small), skip))` of a 3x3 convolution, by its weights."""

    def __init__(self, convolution, **kwargs):
        super().__init__(dtype=convolution.dtype_policy, **kwargs)
        self.convolution = convolution

    def call(self, small, skip):
        """(n, h, w, c) and (n, 2h, 2w, d) to (n, 2h, 2w, filters)."""
        weights = tf.convert_to_tensor(self.convolution.kernel)  # (3, 3, c + d, filters)
        of_small, of_skip = tf.split(weights, [small.shape[-1], skip.shape[-1]], axis=2)
        n, h, w, _ = tf.unstack(tf.shape(small))
        doubled = tf.nn.conv2d_transpose(
            small,
            tf.cast(doubling_kernel(of_small), small.dtype),
            (n, 2 * h, 2 * w, weights.shape[-1]),
            strides=2,
            padding="SAME",
        )
        skipped = tf.nn.conv2d(skip, tf.cast(of_skip, skip.dtype), 1, "SAME")
        if self.convolution.use_bias:
            skipped = tf.nn.bias_add(skipped, tf.cast(self.convolution.bias, skip.dtype))
        return self.convolution.activation(skipped + doubled)


# Of the weights (u, v, w) along one axis, a pixel of the small image adds to four of the doubled
# one: w times itself to the pixel before its own two, v + w and u + v to these, u to the one after.
SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def doubling_kernel(weights):
    """The kernel of the transposed convolution that doubles an image and convolves it.

    Args:
        weights: (3, 3, c, filters), of the convolution.

    Returns:
        (4, 4, filters, c), for tf.nn.conv2d_transpose with stride 2.
    """
    sums = tf.constant(SUMS, weights.dtype)
    return tf.einsum("ai,bj,ijcf->abfc", sums, sums, weights)
