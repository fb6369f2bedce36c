"""Imported first by every program: a missing package is one line instead of a traceback."""

import sys

from harness.errors import one_line


def _report(kind, error, traceback):
    if issubclass(kind, ModuleNotFoundError):
        sys.stderr.write(f"Error: {one_line(error)}\n")
        sys.exit(2)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report
