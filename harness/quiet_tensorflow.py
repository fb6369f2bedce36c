"""Import TensorFlow without its start-up messages; to be imported before anything that imports it.

TensorFlow 2.21 writes a dozen lines to standard error while it loads and looks for GPUs, and only
some of them respect TF_CPP_MIN_LOG_LEVEL. With `--verbose` they are all shown.

Settings of Keras in the environment and in keras.json would change results: they are replaced by
those of the benchmark.
"""

import contextlib
import os
import signal
import subprocess
import sys

from harness.errors import UserError

QUIET = b"\0quiet\0"  # ends the captured messages if nobody needs them

# Another process keeps the messages: native code ends this one with abort(), exit() or an illegal
# instruction, and no Python code runs after that.
KEEPER = f"""
import os
text = b""
while block := os.read(0, 1 << 16):
    text = (text + block)[-8000:]
    if text.endswith({QUIET!r}):
        raise SystemExit
last = b"\\n".join(text.rstrip().splitlines()[-20:])
what = b"Its last lines:\\n" if last else b"It wrote nothing; perhaps the memory is full."
os.write(2, b"Error: TensorFlow could not be loaded. " + what + last + b"\\n")
"""


@contextlib.contextmanager
def _captured_stderr():
    """Capture what native code writes to standard error; show it unless the import succeeds."""
    sys.stderr.flush()
    try:
        keeper = subprocess.Popen(
            [sys.executable, "-ISc", KEEPER], stdin=subprocess.PIPE, start_new_session=True
        )
    except OSError:  # no more processes are allowed: then nothing is captured
        yield
        return
    screen = os.dup(2)
    os.dup2(keeper.stdin.fileno(), 2)
    try:
        yield
        os.write(2, QUIET)
    except (ModuleNotFoundError, SystemExit, KeyboardInterrupt) as error:
        os.write(2, QUIET)
        if isinstance(error, KeyboardInterrupt):  # nothing has begun: a traceback would not help
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        keeper.communicate()  # closes the pipe; the keeper has written before an error is printed


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if "--verbose" in sys.argv else "2")
os.environ["KERAS_BACKEND"] = "tensorflow"
with contextlib.nullcontext() if "--verbose" in sys.argv else _captured_stderr():
    import h5py  # noqa: F401, isort: skip  (before TensorFlow, which disables HDF5_PLUGIN_PATH)
    import keras
    import tensorflow as tf

    tf.config.list_physical_devices()

keras.config.set_floatx("float32")
keras.config.set_image_data_format("channels_last")
keras.config.set_epsilon(1e-7)
if keras.config.backend() != "tensorflow":
    raise UserError(
        f"Keras was imported with the backend {keras.config.backend()}, CloudMask needs "
        "tensorflow. Set the environment variable KERAS_BACKEND to tensorflow and start again."
    )
