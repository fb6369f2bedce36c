"""The U-Net in PyTorch, written as its users would write it, on the same work as ours.

It runs in the same process as TensorFlow. On two idle cores PyTorch trained 2.1 to 2.4 patches/s in
float32 and 4.9 in bfloat16 in a process of its own, 2.3 to 2.4 and 4.5 to 5.1 here, between matrix
products of TensorFlow that kept their 210 GFLOP/s. If other programs use the cores, OpenMP, whose
threads wait for one another, loses far more than TensorFlow: compare on an idle machine.
"""

import logging
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tools.lib.bench import measurements, program
from tools.lib.bench.rows import make_row, rate, timed

UNITS = {"train_step": "patches/s", "infer_patches": "s/scene", "infer_scene": "s/scene"}
MAX_DIFFERENCE = 1e-4  # of probabilities, between PyTorch's network and ours in float32

log = logging.getLogger("bench")


class UNet(nn.Module):
    """The U-Net of model.py, (n, C, H, W) to logits (n, 1, H, W).

    Args:
        weights: Arrays of the Keras model: kernel and bias of each convolution in turn.
    """

    def __init__(self, weights):
        super().__init__()
        self.convolutions = nn.ModuleList()
        for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
            rows, cols, n_in, n_out = kernel.shape
            layer = nn.Conv2d(n_in, n_out, (rows, cols), padding="same")
            layer.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            layer.bias.data = torch.from_numpy(bias.copy())
            self.convolutions.append(layer)

    def forward(self, x):
        """Return logits."""
        convolutions = iter(self.convolutions)

        def block(x):
            x = functional.relu(next(convolutions)(x))
            return functional.relu(next(convolutions)(x))

        skips = []
        for _ in range(3):
            skips.append(block(x))
            x = functional.max_pool2d(skips[-1], 2)
        x = block(x)
        for skip in reversed(skips):
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skip], dim=1))
        return next(convolutions)(x)


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
        network = UNet(model.get_weights()).to(self.device, memory_format=torch.channels_last)
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
                logits = self.networks[kind](self.to_device(windows[first : first + batch]))
                parts.append(torch.sigmoid(logits.float())[:, 0].cpu().numpy())
        return np.concatenate(parts)

    def train_step(self, kind, precision, channels, cloud, micro_batch):
        """One step of the optimizer, whose gradients are those of micro-batches added up, as ours.

        With 8 patches at once PyTorch trained 2.1 to 2.2 patches/s in float32 and 4.2 to 4.5 in
        bfloat16, no more than with 4 at once.
        """
        self.optimizer.zero_grad()
        for x, y in zip(channels.split(micro_batch), cloud.split(micro_batch), strict=True):
            with self.autocast(precision):
                logits = self.networks[kind](x)
            loss = functional.binary_cross_entropy_with_logits(
                logits[self.clip].float(), y[self.clip]
            )
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
    batch = next(bench.devices.distribute(measurements.in_memory(bench, trainer)))
    channels, cloud = (
        theirs.to_device(array.numpy().astype(np.float32))
        for array in next(measurements.in_memory(bench, trainer))[:2]
    )
    arguments = precision, channels, cloud, trainer.micro_batch
    return {
        kind: rate(step, trainer.batch_size)
        for kind, step in {
            "ours": partial(program.train_on, trainer, batch),
            **{kind: partial(theirs.train_step, kind, *arguments) for kind in theirs.networks},
        }.items()
    }


def inference_functions(bench, theirs, mode, precision, model):
    """Functions that return the network's seconds for a scene: ours, and PyTorch's by kind."""
    changed = {"inference_mode": mode, "precision": precision}
    ours = program.build_predictor(bench.config.model_copy(update=changed), bench.devices, model)
    (rows, cols), corners = ours.grid.window, ours.grid.corners
    shape = (*np.max(corners, axis=0) + ours.grid.window, bench.config.n_channels)
    scene = np.random.default_rng(0).standard_normal(shape, np.float32)
    windows = np.stack([scene[i : i + rows, j : j + cols] for i, j in corners])
    arguments = precision, windows, bench.trainer(precision).micro_batch
    return {
        "ours": lambda: ours(scene)[1],
        **{kind: timed(partial(theirs.predict, kind, *arguments)) for kind in theirs.networks},
    }


def measure_against_torch(bench):
    """The same network in PyTorch: training steps, and a scene without reading it."""
    model = program.build_network(bench.config)
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
