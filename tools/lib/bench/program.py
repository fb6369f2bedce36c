"""All calls of bench.py into the benchmark: what is measured is built as a run builds it."""

import harness.quiet_tensorflow  # noqa: F401  (before all that imports TensorFlow)

# isort: split
import json
import logging
import shutil
import sys
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np

import data_loader
import slstr_cloud
from harness import build
from harness.inference.windows import StripGrid
from harness.networks import model_files
from harness.networks.geometry import geometry
from harness.parallel.rendezvous import SingleRank

logging.getLogger("harness.build").setLevel(logging.WARNING)  # no line about each input


def open_devices(config):
    """Set TensorFlow up as a run of one process does."""
    return build.open_devices(config, SingleRank())


def build_network(config, window=None):
    """Build the network for windows of (rows, cols), by default for patches."""
    shape = (*(window or (config.patch_size,) * 2), config.n_channels)
    return model_files.build_network(config.network, shape)


def build_network_without_zeros(config):
    """Build the network with small numbers for what training starts at 0.

    Biases and the last layers of residual blocks are 0: whether another program has them could not
    be seen from its probabilities.
    """
    network, random = build_network(config), np.random.default_rng(0)
    network.set_weights(
        [w if w.any() else random.normal(scale=0.01, size=w.shape) for w in network.get_weights()]
    )
    return network


def build_trainer(config, devices):
    """Build what takes the training steps."""
    return build.open_trainer(config, devices)


def train_on(trainer, batch):
    """Take one training step and wait for its end."""
    trainer.train_step(batch)
    trainer.pop_train_metrics()


def build_batches(config, devices, paths, n_threads=None):
    """Build the batches of training; they must be closed, because threads read ahead."""
    config = config.model_copy(update={"reader_threads": n_threads or "auto"})
    return build.open_batches(config, devices, paths)


def build_predictor(config, devices, model):
    """Build what predicts scenes as `inference_mode` and `precision` say, on the first device."""
    return build.open_predictor(config, devices, model, devices.local[0])


def inference_grids(config):
    """The windows of a scene by `inference_mode`; those of `scene` without strips."""
    size = config.image_h, config.image_w
    network = geometry(build_network(config))
    patches = data_loader.PatchGrid(*size, config.patch_size, config.crop_size)
    return {
        "patches": patches,
        "scene": StripGrid(*size, patches.padding, 1, network.margin, network.multiple),
    }


def run_inference(config, config_file, **settings):
    """Run `--mode inference` in this process, with settings that override the configuration.

    Returns:
        The part `inference` of results.json.

    Raises:
        RuntimeError: If the run fails; its message is on the screen.
    """
    options = [f"{key}={value}" for key, value in settings.items()]
    logging.disable(logging.WARNING)  # errors are shown
    try:
        # Not part of the work: `inference_mode: scene` also predicts the first scene in patches.
        with mock.patch.object(slstr_cloud, "compare_masks", lambda *_: None):
            status = slstr_cloud.main(
                ["--config", str(config_file), "--mode", "inference", "--set", *options]
            )
    finally:
        logging.disable(logging.NOTSET)
    if status:
        raise RuntimeError(f"inference with {' '.join(options)} ended with exit status {status}")
    run = Path(config.output_dir, settings["run_name"])
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    shutil.rmtree(run)
    return results["inference"]


def run_few_steps():
    """Run the benchmark with all its loops cut to a few steps; print its peak memory [bytes].

    The command line of this process is the number of steps, then the options of the benchmark.
    """
    n_steps, *options = sys.argv[1:]
    with mock.patch.object(slstr_cloud, "progress", lambda items, *_: islice(items, int(n_steps))):
        status = slstr_cloud.main(options)
    # Not ru_maxrss: a process inherits that of the process that started it.
    peak = Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]
    sys.stdout.write(f"{int(peak) * 1024}\n")
    sys.exit(status)
