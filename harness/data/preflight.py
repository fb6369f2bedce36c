"""Before a run: whether its scenes can be used, and whether the disk holds its results."""

import json
import logging
import shutil
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from harness.console import format_bytes, progress
from harness.data.prefetch import ReaderPool
from harness.errors import UserError
from harness.files import json_sha256, write_json

THREADS = 16
HEADER_BYTES = 1 << 16  # of a file, among which most of its headers are
# Two kept and one being written, each 24 MB of weights and Adam's moments and an 8 MB model file.
CHECKPOINT_BYTES = 100_000_000
MASK_SHARE = 1 / 7  # bytes a pixel of a compressed mask: a bit each, if neighbours tell nothing
DURING_START = "start"

log = logging.getLogger(__name__)


def check_scenes(paths, check, seconds=None):
    """Check scene files side by side, with progress.

    Args:
        paths: Scene files.
        check: Function of a path, which returns something, or raises a ValueError that says what
            is wrong.
        seconds: One that takes longer hangs.

    Returns:
        Two dictionaries by path: what `check` returned, and the reasons of those that are bad.

    Raises:
        TimeoutError: If a file hangs.
    """

    def outcome(path):
        # HDF5 reads one file at a time in a process. Here the threads wait for the disk together;
        # whatever is wrong, `check` says it better.
        with suppress(OSError):
            if path.is_file():
                with path.open("rb") as file:
                    file.read(HEADER_BYTES)
        try:
            return path, check(path), None
        except ValueError as error:
            return path, None, str(error)

    good, bad = {}, {}
    with ReaderPool(THREADS, seconds) as readers:
        outcomes = readers.prefetch(outcome, paths, 4 * THREADS)
        for path, found, reason in progress(outcomes, "Checking", len(paths)):
            if reason is None:
                good[path] = found
            else:
                bad[path] = reason
    return good, bad


class BadScenes:
    """The scenes that a run leaves out, in small files of its folder: every rank adds to them.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder):
        self._folder, self._lock = Path(folder) / "bad_scenes", threading.Lock()

    def add(self, path, reason, during):
        """Note that a scene is left out, and say so once.

        Args:
            path: Scene file.
            reason: What is wrong with it.
            during: 'start', 'training', 'validation' or 'inference'.
        """
        file = self._folder / f"{during}-{json_sha256(str(path))[:16]}.json"
        with self._lock:
            if not file.exists():
                log.warning("Left out: %s", reason)
                write_json(file, {"path": str(path), "reason": str(reason), "during": during})

    def leave_out(self, during, n_scenes):
        """A function of a path and an error that adds it; an error itself once half are bad.

        Args:
            during: See `add`.
            n_scenes: Scenes of this part of the run.
        """

        def add(path, error):
            self.add(path, error, during)
            if 2 * (n := len(self.paths(during))) > n_scenes:
                raise type(error)(
                    f"{n} of {n_scenes} scenes of the {during} can no longer be read: {error} See "
                    "whether their file system is there; then go on with --resume."
                )

        return add

    def all(self):
        """Every scene left out: {'path', 'reason', 'during'}, sorted."""
        files = self._folder.glob("[a-z]*.json")  # whole ones
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return sorted(found, key=lambda scene: (scene["path"], scene["during"]))

    def paths(self, during):
        """The paths of those left out in one part of the run, as texts."""
        return [scene["path"] for scene in self.all() if scene["during"] == during]

    def forget(self, during):
        """Try those of one part of the run again."""
        for file in self._folder.glob(f"{during}-*.json"):
            file.unlink()


def results_bytes(config, n_masks):
    """About how many bytes a run leaves on the disk at most, while it trains and masks.

    Args:
        config: Config.
        n_masks: Scenes to be masked.
    """
    pixel = MASK_SHARE + 4 * config.keep_probability
    return CHECKPOINT_BYTES + n_masks * int(config.image_h * config.image_w * pixel)


def check_disk(folder, n_bytes):
    """Compare free space with what will be written.

    Args:
        folder: Where; it may be absent yet.
        n_bytes: How much.

    Returns:
        Free bytes.

    Raises:
        UserError: If there is too little.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(
            f"{folder} has {format_bytes(free)} free, the masks and checkpoints of this run take up to "
            f"{format_bytes(n_bytes)}. Make room or set another output_dir."
        )
    return free


def describe_scenes(kinds, stored, bad, samples):
    """What `--mode check` says of one set of scenes, by lines of its table.

    Args:
        kinds: 'day', 'night' or 'unknown' of each scene.
        stored: How each good scene is stored, by path: {'refs': 'float64 contiguous', ...}.
        bad: Paths of those that are bad.
        samples: List of (data_loader.Scene, seconds that reading it took).
    """
    counts = Counter(kinds)
    lines = {
        "scenes": str(len(kinds)),
        **{kind: str(counts[kind]) for kind in ("day", "night", "unknown") if counts[kind]},
        "bad": str(len(bad)),
        "size": format_bytes(sum(path.stat().st_size for path in stored)),
    }
    for name in ("refs", "bts", "bayes"):
        ways = Counter(found[name] for found in stored.values())
        lines[name] = ", ".join(
            way if len(ways) == 1 else f"{way} ({n})" for way, n in ways.most_common()
        )
    if samples:
        scenes = [scene for scene, _ in samples]
        lines |= {
            "sample": f"{len(samples)} scenes",
            "pixels without data": f"{1 - np.mean([s.valid.mean() for s in scenes]):.1%}",
            "cloud": f"{np.mean([s.cloud.mean() for s in scenes]):.1%}",
            "numbers out of range": str(sum(s.out_of_range for s in scenes)),
            "reading": f"{np.median([seconds for _, seconds in samples]):.3f} s a scene",
        }
    return lines
