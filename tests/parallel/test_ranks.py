"""Runs of several processes on this host, started as jsrun starts them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import results, rows, spoil
from lsf_standin import parse_arguments, rank_environments
from test_slstr_cloud import (
    assert_same_losses_and_scores,
    copy_of_training_scenes,
    objections_to,
)

from harness import REPOSITORY

LIMIT_SECONDS = 500  # for a run, or until a failure has ended all ranks: only a hang takes longer
pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_SECONDS)]


class Ranks:
    """The processes of one run, and what they printed.

    `prefix` has words before the command of a rank, by rank.
    """

    def __init__(self, n, settings, folder, *arguments, prefix=None, **changes):
        settings = {**settings, "output_dir": folder, "run_name": "run", **changes}
        arguments = [*arguments, "--set", *(f"{key}={value}" for key, value in settings.items())]
        options = parse_arguments(["-n", str(n), "--", "true"])
        environments = rank_environments(options, os.environ, folder / "rankfile")
        self.folder = folder / "run"
        self.files = [(folder / f"stderr-{rank}").open("w+") for rank in range(n)]
        self.processes = [
            subprocess.Popen(
                [*(prefix or {}).get(rank, []), sys.executable, "slstr_cloud.py", *arguments],
                cwd=REPOSITORY, env=environment, stderr=file,
            )
            for rank, (environment, file) in enumerate(zip(environments, self.files, strict=True))
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process, file in zip(self.processes, self.files, strict=True):
            process.kill()
            process.wait()
            file.close()

    def wait(self, seconds=LIMIT_SECONDS):
        """Exit statuses of all ranks."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(1, deadline - time.monotonic())) for process in self.processes]

    def wait_for(self, condition, seconds=LIMIT_SECONDS):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.1)

    def error(self, rank):
        return Path(self.files[rank].name).read_text()

    def assert_aborted(self, words):
        """The chief says so with these words, on the screen, in its log and in the records."""
        pattern = re.compile(words, re.IGNORECASE)
        assert pattern.search(self.error(0)), self.error(0)
        assert pattern.search((self.folder / "rank-0.log").read_text())
        assert results(self.folder)["status"] == "aborted"
        (objection,) = objections_to(self.folder / "mlperf_cloudmask.log")
        assert "run_stop" in objection


LOST = r"rank 2 was lost|lost contact with rank 2"


@pytest.mark.parametrize("n", [2, 3])
def test_ranks_change_neither_losses_nor_scores(finished, settings, tmp_path, n):
    with Ranks(n, settings, tmp_path) as ranks:
        assert ranks.wait() == [0] * n, ranks.error(0)
    assert results(ranks.folder)["devices"]["ranks"] == n
    assert_same_losses_and_scores(finished, ranks.folder)
    assert objections_to(ranks.folder / "mlperf_cloudmask.log") == []
    assert all((ranks.folder / f"rank-{rank}.log").exists() for rank in range(n))
    assert not list(tmp_path.glob(".ranks-*"))


def test_fewer_scenes_than_ranks(settings, tmp_path):
    # one scene to train on, one to validate with, two to mask, three ranks
    (data := tmp_path / "data").mkdir()
    for path in sorted(Path(settings["train_dir"]).rglob("S3A*.hdf"))[:2]:
        (data / path.name).symlink_to(path)
    with Ranks(3, settings, tmp_path, train_dir=data, train_split=0.5, epochs=2) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.error(0)
    assert len(rows(ranks.folder / "history.csv")) == 2
    assert results(ranks.folder)["training"]["scenes_train"] == 1


def test_killed_rank_ends_all_and_is_named(settings, tmp_path):
    with Ranks(3, settings, tmp_path, epochs=1000) as ranks:
        ranks.wait_for(lambda: (ranks.folder / "history.csv").exists())  # the second epoch
        ranks.processes[2].send_signal(signal.SIGKILL)
        statuses = ranks.wait()
    assert 0 not in statuses and statuses[2] == -signal.SIGKILL
    ranks.assert_aborted(LOST)


