"""Import TensorFlow without its start-up chatter; to be imported before anything that imports it.

TensorFlow 2.21 writes a dozen lines to the standard error while it loads and looks for GPUs, and
heeds TF_CPP_MIN_LOG_LEVEL in some of them only. `--verbose` leaves all of them there.
"""

import contextlib
import os
import signal
import sys
import tempfile


@contextlib.contextmanager
def _held_back():
    """Hold back what native code writes to the standard error; show it if an error follows."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), "wb") as screen:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except KeyboardInterrupt:  # nothing was begun yet: a traceback would tell nothing
            raise SystemExit(128 + signal.SIGINT) from None
        except BaseException:
            held.seek(0)
            screen.write(held.read())
            raise
        finally:
            os.dup2(screen.fileno(), 2)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if "--verbose" in sys.argv else "2")
with contextlib.nullcontext() if "--verbose" in sys.argv else _held_back():
    import tensorflow as tf

    tf.config.list_physical_devices()
