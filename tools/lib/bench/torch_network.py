"""Our networks in PyTorch, with the layers that its users would take, on the same work as ours.

It runs in the same process as TensorFlow. On two idle cores PyTorch trained 2.1 to 2.4 patches/s in
float32 and 4.9 in bfloat16 in a process of its own, 2.3 to 2.4 and 4.5 to 5.1 here, between matrix
products of TensorFlow that kept their 210 GFLOP/s. If other programs use the cores, OpenMP, whose
threads wait for one another, loses far more than TensorFlow: compare on an idle machine.
"""

import logging
from functools import partial, reduce

import keras
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from harness.errors import UserError
from tools.lib.bench import measurements, program
from tools.lib.bench.rows import make_row, rate, timed

UNITS = {"train_step": "patches/s", "infer_patches": "s/scene", "infer_scene": "s/scene"}
MAX_DIFFERENCE = 1e-4  # of probabilities, between PyTorch's network and ours in float32

log = logging.getLogger("bench")


class Sigmoid(nn.Sigmoid):
    """The sigmoid in float32, as in ours: half precision rounds it to 0 or 1."""

    def forward(self, x):
        """Return probabilities."""
        return super().forward(x.float())


ACTIVATIONS = {"linear": nn.Identity, "relu": nn.ReLU, "sigmoid": Sigmoid}


def with_weights(module, *weights):
    """A module with these arrays as its parameters, in the order in which it has them."""
    for parameter, array in zip(module.parameters(), weights, strict=True):
        parameter.data = torch.from_numpy(array.copy())
    return module


def convolution(layer, kernel, *bias, strides=None, groups=1):
    """A convolution with the settings of a Keras layer.

    Args:
        layer: keras.Layer.
        kernel: (outputs, inputs / groups, rows, cols), for a transposed convolution (inputs,
            outputs, rows, cols).
        bias: None or one, (outputs,).
        strides: Those of the layer by default.
        groups: Of channels that do not see one another.

    Raises:
        UserError: If PyTorch has no such padding.
    """
    n_out, n_in, *size = kernel.shape
    strides, padding, make = strides or layer.strides, 0, nn.Conv2d
    if layer.padding == "same" and strides == (1, 1):
        padding = "same"
    elif layer.padding == "same" and strides != tuple(size):  # whole images divide by the stride
        raise UserError(f"PyTorch cannot pad images as the layer {layer.name} does.")
    if isinstance(layer, keras.layers.Conv2DTranspose):
        n_out, n_in, make = n_in, n_out, nn.ConvTranspose2d
    settings = {"groups": groups, "bias": bool(bias), "dilation": layer.dilation_rate}
    module = make(n_in * groups, n_out, size, strides, padding, **settings)
    return with_weights(module, kernel, *bias)


def convolve(layer):
    """Conv2D or Conv2DTranspose."""
    kernel, *bias = layer.get_weights()
    return activated(layer, convolution(layer, kernel.transpose(3, 2, 0, 1), *bias))


def convolve_channels(layer):
    """SeparableConv2D: of each channel by itself, then 1x1 across channels."""
    kernel, pointwise, *bias = layer.get_weights()  # (rows, cols, channels, outputs of each)
    of_channel = kernel.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
    return activated(
        layer,
        convolution(layer, of_channel, groups=kernel.shape[2]),
        convolution(layer, pointwise.transpose(3, 2, 0, 1), *bias, strides=(1, 1)),
    )


def activated(layer, *modules):
    """Modules in turn, then the activation of a layer."""
    return nn.Sequential(*modules, ACTIVATIONS[layer.activation.__name__]())


# Functions that make the function of a Keras layer or operation on images (n, C, H, W). Its axis is
# that of the channels; check_same_network would notice another one.
LAYERS = {
    "Conv2D": convolve,
    "Conv2DTranspose": convolve,
    "SeparableConv2D": convolve_channels,
    "MaxPooling2D": lambda layer: nn.MaxPool2d(layer.pool_size, layer.strides),
    "UpSampling2D": lambda layer: nn.Upsample(scale_factor=layer.size, mode=layer.interpolation),
    "ReLU": lambda layer: nn.ReLU(),
    "Activation": activated,
    "Add": lambda layer: partial(reduce, torch.add),
    "Concatenate": lambda layer: lambda images: torch.cat(images, 1),
    "Split": lambda layer: lambda x: torch.tensor_split(x, layer.indices_or_sections, 1),
    "Greater": lambda layer: torch.gt,
    "Any": lambda layer: lambda x: x.any(1, keepdim=True),
    "Where": lambda layer: torch.where,
    "Mean": lambda layer: lambda x: x.mean(1, keepdim=True),
}


