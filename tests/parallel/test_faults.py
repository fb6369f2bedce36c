"""Runs of two ranks in which a rank, its network or the disk fails, and which are resumed.

They end like a run that was never disturbed, and the reason of each fault is on the screen. CI
makes two faults; `make torture` makes a dozen in each of three runs. `--torture-seed N` repeats one
of them.
"""

import random
import re
import shutil
import signal
import sys
import time
from collections import Counter

import pytest
from conftest import HEIGHT, PATCH, WIDTH
from test_disk import disk, fill  # noqa: F401  (a fixture)
from test_kill import EPOCHS, STEPS, Part, assert_equal
from test_ranks import LIMIT_SECONDS, Ranks

from tools.make_scenes import make_dataset

SHORT_PLAN = (("kill", "checkpointing"), ("kill", "inference"))
PLAN = (
    ("no connection", "start-up"), ("kill", "start-up"), ("kill", "training"),
    ("kill", "checkpointing"), ("stop", "training"), ("kill", "evaluation"),
    ("full disk", "training"), ("full cache", "training"), ("kill", "writing"),
    ("kill", "inference"), ("full disk", "inference"), ("stop", "inference"),
)  # fmt: skip
MOMENTS = {**STEPS, "start-up": 3.0, "evaluation": 0.1}  # [s] after a stage has been reached
STOP_SECONDS = 60
LOST = "lost contact with rank {rank}"
REASONS = {
    "kill": LOST,
    "stop": LOST,
    "full cache": LOST,  # which slows a run down; then the rank is killed
    "full disk": "No space left on device",
    "no connection": "cannot reach rank {rank} at {host}:",
}
# Not in the range that hosts may have, and a name that is never one: RFC 5737, RFC 2606.
HOSTS = ("203.0.113.1", "node.invalid")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]  # `make torture` is one test


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings; scenes enough for faults while they are masked."""
    folder = tmp_path_factory.mktemp("faults")
    make_dataset(folder, train=7, inference=10, height=HEIGHT, width=WIDTH, seed=7)
    (folder / "cache").mkdir()
    return {
        "train_dir": folder / "one-day", "inference_dir": folder / "ssts",
        "cache_dir": folder / "cache", "IMAGE_H": HEIGHT, "IMAGE_W": WIDTH, "PATCH_SIZE": PATCH,
        "CROP_SIZE": 10, "clip_offset": 3, "epochs": EPOCHS, "batch_size": 11, "train_split": 0.75,
        "keep_probability": True, "report": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The folder of a run of two ranks that was never disturbed."""
    with Ranks(2, settings, tmp_path_factory.mktemp("whole")) as ranks:
        assert ranks.wait() == [0, 0], ranks.error(0)
    return ranks.folder


class RankPart(Part):
    """What a run of two ranks had done when a part of it began."""

    def __init__(self, folder):
        super().__init__(folder)
        self._begin = time.time()

    def has_reached(self, stage):
        if stage == "start-up":  # both ranks have announced themselves
            files = list(self.folder.parent.glob(".ranks-*/rank-*.json"))
            return sum(file.stat().st_mtime > self._begin for file in files) == 2
        if stage == "evaluation":
            file = self.folder / "mlperf_cloudmask.log"
            return file.exists() and b'"eval_start"' in file.read_bytes().splitlines()[-1]
        return super().has_reached(stage)


def start(settings, folder, screens, fault, rank, host):
    """Start both ranks of a run, or of the rest of it; with what makes some faults."""
    prefix = {
        "no connection": ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "-"],
        "full cache": [
            "unshare", "--mount", "sh", "-c",
            f'mount -t tmpfs -o size=4k none {settings["cache_dir"]} && exec "$@"', "-",
        ],
    }  # fmt: skip
    resume = ["--resume", str(folder)] if folder.exists() else []
    return Ranks(
        2, {} if resume else settings, screens, *resume, prefix={rank: prefix.get(fault, [])},
        output_dir=folder.parent, run_name=folder.name,
    )  # fmt: skip


def ended(ranks):
    return any(process.poll() is not None for process in ranks.processes)


