"""How this process was started: everything about TF_CONFIG, Slurm, LSF, MPI and other launchers.

A launcher is one function of the environment that returns a Launch, or None if it did not start
this process; LAUNCHERS lists them, the innermost first: a job script of Slurm may call mpirun.
Which ranks share a node, and its GPUs, is found out when the ranks meet (devices.py).
"""

import hashlib
import json
import os
import socket
from dataclasses import dataclass, field

from harness.errors import UserError

SCHEDULERS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "FLUX_JOB_ID", "COBALT_JOBID")
# Ranks without a number of ranks, if no launcher gives both.
RANK_ONLY = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE", "RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Launch:
    """This process among those of the run.

    Attributes:
        rank: Number of this process; 0 is the chief.
        n_ranks: Number of processes.
        node: Name of its node.
        job: Identifies this start of the program among all others.
        addresses: 'host:port' of every rank, if TF_CONFIG gives them.
        variables: The environment variables that give `rank` and `n_ranks`.
    """

    rank: int = 0
    n_ranks: int = 1
    node: str = field(default_factory=socket.gethostname)
    job: str = ""
    addresses: tuple = ()
    variables: tuple = ()


def detect_launch(environ=os.environ):
    """Find out which launcher started this process; without one, it is the only rank.

    Args:
        environ: Environment variables.

    Raises:
        UserError: If the variables of a launcher are incomplete or contradict those of another.
    """
    launches = [launch for launcher in LAUNCHERS if (launch := launcher(environ))]
    several = [launch for launch in launches if launch.n_ranks > 1]
    if not launches:
        found = {name: environ[name] for name in RANK_ONLY if environ.get(name)}
        if found.get("SLURM_PROCID") == "0":  # also in a batch script, which is no rank
            del found["SLURM_PROCID"]
        if started := next(iter(found), None):
            raise UserError(
                f"{started}={environ[started]} says that a launcher started this process, but no "
                "variable gives the number of ranks. Start the program with srun, mpirun or "
                f"mpiexec, set TF_CONFIG, or unset {started} to run with one rank."
            )
        return Launch()
    if not several:
        return Launch()
    first, *others = several
    for other in others:
        # srun may start one process per node, each of which starts the ranks of its node.
        is_outer = "SLURM_PROCID" in other.variables and other.n_ranks <= first.n_ranks
        if (other.rank, other.n_ranks) != (first.rank, first.n_ranks) and not is_outer:
            raise UserError(
                f"{_say(first)}, but {_say(other)}. Unset the variables that are wrong."
            )
    return first


def job_id(environ=os.environ):
    """The scheduler's number of this job, or None without a scheduler."""
    return next((environ[name] for name in SCHEDULERS if environ.get(name)), None)


def is_requeued(environ=os.environ):
    """Whether Slurm has put this job back into the queue and started it again."""
    return int(environ.get("SLURM_RESTART_COUNT", 0)) > 0


def tf_config(environ):
    """TF_CONFIG with a cluster of workers, of which `chief` or `master` is the first."""
    if not (text := environ.get("TF_CONFIG")):
        return None
    try:
        config = json.loads(text)
        if config == {}:
            return None
        cluster, task = config["cluster"], config["task"]
        kind, index = task["type"], int(task["index"])
        chiefs = [*cluster.get("chief", []), *cluster.get("master", [])]
        addresses = [*chiefs, *cluster.get("worker", [])]
        if kind not in ("chief", "master", "worker"):
            raise ValueError(
                f"a task of the type '{kind}' does not train; start the program on workers only"
            )
        if "ps" in cluster:
            raise ValueError("CloudMask trains without parameter servers, remove 'ps'")
        if not 0 <= index < len(cluster[kind]):
            raise ValueError(f"task.index {index} is not one of the {len(cluster[kind])} {kind}s")
        rank = index + (len(chiefs) if kind == "worker" else 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"TF_CONFIG cannot be used: {reason}. Fix or unset it.") from None
    return Launch(
        rank,
        len(addresses),
        addresses[rank].rpartition(":")[0],
        job=hashlib.sha256("".join(addresses).encode()).hexdigest()[:16],
        addresses=tuple(addresses) if len(addresses) > 1 else (),
        variables=("TF_CONFIG",),
    )


def open_mpi(environ):
    """Open MPI's mpirun, and LSF's jsrun."""
    job = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    return from_variables(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", job)


def mvapich(environ):
    """MVAPICH2's mpirun_rsh."""
    job = ("MPISPAWN_ID", "MPISPAWN_GLOBAL_NPROCS")
    return from_variables(environ, "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", job)


def hydra(environ):
    """The mpiexec of MPICH, Intel MPI and Cray PALS."""
    return from_variables(environ, "PMI_RANK", "PMI_SIZE", ("PALS_APID", "PMI_JOBID"))


def flux(environ):
    """Flux's `flux run`; the shell of `flux alloc` has FLUX_JOB_SIZE alone."""
    if not environ.get("FLUX_TASK_RANK"):
        return None
    return from_variables(environ, "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_JOB_ID",))


def torch(environ):
    """RANK and WORLD_SIZE, set by torchrun and by many job scripts."""
    if not (environ.get("RANK") and environ.get("WORLD_SIZE")):
        return None
    return from_variables(environ, "RANK", "WORLD_SIZE", ("TORCHELASTIC_RUN_ID", "MASTER_PORT"))


def slurm(environ):
    """Slurm's srun; SLURM_STEP_NUM_TASKS is absent in the batch script itself."""
    if not environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    node = environ.get("SLURMD_NODENAME")
    job = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return from_variables(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", job, node)


def from_variables(environ, rank, size, job=(), node=None):
    """The Launch that the variables of a launcher describe; None if it did not start this process.

    Args:
        environ: Environment variables.
        rank: Name of the variable with the number of this process.
        size: Name of the variable with the number of processes.
        job: Names of variables that together identify the start, if the launcher has any.
        node: Name of this node; None for the host name.

    Raises:
        UserError: If one of `rank` and `size` is missing, or they are not numbers that fit.
    """
    found = {name: environ.get(name, "") for name in (rank, size)}
    if not any(found.values()):
        return None
    number, n_ranks = (int(text) if text.isdecimal() else -1 for text in found.values())
    if not 0 <= number < n_ranks:
        text = " and ".join(f"{name}='{value}'" for name, value in found.items())
        raise UserError(
            f"{text} should be the number of this rank and the number of ranks. Start the program "
            "with its launcher again, or unset both to run with one rank."
        )
    parts = [job_id(environ) or "", size.split("_")[0].lower(), *(environ.get(j, "") for j in job)]
    name = "".join(c if c.isalnum() else "-" for c in "-".join(filter(None, parts)))
    return Launch(number, n_ranks, node or socket.gethostname(), name, variables=(rank, size))


def _say(launch):
    return f"{' and '.join(launch.variables)} say rank {launch.rank} of {launch.n_ranks}"


LAUNCHERS = (
    tf_config,
    open_mpi,
    mvapich,
    hydra,
    flux,
    torch,
    slurm,
)
