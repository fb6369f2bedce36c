"""Threads that read files ahead of their use, and do not wait for ever."""

import itertools
import logging
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

THREAD_NAME = "reader"


class Readers:
    """A pool of reading threads; as a context it ends them.

    Args:
        n_threads: Files that are read side by side.
        seconds: One that takes longer hangs: its file system has gone, say. None waits for ever.
    """

    def __init__(self, n_threads, seconds=None):
        self._pool = ThreadPoolExecutor(n_threads, THREAD_NAME)
        self._seconds, self._hangs = seconds, False

    def ahead(self, read, items, n_ahead, name=str):
        """Yield read(item) in the order of items, computed up to `n_ahead` items early.

        Args:
            read: Function of an item.
            items: Iterable.
            n_ahead: Items that are being read, or were read and wait.
            name: Function from an item to the file's name, for the error.

        Raises:
            TimeoutError: If a file hangs. What `read` raises goes through.
        """
        jobs = ((item, self._pool.submit(read, item)) for item in items)
        pending = deque(itertools.islice(jobs, n_ahead))
        try:
            while pending:
                item, future = pending.popleft()
                try:
                    result = future.result(self._seconds)
                except TimeoutError:
                    self._hangs = not future.done()
                    if not self._hangs:
                        raise  # by read itself
                    raise TimeoutError(
                        f"{name(item)} could not be read within read_timeout, {self._seconds:g} s. "
                        "See whether its file system answers; then go on with --resume."
                    ) from None
                pending.extend(itertools.islice(jobs, 1))
                yield result
        finally:
            for _, future in pending:
                future.cancel()

    def close(self):
        """Read no more, and wait for what is being read unless it hangs."""
        self._pool.shutdown(wait=not self._hangs, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def leave(status):
    """End the process with an exit status, even where a reader hangs: Python would wait for it."""
    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