class Network(nn.Module):
    """A network of model.py: (n, C, H, W) to probabilities (n, 1, H, W).

    Args:
        model: Functional keras.Model, whose weights are copied.

    Raises:
        UserError: If it has a layer that is not in LAYERS.
    """

    def __init__(self, model):
        super().__init__()
        self.steps, made, names = [], {}, {}

        def named(values):
            if isinstance(values, list | tuple):
                return [named(each) for each in values]
            is_image = isinstance(values, keras.KerasTensor)
            return names.setdefault(values, f"image {len(names)}") if is_image else values

        def call(layer, *arguments):
            kind = type(layer).__name__
            if kind not in LAYERS:
                raise UserError(
                    f"--against torch has no translation of the layer {layer.name} ({kind}). Add "
                    "one to LAYERS in tools/lib/bench/torch_network.py, or omit torch."
                )
            output = layer(*arguments)
            if layer not in made:
                made[layer] = LAYERS[kind](layer)
            self.steps.append([made[layer], named(arguments), named(output), []])
            return output

        inputs = keras.Input(model.input_shape[1:])
        clone = keras.models.clone_model(
            model, input_tensors=inputs, clone_function=lambda layer: layer, call_function=call
        )
        self.first, self.last = named(inputs), named(clone.outputs[0])
        self.layers = nn.ModuleList(f for f in made.values() if isinstance(f, nn.Module))
        needed = {self.last}
        for _, arguments, _, unused in reversed(self.steps):  # memory is freed after the last use
            unused += set(filter(is_name, keras.tree.flatten(arguments))) - needed
            needed.update(unused)

    def forward(self, x):
        """Return probabilities, in float32."""
        images = {self.first: x}

        def filled(values):
            if isinstance(values, list):
                return [filled(each) for each in values]
            return images[values] if is_name(values) else values

        for function, arguments, results, unused in self.steps:
            outputs = function(*filled(arguments))
            if is_name(results):
                images[results] = outputs
            else:
                images.update(zip(results, outputs, strict=True))
            for name in unused:
                del images[name]
        return images[self.last]


def is_name(value):
    """Whether a value of `Network.steps` stands for an image."""
    return isinstance(value, str)


class TorchProgram:
    """Training and prediction in PyTorch, with the settings of `bench`.

    Args:
        bench: Bench.
        model: The keras.Model whose weights are taken.
    """

    def __init__(self, bench, model):
        torch.set_num_threads(measurements.n_cores())
        self.device = "cuda" if bench.devices.kind == "GPU" else "cpu"
        clip = slice(bench.config.clip_offset, bench.config.patch_size - bench.config.clip_offset)
        self.clip = (slice(None), slice(None), clip, clip)
        network = Network(model).to(self.device, memory_format=torch.channels_last)
        self.networks = {"eager": network}
        if not bench.quick:
            self.networks["compile"] = torch.compile(network)
        self.optimizer = torch.optim.Adam(network.parameters(), bench.config.learning_rate)

    def to_device(self, array):
        """NumPy (n, H, W, C) to a tensor (n, C, H, W), channels last in memory."""
        return torch.from_numpy(array).to(self.device).permute(0, 3, 1, 2)

    def autocast(self, precision):
        """The context in which the network computes in a precision."""
        half = precision != "float32"
        return torch.autocast(self.device, getattr(torch, precision), enabled=half)

    def predict(self, kind, precision, windows, batch):
        """Probability for NumPy windows (n, H, W, C), `batch` of them at once: (n, H, W)."""
        parts = []
        with torch.inference_mode(), self.autocast(precision):
            for first in range(0, len(windows), batch):
                found = self.networks[kind](self.to_device(windows[first : first + batch]))
                parts.append(found[:, 0].cpu().numpy())
        return np.concatenate(parts)

    def train_step(self, kind, precision, channels, cloud, micro_batch):
        """One step of the optimizer, whose gradients are those of micro-batches added up, as ours.

        With 8 patches at once PyTorch trained 2.1 to 2.2 patches/s in float32 and 4.2 to 4.5 in
        bfloat16, no more than with 4 at once.
        """
        self.optimizer.zero_grad()
        for x, y in zip(channels.split(micro_batch), cloud.split(micro_batch), strict=True):
            with self.autocast(precision):
                probability = self.networks[kind](x)
            loss = functional.binary_cross_entropy(probability[self.clip], y[self.clip])
            (loss * (len(x) / len(channels))).backward()
        self.optimizer.step()
        return loss.item()  # waits for the device


