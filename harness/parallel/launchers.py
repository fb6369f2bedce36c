"""How this process was started: everything about TF_CONFIG, Slurm, LSF and MPI.

A launcher is one function of the environment that returns a Launch, or None if it did not start
this process; LAUNCHERS lists them in the order in which they are asked.
"""

import hashlib
import json
import os
import socket
from dataclasses import dataclass, field

from harness.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process among those of the run.

    Attributes:
        rank: Number of this process; 0 is the chief.
        n_ranks: Number of processes.
        local_rank: Number of this process on its node.
        local_size: Processes on its node.
        node: Name of its node.
        job: Identifies this start of the program among all others.
        shares_gpus: Whether the ranks of a node see the same GPUs and must divide them.
        addresses: 'host:port' of every rank, if TF_CONFIG gives them.
    """

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: str = field(default_factory=socket.gethostname)
    job: str = ""
    shares_gpus: bool = False
    addresses: tuple = ()


def detect_launch(environ=os.environ):
    """Find out which launcher started this process; without one, it is the only rank.

    Args:
        environ: Environment variables.

    Raises:
        UserError: If the variables of the launcher are incomplete or unusable.
    """
    launches = (launcher(environ) for launcher in LAUNCHERS)
    return next((launch for launch in launches if launch), Launch())


def job_id(environ=os.environ):
    """The scheduler's number of this job, or None without a scheduler."""
    return environ.get("SLURM_JOB_ID") or environ.get("LSB_JOBID")


def is_requeued(environ=os.environ):
    """Whether Slurm has put this job back into the queue and started it again."""
    return int(environ.get("SLURM_RESTART_COUNT", 0)) > 0


def tf_config(environ):
    """TF_CONFIG with a cluster of workers."""
    if not (text := environ.get("TF_CONFIG")):
        return None
    try:
        config = json.loads(text)
        (kind, addresses), *others = config["cluster"].items()
        rank = int(config["task"]["index"])
        if kind != "worker" or others or not 0 <= rank < len(addresses):
            raise ValueError("the cluster should contain only 'worker', and task.index one of them")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"TF_CONFIG cannot be used: {error}. Fix or unset it.") from None
    if len(addresses) == 1:
        return Launch()
    hosts = [address.rpartition(":")[0] for address in addresses]
    same_host = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    return Launch(
        rank,
        len(addresses),
        same_host.index(rank),
        len(same_host),
        hosts[rank],
        job=hashlib.sha256("".join(addresses).encode()).hexdigest()[:16],
        shares_gpus="CUDA_VISIBLE_DEVICES" not in environ,
        addresses=tuple(addresses),
    )


def open_mpi(environ):
    """Open MPI's mpirun, also below Slurm, and LSF's jsrun."""
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) == 1:
        return None
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    if not job:
        raise UserError(
            "OMPI_COMM_WORLD_SIZE says that there are several ranks, but neither PMIX_NAMESPACE "
            "nor OMPI_MCA_ess_base_jobid says which job they belong to. Start them with jsrun or "
            "mpirun."
        )
    job = "".join(c if c.isalnum() else "-" for c in f"{environ.get('LSB_JOBID', 'mpi')}-{job}")
    return Launch(
        rank=int(environ["OMPI_COMM_WORLD_RANK"]),
        n_ranks=int(environ["OMPI_COMM_WORLD_SIZE"]),
        local_rank=int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),
        local_size=int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"]),
        job=job,
        # A resource set of jsrun shows each rank its own GPUs; mpirun shows all to each rank.
        shares_gpus="JSM_NAMESPACE_RANK" not in environ,
    )


def slurm(environ):
    """Slurm's srun; SLURM_STEP_NUM_TASKS is absent in the batch script itself."""
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    n_visible = visible and str(len(visible.split(",")))
    step = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    tasks = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    return Launch(
        rank=int(environ["SLURM_PROCID"]),
        n_ranks=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        local_size=tasks[int(environ["SLURM_NODEID"])],
        node=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        job="slurm-" + "-".join(environ.get(name, "0") for name in step),
        # --gpus-per-task shows each rank its own GPUs; otherwise it sees all of its node.
        shares_gpus=n_visible in (None, environ.get("SLURM_GPUS_ON_NODE")),
    )


def _tasks_per_node(text):
    """Slurm's '2(x3),1' means the list 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        n, _, times = part.partition("(x")
        counts += [int(n)] * int(times.rstrip(")") or 1)
    return counts


LAUNCHERS = (
    tf_config,
    open_mpi,
    slurm,
)
