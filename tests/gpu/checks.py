"""What only a machine with GPUs can show: the checks of `make gpu-check`.

    python tests/gpu/checks.py NAME SCENES

runs one of CHECKS on folders of scenes and prints a JSON object, in a process of its own:
TensorFlow sets up devices once, and a GPU that fails can end the process. The checks take devices
and a configuration; test_checks.py runs them on virtual CPUs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import harness.quiet_tensorflow  # noqa: E402, F401

# isort: split
import numpy as np
import tensorflow as tf
import yaml

from data_loader import PatchGrid, find_scenes, read_scene
from harness import REPOSITORY
from harness.build import open_batches, open_devices, open_trainer
from harness.config import Config
from harness.console import counted
from harness.errors import one_line
from harness.inference.predictor import Predictor
from harness.parallel.gpu_setup import OLDEST_DRIVER, driver_version, why_no_gpu
from harness.parallel.rendezvous import SingleRank
from harness.training.trainer import POLICIES

# Largest differences from float32 on the CPU: of a probability, of the mean loss, and of all
# gradients together (the norm of the difference over the norm). Half precision on a CPU came to
# 0.004, 0.00001 and 0.003 in float16, and to 0.014, 0.0001 and 0.009 in bfloat16 (U-Net, patches of
# 64); another order of sums adds to it. Float32 in the convolutions of NVIDIA GPUs since 2020 is
# TF32, with the 10 bits of float16.
TOLERANCES = {
    "float32": (0.02, 0.001, 0.02),
    "float16": (0.02, 0.001, 0.02),
    "bfloat16": (0.06, 0.005, 0.05),
}
SAME = 1e-3  # relative difference of losses that are computed in another order, on TF32 too
STEPS = 10  # of training, where losses are compared
MAX_WAITING = 0.05  # share of the training time that may be waiting for batches
MEMORY_MARGIN = 1.15  # a run may take this many times the GPU memory that --mode check measured
GROWTH_SHARE = 0.25  # of a GPU's memory that may be taken before anything is computed
LIMIT_SECONDS = 400  # for a program that a check starts


class Skipped(Exception):
    """A check that this machine cannot make, and why."""


class Failed(Exception):
    """What a check found to be wrong, and the facts that it has collected."""

    def __init__(self, reason, facts=()):
        super().__init__(reason)
        self.facts = dict(facts)


# --- checks within a process: they take Devices and a Config


def on(devices, *names):
    """The same Devices with other devices of this process, '/CPU:0' or '/GPU:0', '/GPU:1'."""
    kind = names[0][1:4]
    reduction = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
    strategy = tf.distribute.MirroredStrategy(names, cross_device_ops=reduction)
    return replace(devices, strategy=strategy, local=names, kind=kind)


def check_versions(build, gpus, driver, cudnn):
    """Compare the driver, cuDNN and the GPUs with what TensorFlow is built for.

    Args:
        build: Dictionary of tf.sysconfig.get_build_info().
        gpus: Details of each GPU by tf.config.experimental.get_device_details.
        driver: Version of the driver, '560.35.03', or None.
        cudnn: Version of cuDNN that is loaded, '9.3.0', or None.
    """
    facts = {
        "tensorflow": tf.__version__,
        "built_for": {name: build.get(name) for name in
                      ("cuda_version", "cudnn_version", "cuda_compute_capabilities")},
        "gpus": gpus, "driver": driver, "cudnn": cudnn,
    }  # fmt: skip
    oldest = OLDEST_DRIVER.get(build["cuda_version"].partition(".")[0], "0")
    if driver and list(map(int, driver.split("."))) < list(map(int, oldest.split("."))):
        raise Failed(f"The driver is {driver}, CUDA {build['cuda_version']} needs {oldest}", facts)
    if cudnn and cudnn.partition(".")[0] != build["cudnn_version"].partition(".")[0]:
        raise Failed(f"cuDNN is {cudnn}, TensorFlow needs {build['cudnn_version']}", facts)
    known = [int(name.rpartition("_")[2]) for name in build["cuda_compute_capabilities"]]
    for gpu in gpus:
        major, minor = gpu["compute_capability"]
        if 10 * major + minor < min(known):
            raise Failed(f"{gpu['device_name']} is older than TensorFlow supports", facts)
    return facts


def check_agreement(config, tested, reference, paths):
    """Compare probabilities, loss and gradients of a device in each precision with float32.

    Args:
        config: Config.
        tested: Devices, of which the first is tested.
        reference: Devices with a CPU.
        paths: Scenes.
    """
    exact, weights = _first_step(config, on(reference, reference.local[0]), paths)
    facts, faults = {}, []
    for precision, tolerances in TOLERANCES.items():
        half = config.model_copy(update={"precision": precision})
        ours, _ = _first_step(half, on(tested, tested.local[0]), paths, weights)
        differences = {
            "probability": float(np.abs(ours["probability"] - exact["probability"]).max()),
            "loss": abs(ours["loss"] - exact["loss"]),
            "gradient": float(
                np.linalg.norm(ours["gradient"] - exact["gradient"])
                / np.linalg.norm(exact["gradient"])
            ),
        }
        facts[precision] = differences
        faults += (
            f"{precision} {name} {difference:.2g}, allowed {tolerance:.2g}"
            for (name, difference), tolerance in zip(differences.items(), tolerances, strict=True)
            if not difference <= tolerance
        )
    if faults:
        raise Failed(f"Differences from float32 on the CPU: {'; '.join(faults)}", facts)
    return facts


def _first_step(config, devices, paths, weights=None):
    """Probabilities of a patch, loss and gradients of one batch; and the weights of the start."""
    trainer = open_trainer(config, devices)
    if weights:
        trainer.model.set_weights(weights)
    weights = trainer.model.get_weights()
    size = config.patch_size
    predictor = Predictor(
        trainer.model, devices.local[0], PatchGrid(size, size, size, 0), 1,
        POLICIES[config.precision],
    )  # fmt: skip
    scene = read_scene(paths[0], config.scene_shape)
    probability, *_ = predictor(scene.channels[:size, :size])
    with open_batches(config, devices, paths) as batches:
        batch = next(devices.distribute(batches.batches()))
    trainer.eval_step(batch)
    loss = trainer.pop_eval_metrics()["loss"]
    gradient = np.zeros(1)
    while not gradient.any():  # a step in float16 is skipped until the scale of the loss is right
        trainer.train_step(batch)
        # The first moment of Adam after one step is 1 - 0.9 times the gradient.
        moments = [v for v in trainer.optimizer.variables if v.path.endswith("_momentum")]
        gradient = np.concatenate([v.numpy().ravel() for v in moments]) / 0.1
    return {"probability": probability, "loss": loss, "gradient": gradient}, weights


def losses_of(config, devices, paths, weights=None, steps=STEPS):
    """Loss of each training step, seconds of the last steps, weights of the start and the end."""
    trainer = open_trainer(config, devices)
    if weights:
        trainer.model.set_weights(weights)
    start, losses = trainer.model.get_weights(), []
    with open_batches(config, devices, paths) as batches:
        feed = devices.distribute(batches.batches())
        for step in range(steps):
            if step == steps // 2:  # what follows is traced and compiled
                begin = time.perf_counter()
            trainer.train_step(next(feed))
            losses.append(trainer.pop_train_metrics()["loss"])
    seconds = (time.perf_counter() - begin) / (steps - steps // 2)
    return losses, seconds, start, trainer.model.get_weights()


def check_repeats(config, devices, paths, steps=STEPS):
    """Train twice: with `deterministic: true` losses and weights must be the same bits."""
    losses, _, start, end = losses_of(config, devices, paths, steps=steps)
    again, _, _, end_again = losses_of(config, devices, paths, start, steps)
    n_different = sum(int((a != b).sum()) for a, b in zip(end, end_again, strict=True))
    if losses != again or n_different:
        raise Failed(f"Two runs differ: losses {losses} and {again}, {n_different} weights")
    return {"losses": losses}


def check_same_losses(paths, config, devices, other_config, other_devices, steps=STEPS):
    """Train in two ways, from the same weights on the same batches."""
    losses, seconds, start, _ = losses_of(config, devices, paths, steps=steps)
    others, other_seconds, *_ = losses_of(other_config, other_devices, paths, start, steps)
    return compare_losses(losses, others) | {"seconds_per_step": [seconds, other_seconds]}


def compare_losses(losses, others):
    """The losses, which must agree to SAME."""
    if not np.allclose(losses, others, rtol=SAME, atol=0):
        raise Failed(f"Losses differ by more than {SAME:.1%}: {losses} and {others}")
    return {"losses": [losses, others]}


# --- checks by runs of the program


def run_program(folder, config, *arguments, ranks=1):
    """Run slstr_cloud.py, as several ranks if wanted; return what it printed."""
    file = folder / f"{config['run_name']}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "slstr_cloud.py", "--config", str(file), *arguments]
    job = {"OMPI_COMM_WORLD_SIZE": str(ranks), "PMIX_NAMESPACE": config["run_name"]}
    environments = [
        {**os.environ, **job, "OMPI_COMM_WORLD_RANK": str(rank)} if ranks > 1 else None
        for rank in range(ranks)
    ]
    processes = [
        subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for environment in environments
    ]  # fmt: skip
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=LIMIT_SECONDS)[0])
            if process.returncode:
                last = "; ".join(outputs[-1].splitlines()[-3:])
                raise Failed(f"slstr_cloud.py {' '.join(arguments)} failed: {last}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outputs[0]


def results_of(folder, config):
    """Results of a run."""
    return json.loads((folder / config["run_name"] / "results.json").read_text())


def estimated_memory(printed):
    """Bytes of each GPU that `--mode check` printed."""
    number, unit = re.search(r"([\d.]+) (\w+) of each GPU", printed).groups()
    return float(number) * 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit)


def check_run(results, estimate):
    """Compare a run with what it should be: GPU memory, and the time that it waited for batches.

    Args:
        results: Dictionary of results.json.
        estimate: Bytes of GPU memory by `--mode check`.
    """
    training = results["training"]
    waited = sum(training["input_seconds_per_epoch"][1:])
    waited /= sum(training["train_seconds_per_epoch"][1:])
    peak = max(results["peak_gpu_memory"])
    facts = {
        "patches_per_second": training["patches_per_second"],
        "share_of_time_waiting_for_batches": waited,
        "peak_gpu_memory": peak,
        "estimated_gpu_memory": estimate,
        "warm_up_seconds": training["warm_up_seconds"],
    }
    faults = []
    if waited > MAX_WAITING:
        faults.append(f"{waited:.1%} of the time waited for batches, allowed {MAX_WAITING:.0%}")
    if peak > MEMORY_MARGIN * estimate:
        faults.append(f"{peak:.3g} bytes of GPU memory, --mode check said {estimate:.3g}")
    return facts, faults


# --- the checks of this machine: they take a folder of scenes


def settings(scenes, **options):
    """Settings on full-size scenes, with which differences by rounding hardly grow."""
    return {
        "train_dir": str(scenes / "one-day"), "inference_dir": str(scenes / "ssts"),
        "report": False, "learning_rate": 1e-5, **options,
    }  # fmt: skip


def configure(scenes, n_needed=1, **options):
    """Config, Devices with all GPUs, and the training scenes.

    Raises:
        Skipped: If there are too few GPUs.
    """
    need_gpus(n_needed)
    config = Config.model_validate(settings(scenes, **options))
    return config, open_devices(config, SingleRank()), find_scenes(config.train_dir)


def need_gpus(n_needed):
    """Raise Skipped if TensorFlow lists fewer GPUs."""
    n_gpus = len(tf.config.list_physical_devices("GPU"))
    if n_gpus < n_needed:
        raise Skipped(f"it needs {counted(n_needed, 'GPU')}, TensorFlow lists {n_gpus}")


def versions(scenes):
    """Devices, driver, CUDA and cuDNN."""
    del scenes
    build, gpus = tf.sysconfig.get_build_info(), tf.config.list_physical_devices("GPU")
    if not gpus:
        raise Failed(why_no_gpu(build) or "TensorFlow lists no GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    try:
        cudnn = metadata.version(f"nvidia-cudnn-cu{build['cuda_version'].partition('.')[0]}")
    except metadata.PackageNotFoundError:  # it is part of the system
        cudnn = None
    return check_versions(build, details, driver_version(), cudnn)


def agreement(scenes):
    """Probabilities, loss and gradients of each precision against float32 on the CPU."""
    config, devices, paths = configure(scenes, batch_size=8)
    return check_agreement(config, devices, on(devices, "/CPU:0"), paths)


def repeats(scenes):
    """Deterministic training, twice."""
    config, devices, paths = configure(scenes, deterministic=True, loss="forward_correction")
    return check_repeats(config, devices, paths)


def memory_growth(scenes):
    """Memory of the GPU is taken as it is needed."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    _, devices, _ = configure(scenes)
    with tf.device(devices.local[0]):
        tf.reduce_sum(tf.ones(1000)).numpy()
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    taken = memory.used - before
    if taken > GROWTH_SHARE * memory.total:
        raise Failed(f"{taken:.3g} of {memory.total:.3g} bytes are taken at the start")
    return {"taken_at_the_start": taken, "total": memory.total}


