"""Memory for the arrays of batches that is used again."""

import math
import weakref
from collections import defaultdict

import numpy as np


class ReusedMemory:
    """Memory for arrays, which is used again once no array or tensor refers to it.

    New memory costs more than the numbers that are copied to it, because the system clears each
    page at its first use: 0.1 to 2 ms for a patch of 2.4 MB on virtual machines.
    """

    def __init__(self):
        self._spare = defaultdict(list)  # by number of bytes

    def empty(self, shape, dtype):
        """An empty array at a multiple of 64 bytes, which TensorFlow can use without a copy."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        spare = self._spare[n_bytes]
        space = spare.pop() if spare else np.empty(n_bytes + 63, np.uint8)
        # All views of `owner`, and tensors made from them, keep it alive, as its own memory is no
        # NumPy array; when it is gone, nothing refers to the memory.
        owner = np.frombuffer(memoryview(space), np.uint8)
        weakref.finalize(owner, spare.append, space).atexit = False
        return owner[-owner.ctypes.data % 64 :][:n_bytes].view(dtype).reshape(shape)
