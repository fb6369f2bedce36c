"""How the ranks of one run find one another, and what they tell each other later."""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

from harness.errors import UserError

MEETING_SECONDS = 300  # [s] a rank waits for the others at the start
FAILURE_SECONDS = 5  # [s] a rank that fails has to say so before another is at a loss for a reason
BEAT_SECONDS = 5  # [s] between signs of life
LOST_SECONDS = 60  # [s] without a sign of life: network file systems may show one late


def reserve_port():
    """A socket that holds a free port of this host, until it is closed for gRPC to take over."""
    reserved = socket.socket()
    reserved.bind(("", 0))
    return reserved


LOST = "Rank {} was lost: it ended without a word, or its network broke"


class Rendezvous:
    """Where the ranks of one start tell each other who they are, and later what went wrong.

    A rank's card is a small file in a folder below output_dir, which the chief removes at the end.
    It is touched every few seconds: one that has grown old is of a rank that was lost, or of an
    earlier start.
    """

    def __init__(self, launch, output_dir):
        self.launch = launch
        self.folder = Path(output_dir) / f".ranks-{launch.job}"
        self._files = [self.folder / f"rank-{rank}.json" for rank in range(launch.n_ranks)]
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._keep_fresh, daemon=True)
        self._complete = False

    def show(self, **card):
        """Show this rank's card to the others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self._files[self.launch.rank]
        own.with_suffix(".part").write_text(json.dumps(card), encoding="utf-8")
        own.with_suffix(".part").replace(own)

    def _keep_fresh(self):
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._files[self.launch.rank])

    def read(self):
        """The fresh cards, by rank."""
        if self.folder.is_dir():
            os.listdir(self.folder)  # makes a network file system look again
        cards = {}
        for rank, file in enumerate(self._files):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime < LOST_SECONDS:
                    cards[rank] = json.loads(file.read_text(encoding="utf-8"))
        return cards

    def failure(self):
        """What is known of another rank's failure, in words; None if all is well."""
        cards = self.read()
        if said := failure_among(cards):
            return said
        lost = [rank for rank in range(self.launch.n_ranks) if rank not in cards]
        return LOST.format(lost[0]) if self._complete and lost else None

    def wait_for_all(self, seconds=MEETING_SECONDS):
        """Return the cards of all ranks, in order.

        Raises:
            UserError: If ranks are missing when the time is over, with their numbers, or if one of
                them says that it failed.
        """
        deadline = time.monotonic() + seconds
        while True:
            cards = self.read()
            if failure := failure_among(cards):
                raise UserError(failure)
            if len(cards) == self.launch.n_ranks:
                self._complete = True
                return [cards[rank] for rank in range(self.launch.n_ranks)]
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        missing = [str(rank) for rank in range(self.launch.n_ranks) if rank not in cards]
        raise UserError(
            f"Of {self.launch.n_ranks} ranks, {len(missing)} did not start within {seconds} s: "
            f"{', '.join(missing)}. See what became of them; all ranks must see the same "
            f"output_dir, {self.folder.parent}."
        )

    def find_failure(self, seconds=FAILURE_SECONDS):
        """What another rank says of its failure, waiting for it a while; None if none says."""
        deadline = time.monotonic() + seconds
        while not (said := failure_among(self.read())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return said

    def __enter__(self):
        self._beat.start()
        return self

    def __exit__(self, kind, error, traceback):
        self._over.set()
        if self.launch.rank == 0:
            if error is not None:
                time.sleep(2 * FAILURE_SECONDS)  # the others may still ask for the reason
            shutil.rmtree(self.folder, ignore_errors=True)


def failure_among(cards):
    """The first failure that the cards tell of, in words; None if there is none."""
    return next(
        (f"Rank {rank} says: {card['error']}" for rank, card in cards.items() if "error" in card),
        None,
    )
