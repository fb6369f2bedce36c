"""Threads of inference: one for each device, and one that finishes a scene after the network."""

from concurrent.futures import ThreadPoolExecutor, as_completed


def call_in_threads(function, *arguments, on_error):
    """Call a function with the first of all arguments, the second, and so on, each in a thread.

    Args:
        function: Function of as many arguments as there are iterables.
        *arguments: Iterables of equal length.
        on_error: Called as soon as a call, or this thread, fails: the other calls should then end,
            as they are waited for before the error is raised.
    """
    calls = list(zip(*arguments, strict=True))
    with ThreadPoolExecutor(len(calls)) as pool:
        try:
            for future in as_completed([pool.submit(function, *call) for call in calls]):
                future.result()  # raises what the thread raised
        except BaseException:
            on_error()
            raise


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
