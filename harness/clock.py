"""A clock that stands still while the program is suspended.

`scontrol suspend`, Ctrl-Z and SIGSTOP stop a process between two of its instructions; an epoch does
not take that time. A thread looks at the clock every second, and at once when SIGCONT ends a
suspension.
"""

import signal
import threading
import time

TICK_SECONDS = 1.0  # [s] between looks: the error of the length of a suspension


class ActiveClock:
    """Seconds of an arbitrary origin, without those of suspensions.

    Attributes:
        suspended: Seconds that this process has been suspended so far.
    """

    def __init__(self):
        self.suspended, self._thread = 0.0, None  # [s]

    def start(self):
        """Notice suspensions from now on; to be called before other threads start."""
        if self._thread is None and hasattr(signal, "sigtimedwait"):  # not on macOS
            # All threads block it, so that it waits for the one that asks for it. Processes
            # started later inherit that; it ends their suspensions all the same.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
            self._thread = threading.Thread(target=self._watch, name="clock", daemon=True)
            self._thread.start()

    def _watch(self):
        while True:
            last = time.perf_counter()
            if signal.sigtimedwait([signal.SIGCONT], TICK_SECONDS):
                seconds = time.perf_counter() - last
                # The last look was up to a second before the suspension.
                self.suspended += max(0.0, seconds - TICK_SECONDS)

    def __call__(self):
        """The time [s]."""
        return time.perf_counter() - self.suspended


active_seconds = ActiveClock()
