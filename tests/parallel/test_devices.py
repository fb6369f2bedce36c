import itertools
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from harness.errors import UserError
from harness.parallel.devices import (
    Devices,
    check_requirements,
    open_devices,
    share_of_cores,
    share_of_gpus,
    usable_cores,
)
from harness.parallel.launchers import Launch
from harness.parallel.rendezvous import SingleRank


def card(node, devices=1, kind="CPU", work="same"):
    return {
        "node": node, "devices": devices, "gpus": devices * (kind == "GPU"), "kind": kind,
        "work": work, "address": "x:1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "nodes", "others", "words"),
    [
        (4, "auto", [], "requires 4 GPUs per node, TensorFlow finds 0"),
        (4, "auto", [card("b", 2, "GPU")], "TensorFlow finds 0 and 2"),
        (4, "auto", [card("b", 1, "GPU"), card("b", 2, "GPU")], "TensorFlow finds 0 and 3"),
        ("auto", 3, [card("b")], "requires 3 nodes, the scheduler started 2"),
        ("auto", 3, [card("b"), card("b")], "requires 3 nodes, the scheduler started 2"),
        ("auto", "auto", [card("b", 2)], "rank 0: 1 CPU, rank 1: 2 CPU"),
        ("auto", "auto", [card("b", 1, "GPU")], "rank 1: 1 GPU"),
        ("auto", "auto", [card("b", work="other")], "different configurations"),
        (0, 2, [card("b", work="other")], "different configurations"),  # the requirements are met
    ],
)
def test_unmet_requirements_give_both_numbers(gpu, nodes, others, words):
    with pytest.raises(UserError) as error:
        check_requirements(gpu, nodes, [card("a"), *others])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("gpu", "nodes", "cards"),
    [
        ("auto", "auto", [card("a"), card("b")]),
        (0, 2, [card("a"), card("b"), card("b")]),
        (4, 2, [card(node, 2, "GPU") for node in "aabb"]),
        (8, 2, [card(node, 2, "GPU") for node in "aabb"]),  # v1.1 counted those of all nodes
    ],
)
def test_met_requirements_are_accepted(gpu, nodes, cards):
    check_requirements(gpu, nodes, cards)


def has(node, *cores):
    return {"node": node, "cores": list(cores)}


@pytest.mark.parametrize(
    ("ranks", "shares"),
    [
        ([has("a", 0, 1, 2, 3)], [4]),
        ([has("a", 0, 1, 2, 3)] * 2 + [has("b", 0, 1, 2, 3)], [2, 2, 4]),
        ([has("a", 0, 1), has("a", 2, 3, 4)], [2, 3]),  # the scheduler has divided them
        ([has("a", *range(8))] * 3, [2, 2, 2]),
        ([has("a", 0)] * 2, [1, 1]),
    ],
)
def test_ranks_divide_the_cores_that_they_share(ranks, shares):
    assert [share_of_cores(ranks, rank) for rank in range(len(ranks))] == shares


