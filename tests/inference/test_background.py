import threading

import pytest

from harness.inference.background import BackgroundThread, call_in_threads


def test_calls_run_at_the_same_time():
    together = threading.Barrier(3)
    seen = []

    def call(letter, number):
        together.wait(timeout=30)
        seen.append((letter, number))

    call_in_threads(call, "abc", (1, 2, 3), on_error=pytest.fail)
    assert sorted(seen) == [("a", 1), ("b", 2), ("c", 3)]


@pytest.mark.parametrize("failing", [0, 1])
def test_error_of_any_call_ends_the_others(failing):
    stopped = threading.Event()

    def call(number):
        if number == failing:
            raise ValueError(f"device {number} failed")
        assert stopped.wait(timeout=30)

    with pytest.raises(ValueError, match=f"device {failing} failed"):
        call_in_threads(call, range(2), on_error=stopped.set)


def test_background_thread_finishes_what_was_submitted_before_the_caller_failed():
    done = []
    with pytest.raises(KeyError), BackgroundThread() as thread:
        thread.submit(done.append, 1)
        raise KeyError
    assert done == [1]


def test_error_of_the_background_thread_is_raised_at_the_end():
    with pytest.raises(ZeroDivisionError), BackgroundThread() as thread:
        thread.submit(divmod, 1, 0)


def test_error_of_the_background_thread_is_raised_at_the_next_item():
    done = []
    with pytest.raises(ZeroDivisionError), BackgroundThread() as thread:
        thread.submit(divmod, 1, 0)
        thread.submit(done.append, 2)
        pytest.fail("the error was not raised")
    assert not done
