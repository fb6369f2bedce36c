from types import SimpleNamespace

import pytest
import tensorflow as tf

from harness.errors import UserError
from harness.parallel.devices import Devices, check_requirements, open_devices
from harness.parallel.launchers import Launch
from harness.parallel.rendezvous import Rendezvous, SingleRank


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
def test_unmet_requirements_give_both_numbers(tmp_path, gpu, nodes, others, words):
    ranks = [
        Rendezvous(Launch(rank, 1 + len(others), node="a", job="x"), tmp_path)
        for rank in range(1 + len(others))
    ]
    for rank, other in zip(ranks[1:], others, strict=True):
        rank.announce(**other)
    with pytest.raises(UserError) as error:
        open_devices(ranks[0] if others else SingleRank(), gpu, nodes, work="same")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("gpu", "nodes", "cards"),
    [
        ("auto", "auto", [card("a"), card("b")]),
        (0, 2, [card("a"), card("b"), card("b")]),
        (4, 2, [card(node, 2, "GPU") for node in "aabb"]),
    ],
)
def test_met_requirements_are_accepted(gpu, nodes, cards):
    check_requirements(gpu, nodes, cards)


class Chosen(Exception):
    """Carries the GPUs that a rank has chosen; there are none to open."""


@pytest.mark.parametrize(
    ("gpu", "local_rank", "local_size", "gpus"),
    [
        ("auto", 0, 3, "ab"), ("auto", 1, 3, "cd"), ("auto", 2, 3, "ef"), ("auto", 1, 2, "def"),
        ("auto", 0, 1, "abcdef"), (2, 0, 1, "ab"), (0, 0, 1, ""), (0, 1, 2, ""),
    ],
)  # fmt: skip
def test_ranks_of_a_node_divide_its_gpus(tmp_path, monkeypatch, gpu, local_rank, local_size, gpus):
    def choose(devices, kind):
        raise Chosen("".join(devices))

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list("abcdef"))
    monkeypatch.setattr(tf.config, "set_visible_devices", choose)
    launch = Launch(
        0, 1, local_rank=local_rank, local_size=local_size, shares_gpus=True, node="a", job="x"
    )
    with pytest.raises(Chosen) as chosen:
        open_devices(Rendezvous(launch, tmp_path), gpu)
    assert str(chosen.value) == gpus


def test_ranks_that_cannot_divide_the_gpus_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list("abcdef"))
    launch = Launch(0, 1, local_size=4, shares_gpus=True, node="a", job="x")
    with pytest.raises(UserError, match="4 ranks cannot share the 6 GPUs of a node"):
        open_devices(Rendezvous(launch, tmp_path))


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
