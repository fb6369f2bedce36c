"""Which devices a run uses, and the distribution strategy over them."""

import contextlib
import json
import os
import re
import socket
from dataclasses import dataclass

import keras
import tensorflow as tf

from harness.errors import UserError
from harness.parallel.launchers import Launch
from harness.parallel.rendezvous import LOST, Rendezvous, reserve_port

CPU_MICRO_BATCH = 4  # patches; at 256 x 256 more took 1 GB more and were no faster on two cores


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        strategy: tf.distribute.Strategy over all replicas.
        local: Names of this process's devices, '/GPU:0' and so on.
        kind: 'GPU' or 'CPU'.
        launch: Launch of this process.
        cards: What each rank told the others at the start; one empty card where there is one rank.
        deterministic: Whether runs repeat bit for bit.
        meeting: Rendezvous of the ranks, or None where there is one.
        gpu_numbers: Of the GPUs of this process, among those that TensorFlow sees.
    """

    strategy: tf.distribute.Strategy
    local: tuple
    kind: str
    launch: Launch
    cards: tuple
    deterministic: bool
    meeting: Rendezvous | None = None
    gpu_numbers: tuple = ()

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
        return len({card.get("node") for card in self.cards})

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

    def peak_gpu_memory(self):
        """Most bytes that TensorFlow took on each GPU of this process; empty on CPUs."""
        if self.kind == "CPU":
            return []
        return [tf.config.experimental.get_memory_info(gpu)["peak"] for gpu in self.local]

    def check_ranks(self):
        """Raise RankError if another rank is known to have failed; for long times without steps."""
        if self.meeting and (failure := self.meeting.failure()):
            raise RankError(failure)

    def gather(self, number):
        """The numbers of all ranks, by rank; every rank waits here for all others."""
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
        """Yield an element for each replica of this process at once, each on its device."""
        elements = iter(elements)
        while True:
            yield on_replicas(self.strategy, elements)

    def describe(self):
        """One line for people: '2 nodes, 4 ranks, 8 GPU replicas (NVIDIA A100)'."""
        replica = f"{self.kind} replica"
        counts = ((self.n_nodes, "node"), (self.n_ranks, "rank"), (self.n_replicas, replica))
        words = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts)
        return f"{words} ({_hardware_name(self.kind)})"


def on_replicas(strategy, elements):
    """Take an element for each replica of this process, and put it on the replica's device.

    `distribute_datasets_from_function` would do this with datasets of its own. Each of them has a
    thread that tunes it, and who drops it waits for that thread: up to a minute in TensorFlow 2.21.

    Args:
        strategy: tf.distribute.Strategy.
        elements: Iterator over nested tuples of tensors.

    Returns:
        Such a tuple, of what `strategy.run` takes.
    """
    devices = iter(strategy.extended.worker_devices)

    def next_element(context):
        with tf.device(next(devices)):
            return tf.nest.map_structure(tf.identity, next(elements))

    return strategy.experimental_distribute_values_from_function(next_element)


def open_devices(
    gpu="auto", nodes="auto", cpu_devices=1, deterministic="auto", xla=False, seed=0,
    meeting=None, **card,
):  # fmt: skip
    """Set TensorFlow up and build the strategy; to be called once, before TensorFlow is used.

    Args:
        gpu: 'auto', or the number of GPUs a node that is demanded; 0 for the CPU.
        nodes: 'auto', or the number of nodes that is demanded.
        cpu_devices: Virtual CPU replicas where there is no GPU.
        deterministic: True, False or 'auto', which is True on CPUs.
        xla: Whether the network will be compiled.
        seed: Of Python, NumPy and TensorFlow.
        meeting: Rendezvous of the ranks, or None where there is one.
        card: More for the other ranks to know.

    Returns:
        Devices.

    Raises:
        UserError: If a demand cannot be met, or ranks are missing.
    """
    launch = meeting.launch if meeting else Launch()
    found = tf.config.list_physical_devices("GPU")
    if launch.shares_gpus and launch.local_size > 1:
        found = _share(found, launch.local_rank, launch.local_size)
    used = found[: gpu if gpu != "auto" and launch.local_size == 1 else None] if gpu != 0 else []
    kind = "GPU" if used else "CPU"
    if cpu_devices > 1 and (kind == "GPU" or launch.n_ranks > 1):
        raise UserError(
            f"cpu_devices: {cpu_devices} rehearses many devices on the CPU of one process, found "
            f"{launch.n_ranks} rank(s) and {len(used)} GPU(s). Set it to 1, or gpu: 0 in one rank."
        )
    local = tuple(f"/{kind}:{i}" for i in range(len(used) or cpu_devices))
    cards = [{}]
    if meeting:
        with reserve_port() as reserved:  # TensorFlow takes the port over below
            address = f"{socket.gethostname()}:{reserved.getsockname()[1]}"
            meeting.show(address=address, node=launch.node, devices=len(local), kind=kind, **card)
            cards = meeting.wait_for_all()
    _check_demands(gpu, nodes, len(used), cards)

    tf.config.set_visible_devices(used, "GPU")
    for device in used:
        tf.config.experimental.set_memory_growth(device, True)
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

    if meeting:
        strategy = _many_workers(launch, cards, kind)
    else:
        # Between GPUs TensorFlow chooses NCCL; virtual CPUs share one memory.
        reduction = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
        strategy = tf.distribute.MirroredStrategy(local, cross_device_ops=reduction)
    numbers = tuple(int(gpu.name.rsplit(":", 1)[1]) for gpu in used)
    return Devices(strategy, local, kind, launch, tuple(cards), deterministic, meeting, numbers)


def _share(devices, local_rank, local_size):
    """The part of a node's devices that falls to one of its ranks."""
    if len(devices) % local_size:
        raise UserError(
            f"{local_size} ranks share a node of {len(devices)} GPUs, which does not divide. "
            "Start as many ranks a node as it has GPUs, or one."
        )
    n = len(devices) // local_size
    return devices[local_rank * n : (local_rank + 1) * n]


