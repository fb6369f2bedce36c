"""What started this process, and how the ranks of one run find one another.

Every rank writes its address into a folder below output_dir, which all ranks share since they write
their masks there, and reads those of the others. So ports are free ones, several ranks on a host
and unequal numbers of ranks a node need no rule, and whoever is missing has a number. TensorFlow's
cluster resolvers were tried: they want equal numbers of tasks a node, fixed ports (two jobs on one
host collide), and there is none for jsrun.
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
        rank: Its number; 0 is the chief.
        n_ranks: Number of processes.
        local_rank: Its number on its node.
        local_size: Processes on its node.
        node: Name of its node.
        job: What tells this start from any other.
        shares_gpus: Whether the ranks of a node see the same GPUs, and divide them.
        addresses: 'host:port' of every rank, where TF_CONFIG gives them.
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
    """Find out what started us: a TF_CONFIG, Slurm's srun, jsrun or mpirun, or nothing of these.

    Args:
        environ: Environment variables.

    Raises:
        UserError: If TF_CONFIG describes anything but workers.
    """
    if config := environ.get("TF_CONFIG"):
        return _from_tf_config(config, environ)
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:  # jsrun, and mpirun, also below Slurm
        return _from_open_mpi(environ)
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # absent from a batch script itself
        return _from_slurm(environ)
    return Launch()


def _from_tf_config(text, environ):
    try:
        config = json.loads(text)
        (kind, addresses), *others = config["cluster"].items()
        rank = int(config["task"]["index"])
        if kind != "worker" or others or not 0 <= rank < len(addresses):
            raise ValueError("its cluster should hold 'worker' alone, and task.index one of them")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"TF_CONFIG cannot be used: {error}. Mend or unset it.") from None
    if len(addresses) == 1:
        return Launch()
    job = hashlib.sha256("".join(addresses).encode()).hexdigest()[:16]
    hosts = [address.rpartition(":")[0] for address in addresses]
    same_host = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    return Launch(
        rank,
        len(addresses),
        same_host.index(rank),
        len(same_host),
        hosts[rank],
        job,
        "CUDA_VISIBLE_DEVICES" not in environ,
        tuple(addresses),
    )


def _from_slurm(environ):
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    n_visible = visible and str(len(visible.split(",")))
    parts = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return Launch(
        rank=int(environ["SLURM_PROCID"]),
        n_ranks=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        local_size=_tasks_on_node(
            environ["SLURM_STEP_TASKS_PER_NODE"], int(environ["SLURM_NODEID"])
        ),
        node=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        job="slurm-" + "-".join(environ.get(part, "0") for part in parts),
        # --gpus-per-task shows each rank its own; else each sees all of the step on its node.
        shares_gpus=n_visible in (None, environ.get("SLURM_GPUS_ON_NODE")),
    )


def _tasks_on_node(text, node):
    """Read Slurm's '2(x3),1': the number of tasks on a node, by its place in the list."""
    counts = []
    for part in text.split(","):
        n, _, times = part.partition("(x")
        counts += [int(n)] * int(times.rstrip(")") or 1)
    return counts[node]


def _from_open_mpi(environ):
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    if not job:
        raise UserError(
            "OMPI_COMM_WORLD_SIZE says that there are several ranks, but neither PMIX_NAMESPACE "
            "nor OMPI_MCA_ess_base_jobid says of which job. Start them with jsrun or mpirun."
        )
    job = "".join(c if c.isalnum() else "-" for c in f"{environ.get('LSB_JOBID', 'mpi')}-{job}")
    return Launch(
        rank=int(environ["OMPI_COMM_WORLD_RANK"]),
        n_ranks=int(environ["OMPI_COMM_WORLD_SIZE"]),
        local_rank=int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),
        local_size=int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"]),
        job=job,
        # jsrun's resource sets show each rank its own; mpirun shows all of a node to each.
        shares_gpus="JSM_NAMESPACE_RANK" not in environ,
    )
