import os
import signal
import sys

import pytest

from harness.signals import STOPPING, Interrupted, check_signals, deferred, install_handlers


@pytest.fixture(autouse=True)
def signals():
    before = {number: signal.getsignal(number) for number in STOPPING}
    install_handlers()
    yield
    install_handlers()  # forgets those of the test
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_signal_ends_the_program_with_128_and_its_number(number):
    with pytest.raises(Interrupted) as told:
        os.kill(os.getpid(), number)
    assert told.value.code == 128 + number and number.name in str(told.value)


def test_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    install_handlers()
    os.kill(os.getpid(), signal.SIGHUP)
    check_signals()


@pytest.mark.parametrize(
    ("always", "n_signals", "is_done"),
    [(False, 1, True), (False, 2, False), (True, 1, True), (True, 2, True)],
)
def test_deferred_work_ends_first_unless_a_second_signal_interrupts(always, n_signals, is_done):
    done = []
    with pytest.raises(Interrupted), deferred(always):
        for _ in range(n_signals):
            os.kill(os.getpid(), signal.SIGINT)
        done.append(True)
    assert bool(done) == is_done


def test_signal_that_python_dropped_in_a_destructor_is_not_lost(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda told: None)

    class Dies:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    install_handlers(reset=False)
    Dies()
    with pytest.raises(Interrupted):
        check_signals()


def test_signals_of_an_earlier_program_are_forgotten():
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    install_handlers(reset=False)
    with pytest.raises(Interrupted):
        check_signals()
    install_handlers()
    check_signals()
