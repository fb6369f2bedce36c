"""Import TensorFlow without its start-up messages; to be imported before anything that imports it.

TensorFlow 2.21 writes a dozen lines to standard error while it loads and looks for GPUs, and only
some of them respect TF_CPP_MIN_LOG_LEVEL. With `--verbose` they are all shown.
"""

import contextlib
import os
import signal
import sys
import tempfile


@contextlib.contextmanager
def _captured_stderr():
    """Capture what native code writes to standard error; show it if an error follows."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured, os.fdopen(os.dup(2), "wb") as screen:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except KeyboardInterrupt:  # nothing has begun: a traceback would not help
            raise SystemExit(128 + signal.SIGINT) from None
        except BaseException:
            captured.seek(0)
            screen.write(captured.read())
            raise
        finally:
            os.dup2(screen.fileno(), 2)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if "--verbose" in sys.argv else "2")
with contextlib.nullcontext() if "--verbose" in sys.argv else _captured_stderr():
    import tensorflow as tf

    tf.config.list_physical_devices()
