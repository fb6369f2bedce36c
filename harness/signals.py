"""Signals end the program in order, and never in the middle of a step."""

import contextlib
import signal
from types import SimpleNamespace

from harness.clock import active_seconds

# SIGHUP: the terminal was closed; the others: warnings of schedulers that the time is nearly over.
STOPPING = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip

_state = SimpleNamespace(deferred=False, always=False, received=None)


class Interrupted(SystemExit):
    """The program received a signal to stop; its exit status is 128 plus the signal's number."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)

    def __str__(self):
        return f"received {self.signal.name}"


def install_handlers(reset=True):
    """Let the signals STOPPING raise Interrupted; again after TensorFlow has taken SIGTERM.

    A signal that is ignored, as SIGHUP under nohup, stays ignored.

    Args:
        reset: Whether signals received earlier are forgotten.
    """
    if reset:
        _state.received = None
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)
    active_seconds.start()


def check_signals():
    """Raise Interrupted if a signal has been received.

    The handler has raised it before, but Python drops exceptions raised inside a destructor.
    """
    if _state.received is not None:
        raise Interrupted(_state.received)


@contextlib.contextmanager
def deferred(always=False):
    """Finish the block before Interrupted is raised; a second signal interrupts at once.

    Args:
        always: Whether further signals wait too, for short blocks.
    """
    _state.deferred, _state.always = True, always
    try:
        yield
    finally:
        _state.deferred = False
    check_signals()


def _receive(number, frame):
    waits = _state.deferred and (_state.always or _state.received is None)
    _state.received = _state.received or number
    if not waits:
        raise Interrupted(_state.received)
