"""SIGTERM and SIGINT: the program ends in order, and never in the middle of a step."""

import contextlib
import signal
from types import SimpleNamespace

_state = SimpleNamespace(deferred=False, received=None)


class Interrupted(SystemExit):
    """The program was told to stop; its exit status is 128 and the signal's number."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)

    def __str__(self):
        return f"received {self.signal.name}"


def install_handlers(anew=True):
    """Let SIGTERM and SIGINT raise Interrupted; TensorFlow may take SIGTERM for itself later on.

    Args:
        anew: Whether signals that came before are forgotten.
    """
    if anew:
        _state.received = None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _receive)


def check_signals():
    """Raise Interrupted if a signal has come.

    It was raised at once, but where it came inside a destructor, say, Python drops what is raised.
    """
    if _state.received is not None:
        raise Interrupted(_state.received)


@contextlib.contextmanager
def deferred():
    """Let what is inside end before Interrupted is raised; a second signal does not wait."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    check_signals()


def _receive(number, frame):
    waits = _state.deferred and _state.received is None
    _state.received = _state.received or number
    if not waits:
        raise Interrupted(_state.received)