def wait_for(stage, part, ranks, rng):
    """Wait for a random moment of a stage; return early if a rank has ended."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not part.has_reached(stage) and not ended(ranks):
        assert time.monotonic() < deadline, f"no {stage} within {LIMIT_SECONDS} s"
        time.sleep(0.001)
    until = time.monotonic() + rng.random() * MOMENTS[stage]
    while time.monotonic() < until and not ended(ranks):
        time.sleep(0.001)


def make_fault(fault, ranks, rank, folder, stage, rng):
    """Make a fault now; those of the start exist since then."""
    if fault == "full disk":
        fill(folder.parent)
    elif fault == "stop":
        ranks.processes[rank].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and not ended(ranks):
            time.sleep(0.1)
        ranks.processes[rank].send_signal(signal.SIGCONT)
        if not ended(ranks):  # then it continues, until it is killed
            wait_for(stage, RankPart(folder), ranks, rng)
    if fault in ("kill", "full cache", "stop") and not ended(ranks):
        ranks.processes[rank].kill()


def disturbed_and_resumed(settings, folder, screens, seed, plan):
    """Make the planned faults in a run, and resume it after each until it has finished.

    Returns:
        Counter of the faults that were made, and the longest time [s] from each kind of fault to
        the end of all ranks.
    """
    rng, made, seconds = random.Random(seed), Counter(), Counter()
    for fault, stage in (*plan, (None, None)):
        rank, host = rng.randrange(2), rng.choice(HOSTS)
        part = RankPart(folder)
        with start(settings, folder, screens, fault, rank, host) as ranks:
            if fault:
                wait_for(stage, part, ranks, rng)
            begin = time.monotonic()
            is_made = fault == "no connection" or (fault and not ended(ranks))
            if is_made:
                make_fault(fault, ranks, rank, folder, stage, rng)
            statuses = ranks.wait()
            screen = ranks.error(0) + ranks.error(1)
        (folder.parent.parent / "filler").unlink(missing_ok=True)
        took = time.monotonic() - begin
        case = f"seed {seed}: {fault} of rank {rank} in {stage}, {statuses} after {took:.0f} s"
        sys.stdout.write(f"{case}\n")
        made[fault] += bool(is_made)
        if statuses == [0, 0]:  # a stopped rank continued, or the disk was full too late
            assert not is_made or fault in ("stop", "full disk"), f"{case}\n{screen}"
            break
        assert is_made, f"{case}\n{screen}"
        seconds[fault] = max(seconds[fault], took)
        reason = REASONS[fault].format(rank=rank, host=re.escape(host))
        if 0 not in statuses:  # one that had nothing left to do does not miss the other
            assert re.search(reason, screen, re.IGNORECASE), f"{case}\n{screen}"
        if fault == "full cache":
            log = (folder / f"rank-{rank}.log").read_text()
            assert "Could not write the cache file" in log, log
    return made, seconds


def test_disturbed_run_ends_like_one_that_was_not(settings, whole, pytestconfig, tmp_path, request):
    n_runs, seed = (pytestconfig.getoption(name) for name in ("torture", "torture_seed"))
    seeds = range(n_runs) if seed is None else [seed]
    is_long = n_runs > 1 or seed is not None
    output = request.getfixturevalue("disk") if is_long else tmp_path / "disk/out"
    output.mkdir(parents=True)
    made, seconds = Counter(), Counter()
    for seed in seeds:
        folder = output / f"run-{seed}"
        plan = PLAN if is_long else SHORT_PLAN
        made_now, took = disturbed_and_resumed(settings, folder, tmp_path, seed, plan)
        made += made_now
        seconds |= took  # the larger ones
        assert_equal(folder, whole)
        shutil.rmtree(folder)
    longest = {fault: round(time) for fault, time in seconds.items()}
    sys.stdout.write(
        f"\n{len(seeds)} runs of two ranks, {made.total()} faults, nothing lost: {dict(made)}; "
        f"seconds until all ranks had ended: {longest}\n"
    )
    assert made.total() > 0.7 * len(seeds) * len(plan)
