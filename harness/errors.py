"""Which errors the user can mend, and how an error is told."""

import errno
import logging
import os
import traceback

from harness.interrupts import Interrupted

INSTALL_TOOLS = "pip install -r requirements-tools.txt"

log = logging.getLogger(__name__)


class UserError(ValueError):
    """What the user can mend; main shows it as one line without a traceback."""


class Failure(RuntimeError):
    """What failed through no mistake of the user; its message says all, the exit status is 1."""


def one_line(error):
    """An error for people: its message where it is ours, its kind and first line where not."""
    if isinstance(error, OSError) and error.filename:
        # HDF5 has a strerror of its own, of many lines.
        reason = os.strerror(error.errno) if error.errno else error.strerror
        return f"{error.filename}: {reason}. Mend it, or set another path."
    if is_users_mistake(error) or isinstance(error, Failure):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (--verbose shows where)"


def is_users_mistake(error):
    """Whether the user can mend an error: a bad value, file or permission, or a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(
        error,
        UserError | FileNotFoundError | FileExistsError | NotADirectoryError
        | IsADirectoryError | PermissionError,
    )  # fmt: skip


def exit_status(work, verbose=False, when_stopped=""):
    """Do the work of a program in tools/; an error is told in one line.

    Args:
        work: Function without arguments.
        verbose: Whether tracebacks are shown.
        when_stopped: What is said besides, of a program that heeds signals (harness.interrupts).

    Returns:
        0; 2 for the user's mistake, a missing package too; 130 after SIGINT; 143 after SIGTERM of a
        program that heeds it; 1 for the rest.
    """
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
        if isinstance(error, ModuleNotFoundError):
            log.error("Error: the package %s is missing. Type: %s", error.name, INSTALL_TOOLS)
            return 2
        log.error("Error: %s", one_line(error))
        return 2 if is_users_mistake(error) else 1
    return 0
