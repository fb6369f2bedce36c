"""How the ranks of a run find each other, and how they report failures.

Every rank writes its address to a folder below output_dir, which all ranks share because they write
their masks there, and reads those of the others. So ports are free ones, several ranks on a host
and unequal numbers of ranks per node need no rule, and missing ranks can be named. TensorFlow's
cluster resolvers were tried: they need equal numbers of tasks per node and fixed ports (two jobs on
a host collide), and none supports jsrun.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import UserError
from harness.parallel.launchers import Launch

WAIT_SECONDS = 300  # [s] a rank waits for the others at the start
FAILURE_SECONDS = 5  # [s] a failing rank has to announce its reason before others stop waiting
HEARTBEAT_SECONDS = 5  # [s] between signs of life
LOST_SECONDS = 60  # [s] without a sign of life; network file systems can show one late

LOST = "Lost contact with rank {}: it exited without a message or its network failed"


class RankError(RuntimeError):
    """Another rank failed or was lost; the message names it, and the reason if known."""


class Rendezvous:
    """Where the ranks of one start announce who they are and, later, why they failed.

    An announcement is a small JSON file in a folder below output_dir, which the chief removes at
    the end. Its modification time is renewed every few seconds: an old file belongs to a lost rank
    or to an earlier start.
    """

    def __init__(self, launch, output_dir):
        self.launch = launch
        self.folder = Path(output_dir) / f".ranks-{launch.job}"
        self._files = [self.folder / f"rank-{rank}.json" for rank in range(launch.n_ranks)]
        self._stopped = threading.Event()
        self._heartbeat = threading.Thread(target=self._keep_fresh, daemon=True)
        self._complete = False

    def announce(self, **facts):
        """Write this rank's announcement; it replaces an earlier one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self._files[self.launch.rank]
        own.with_suffix(".part").write_text(json.dumps(facts), encoding="utf-8")
        own.with_suffix(".part").replace(own)

    def _keep_fresh(self):
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._files[self.launch.rank])

    def read(self):
        """The recent announcements: {rank: dictionary}."""
        if self.folder.is_dir():
            os.listdir(self.folder)  # makes a network file system refresh its cache
        found = {}
        for rank, file in enumerate(self._files):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime < LOST_SECONDS:
                    found[rank] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def failure(self):
        """What is known about another rank's failure, as text; None if all is well."""
        found = self.read()
        if announced := announced_failure(found):
            return announced
        lost = [rank for rank in range(self.launch.n_ranks) if rank not in found]
        return LOST.format(lost[0]) if self._complete and lost else None

    def check(self):
        """Raise RankError if another rank is known to have failed."""
        if failure := self.failure():
            raise RankError(failure)

    def wait_for_all(self, seconds=WAIT_SECONDS):
        """Return the announcements of all ranks, in order.

        Raises:
            UserError: If ranks are missing after this time, or one of them announces a failure.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.read()
            if failure := announced_failure(found):
                raise UserError(failure)
            if len(found) == self.launch.n_ranks:
                self._complete = True
                return [found[rank] for rank in range(self.launch.n_ranks)]
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        missing = [str(rank) for rank in range(self.launch.n_ranks) if rank not in found]
        raise UserError(
            f"{len(missing)} of {self.launch.n_ranks} ranks did not start within {seconds} s: "
            f"{', '.join(missing)}. Check their logs; all ranks must see the same output_dir, "
            f"{self.folder.parent}."
        )

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
            failure = self.wait_for_failure()
            if failure is None:
                # A broken connection, or a rank whose heartbeats TensorFlow misses.
                lost = re.search(r"(?:remote target|heartbeats\):)\s*\S*task:(\d+)", str(error))
                failure = LOST.format(lost[1] if lost else "(unknown)")
                self.announce(error=failure)
            raise RankError(failure) from error

    def __enter__(self):
        self._heartbeat.start()
        return self

    def __exit__(self, kind, error, traceback):
        self._stopped.set()
        if self.launch.rank == 0:
            if error is not None:
                time.sleep(2 * FAILURE_SECONDS)  # the others may still look for the reason
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class SingleRank:
    """The rendezvous of a run with one rank: there are no others to wait for."""

    launch: Launch = field(default_factory=Launch)

    def check(self):
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


def reserve_port():
    """A socket that holds a free port of this host until it is closed for gRPC to use it."""
    reserved = socket.socket()
    reserved.bind(("", 0))
    return reserved
