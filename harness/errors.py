"""Which errors the user can fix, and how an error is printed."""

import errno
import os

from harness import REPOSITORY

# Packages, by the names that are imported, of requirements-tools.txt; all others are of
# requirements.txt.
TOOLS_PACKAGES = {
    "boto3", "botocore", "h5netcdf", "onnx", "onnxruntime", "rasterio", "scipy",
    "tensorboard", "tf2onnx",
}  # fmt: skip


class UserError(ValueError):
    """An error that the user can fix; printed as one line without a traceback."""


class Failure(RuntimeError):
    """A failure that is not the user's mistake, with a complete message; the exit status is 1."""


def one_line(error):
    """The text of an error on the screen; with its type where the message is not ours."""
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error.name)
    if isinstance(error, OSError) and error.filename:
        # HDF5 fills strerror with many lines of its own.
        reason = os.strerror(error.errno) if error.errno else error.strerror
        return f"{error.filename}: {reason}. Fix it or choose another path."
    if is_user_error(error) or isinstance(error, Failure):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (use --verbose for the traceback)"


def missing_package(name):
    """What to do about a missing package, as one line."""
    package, python = str(name).partition(".")[0], REPOSITORY / ".venv/bin/python"
    missing = f"the package {package} is missing. Install it: pip install -r"
    if package in TOOLS_PACKAGES:
        return f"{missing} requirements-tools.txt"
    made = f", or use {python}, which `make demo` made" if python.exists() else ""
    return f"{missing} requirements.txt{made}"


def is_user_error(error):
    """Whether the user can fix an error: a wrong value or file, a missing package, a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(
        error,
        UserError | FileNotFoundError | FileExistsError | NotADirectoryError
        | IsADirectoryError | PermissionError | ModuleNotFoundError,
    )  # fmt: skip
