import os
import signal
import subprocess
import sys
import time

import pytest

from harness import REPOSITORY

PROGRAM = """
import sys, time
from harness.clock import active_seconds
active_seconds.start()
begin = time.perf_counter(), active_seconds()
print("ready", flush=True)
sys.stdin.readline()
time.sleep(0.2)  # the other thread notices the end of the suspension
print(time.perf_counter() - begin[0], active_seconds() - begin[1])
"""


@pytest.mark.parametrize("is_stopped", [True, False])
def test_suspended_time_does_not_count(is_stopped):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as program:  # fmt: skip
        assert program.stdout.readline() == "ready\n"
        if is_stopped:
            os.kill(program.pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(program.pid, signal.SIGCONT)
        wall, active = map(float, program.communicate("\n")[0].split())
    assert wall > 4
    # The length of a suspension is known to a second. A SIGCONT without one adds nothing but what
    # a busy machine delays the thread that waits for it.
    assert (wall - active > 2) if is_stopped else (wall - active < 1)
