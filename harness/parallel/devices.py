"""Which devices a run uses, and the distribution strategy over them."""

import contextlib
import itertools
import json
import logging
import os
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import keras
import numpy as np
import psutil
import tensorflow as tf
from tensorflow.python.client import device_lib
from tensorflow.python.eager import context as eager  # see _many_workers

from harness.console import counted
from harness.data.batches import KeptBatch, used_slots
from harness.data.prefetch import ReaderPool
from harness.errors import UserError
from harness.parallel.rendezvous import Rendezvous, SingleRank, reserve_port
from harness.signals import check_signals

log = logging.getLogger("cloudmask")

SERVICE_SECONDS = 30 * 86400  # [s] suspended ranks may be silent for TensorFlow's service
# Steps whose batches are on the devices early. A copy to a GPU waits for the steps that have been
# sent to it: only that of the step after next runs beside a step.
STEPS_AHEAD = 2
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of the container: microseconds per period, or "max"
CPU_MICRO_BATCH = 4  # patches; at 256 x 256 more took 1 GB more and were no faster on two cores


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        strategy: tf.distribute.Strategy over all replicas.
        local: Names of this process's devices, '/GPU:0' and so on.
        kind: 'GPU' or 'CPU'.
        rendezvous: Rendezvous of the ranks, or SingleRank.
        announcements: What each rank announced at the start, in order.
        deterministic: Whether runs repeat bit for bit.
        gpu_numbers: Numbers of this process's GPUs among those that TensorFlow sees.
    """

    strategy: tf.distribute.Strategy
    local: tuple
    kind: str
    rendezvous: Rendezvous | SingleRank
    announcements: tuple
    deterministic: bool
    gpu_numbers: tuple = ()

    @property
    def launch(self):
        """Launch of this process."""
        return self.rendezvous.launch

    @property
    def rank(self):
        """Number of this process; 0 is the chief."""
        return self.launch.rank

    @property
    def n_ranks(self):
        """Number of processes."""
        return self.launch.n_ranks

    @property
    def n_nodes(self):
        """Number of nodes that the ranks run on."""
        return len({facts["node"] for facts in self.announcements})

    @property
    def n_replicas(self):
        """Replicas in all processes."""
        return self.strategy.num_replicas_in_sync

    @property
    def replicas(self):
        """Numbers of this process's replicas among those of all processes."""
        first = self.rank * len(self.local)
        return range(first, first + len(self.local))

    @property
    def n_cores(self):
        """Cores of the node that are for this process: ranks divide those that they share."""
        return share_of_cores(self.announcements, self.rank)

    @property
    def is_first_on_node(self):
        """Whether this is the first rank of its node."""
        nodes = [facts["node"] for facts in self.announcements]
        return nodes.index(self.launch.node) == self.rank

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
        """GPUs per node, as found."""
        return self.n_gpus // self.n_nodes

    @property
    def n_ranks_on_node(self):
        """Number of processes on the node of this one."""
        return sum(facts["node"] == self.launch.node for facts in self.announcements)

    def memory(self):
        """Memory that TensorFlow may use on each device of this process [bytes]."""
        if self.kind == "CPU":
            free = psutil.virtual_memory().available
            return free // (self.n_ranks_on_node * len(self.local))
        listed = device_lib.list_local_devices()
        return min(device.memory_limit for device in listed if device.device_type == "GPU")

    def peak_gpu_memory(self):
        """Peak memory of TensorFlow on each GPU of this process [bytes]; empty on CPUs."""
        if self.kind == "CPU":
            return []
        return [tf.config.experimental.get_memory_info(gpu)["peak"] for gpu in self.local]

    def check(self):
        """Raise Interrupted after a signal and RankError after the failure of another rank."""
        check_signals()
        self.rendezvous.check()

    def gather(self, number):
        """The numbers of all ranks, in order; every rank waits here for all others."""
        if self.n_ranks == 1:
            return [number]
        mine = tf.one_hot(self.rank, self.n_ranks, dtype=tf.float64) * number / len(self.local)

        @tf.function
        def add_up():
            def on_replica():
                return tf.distribute.get_replica_context().all_reduce("sum", mine)

            return self.strategy.run(on_replica)

        return self.strategy.experimental_local_results(add_up())[0].numpy().tolist()

    def micro_batch(self, wanted, batch_size, replicas=None):
        """Patches that one replica passes through the network at once."""
        share = -(-batch_size // (replicas or self.n_replicas))
        if wanted == "auto":
            wanted = CPU_MICRO_BATCH if self.kind == "CPU" else share
        return min(wanted, share)

    def distribute(self, elements):
        """Yield tuples of one element per replica of this process, each on its device.

        While a step runs, a thread takes the elements of the next STEPS_AHEAD steps, and a thread
        for each replica copies them.
        """
        elements = iter(elements)
        with ReaderPool(1) as feeder, ThreadPoolExecutor(len(self.local)) as copiers:

            def take(_):
                return on_replicas(self.strategy, elements, copiers.map)

            yield from feeder.prefetch(take, itertools.count(), STEPS_AHEAD)

    def summary(self):
        """The dictionary `devices` of results.json."""
        return {
            "kind": self.kind,
            "replicas": self.n_replicas,
            "ranks": self.n_ranks,
            "nodes": self.n_nodes,
            "accelerators_per_node": self.accelerators_per_node,
            "description": self.describe(),
            "deterministic": self.deterministic,
        }

    def describe(self):
        """One line of text: '2 nodes, 4 ranks, 8 GPU replicas (NVIDIA A100)'."""
        replica = f"{self.kind} replica"
        counts = ((self.n_nodes, "node"), (self.n_ranks, "rank"), (self.n_replicas, replica))
        words = ", ".join(counted(n, word) for n, word in counts)
        return f"{words} ({_hardware_name(self.kind)})"


def on_replicas(strategy, elements, map_over=map):
    """Take one element for each replica of this process and copy it to the replica's device.

    `distribute_datasets_from_function` would do this with datasets of its own, each with a tuning
    thread: dropping such a dataset waits for its thread, up to a minute in TensorFlow 2.21.

    Args:
        strategy: tf.distribute.Strategy.
        elements: Iterator over tuples of tensors or arrays, or over KeptBatch.
        map_over: Function like `map`, such as that of a pool of threads.

    Returns:
        Such a tuple with the per-replica values that `strategy.run` takes.
    """
    devices = strategy.extended.worker_devices
    copies = map_over(_copy_to, devices, list(itertools.islice(elements, len(devices))))
    return strategy.experimental_distribute_values_from_function(lambda context: next(copies))


def _copy_to(device, element):
    with tf.device(device):
        if isinstance(element, KeptBatch):
            return _batch_on_device(element)
        return tuple(tf.identity(_as_tensor(part)) for part in element)


def _batch_on_device(batch):
    """Copy the new patches of a KeptBatch to the device, and put the batch together there."""
    new = [tf.identity(_as_tensor(part)) for part in (batch.new.channels, batch.new.cloud)]
    for i, weight in enumerate(batch.new.weight):
        batch.kept.append((*(part[i : i + 1] for part in new), weight))
    patches = [batch.kept[row] for row in batch.rows]
    weight = np.zeros(batch.size, np.float32)
    weight[: len(patches)] = [each[2] for each in patches]
    n_empty = batch.size - len(patches)
    empty = [np.zeros((n_empty, *part.shape[1:]), part.dtype.as_numpy_dtype) for part in new]
    images = (tf.concat([*(each[k] for each in patches), empty[k]], axis=0) for k in (0, 1))
    return *images, tf.identity(weight), tf.identity(used_slots(weight))


def _as_tensor(array):
    """An array as a tensor in the memory of the host, without a copy where TensorFlow allows it."""
    if isinstance(array, np.ndarray) and array.ctypes.data % 64 == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return array


def open_devices(
    rendezvous, gpu="auto", nodes="auto", cpu_devices=1, deterministic="auto", xla=False, seed=0,
    **facts,
):  # fmt: skip
    """Set up TensorFlow and build the strategy; to be called once, before TensorFlow is used.

    Args:
        rendezvous: Rendezvous of the ranks, or SingleRank.
        gpu: 'auto', or the required number of GPUs per node; 0 for the CPU.
        nodes: 'auto', or the required number of nodes.
        cpu_devices: Virtual CPU replicas if no GPU is used.
        deterministic: True, False or 'auto', which is True on CPUs.
        xla: Whether the network will be compiled.
        seed: Seed of Python, NumPy and TensorFlow.
        facts: More to announce to the other ranks; `work` must be the same on all of them.

    Returns:
        Devices.

    Raises:
        UserError: If a requirement is not met, or ranks are missing.
    """
    launch = rendezvous.launch
    found = tf.config.list_physical_devices("GPU") if gpu != 0 else []
    facts |= {"node": launch.node, "gpus": len(found), "visible": visible_gpus()}
    facts["cores"] = usable_cores()
    announcements = [facts]
    if launch.n_ranks > 1:
        with reserve_port(launch) as reserved:  # TensorFlow takes the port over below
            address = f"{socket.gethostname()}:{reserved.getsockname()[1]}"
            rendezvous.announce(address=address, **facts)
            announcements = rendezvous.wait_for_all()
            addresses = launch.addresses or [other["address"] for other in announcements]
            rendezvous.check_connections(addresses)
    shares = [share_of_gpus(announcements, rank, gpu) for rank in range(launch.n_ranks)]
    used = found[slice(*shares[launch.rank])]
    kind = "GPU" if used else "CPU"
    if cpu_devices > 1 and (kind == "GPU" or launch.n_ranks > 1):
        raise UserError(
            f"cpu_devices: {cpu_devices} simulates several devices on the CPU of one process, "
            f"found {counted(launch.n_ranks, 'rank')} and {counted(len(used), 'GPU')}. Set "
            "cpu_devices: 1, or use gpu: 0 with one rank."
        )
    local = tuple(f"/{kind}:{i}" for i in range(len(used) or cpu_devices))
    announcements = [
        {**other, "gpus": n, "devices": n or cpu_devices, "kind": "GPU" if n else "CPU"}
        for other, (begin, end) in zip(announcements, shares, strict=True)
        for n in [end - begin]
    ]
    check_requirements(gpu, nodes, announcements)

    tf.config.set_visible_devices(used, "GPU")
    for device in used:
        tf.config.experimental.set_memory_growth(device, True)
    if kind == "CPU":
        _divide_cpu(cpu_devices)
    keras.utils.set_random_seed(seed)
    deterministic = kind == "CPU" if deterministic == "auto" else deterministic
    if deterministic and xla and kind == "GPU":
        raise UserError(
            "deterministic: true and xla: true cannot be combined on GPUs: XLA has no "
            "deterministic gradient of pooling. Set one of them to false."
        )
    if deterministic:
        _make_deterministic(kind)

    numbers = tuple(int(gpu.name.rsplit(":", 1)[1]) for gpu in used)
    facts = (local, kind, rendezvous, tuple(announcements), deterministic, numbers)
    if launch.n_ranks > 1:
        with rendezvous.first_contact(addresses):
            devices = Devices(_many_workers(launch, addresses, kind), *facts)
            devices.gather(0)
        rendezvous.watch(_end_collectives)
        return devices
    # TensorFlow chooses NCCL between GPUs; virtual CPUs share one memory.
    reduction = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
    return Devices(tf.distribute.MirroredStrategy(local, cross_device_ops=reduction), *facts)


def visible_gpus():
    """A text that is the same for two ranks of a node if they see the same GPUs.

    CUDA_VISIBLE_DEVICES alone does not tell: inside a control group each rank may see its own GPU
    as number 0.
    """
    ids = []
    try:
        import pynvml
    except ModuleNotFoundError:  # the sampling of GPUs, for which it is installed, may be off
        return f"{os.environ.get('CUDA_VISIBLE_DEVICES')}"
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        ids = sorted(map(pynvml.nvmlDeviceGetUUID, handles))
    return f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {ids}"


def usable_cores():
    """Numbers of the cores that this process may use, as many as its container has at most."""
    known = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count()))
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        quota, period = map(int, CPU_QUOTA.read_text(encoding="utf-8").split())
        cores = cores[: max(1, quota // period)]
    return cores


def share_of_cores(announcements, rank):
    """How many cores are for a rank, at least one: ranks that may use the same ones divide them.

    Args:
        announcements: Dictionaries with `node` and `cores`, the numbers of cores.
        rank: Number of the rank.
    """
    own = announcements[rank]
    users = Counter()
    for other in announcements:
        if other["node"] == own["node"]:
            users.update(other["cores"])
    return max(1, int(sum(Fraction(1, users[core]) for core in own["cores"])))


def share_of_gpus(announcements, rank, gpu="auto"):
    """Which of the GPUs that a rank sees it uses: ranks that see the same ones divide them.

    Args:
        announcements: Dictionaries with `node`, `gpus` (the number seen) and `visible`.
        rank: Number of the rank.
        gpu: 'auto', or the required number of GPUs per node.

    Returns:
        The first GPU, and the one after the last.

    Raises:
        UserError: If they cannot be divided equally.
    """
    own = announcements[rank]
    sharing = [
        r
        for r, other in enumerate(announcements)
        if (other["node"], other["visible"]) == (own["node"], own["visible"])
    ]
    n_gpus = own["gpus"] if gpu == "auto" else min(gpu, own["gpus"])
    if n_gpus % len(sharing):
        raise UserError(
            f"{len(sharing)} ranks cannot share the {n_gpus} GPUs of a node equally. Start as "
            "many ranks per node as it has GPUs, or one."
        )
    n, place = n_gpus // len(sharing), sharing.index(rank)
    return place * n, (place + 1) * n


def check_requirements(gpu, nodes, announcements):
    """Compare the required GPUs and nodes with what the ranks announced, and these with each other.

    Args:
        gpu: 'auto', or the required number of GPUs per node.
        nodes: 'auto', or the required number of nodes.
        announcements: Dictionaries with `node`, `gpus`, `devices`, `kind` and maybe `work`.

    Raises:
        UserError: If they differ.
    """
    found = Counter()
    for facts in announcements:
        found[facts["node"]] += facts["gpus"]
    is_total = gpu == sum(found.values()) and len(found) > 1  # as in v1.1
    if is_total:
        log.info("gpu: %d is read as the number of GPUs of all %d nodes.", gpu, len(found))
    elif isinstance(gpu, int) and set(found.values()) != {gpu}:
        raise UserError(
            f"gpu: {gpu} requires {counted(gpu, 'GPU')} per node, TensorFlow finds "
            f"{' and '.join(map(str, sorted(set(found.values()))))}. "
            "Set gpu: auto, or gpu: 0 for the CPU; see docs/troubleshooting.md."
        )
    if isinstance(nodes, int) and nodes != len(found):
        raise UserError(
            f"nodes: {nodes} requires {counted(nodes, 'node')}, the scheduler started "
            f"{len(found)}. "
            "Set nodes: auto, or start the program on as many nodes."
        )
    if len({facts.get("work") for facts in announcements}) > 1:
        raise UserError(
            "The ranks were started with different configurations, or see different scenes. "
            "Start all of them with the same configuration, on a shared file system."
        )
    if len({(facts["devices"], facts["kind"]) for facts in announcements}) > 1:
        counts = ", ".join(
            f"rank {r}: {facts['devices']} {facts['kind']}" for r, facts in enumerate(announcements)
        )
        raise UserError(f"All ranks need the same number of devices of one kind, found {counts}.")


def _many_workers(launch, addresses, kind):
    # gRPC would send the traffic between ranks through a web proxy.
    hosts = sorted({address.rpartition(":")[0] for address in addresses})
    os.environ["no_grpc_proxy"] = ",".join(hosts)
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": launch.rank}}
    )
    # No public function sets these times. After ten seconds without a heartbeat TensorFlow would
    # end the run, also when all ranks were suspended; the rendezvous notices lost ranks.
    eager.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        heartbeat_timeout_in_ms=1000 * SERVICE_SECONDS,
        coordinated_jobs=[
            eager.coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=len(addresses))
        ],
    )
    communication = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=communication.NCCL if kind == "GPU" else communication.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def _end_collectives(reason):
    """Let the operations that wait for other ranks fail, now and from now on."""
    eager.context().abort_collective_ops(tf.errors.UNAVAILABLE, reason)


def _divide_cpu(n_parts):
    """Make sure that there are this many virtual CPUs; TensorFlow can divide them only once."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = tf.config.get_logical_device_configuration(cpu) or [None]
    if len(parts) < n_parts:
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(n_parts)]
        tf.config.set_logical_device_configuration(cpu, parts)


def _make_deterministic(kind):
    if kind == "GPU":
        tf.config.experimental.enable_op_determinism()
    else:
        # Operations that run in parallel add up in a different order each time. This is enough on
        # CPUs; enable_op_determinism is not, and with it XLA has no gradient of pooling.
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