def compiled(scenes):
    """XLA against uncompiled training."""
    config, devices, paths = configure(scenes)
    with_xla = config.model_copy(update={"xla": True})
    return check_same_losses(paths, config, devices, with_xla, devices)


def several_gpus(scenes):
    """All GPUs against one (NCCL)."""
    config, devices, paths = configure(scenes, 2)
    return check_same_losses(paths, config, on(devices, devices.local[0]), config, devices)


def two_ranks(scenes):
    """Two ranks of a node with a GPU each, against one rank with both."""
    need_gpus(2)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            config = settings(scenes, output_dir=folder, run_name=f"ranks{ranks}", gpu=2, epochs=2)
            run_program(Path(folder), config, "--mode", "train", ranks=ranks)
            training = results_of(Path(folder), config)["training"]
            losses.append([training["loss"], training["val_loss"]])
    return compare_losses(*losses)


def runs(scenes):
    """Real runs in each precision: throughput, starvation of input, peak memory."""
    need_gpus(1)
    facts, faults = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for precision in POLICIES:
            config = settings(
                scenes, output_dir=folder, run_name=precision, precision=precision, epochs=4,
                batch_size=32 * len(tf.config.list_physical_devices("GPU")),
            )  # fmt: skip
            estimate = estimated_memory(run_program(Path(folder), config, "--mode", "check"))
            run_program(Path(folder), config)
            facts[precision], wrong = check_run(results_of(Path(folder), config), estimate)
            faults += (f"{precision}: {fault}" for fault in wrong)
    if faults:
        raise Failed("; ".join(faults), facts)
    return facts


CHECKS = {
    "versions": versions,
    "memory_growth": memory_growth,
    "agreement": agreement,
    "repeats": repeats,
    "compiled": compiled,
    "several_gpus": several_gpus,
    "two_ranks": two_ranks,
    "runs": runs,
}


def report(check, scenes):
    """Make a check: its status, facts and what was wrong."""
    try:
        return {"status": "passed", **check(scenes)}
    except Skipped as error:
        return {"status": "skipped", "reason": str(error)}
    except Failed as error:
        return {"status": "failed", "reason": str(error), **error.facts}
    except Exception as error:  # of TensorFlow or CUDA: it belongs into the report
        return {"status": "failed", "reason": one_line(error)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report(CHECKS[sys.argv[1]], Path(sys.argv[2]))) + "\n")
