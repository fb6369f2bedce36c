"""A thread that finishes one item while its caller prepares the next."""

from concurrent.futures import ThreadPoolExecutor


class BackgroundThread:
    """A thread that works on one item at a time, as a context.

    What was submitted is always finished, also if the caller fails: leaving the context waits.
    """

    def __init__(self):
        self._pool, self._job = ThreadPoolExecutor(1, "writer"), None

    def submit(self, function, *arguments):
        """Call a function in the thread, once the call before is over; raises what that raised."""
        if self._job is not None:
            self._job.result()
        self._job = self._pool.submit(function, *arguments)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._pool.shutdown()  # waits
        if kind is None and self._job is not None:  # otherwise the first error is reported
            self._job.result()
