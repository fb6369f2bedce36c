"""Threads that read files before they are needed, with a time limit for each file."""

import itertools
import logging
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one since 3.11

THREAD_NAME = "reader"


class ReaderPool:
    """A pool of reading threads, as a context; leaving it ends the threads.

    Args:
        n_threads: Files that are read at the same time.
        timeout: Seconds after which a file is taken as hanging, because its file system does not
            answer; None waits without end.
    """

    def __init__(self, n_threads, timeout=None):
        self._pool = ThreadPoolExecutor(n_threads, THREAD_NAME)
        self._timeout, self._hangs = timeout, False

    def prefetch(self, read, items, n_ahead, name=str):
        """Yield read(item) in the order of items, read up to `n_ahead` items early.

        Args:
            read: Function of an item.
            items: Iterable.
            n_ahead: Items that are being read, or have been read and not yet yielded.
            name: Function from an item to the file's name, for the error.

        Raises:
            TimeoutError: If a file hangs. Errors of `read` are passed on.
        """
        jobs = ((item, self._pool.submit(read, item)) for item in items)
        pending = deque(itertools.islice(jobs, n_ahead))
        try:
            while pending:
                item, future = pending.popleft()
                try:
                    result = future.result(self._timeout)
                except FutureTimeoutError:
                    self._hangs = not future.done()
                    if not self._hangs:
                        raise  # by read itself
                    raise TimeoutError(
                        f"{name(item)} could not be read within read_timeout, {self._timeout:g} s. "
                        "Check its file system, then resume with --resume."
                    ) from None
                pending.extend(itertools.islice(jobs, 1))
                yield result
        finally:
            for _, future in pending:
                future.cancel()

    def close(self):
        """Cancel what has not begun, and wait for what is being read unless it hangs."""
        self._pool.shutdown(wait=not self._hangs, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def exit_process(status):
    """Exit with a status, even while a reading thread hangs: sys.exit would wait for it."""
    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
