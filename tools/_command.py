"""What every command here starts with: the repository on the path, and its exit status."""

import logging
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python tools/x.py, from anywhere

import harness.startup  # noqa: E402, F401

log = logging.getLogger("tools")


def exit_status(work, verbose=False, when_stopped=""):
    """Do the work of a command; an error is printed as one line.

    Args:
        work: Function without arguments.
        verbose: Whether tracebacks are printed.
        when_stopped: Added to the message of a command that handles signals (harness.signals).

    Returns:
        0; 2 for an error that the user can fix, also a missing package; 130 after SIGINT; 143 after
        SIGTERM in a command that handles it; 1 for any other error.
    """
    from harness.errors import is_user_error, one_line
    from harness.signals import Interrupted

    try:
        work()
    except Interrupted as error:
        log.error("Stopped: %s. %s", error, when_stopped)
        return error.code
    except KeyboardInterrupt:
        log.error("Stopped: received SIGINT.")
        return 130
    except Exception as error:
        if verbose:
            traceback.print_exc()
        log.error("Error: %s", one_line(error))
        return 2 if is_user_error(error) else 1
    return 0
