"""Memory is used again when nothing refers to it any more, and not earlier."""

import numpy as np
import pytest

from harness.data.reused_memory import ReusedMemory

N_BYTES = 3 * 5 * 4


@pytest.mark.parametrize(
    "refer",
    [
        lambda array: array[1],
        lambda array: array.view(np.uint8)[..., 2].T,
        lambda array: array.reshape(-1)[4:5],
        lambda array: np.from_dlpack(array),  # as tensors are made
        lambda array: memoryview(array[2:]),
    ],
)
def test_memory_is_used_again_once_nothing_refers_to_it(refer):
    memory = ReusedMemory()
    first = memory.empty((3, 5), np.float32)
    place, first[:] = first.ctypes.data, 1
    reference = refer(first)
    expected = np.array(reference)
    del first
    others = [memory.empty((3, 5), np.float32) for _ in range(3)]
    for other in others:
        other[:] = 2
    assert (np.asarray(reference) == expected).all()
    del reference
    # What malloc would hand out again if the memory were free.
    blockers = [np.empty(N_BYTES + 63, np.uint8) for _ in range(3)]
    assert memory.empty((5, 15), np.uint8).ctypes.data != place  # has another size
    again = memory.empty((15,), np.float32)
    assert again.ctypes.data == place and place % 64 == 0
    assert not any(np.shares_memory(again, other) for other in others + blockers)
