"""A Slurm cluster of two nodes, n1 and n2, on this host: the real daemons, nothing installed.

Used by test_slurm.py. It needs Debian's packages slurm-wlm and munge and no rights but those of
its user: keys, sockets, logs and spool directories lie in one folder, ports are free ones, and what
was started is ended by process id. The nodes have no GPU; they declare sixteen, which are plain
files, so that job scripts are scheduled with the `--gres` that they ask for.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = (
    ("munged", "slurmctld", "slurmd")  # daemons
    + ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
)  # fmt: skip
RUNNING_STATES = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
START_SECONDS = 60  # until the nodes are idle; 3 on an idle host
END_SECONDS = 20  # for a daemon to end after SIGTERM

# NodeHostname and NodeAddr tell the daemons that both nodes are this host; n1 and n2 are in no
# host table. Without cgroups and task plugins the daemons need no rights. config_overrides lets
# a node have more processors and memory than the host, as many as the job scripts ask for.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
GresTypes=gpu
NodeName=DEFAULT CPUs=96 RealMemory=1500000 Gres=gpu:a100:16
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=gpu Nodes=n1,n2 Default=YES
PartitionName=pearl Nodes=n1,n2
"""


def find(program):
    """The path of a program, or None; daemons lie where not every user looks."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def missing_programs():
    """Which programs the cluster lacks on this host."""
    return [program for program in PROGRAMS if find(program) is None]


@contextlib.contextmanager
def running_cluster(folder):
    """Start a SlurmCluster in an empty folder, and end it."""
    cluster = SlurmCluster(folder)
    with contextlib.ExitStack() as stack:
        cluster.start(stack)
        yield cluster


class SlurmCluster:
    """A running cluster.

    Attributes:
        folder: Holds all that the daemons read and write.
        environment: What commands need to talk to this cluster and to no other.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.environment = {
            **{
                name: v
                for name, v in os.environ.items()
                if not name.startswith(("SLURM", "SBATCH"))
            },
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def start(self, stack):
        """Start the daemons and wait for the nodes; `stack`, an ExitStack, ends them."""
        self._write_configuration()
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        paths = [f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in names]
        # --force: pytest's folders are private, munged wants everyone to reach its socket
        daemons = [stack.enter_context(self._daemon("munged", "--foreground", "--force", *paths))]
        self._wait_for("munged", daemons, (self.folder / "munge.socket").exists)
        daemons.append(stack.enter_context(self._daemon("slurmctld", "-D", "-i")))
        for node in NODES:
            daemons.append(stack.enter_context(self._daemon("slurmd", "-D", "-N", node)))
        stack.callback(self._cancel_all)
        self._wait_for("nodes", daemons, lambda: self._node_states() == ["idle"] * len(NODES))

    def _write_configuration(self):
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for index in range(16):
            (self.folder / f"gpu{index}").touch()
        (self.folder / "gres.conf").write_text(
            f"Name=gpu Type=a100 File={self.folder}/gpu[0-15]\n", encoding="utf-8"
        )
        (self.folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                folder=self.folder,
                ports=free_ports(3),
            ),
            encoding="utf-8",
        )

    @contextlib.contextmanager
    def _daemon(self, program, *arguments):
        name = "-".join([program, *(a for a in arguments if a in NODES)])
        with (self.folder / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(
                [find(program), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for pytest, which ends them in order
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_for(self, what, daemons, done):
        deadline = time.monotonic() + START_SECONDS
        while not done():
            if ended := [daemon.args for daemon in daemons if daemon.poll() is not None]:
                raise RuntimeError(f"{ended} ended at once.\n{self.logs()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not ready after {START_SECONDS} s.\n{self.logs()}")
            time.sleep(0.2)

    def _node_states(self):
        answer = self._ask("sinfo", "--noheader", "--Node", "--format=%t", "--partition=gpu")
        return answer.stdout.split()

    def _cancel_all(self):
        """End the jobs before the daemons, which would leave their processes behind."""
        self._ask("scancel", "--quiet", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + END_SECONDS
        while self._ask("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _ask(self, program, *arguments):
        return subprocess.run(
            [find(program), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=END_SECONDS,
            check=False,
        )

    def logs(self):
        """What munged, slurmctld and slurmd said, for the message of a failed test."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)

    def run(self, *command, timeout=60, **environment):
        """Run a command of Slurm and return what it printed.

        Args:
            *command: The program, 'srun' for example, and its arguments.
            timeout: [s].
            **environment: Variables that the command gets besides.

        Raises:
            RuntimeError: With the daemons' logs where the command fails.
        """
        answer = subprocess.run(
            [find(command[0]), *map(str, command[1:])],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if answer.returncode:
            raise RuntimeError(f"{command}: {answer.returncode}\n{answer.stderr}\n{self.logs()}")
        return answer.stdout

    def facts(self, job):
        """What `scontrol show job` knows of a job: 'JobState', 'ExitCode', 'NodeList' and more."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job, timeout, restarts=0):
        """Wait until a job has ended; cancel it where it takes longer than `timeout` seconds.

        Args:
            job: Its number.
            timeout: [s].
            restarts: How often it is queued again before; Slurm then waits up to two minutes.

        Returns:
            Its facts.
        """
        deadline = time.monotonic() + timeout
        while True:
            facts = self.facts(job)
            if facts["JobState"] == "PENDING" and int(facts["Restarts"]) == restarts > 0:
                # Not at once: slurmd refuses a job in the second in which it was ended.
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")
                restarts = 0
            if facts["JobState"] not in RUNNING_STATES:
                return facts
            if time.monotonic() > deadline:
                self.run("scancel", "--signal=KILL", "--full", job)
                raise TimeoutError(
                    f"Job {job} is {facts['JobState']} after {timeout} s.\n{self.logs()}"
                )
            time.sleep(0.5)


def free_ports(count):
    """Numbers of ports that no one listens on at present."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
