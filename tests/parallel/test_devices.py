import pytest

from harness.errors import UserError
from harness.parallel.devices import _check_demands, open_devices


def card(node, devices=4, kind="GPU", work="same"):
    return {"node": node, "devices": devices, "kind": kind, "work": work}


def test_demands_that_are_met_pass():
    _check_demands("auto", "auto", 0, [{}])
    _check_demands(2, 1, 2, [{}])
    _check_demands(4, 2, 4, [card("a"), card("b")])
    _check_demands(6, 1, 2, [card("a", 2), card("a", 2), card("a", 2)])  # three ranks on a node
    _check_demands(0, 2, 0, [card("a", 1, "CPU"), card("b", 1, "CPU")])


@pytest.mark.parametrize(
    ("gpu", "nodes", "cards", "words"),
    [
        (4, "auto", [{}], "demands 4 GPU(s) a node, TensorFlow sees 2"),
        (4, "auto", [card("a"), card("b", 2)], "TensorFlow sees 2 and 4"),
        ("auto", 3, [card("a"), card("b")], "demands 3 node(s), the scheduler started 2"),
        ("auto", "auto", [card("a"), card("b", 2)], "rank 0: 4 GPU, rank 1: 2 GPU"),
        ("auto", "auto", [card("a"), card("b", 4, "CPU")], "rank 1: 4 CPU"),
        ("auto", "auto", [card("a"), card("b", work="other")], "different configurations"),
    ],
)
def test_demands_that_are_not_met_give_both_numbers(gpu, nodes, cards, words):
    with pytest.raises(UserError) as error:
        _check_demands(gpu, nodes, 2, cards)
    assert words in str(error.value)


def test_virtual_replicas_are_numbered_and_described():
    devices = open_devices(cpu_devices=3)
    assert list(devices.replicas) == [0, 1, 2] and devices.n_replicas == 3
    assert "3 CPU replicas" in devices.describe() and "1 node, 1 rank" in devices.describe()
    assert devices.accelerators_per_node == 0 and devices.gather(2.5) == [2.5]


@pytest.mark.parametrize(("wanted", "batch", "found"), [("auto", 32, 4), ("auto", 6, 2), (9, 6, 2)])
def test_micro_batch_is_a_share_at_most(wanted, batch, found):
    assert open_devices(cpu_devices=3).micro_batch(wanted, batch) == found
