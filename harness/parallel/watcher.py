"""End a process that waits too long for other ranks while TensorFlow connects them.

TensorFlow holds Python's lock meanwhile, so that no thread and no handler of a signal runs in that
process. This is therefore a program of its own, which ends when its standard input is closed:

    python watcher.py PID SECONDS TEXT-IF-TOO-LATE TEXT-IF-A-RANK-IS-GONE ADDRESS...
"""

import math
import os
import select
import signal
import socket
import sys

PROBE_SECONDS = 5
REFUSALS = 3  # in a row: before TensorFlow's server opens a port, it is closed for a moment


def main(pid, seconds, late, gone, *addresses):
    """Wait for the end of the input; otherwise print a text and kill the process.

    Args:
        pid: Number of the process.
        seconds: How long to wait; time in which all are suspended does not count.
        late: Text if the time is over.
        gone: Text if an address refuses connections; {} is its number in the list.
        addresses: 'host:port' of every rank, in order; '' for one that is not tried.
    """
    refusals = [0] * len(addresses)
    for _ in range(math.ceil(float(seconds) / PROBE_SECONDS)):
        if select.select([0], [], [], PROBE_SECONDS)[0]:
            return
        for rank, address in enumerate(addresses):
            refusals[rank] = refusals[rank] + 1 if address and refuses(address) else 0
        if REFUSALS in refusals:
            late = gone.format(refusals.index(REFUSALS))
            break
    os.write(2, f"Error: {late}\n".encode())
    os.kill(int(pid), signal.SIGKILL)


def refuses(address):
    """Whether no process listens at 'host:port', though its host answers."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PROBE_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
