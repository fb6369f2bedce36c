"""Which errors the user can mend, and how an error is told."""

import errno
import logging
import os

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
    if is_user_error(error) or isinstance(error, Failure):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (--verbose shows where)"


def is_user_error(error):
    """Whether the user can mend an error: a bad value, file or permission, or a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(
        error,
        UserError | FileNotFoundError | FileExistsError | NotADirectoryError
        | IsADirectoryError | PermissionError,
    )  # fmt: skip