# Starts the program, after statements in the place of {}.
PROGRAM = """
import os, runpy, signal, sys
from harness.parallel import rendezvous
{}
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "seconds", "words"),
    [
        ("SIGSTOP", 5, r"could not exchange data with rank 1 at \S+:\d+ within 5 s"),
        ("SIGKILL", 10 * LIMIT_SECONDS, "Lost contact with rank 1"),
    ],
)
def test_rank_that_fails_while_tensorflow_connects_is_named(
    settings, tmp_path, number, seconds, words
):
    fails = f"os.kill(os.getpid(), signal.{number})"
    changes = {
        0: f"rendezvous.CONTACT_SECONDS = {seconds}",
        1: f"rendezvous.Rendezvous.first_contact = lambda *_: {fails}",
    }
    prefix = {rank: [sys.executable, "-c", PROGRAM.format(s)] for rank, s in changes.items()}
    with Ranks(2, settings, tmp_path, prefix=prefix) as ranks:
        assert ranks.processes[0].wait(LIMIT_SECONDS) == -signal.SIGKILL
    assert re.search(words, ranks.error(0)), ranks.error(0)


N_MANY = 400  # scenes: some seconds of inference


@pytest.fixture
def many_scenes(dataset, tmp_path):
    """A folder of links to the inference scenes, under names of their own."""
    (folder := tmp_path / "many").mkdir()
    scenes = sorted((dataset / "ssts").rglob("S3A*.hdf"))
    for i in range(N_MANY):
        (folder / f"S3A_{i:03d}.hdf").symlink_to(scenes[i % len(scenes)])
    return folder


def masks(ranks):
    return list((ranks.folder / "masks").glob("[!.]*.h5"))


def test_rank_killed_during_inference_ends_all_and_is_named(
    finished, settings, tmp_path, many_scenes
):
    model = "--mode", "inference", "--model", str(finished / "model.keras")
    with Ranks(3, settings, tmp_path, *model, inference_dir=many_scenes) as ranks:
        ranks.wait_for(lambda: masks(ranks))
        ranks.processes[2].send_signal(signal.SIGKILL)
        assert len(masks(ranks)) < N_MANY  # or it was killed too late
        statuses = ranks.wait()
    assert 0 not in statuses and statuses[2] == -signal.SIGKILL
    ranks.assert_aborted(LOST)
    assert not (ranks.folder / "scenes.csv").exists()


def test_bad_scene_of_one_rank_ends_inference_of_all(finished, settings, tmp_path, many_scenes):
    bad = many_scenes / "S3A_003.hdf"
    content = bad.read_bytes()
    bad.unlink()
    bad.write_bytes(content)
    spoil(bad)
    model = "--mode", "inference", "--model", str(finished / "model.keras")
    with Ranks(2, settings, tmp_path, *model, inference_dir=many_scenes) as ranks:
        statuses = ranks.wait()
    assert 0 not in statuses
    ranks.assert_aborted(re.escape(str(bad)))
    assert len(masks(ranks)) < N_MANY - 1  # the other rank does not finish the scenes first


def test_reason_of_a_failing_rank_reaches_the_chief(dataset, settings, tmp_path):
    train_dir = copy_of_training_scenes(dataset, tmp_path)
    for path in train_dir.rglob("S3A*.hdf"):  # whichever is first, a rank meets one
        spoil(path)
    with Ranks(2, settings, tmp_path, train_dir=train_dir) as ranks:
        statuses = ranks.wait()
    assert 0 not in statuses
    assert "cannot be used" in ranks.error(0)
    assert "cannot be used" in results(ranks.folder)["error"]


def test_all_ranks_skip_the_same_bad_scenes(dataset, settings, tmp_path):
    train_dir = copy_of_training_scenes(dataset, tmp_path)
    first, second, *_ = sorted(train_dir.rglob("S3A*.hdf"))
    first.write_bytes(b"")
    spoil(second)
    settings = {**settings, "on_bad_scene": "skip", "epochs": 1}
    with Ranks(2, settings, tmp_path, train_dir=train_dir) as ranks:
        assert ranks.wait() == [0, 0]
    said = results(ranks.folder)
    assert [(b["path"], b["during"] == "start") for b in said["bad_scenes"]] == [
        (str(first), True), (str(second), False),
    ]  # fmt: skip
    assert said["training"]["scenes_train"] + said["training"]["scenes_test"] == 6


def test_two_ranks_resume(settings, tmp_path):
    with Ranks(2, {**settings, "epochs": 3}, tmp_path) as ranks:
        assert ranks.wait() == [0, 0]
    whole = rows(ranks.folder / "history.csv")
    shutil.rmtree(ranks.folder)
    with Ranks(2, {**settings, "epochs": 1}, tmp_path) as ranks:
        assert ranks.wait() == [0, 0]
    with Ranks(2, {}, tmp_path, "--resume", str(ranks.folder), epochs=3) as ranks:
        assert ranks.wait() == [0, 0]
    resumed = rows(ranks.folder / "history.csv")
    assert [row["epoch"] for row in resumed] == ["1", "2", "3"]
    for a, b in zip(whole, resumed, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    assert results(ranks.folder)["resumed"] == 1


def test_rejected_start_ends_all_ranks_at_once(settings, tmp_path):
    (tmp_path / "run").mkdir()
    with Ranks(2, settings, tmp_path) as ranks:
        assert ranks.wait() == [2, 2]
    assert "exists" in ranks.error(0) and "Rank 0" in ranks.error(1)


def test_virtual_devices_of_many_ranks_are_rejected(settings, tmp_path):
    with Ranks(2, settings, tmp_path, cpu_devices=2) as ranks:
        assert ranks.wait() == [2, 2]
    assert "cpu_devices: 2" in ranks.error(0)


def test_given_tf_config_connects_ranks(settings, tmp_path):
    from harness.parallel.rendezvous import reserve_port

    sockets = [reserve_port() for _ in range(2)]
    workers = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    arguments = [f"{key}={value}" for key, value in settings.items()]
    processes = [
        subprocess.Popen(
            [sys.executable, "slstr_cloud.py", "--mode", "train", "--set", *arguments, "epochs=1",
             f"output_dir={tmp_path}", "run_name=run"],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "TF_CONFIG": json.dumps(
                    {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}
                ),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(LIMIT_SECONDS) for process in processes] == [0, 0]
    assert results(tmp_path / "run")["devices"]["ranks"] == 2