def _check_demands(gpu, nodes, n_used, cards):
    """Compare what was demanded, and the ranks with one another."""
    found = {}
    for card in cards:
        node, n = card.get("node"), card["devices"] * (card["kind"] == "GPU") if card else n_used
        found[node] = found.get(node, 0) + n
    if isinstance(gpu, int) and set(found.values()) != {gpu}:
        raise UserError(
            f"gpu: {gpu} demands {gpu} GPU(s) a node, TensorFlow sees "
            f"{' and '.join(map(str, sorted(set(found.values()))))}. "
            "Set gpu: auto, or gpu: 0 for the CPU; README.md says how to set GPUs up."
        )
    if isinstance(nodes, int) and nodes != len(found):
        raise UserError(
            f"nodes: {nodes} demands {nodes} node(s), the scheduler started {len(found)}. "
            "Set nodes: auto, or start the program on as many."
        )
    if len({card.get("work") for card in cards}) > 1:
        raise UserError(
            "The ranks were started with different configurations, or see different scenes. "
            "Start all with the same, on a file system that all share."
        )
    if len({(card.get("devices"), card.get("kind")) for card in cards}) > 1:
        counts = ", ".join(f"rank {r}: {c['devices']} {c['kind']}" for r, c in enumerate(cards))
        raise UserError(f"All ranks need the same number of devices of one kind, found {counts}.")


class RankError(RuntimeError):
    """Another rank failed or was lost; the message says which, and why if it is known."""


@contextlib.contextmanager
def watch_ranks(meeting):
    """Tell the other ranks why this one fails, and say of which of them TensorFlow's errors tell.

    Args:
        meeting: Rendezvous of the ranks, or None where there is one.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if meeting is None:
            raise
        failure = meeting.find_failure()
        if failure is None:
            # A broken connection, or a rank that TensorFlow has not heard from
            lost = re.search(r"(?:remote target|heartbeats\):)\s*\S*task:(\d+)", str(error))
            failure = LOST.format(lost[1] if lost else "(which is unknown)")
            meeting.show(error=failure)
        raise RankError(failure) from error
    except RankError:
        raise
    except BaseException as error:
        if meeting is not None:
            with contextlib.suppress(OSError):
                meeting.show(error=f"{type(error).__name__}: {error}")
        raise


def _many_workers(launch, cards, kind):
    workers = launch.addresses or [card["address"] for card in cards]
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": workers}, "task": {"type": "worker", "index": launch.rank}}
    )
    communication = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=communication.NCCL if kind == "GPU" else communication.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


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
