"""A stand-in for jsrun, the launcher of Summit: it starts ranks on this host, as a test needs them.

It is no scheduler and no LSF. It gives each process the environment variables that LSF and jsrun
document and that launchers of their users read (Spectrum MPI's OMPI_*, PMIX_*, JSM_NAMESPACE_*,
LSB_*), and like `jsrun -X 1` it ends all when one fails. All hosts are this one: they are named by
addresses of the loopback network, 127.0.0.1, 127.0.0.2, ..., which differ and can be reached.

    python tests/lsf_standin.py -n 2 -- python slstr_cloud.py --config config.yaml
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CORES_PER_HOST = 42  # slots that LSF gives of a Summit node
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL


def parse_arguments(argv=None):
    """Read jsrun's options, those alone that target/summit.job and the tests use."""
    parser = argparse.ArgumentParser(description="A stand-in for jsrun.")
    add = parser.add_argument
    add("-n", "--nrs", type=int, required=True, help="resource sets")
    add("-r", "--rs_per_host", type=int, help="resource sets a host; all on one by default")
    add("-a", "--tasks_per_rs", type=int, default=1, help="ranks a resource set")
    add("-c", "--cpu_per_rs", type=int, default=1, help="accepted, does nothing")
    add("-g", "--gpu_per_rs", type=int, default=0, help="GPUs a resource set")
    add("-b", "--bind", help="accepted, does nothing")
    add("-d", "--launch_distribution", choices=["packed"], default="packed")
    add("-X", "--exit_on_error", type=int, choices=[1], default=1)
    add("command", nargs=argparse.REMAINDER, help="program and arguments, after -- or not")
    arguments = parser.parse_args(argv)
    arguments.command = arguments.command[arguments.command[:1] == ["--"] :]
    if not arguments.command:
        parser.error("no program to start")
    return arguments


def allocated_slots(environment, n_hosts):
    """The job's hosts and their slots, (name, number), the launch host first.

    They are those of LSB_MCPU_HOSTS where it is set, and else as many as are needed.
    """
    if "LSB_MCPU_HOSTS" not in environment:
        names = [f"127.0.0.{number}" for number in range(1, n_hosts + 1)]
        return [("batch1", 1), *((name, CORES_PER_HOST) for name in names)]
    words = environment["LSB_MCPU_HOSTS"].split()
    slots = list(zip(words[::2], map(int, words[1::2]), strict=True))
    if len(slots) - 1 < n_hosts:
        raise SystemExit(f"jsrun stand-in: {n_hosts} hosts wanted, {len(slots) - 1} allocated")
    return slots


def rank_environments(arguments, environment, rankfile):
    """Make the environment of each rank, and write the job's rank file.

    Args:
        arguments: From `parse_arguments`.
        environment: That of the job.
        rankfile: Path; it names a host a slot, the launch host first.

    Returns:
        A list of dictionaries in the order of ranks, which fill one host after the other.
    """
    rs_per_host = arguments.rs_per_host or arguments.nrs
    per_host = rs_per_host * arguments.tasks_per_rs
    size = arguments.nrs * arguments.tasks_per_rs
    slots = allocated_slots(environment, n_hosts=-(-size // per_host))
    job = environment.get("LSB_JOBID", str(os.getpid()))
    rankfile.write_text("".join(f"{host}\n" * n for host, n in slots), encoding="utf-8")
    every_rank = {
        **environment,
        "LSB_JOBID": job,
        "LSB_DJOB_RANKFILE": str(rankfile),
        "LSB_DJOB_HOSTFILE": str(rankfile),
        "LSB_MCPU_HOSTS": " ".join(f"{host} {n}" for host, n in slots),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "JSM_NAMESPACE_SIZE": str(size),
        "PMIX_NAMESPACE": f"{job}.0",
    }
    environments = []
    for rank in range(size):
        local_rank = rank % per_host
        local_size = min(per_host, size - (rank - local_rank))
        one = {
            **every_rank,
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
            "OMPI_COMM_WORLD_NODE_RANK": str(local_rank),
            "PMIX_RANK": str(rank),
            "JSM_NAMESPACE_RANK": str(rank),
            "JSM_NAMESPACE_LOCAL_RANK": str(local_rank),
            "JSM_NAMESPACE_LOCAL_SIZE": str(local_size),
        }
        if arguments.gpu_per_rs:
            first = local_rank // arguments.tasks_per_rs * arguments.gpu_per_rs
            gpus = range(first, first + arguments.gpu_per_rs)
            one["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        environments.append(one)
    return environments


def run_all(command, environments):
    """Run the command in each environment; end all when one fails.

    Returns:
        The exit status of the first that failed, 128 + N for one that signal N ended, or 0.
    """
    ranks = []
    try:
        for environment in environments:
            ranks.append(subprocess.Popen(command, env=environment))
        while True:
            statuses = [rank.poll() for rank in ranks]
            if failed := [(n, s) for n, s in enumerate(statuses) if s]:
                number, status = failed[0]
                sys.stderr.write(f"jsrun stand-in: rank {number} ended with {status}\n")
                return status if status > 0 else 128 - status
            if None not in statuses:
                return 0
            time.sleep(0.1)
    finally:
        end_all(ranks)


def end_all(ranks):
    """Send SIGTERM to the processes that still run, and after a while SIGKILL."""
    for rank in ranks:
        rank.terminate()  # does nothing where the process has ended
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def main(argv=None):
    """Run the stand-in and return its exit status."""
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        environments = rank_environments(arguments, os.environ, Path(folder, "rankfile"))
        return run_all(arguments.command, environments)


if __name__ == "__main__":
    sys.exit(main())
