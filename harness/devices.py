"""Which devices a run uses, and the distribution strategy over them."""

import contextlib
import logging
from dataclasses import dataclass

import keras
import tensorflow as tf

from harness.config import UserError

log = logging.getLogger(__name__)

CPU_MICRO_BATCH = 4  # patches; at 256 x 256 more took 1 GB more and were no faster on two cores


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        strategy: tf.distribute.Strategy over all replicas.
        local: Names of this process's devices, '/GPU:0' and so on.
        kind: 'GPU' or 'CPU'.
        rank: Number of this process; 0 is the chief.
        n_ranks: Number of processes.
        n_nodes: Number of hosts.
        deterministic: Whether runs repeat bit for bit.
    """

    strategy: tf.distribute.Strategy
    local: tuple
    kind: str
    rank: int = 0
    n_ranks: int = 1
    n_nodes: int = 1
    deterministic: bool = False

    @property
    def n_replicas(self):
        """Replicas in all processes."""
        return self.strategy.num_replicas_in_sync

    @property
    def replicas(self):
        """Numbers of this process's replicas among all."""
        first = self.rank * len(self.local)
        return range(first, first + len(self.local))

    @property
    def is_chief(self):
        """Whether this process writes the logs, the model and the results."""
        return self.rank == 0

    @property
    def n_gpus(self):
        """GPUs in all processes."""
        return self.n_replicas if self.kind == "GPU" else 0

    @property
    def accelerators_per_node(self):
        """GPUs a node, as found."""
        return self.n_gpus // self.n_nodes

    def micro_batch(self, wanted, batch_size, replicas=None):
        """Patches that one replica passes through the network at once."""
        share = -(-batch_size // (replicas or self.n_replicas))
        if wanted == "auto":
            wanted = CPU_MICRO_BATCH if self.kind == "CPU" else share
        return min(wanted, share)

    def distribute(self, dataset):
        """An iterator over the elements of `dataset()`, one for each replica in turn."""
        return iter(self.strategy.distribute_datasets_from_function(lambda context: dataset()))

    def describe(self):
        """One line for people: '2 nodes, 4 ranks, 8 GPU replicas (NVIDIA A100)'."""
        replica = f"{self.kind} replica"
        counts = ((self.n_nodes, "node"), (self.n_ranks, "rank"), (self.n_replicas, replica))
        words = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts)
        return f"{words} ({_hardware_name(self.kind)})"


def open_devices(gpu="auto", nodes="auto", cpu_devices=1, deterministic="auto", xla=False, seed=0):
    """Set TensorFlow up and build the strategy; to be called once, before TensorFlow is used.

    Args:
        gpu: 'auto', or the number of GPUs a node that is demanded; 0 for the CPU.
        nodes: 'auto', or the number of nodes that is demanded.
        cpu_devices: Virtual CPU replicas where there is no GPU.
        deterministic: True, False or 'auto', which is True on CPUs.
        xla: Whether the network will be compiled.
        seed: Of Python, NumPy and TensorFlow.

    Returns:
        Devices.

    Raises:
        UserError: If a demand cannot be met.
    """
    found = tf.config.list_physical_devices("GPU")
    if gpu not in ("auto", 0) and gpu > len(found):
        raise UserError(
            f"gpu: {gpu} demands {gpu} GPU(s) a node, TensorFlow sees {len(found)}. "
            "Set gpu: auto, or gpu: 0 for the CPU; README.md says how to set GPUs up."
        )
    if nodes not in ("auto", 1):
        raise UserError(
            f"nodes: {nodes} demands {nodes} nodes, the scheduler started 1. Set nodes: auto."
        )
    used = found if gpu == "auto" else found[:gpu]
    tf.config.set_visible_devices(used, "GPU")
    for device in used:
        tf.config.experimental.set_memory_growth(device, True)
    kind = "GPU" if used else "CPU"
    if kind == "CPU":
        _divide_cpu(cpu_devices)

    keras.utils.set_random_seed(seed)
    deterministic = kind == "CPU" if deterministic == "auto" else deterministic
    if deterministic and xla and kind == "GPU":
        raise UserError(
            "deterministic: true and xla: true do not go together on GPUs: XLA has no "
            "deterministic gradient of pooling. Set one of them to false."
        )
    if deterministic:
        _make_deterministic(kind)
    local = tuple(f"/{kind}:{i}" for i in range(len(used) or cpu_devices))
    # Between GPUs TensorFlow chooses NCCL; virtual CPUs share one memory.
    reduction = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
    strategy = tf.distribute.MirroredStrategy(local, cross_device_ops=reduction)
    return Devices(strategy, local, kind, deterministic=deterministic)


def _divide_cpu(n_parts):
    """See that there are at least so many virtual CPUs; TensorFlow divides once, at its start."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = tf.config.get_logical_device_configuration(cpu) or [None]
    if len(parts) < n_parts:
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(n_parts)]
        tf.config.set_logical_device_configuration(cpu, parts)


def _make_deterministic(kind):
    if kind == "GPU":
        tf.config.experimental.enable_op_determinism()
    else:
        # Operations that run side by side add up in another order each time. This is enough on
        # CPUs; enable_op_determinism is not, and it forbids XLA the gradient of pooling.
        tf.config.threading.set_inter_op_parallelism_threads(1)


def _hardware_name(kind):
    if kind == "GPU":
        physical = tf.config.list_physical_devices("GPU")[0]
        return tf.config.experimental.get_device_details(physical).get("device_name", "GPU")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return "CPU"
