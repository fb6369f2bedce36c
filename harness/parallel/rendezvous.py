"""How the ranks of a run find each other, and how they report failures.

Every rank writes its address to a folder below output_dir, which all ranks share because they write
their masks there, and reads those of the others. So ports are free ones, several ranks on a host
and unequal numbers of ranks per node need no rule, and missing ranks can be named. TensorFlow's
cluster resolvers were tried: they need equal numbers of tasks per node and fixed ports (two jobs on
a host collide), and none supports jsrun.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import Failure, UserError
from harness.files import owner_in
from harness.parallel.launchers import Launch

WAIT_SECONDS = 300  # [s] a rank waits for the others at the start
REPORT_SECONDS = 10  # [s] after which it says for whom it waits
FAILURE_SECONDS = 5  # [s] a failing rank has to announce its reason before others stop waiting
LATE_SECONDS = 60  # [s] after the chief's start in which others may come to see that it has failed
HEARTBEAT_SECONDS = 5  # [s] between signs of life
CONNECT_SECONDS = 10  # [s] to reach another rank
SILENT_HEARTBEATS = 3  # of our own without one of the other rank's, before we try to reach it
# Of our own without one of the other rank's, 100 s: file systems can be late, and a node may be
# suspended for a minute. All ranks end within two minutes.
LOST_HEARTBEATS = 20
# [s] from the last rank's start of TensorFlow's servers to the end of the first collective: two
# seconds here, longer with many GPUs, whose kernels may have to be compiled for their kind.
CONTACT_SECONDS = 300
MAX_BYTES = 1 << 24  # of an announcement, which may list tens of thousands of bad scenes

LOST = (
    "Lost contact with rank {}: it exited without a message, was suspended, or its network failed. "
    "Start all ranks again with --resume and the run's folder"
)

log = logging.getLogger("cloudmask")


class RankError(Failure):
    """Another rank failed or was lost; the message names it, and the reason if known."""


class StartError(UserError, RankError):
    """Another rank failed before the run began; the user can fix that."""


class Rendezvous:
    """Where the ranks of one start announce who they are and, later, why they failed.

    An announcement is a small JSON file in a folder below output_dir, which the chief removes at
    the end. It holds a random `key` of its process and the keys that this has seen of the others:
    once all ranks have seen each other's keys, no file is of an earlier start, and `met` says so.
    Afterwards a counter in it, `beat`, shows that its rank is alive, and is compared with our own:
    clocks of nodes may differ, and no rank is lost because the program was suspended.
    """

    def __init__(self, launch, output_dir):
        self.launch = launch
        self.folder = Path(output_dir) / f".ranks-{launch.job}"
        self._files = [self.folder / f"rank-{rank}.json" for rank in range(launch.n_ranks)]
        self._own = {"key": secrets.token_hex(8), "seen": {}, "met": False, "beat": 0}
        self._own["facts"] = None
        self._lock = threading.Lock()
        self._heard = {}  # by rank: its last beat, and ours when we saw it first
        self._stopped = threading.Event()
        self._heartbeat = threading.Thread(target=self._keep_beating, daemon=True)
        self._keys = None  # of all ranks, once they have met
        self._on_failure, self._addresses = None, []
        self._gone = set()  # ranks whose port is closed

    def announce(self, **facts):
        """Write this rank's announcement; it replaces that of an earlier start.

        Raises:
            UserError: If the folder is not ours, or another process has the number of this rank.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_own_folder():
            raise UserError(
                f"{self.folder} belongs to another user, or is no folder. Remove it, or set an "
                "output_dir of your own."
            )
        if self._own["facts"] is None:
            self._check_unused()
        with self._lock:
            self._own["facts"] = facts
            self._write()

    def _is_own_folder(self):
        status = self.folder.lstat()
        try:
            return stat.S_ISDIR(status.st_mode) and status.st_uid == owner_in(self.folder)
        except PermissionError:
            return False

    def _check_unused(self):
        """Raise UserError if a living process announces itself as this rank."""
        first = self._announcement(self.launch.rank)
        if first is None or first["age"] > LOST_HEARTBEATS * HEARTBEAT_SECONDS:
            return
        deadline = time.monotonic() + 2 * HEARTBEAT_SECONDS
        while time.monotonic() < deadline:  # wait for its next sign of life
            time.sleep(HEARTBEAT_SECONDS / 10)
            found = self._announcement(self.launch.rank)
            if found is None or found["key"] != first["key"]:
                return
            if found["beat"] != first["beat"]:
                raise UserError(self._two_processes())

    def _two_processes(self):
        return (
            f"Two processes are rank {self.launch.rank} in {self.folder}. Each needs a number of "
            "its own: start the program once per output_dir."
        )

    def _write(self):
        own = self._files[self.launch.rank]
        temporary = own.with_suffix(f".{self._own['key']}")
        temporary.write_text(json.dumps(self._own), encoding="utf-8")
        temporary.replace(own)

    def _keep_beating(self):
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError, UserError):
                self.beat()
                if on_failure := self._on_failure:
                    self._find_gone()
                    if failure := self.failure():
                        on_failure(failure)
                        self._on_failure = None

    def beat(self):
        """Give a sign of life; an OSError if it cannot be written, and then it does not count."""
        with self._lock:
            self._own["beat"] += 1
            try:
                if self._own["facts"] is not None:
                    self._write()
            except OSError:  # a full disk: the others cannot write their heartbeats either
                self._own["beat"] -= 1
                raise

    def _announcements(self):
        """All announcements, of earlier starts too: {rank: dictionary}."""
        with contextlib.suppress(OSError):
            os.listdir(self.folder)  # makes a network file system refresh its cache
        found = {rank: self._announcement(rank) for rank in range(self.launch.n_ranks)}
        return {rank: other for rank, other in found.items() if other is not None}

    def _announcement(self, rank):
        """That of a rank, of an earlier start too; None if there is none."""
        file = self._files[rank]
        try:
            return read_announcement(file)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is no announcement of a rank ({error}). Remove {self.folder}."
            ) from None
        except OSError as error:  # ESTALE: replaced meanwhile, on NFS
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return None

    def read(self):
        """What the ranks of this start announced: {rank: dictionary}; failures are among them.

        Raises:
            UserError: If another process has the number of this rank.
        """
        found, me, own = self._announcements(), self.launch.rank, self._own
        with self._lock:
            if own["facts"] is not None:
                if me in found and found[me]["key"] != own["key"]:
                    raise UserError(self._two_processes())
                seen = {str(rank): other["key"] for rank, other in found.items()}
                if seen != own["seen"] and self._keys is None:
                    own["seen"] = seen
                    self._write()
            found = {rank: other for rank, other in found.items() if self._is_current(rank, other)}
            for rank, other in found.items():
                if other["beat"] != self._heard.get(rank, (None,))[0]:
                    self._heard[rank] = (other["beat"], own["beat"])
        return {rank: other["facts"] for rank, other in found.items()}

    def _is_current(self, rank, announcement):
        """Whether an announcement belongs to this start of the program."""
        key, seen = announcement["key"], announcement["seen"]
        if self._keys is not None:
            return key == self._keys[rank]
        if "error" in announcement["facts"] and not announcement["met"]:
            # It may have failed before it saw this rank.
            return announcement["age"] < LOST_HEARTBEATS * HEARTBEAT_SECONDS
        return self._own["key"] in (key, seen.get(str(self.launch.rank)))

    def watch(self, on_failure):
        """Call on_failure(text) once another rank fails; the thread of the heartbeats does.

        The main thread may wait for that rank inside TensorFlow. None ends the watching.
        """
        with self._lock:  # TensorFlow may have stopped the heartbeats of some ranks until now
            self._heard = {r: (beat, self._own["beat"]) for r, (beat, _) in self._heard.items()}
        self._on_failure = on_failure

    def _find_gone(self):
        """Find the silent ranks whose process has ended; that of a suspended one can be reached."""
        for rank, address in enumerate(self._addresses):
            if self._silence(rank) >= SILENT_HEARTBEATS:
                with contextlib.suppress(OSError):
                    try:
                        connect(address)
                    except ConnectionRefusedError:
                        self._gone.add(rank)

    def _silence(self, rank):
        """Our own heartbeats since the last one of a rank."""
        return 0 if rank == self.launch.rank else self._own["beat"] - self._heard[rank][1]

    def failure(self, found=None):
        """What is known about another rank's failure, as text; None if all is well.

        Args:
            found: What `read` returned just before; read now by default.
        """
        if announced := announced_failure(self.read() if found is None else found):
            return announced
        if self._keys is not None:
            for rank in range(self.launch.n_ranks):
                if rank in self._gone or self._silence(rank) >= LOST_HEARTBEATS:
                    return LOST.format(rank)
        return None

    def check(self):
        """Raise RankError if another rank is known to have failed."""
        if failure := self.failure():
            raise RankError(failure)

    def wait_for_all(self, seconds=WAIT_SECONDS):
        """Return the announcements of all ranks, in order.

        Raises:
            UserError: If ranks are missing after this time, or one of them announces a failure.
        """
        begin, is_reported = time.monotonic(), False
        for found in self._poll(seconds):
            if len(found) == self.launch.n_ranks:
                self._keys = [self._own["seen"][str(r)] for r in range(self.launch.n_ranks)]
                self._own["met"] = True
                return [found[rank] for rank in range(self.launch.n_ranks)]
            missing = [str(rank) for rank in range(self.launch.n_ranks) if rank not in found]
            awaited = ", ".join(missing)
            if time.monotonic() - begin > REPORT_SECONDS and not is_reported:
                is_reported = True
                unset = " ".join(f"-u {name}" for name in self.launch.variables)
                log.warning(
                    "Waiting for %d of %d ranks: %s. To run with this rank alone: "
                    "env %s python slstr_cloud.py ...",
                    len(missing), self.launch.n_ranks, awaited, unset,
                )  # fmt: skip
        raise UserError(
            f"{len(missing)} of {self.launch.n_ranks} ranks did not start within {seconds} s: "
            f"{awaited}. Check their logs; all ranks must see the same output_dir, "
            f"{self.folder.parent}."
        )

    def check_connections(self, addresses):
        """Try to reach all ranks, and wait until they have tried too.

        TensorFlow would wait for ever, and not say for which rank.

        Args:
            addresses: 'host:port' of every rank, in order; each rank listens there.

        Raises:
            UserError: If a rank cannot be reached, or fails.
        """
        self._addresses = addresses
        for rank, address in enumerate(addresses):
            try:
                connect(address)
            except OSError as error:
                raise UserError(
                    f"Rank {self.launch.rank} on {socket.gethostname()} cannot reach rank {rank} "
                    f"at {address}: {error}. Ranks connect to each other by TCP on any port: check "
                    "host names, network interfaces and firewalls."
                ) from None
        self.announce(**self._own["facts"], connected=True)
        for found in self._poll(WAIT_SECONDS):
            if sum("connected" in facts for facts in found.values()) == len(addresses):
                return
        raise UserError(f"Not all ranks could connect within {WAIT_SECONDS} s.")

    @contextlib.contextmanager
    def first_contact(self, addresses):
        """Limit the time in which TensorFlow connects the ranks to CONTACT_SECONDS.

        Afterwards, or if the process of another rank has ended, a message is printed and this
        process killed, as nothing else interrupts it.

        Args:
            addresses: 'host:port' of every rank, in order.
        """
        own = self.launch.rank
        others = [f"rank {rank} at {a}" for rank, a in enumerate(addresses) if rank != own]
        late = (
            f"TensorFlow on {socket.gethostname()} could not exchange data with "
            f"{', '.join(others)} within {CONTACT_SECONDS} s, though they accept connections. "
            "Either a rank hangs, or a firewall, proxy or network interface (of GPUs: "
            "NCCL_SOCKET_IFNAME) stops the data: check them, then start again, with --resume if "
            "the run has a folder."
        )
        tried = ["" if rank == own else address for rank, address in enumerate(addresses)]
        watcher = subprocess.Popen(
            [sys.executable, "-IS", Path(__file__).with_name("watcher.py"), str(os.getpid()),
             str(CONTACT_SECONDS), late, LOST, *tried],
            stdin=subprocess.PIPE, start_new_session=True,  # Ctrl-C must not end it first
        )  # fmt: skip
        try:
            yield
        finally:
            watcher.communicate()  # closes the pipe, which ends it

    def _poll(self, seconds):
        """Yield what `read` returns, at least once, until this time is over.

        Raises:
            StartError: If a rank announces a failure.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.read()
            if failure := self.failure(found):
                raise StartError(failure)
            yield found
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)

    def _is_own(self):
        with contextlib.suppress(OSError, UserError):
            found = self._announcement(self.launch.rank)
            return found is not None and found["key"] == self._own["key"]
        return False

    def wait_for_failure(self, seconds=FAILURE_SECONDS):
        """Wait for another rank to announce its failure; None if none does in this time."""
        deadline = time.monotonic() + seconds
        while not (announced := announced_failure(self.read())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return announced

    @contextlib.contextmanager
    def translated_errors(self):
        """Announce why this rank fails, and name the failed rank behind errors of TensorFlow.

        Raises:
            RankError: Instead of an error of TensorFlow, whose text does not say which rank failed.
        """
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            tensorflow = sys.modules.get("tensorflow")  # imported only once it is needed
            if tensorflow is None or not isinstance(error, tensorflow.errors.OpError):
                with contextlib.suppress(OSError):
                    self.announce(error=f"{type(error).__name__}: {error}")
                raise
            failure = self.wait_for_failure() or self.failure()
            if failure is None:  # a broken connection
                lost = re.search(r"remote target \S*task:(\d+)", str(error))
                failure = LOST.format(lost[1] if lost else "(unknown)")
                self.announce(error=failure)
            raise RankError(failure) from error

    def __enter__(self):
        self._begin = time.monotonic()
        self._heartbeat.start()
        return self

    def __exit__(self, kind, error, traceback):
        self._stopped.set()
        self._heartbeat.join(HEARTBEAT_SECONDS)
        if self.launch.rank == 0:
            if isinstance(error, Exception):  # not after a signal
                self._wait_for_late_ranks()
            if error is not None:
                time.sleep(2 * FAILURE_SECONDS)  # the others may still look for the reason
            # Another start that uses this folder by mistake must not take it from a living one.
            if self._is_own():
                self._remove()

    def _wait_for_late_ranks(self):
        """Wait for ranks that still import TensorFlow, which can take longer than to fail here."""
        if self._own["facts"] is None or self._keys is not None:
            return  # nothing was announced, or nobody is late
        with contextlib.suppress(OSError, UserError):
            while len(self.read()) < self.launch.n_ranks:
                if time.monotonic() > self._begin + LATE_SECONDS:
                    return
                time.sleep(0.2)

    def _remove(self):
        """Remove the folder; other ranks may still write their last signs of life."""
        for _ in range(5):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)


@dataclass(frozen=True)
class SingleRank:
    """The rendezvous of a run with one rank: there are no others to wait for."""

    launch: Launch = field(default_factory=Launch)

    def check(self):
        """No other rank can fail."""

    def watch(self, on_failure):
        """No other rank can fail."""

    def translated_errors(self):
        """Errors stay as they are."""
        return contextlib.nullcontext()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def open_rendezvous(launch, output_dir):
    """The Rendezvous of the ranks of this run; SingleRank if there is only one."""
    return Rendezvous(launch, output_dir) if launch.n_ranks > 1 else SingleRank(launch)


def announced_failure(announcements):
    """The first failure in {rank: announcement}, as text; None if there is none."""
    failures = (
        f"Rank {rank} failed: {facts['error']}"
        for rank, facts in announcements.items()
        if "error" in facts
    )
    return next(failures, None)


def connect(address):
    """Connect to 'host:port' once; an OSError if that fails."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def read_announcement(file):
    """An announcement: `key`, `seen`, `met`, `beat`, `facts`, and `age` [s] of the file.

    Raises:
        ValueError, KeyError, TypeError: If it is none.
        FileNotFoundError: If there is none.
    """
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError("it should be a regular file of at most 16 MB")
        announcement = json.loads(opened.read(MAX_BYTES))
    if not isinstance(announcement["seen"], dict) or not isinstance(announcement["facts"], dict):
        raise TypeError("seen and facts should be dictionaries")
    return {
        **{name: announcement[name] for name in ("seen", "facts")},
        "key": str(announcement["key"]),
        "met": announcement.get("met") is True,
        "beat": int(announcement["beat"]),
        "age": time.time() - status.st_mtime,
    }


def reserve_port(launch=None):
    """A socket that holds a free port of this host, or that of TF_CONFIG, for gRPC to use later.

    It listens, so that the other ranks can try to reach it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port = launch.addresses[launch.rank].rpartition(":")[2] if launch and launch.addresses else 0
    try:
        reserved.bind(("", int(port)))
    except (OSError, ValueError) as error:
        raise UserError(f"Port {port} of TF_CONFIG cannot be used: {error}.") from None
    reserved.listen(socket.SOMAXCONN)
    return reserved