@pytest.mark.parametrize(("text", "n"), [("max 100000", 8), ("250000 100000", 2), ("1 100000", 1)])
def test_quota_of_a_container_limits_the_cores(monkeypatch, tmp_path, text, n):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("harness.parallel.devices.CPU_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert usable_cores() == list(range(n))


def sees(node, n_gpus, visible="None"):
    return {"node": node, "gpus": n_gpus, "visible": visible}


@pytest.mark.parametrize(
    ("gpu", "ranks", "shares"),
    [
        ("auto", [sees("a", 6)] * 3, [(0, 2), (2, 4), (4, 6)]),
        ("auto", [sees("a", 6)], [(0, 6)]),
        (2, [sees("a", 6)], [(0, 2)]),
        (2, [sees("a", 4)] * 2, [(0, 1), (1, 2)]),
        (0, [sees("a", 0)] * 2, [(0, 0), (0, 0)]),
        ("auto", [sees("a", 4), sees("b", 4), sees("a", 4)], [(0, 2), (0, 4), (2, 4)]),
        # A wrapper shows each rank its own GPU.
        (2, [sees("a", 1, "0"), sees("a", 1, "1")], [(0, 1), (0, 1)]),
        # Resource sets of jsrun with two ranks and two GPUs each.
        ("auto", [sees("a", 2, "0,1")] * 2 + [sees("a", 2, "2,3")] * 2, [(0, 1), (1, 2)] * 2),
    ],
)
def test_ranks_that_see_the_same_gpus_divide_them(gpu, ranks, shares):
    assert [share_of_gpus(ranks, rank, gpu) for rank in range(len(ranks))] == shares


def test_ranks_that_cannot_divide_the_gpus_are_rejected():
    with pytest.raises(UserError, match="4 ranks cannot share the 6 GPUs of a node"):
        share_of_gpus([sees("a", 6)] * 4, 0)


def test_virtual_replicas_are_numbered_and_described():
    devices = open_devices(SingleRank(), cpu_devices=3)
    assert list(devices.replicas) == [0, 1, 2] and devices.n_replicas == 3
    assert "3 CPU replicas" in devices.describe() and "1 node, 1 rank" in devices.describe()
    assert devices.accelerators_per_node == 0 and devices.gather(2.5) == [2.5]


def test_xla_on_gpus_is_rejected_if_runs_must_repeat(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: None)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda device, on: None)
    with pytest.raises(UserError, match="deterministic: true and xla: true"):
        open_devices(SingleRank(), deterministic=True, xla=True)


@pytest.mark.parametrize(("kind", "n_gpus", "per_node"), [("GPU", 8, 4), ("CPU", 0, 0)])
def test_devices_of_all_ranks_are_counted(kind, n_gpus, per_node):
    """Rank 2 of two nodes with two ranks each, of two devices each."""
    devices = Devices(
        SimpleNamespace(num_replicas_in_sync=8), (f"/{kind}:0", f"/{kind}:1"), kind,
        SingleRank(Launch(rank=2, n_ranks=4)), tuple(card(node) for node in "aabb"), True,
    )  # fmt: skip
    assert list(devices.replicas) == [4, 5] and not devices.is_chief
    assert (devices.n_nodes, devices.n_gpus, devices.accelerators_per_node) == (2, n_gpus, per_node)
    if kind == "CPU":
        assert devices.describe().startswith("2 nodes, 4 ranks, 8 CPU replicas (")


@pytest.mark.parametrize(
    ("wanted", "batch", "replicas", "found"),
    [("auto", 32, None, 4), ("auto", 6, None, 2), (9, 6, None, 2), (9, 7, None, 3), (9, 6, 1, 6)],
)
def test_micro_batch_is_a_share_at_most(wanted, batch, replicas, found):
    devices = open_devices(SingleRank(), cpu_devices=3)
    assert devices.micro_batch(wanted, batch, replicas) == found


def test_batches_of_the_next_two_steps_are_taken_and_the_others_wait():
    devices = open_devices(SingleRank(), cpu_devices=2, seed=5)
    taken, enough = [], threading.Event()

    def elements():
        for i in itertools.count():
            taken.append(i)
            if i == 5:  # two replicas: the step in use and the next two
                enough.set()
            yield np.full(3, i, np.float32), np.int32(i)

    feed = devices.distribute(elements())
    first = next(feed)
    assert enough.wait(60) and len(taken) == 6
    for n, batch in enumerate([first, next(feed)]):
        for part in batch:
            values = devices.strategy.experimental_local_results(part)
            assert [int(tf.reduce_max(value)) for value in values] == [2 * n, 2 * n + 1]
            assert [value.device[-5:] for value in values] == ["CPU:0", "CPU:1"]
    feed.close()


def test_error_of_the_reader_is_that_of_the_step():
    devices = open_devices(SingleRank(), seed=5)

    def elements():
        yield (np.zeros(3, np.float32),)
        raise OSError("disk gone")

    feed = devices.distribute(elements())
    next(feed)
    with pytest.raises(OSError, match="disk gone"):
        next(feed)
