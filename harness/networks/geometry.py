"""What a network demands of its images, computed from its layers: sizes, surroundings, memory.

The U-Net wants rows and columns that divide by 8 and sees 51 pixels around each one. Strips of a
scene agree with the whole scene if they start at multiples of 8 and overlap by that much.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import keras
import numpy as np

from harness.errors import UserError
from harness.networks.fused_upsampling import DoublingConvolution, fuse_upsampling

# Layers by what they do to rows and columns. The operators +, -, * of Keras tensors are layers of
# the names Add, Subtract and Multiply here.
CONVOLUTIONS = {"Conv2D", "DepthwiseConv2D", "SeparableConv2D"}
POOLS = {"MaxPooling2D", "AveragePooling2D"}
RESIZING = {"Conv2DTranspose", "UpSampling2D", "ZeroPadding2D", "Cropping2D"}
JOINS = {"Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"}
POINTWISE = {
    "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "Identity", "Dropout",
    "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "ActivityRegularization", "Rescaling",
    "Normalization", "BatchNormalization", "LayerNormalization", "UnitNormalization",
}  # fmt: skip
OPERATIONS = {"Any", "Greater", "Mean", "Split", "Where"}  # of keras.ops, pixel by pixel
KNOWN = CONVOLUTIONS | POOLS | RESIZING | JOINS | POINTWISE | OPERATIONS | {"Concatenate", "Dense"}
IN_PLACE = JOINS | POINTWISE  # TensorFlow writes the result over an input that has no other use
FLOAT_BYTES = 4  # of float32; half precision takes less


@dataclass(frozen=True)
class Geometry:
    """What the program must know about a network.

    Attributes:
        multiple: Number that rows and columns of an image must divide by.
        radius: Pixels around one that influence its output, along rows or columns.
        bytes_per_pixel: Memory of a forward pass in float32, for each pixel of the image: the most
            that the scene, the window cut from it and all intermediate results that are still
            needed take at once. Weights and most buffers inside a layer are not counted. U-Net:
            520, and 520 measured at 1200 x 1504; other networks take up to 1.5 times as much.
        multiplications_per_pixel: Of a forward pass, in all convolutions and dense layers.
        n_layers: Number of layers.
        n_parameters: Number of weights.
    """

    multiple: int
    radius: int
    bytes_per_pixel: float
    multiplications_per_pixel: float
    n_layers: int
    n_parameters: int

    @property
    def margin(self):
        """`radius`, rounded up to a multiple of `multiple`."""
        return -(-self.radius // self.multiple) * self.multiple


def geometry(model):
    """Compute the geometry of a network from its layers.

    Args:
        model: Functional keras.Model of one input (batch, rows, cols, channels) and one output
            (batch, rows, cols, outputs).

    Raises:
        UserError: If the effect of a layer is unknown, a layer looks at the whole image, or the
            output has another size than the input.
    """
    try:
        calls = _calls(model, (None, None))
        multiple = _multiple(calls, model)
        # Long enough for sizes to be in proportion, whatever a layer cuts or adds at the borders.
        size = 64 * multiple
        return Geometry(
            multiple,
            max(_radius(calls, axis, multiple) for axis in (0, 1)),
            _peak_bytes(_calls(fuse_upsampling(model), (size, size))) / size**2,
            _multiplications(_calls(model, (size, size))) / size**2,
            len(model.layers),
            model.count_params(),
        )
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"The network {model.name} cannot be applied to scenes in one piece or in strips: "
            f"{reason.rstrip('.')}. Use inference_mode: patches."
        ) from error


def _calls(model, size):
    """The calls of a model's layers in order, on images of a size: (layer, inputs, output).

    A layer of several outputs has a call for each.

    Raises:
        ValueError: If the effect of a layer on rows and columns is unknown.
    """
    calls = []

    def call(layer, *args, **kwargs):
        if not _is_known(layer):
            raise ValueError(
                f"it has the layer {layer.name} ({type(layer).__name__}), which may look at the "
                "whole image"
            )
        output = layer(*args, **kwargs)
        inputs = keras.tree.flatten((args, kwargs))
        inputs = [x for x in inputs if isinstance(x, keras.KerasTensor)]
        calls.extend((layer, inputs, each) for each in keras.tree.flatten(output))
        return output

    keras.models.clone_model(
        model,
        input_tensors=keras.Input((*size, model.inputs[0].shape[-1])),
        clone_function=lambda layer: layer,
        call_function=call,
    )
    return calls


def _is_known(layer):
    """Whether the program knows what a layer does, and its channels are the last axis."""
    if isinstance(layer, DoublingConvolution):
        return True
    axes = getattr(layer, "axis", -1)
    axes = set(axes) if isinstance(axes, list | tuple) else {axes}
    return (
        type(layer).__module__.startswith("keras.")  # and no other class of the same name
        and type(layer).__name__ in KNOWN
        and axes <= {-1, 3}
        and getattr(layer, "data_format", "channels_last") in ("channels_last", None)
        and getattr(layer, "interpolation", "nearest") in ("nearest", "bilinear")
        and getattr(layer, "output_padding", None) is None
    )


# --- what rows and columns must divide by ---------------------------------------------------


def _multiple(calls, model):
    """The least common multiple of all distances between neighbours, in pixels of the input."""
    one = Fraction(1), Fraction(1)
    distances, output = {}, one
    for layer, inputs, output_tensor in calls:
        found = {distances.get(id(each), one) for each in inputs}
        if len(found) > 1:
            raise ValueError(f"the layer {layer.name} joins images of different sizes")
        factors = _shrinkage(layer)
        output = tuple(d * f for d, f in zip(found.pop(), factors, strict=True))
        distances[id(output_tensor)] = output
    if output != one:
        raise ValueError("its output has another size than its input")
    return math.lcm(*(d.numerator for pair in distances.values() for d in pair))


def _shrinkage(layer):
    """By what a layer divides the numbers of rows and columns."""
    kind = type(layer).__name__
    if kind in CONVOLUTIONS | POOLS:
        return layer.strides
    if kind == "Conv2DTranspose":
        return [Fraction(1, n) for n in layer.strides]
    if kind == "UpSampling2D":
        return [Fraction(1, n) for n in layer.size]
    return 1, 1


# --- what one output pixel sees -------------------------------------------------------------


def _radius(calls, axis, multiple):
    """Pixels of the input that an output pixel sees to either side, along rows (0) or columns (1).

    Every position of every image is followed along one axis: the first and the last position of
    the input that it sees. The pattern repeats after `multiple` positions, and the middle of a
    long axis does not see the borders.
    """
    n = 4 * multiple
    while True:
        seen = _seen(calls, axis, n)
        if len(seen[0]) != n:
            raise ValueError(f"{n} rows or columns of its input give {len(seen[0])} of its output")
        middle = slice(n // 2, n // 2 + multiple)
        first, last = seen[:, middle]
        if first.min() > 0 and last.max() < n - 1:
            positions = np.arange(n)[middle]
            return int(max((positions - first).max(), (last - positions).max(), 0))
        n *= 2


def _seen(calls, axis, n):
    """First and last position of an input of length n that each position of the output sees."""
    image = np.array([np.arange(n), np.arange(n)])  # (2, n)
    seen = {}
    for layer, inputs, output in calls:
        parts = [seen.get(id(each), image) for each in inputs]
        sources = _sources(layer, axis, parts[0].shape[1])
        parts = np.array([_widen(part, sources, n) for part in parts])  # (inputs, 2, m)
        seen[id(output)] = result = np.array([parts[:, 0].min(0), parts[:, 1].max(0)])
    return result


def _widen(seen, sources, n):
    """What positions see that are made of others: (2, k) and (m, sources of each) to (2, m)."""
    inside = (sources >= 0) & (sources < seen.shape[1])
    first, last = seen[:, sources.clip(0, seen.shape[1] - 1)]
    return np.array([np.where(inside, first, n).min(1), np.where(inside, last, -1).max(1)])


def _sources(layer, axis, n):
    """Positions, of n along an axis, that each position of a layer's output is made of.

    Returns:
        Integers (n_out, number of sources); a source outside of 0 to n - 1 is none.
    """
    kind = type(layer).__name__
    if kind in CONVOLUTIONS:
        size, stride = layer.kernel_size[axis], layer.strides[axis]
        return _window(n, size, stride, layer.dilation_rate[axis], layer.padding)
    if kind in POOLS:
        return _window(n, layer.pool_size[axis], layer.strides[axis], 1, layer.padding)
    if kind == "Conv2DTranspose":
        size, stride = layer.kernel_size[axis], layer.strides[axis]
        return _transposed_window(n, size, stride, layer.dilation_rate[axis], layer.padding)
    if kind == "UpSampling2D":
        factor = layer.size[axis]
        positions = np.arange(n * factor)[:, None]
        if layer.interpolation == "nearest":
            return positions // factor
        before = np.floor((positions + 0.5) / factor - 0.5).astype(int)
        return np.hstack([before, before + 1]).clip(0, n - 1)
    if kind == "ZeroPadding2D":
        before, after = layer.padding[axis]
        return np.arange(-before, n + after)[:, None]
    if kind == "Cropping2D":
        before, after = layer.cropping[axis]
        return np.arange(before, n - after)[:, None]
    return np.arange(n)[:, None]


def _window(n, size, stride, dilation, padding):
    """Sources of a convolution or pool."""
    span = dilation * (size - 1) + 1
    n_out = -(-n // stride) if padding == "same" else (n - span) // stride + 1
    before = max((n_out - 1) * stride + span - n, 0) // 2 if padding == "same" else 0
    return stride * np.arange(n_out)[:, None] - before + dilation * np.arange(size)


def _transposed_window(n, size, stride, dilation, padding):
    """Sources of a transposed convolution.

    Position i adds to the positions stride * i - before + dilation * j, for j below size.
    """
    span = dilation * (size - 1) + 1
    surplus = max(span - stride, 0)
    before, n_out = (surplus // 2, n * stride) if padding == "same" else (0, n * stride + surplus)
    sums = np.arange(n_out)[:, None] + before - dilation * np.arange(size)
    return np.where(sums % stride == 0, sums // stride, -1)


# --- what a pass takes ----------------------------------------------------------------------


def _multiplications(calls):
    """Multiplications of the layers with weights for one image."""
    total = 0
    for layer, inputs, output in calls:
        kernels = [w.shape for w in getattr(layer, "weights", ()) if w.name.endswith("kernel")]
        is_transposed = type(layer).__name__ == "Conv2DTranspose"
        _, n_rows, n_cols, _ = (inputs[0] if is_transposed else output).shape
        total += n_rows * n_cols * sum(map(math.prod, kernels))
    return total


def _peak_bytes(calls):
    """Most bytes that the images of one pass take at once, see Geometry."""
    last_use = {id(each): i for i, (_, inputs, _) in enumerate(calls) for each in inputs}
    for layer, inputs, output in reversed(calls):  # TensorFlow keeps what was joined; measured
        if type(layer).__name__ == "Concatenate":
            last = last_use.get(id(output), 0)
            last_use.update({id(each): max(last_use[id(each)], last) for each in inputs})
    image = calls[0][1][0]
    live = {id(image): _n_bytes(image)}
    last_use[id(image)] = len(calls)
    peak = 0
    for i, (layer, inputs, output) in enumerate(calls):
        ending = {key for key in live if last_use.get(key) == i}
        taken = _n_bytes(output)
        free = [_n_bytes(each) for each in inputs if id(each) in ending]
        if type(layer).__name__ in IN_PLACE and taken in free:
            taken = 0
        peak = max(peak, sum(live.values()) + taken + _buffer_bytes(layer, output))
        live = {key: size for key, size in live.items() if key not in ending}
        live[id(output)] = _n_bytes(output)
    return peak + _n_bytes(image)


def _n_bytes(image):
    return FLOAT_BYTES * math.prod(image.shape[1:])


def _buffer_bytes(layer, output):
    """Bytes of a second image that a layer makes besides its output."""
    if isinstance(layer, DoublingConvolution):  # it adds one of both its inputs
        return _n_bytes(output)
    if type(layer).__name__ == "LayerNormalization":  # differences from the mean, and products
        return 2 * _n_bytes(output)
    if type(layer).__name__ == "SeparableConv2D":
        return _n_bytes(output) // layer.filters * math.prod(layer.depthwise_kernel.shape[2:])
    return 0
