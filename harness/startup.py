"""Imported first by every program: what must be set before packages are imported.

A missing package is one line instead of a traceback. Variables and closed files that other programs
leave behind do not matter.
"""

import os
import sys

from harness.errors import one_line


def _report(kind, error, traceback):
    if issubclass(kind, ModuleNotFoundError):
        sys.stderr.write(f"Error: {one_line(error)}\n")
        sys.exit(2)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report
# That of a notebook, 'module://matplotlib_inline...', is often not installed here.
os.environ["MPLBACKEND"] = "agg"
os.environ["KERAS_HOME"] = os.devnull  # no keras.json; without HOME it would be in a folder '~'
for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:  # closed: the next file that is opened would get its number
        descriptor = os.open(os.devnull, os.O_RDWR)
        os.dup2(descriptor, number)
        setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