def check_same_network(theirs, model):
    """Raise RuntimeError if PyTorch's network gives other probabilities than the Keras model."""
    patch = np.random.default_rng(0).standard_normal((1, *model.input_shape[1:]), np.float32)
    difference = np.abs(model(patch)[..., 0] - theirs.predict("eager", "float32", patch, 1)).max()
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(
            f"PyTorch's probabilities should differ from ours by at most {MAX_DIFFERENCE}, found "
            f"{difference}: the networks do not do the same work."
        )


def training_functions(bench, theirs, precision):
    """Functions that train and return their rate [patches/s]: ours, and PyTorch's by kind."""
    trainer = bench.trainer(precision)
    channels, cloud = (
        theirs.to_device(array.numpy().astype(np.float32))
        for array in next(measurements.in_memory(bench, trainer))[:2]
    )
    arguments = precision, channels, cloud, trainer.micro_batch
    return {"ours": measurements.training_rate(bench, trainer)} | {
        kind: rate(partial(theirs.train_step, kind, *arguments), trainer.batch_size)
        for kind in theirs.networks
    }


def inference_functions(bench, theirs, mode, precision, model):
    """Functions that return the network's seconds for a scene: ours, and PyTorch's by kind."""
    changed = {"inference_mode": mode, "precision": precision}
    ours = program.build_predictor(bench.config.model_copy(update=changed), bench.devices, model)
    scene, windows = measurements.random_scene(bench, ours.grid)
    arguments = precision, windows, bench.trainer(precision).micro_batch
    return {
        "ours": lambda: ours(scene)[1],
        **{kind: timed(partial(theirs.predict, kind, *arguments)) for kind in theirs.networks},
    }


def measure_against_torch(bench):
    """The same network in PyTorch: training steps, and a scene without reading it."""
    model = program.build_network_without_zeros(bench.config)
    theirs = TorchProgram(bench, model)
    check_same_network(theirs, model)
    functions = {}
    for precision in bench.precisions[:2]:
        for work in UNITS:
            if not bench.wants(f"torch/{work}/{precision}"):
                continue
            if work == "train_step":
                of_kind = training_functions(bench, theirs, precision)
            else:
                mode = work.removeprefix("infer_")
                of_kind = inference_functions(bench, theirs, mode, precision, model)
            if work == "infer_patches":  # compiling takes half a minute
                of_kind.pop("compile", None)
            for kind, function in of_kind.items():
                log.info("    first %s/%s, %s ...", work, precision, kind)
                try:
                    function()  # traces, compiles and takes memory
                    functions[work, precision, kind] = function
                except Exception as error:
                    if kind != "compile":
                        raise
                    log.warning("    torch.compile failed: %s", str(error).partition("\n")[0])
    precisions = list(dict.fromkeys(precision for _, precision, _ in functions))
    measured = bench.alternate(functions, 60 if bench.quick else 240, precisions)

    gflop = {f"infer_{mode}": n for mode, n in measurements.inference_gflop(bench.config).items()}
    gflop["train_step"] = measurements.training_gflop(bench.config)
    for work, precision, kind in functions:
        if kind == "ours":
            continue
        ours, other = measured[work, precision, "ours"], measured[work, precision, kind]
        share = measurements.limit_share(measured, precision, gflop[work], ours, UNITS[work])
        label = {"eager": "torch", "compile": "torch.compile"}[kind]
        yield make_row(f"torch/{work}/{precision}/{kind}", UNITS[work], ours, label, other, share)
