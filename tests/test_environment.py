"""Programs in environments that are set for other programs, or that lack something."""

import os
import subprocess
import sys

import pytest

from harness import REPOSITORY


def run(*arguments, cwd=REPOSITORY, **environment):
    """Run Python with a changed environment; None removes a variable."""
    values = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env={name: str(value) for name, value in values.items() if value is not None},
        check=False,
    )  # fmt: skip


LOAD = "import harness.quiet_tensorflow"


@pytest.mark.parametrize(
    ("code", "status", "screen"),
    [
        ("pass", 0, ""),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise SystemExit(143)", 143, ""),  # SIGTERM
        # What TensorFlow does on a processor without AVX:
        ("os.abort()", -6, "Error: TensorFlow could not be loaded. Its last lines:\nNo AVX\n"),
        ("os._exit(1)", 1, "Error: TensorFlow could not be loaded. Its last lines:\nNo AVX\n"),
        ("os.kill(os.getpid(), 9)", -9, "could not be loaded. Its last lines:\nNo AVX\n"),
    ],
    ids=["loads", "SIGINT", "SIGTERM", "abort", "exit", "SIGKILL"],
)
def test_messages_of_tensorflow_are_shown_if_it_ends_the_process(tmp_path, code, status, screen):
    native = "import os, sys\nos.write(2, b'No AVX\\n')\n"
    (tmp_path / "tensorflow.py").write_text(
        f"{native}{code}\nclass config: list_physical_devices = staticmethod(lambda: [])"
    )
    (tmp_path / "keras.py").write_text(
        "class config:\n"
        "    set_floatx = set_image_data_format = set_epsilon = staticmethod(lambda value: None)\n"
        "    backend = staticmethod(lambda: 'tensorflow')\n"
    )
    done = run("-c", LOAD, PYTHONPATH=tmp_path)
    assert done.returncode == status
    assert done.stderr.endswith(screen) and bool(screen) == bool(done.stderr)


@pytest.mark.slow
def test_flag_that_tensorflow_rejects_is_named():
    done = run("-c", LOAD, TF_XLA_FLAGS="--nonsense")
    assert done.returncode != 0 and "Unknown flag in TF_XLA_FLAGS: --nonsense" in done.stderr


KERAS = """
import harness.quiet_tensorflow, keras
print(keras.config.backend(), keras.config.floatx(), keras.config.image_data_format())
"""


@pytest.mark.slow
def test_settings_of_keras_are_those_of_the_benchmark(tmp_path):
    (tmp_path / "keras.json").write_text(
        '{"backend": "jax", "floatx": "float16", "image_data_format": "channels_first"}'
    )
    done = run("-c", KERAS, KERAS_HOME=tmp_path, KERAS_BACKEND="jax")
    assert (done.stdout, done.stderr) == ("tensorflow float32 channels_last\n", "")


CONFIG = ["--config", REPOSITORY / "config.yaml", "--set", "epochs=0"]
ERROR = "--set: epochs: Input should be greater than or equal to 1, found 0."


@pytest.mark.parametrize("flags", [["-P"], ["-I"], ["-OO"], ["-s"]])
def test_program_starts_with_any_flags_of_python_from_any_folder(tmp_path, flags):
    if flags == ["-P"] and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    done = run(*flags, REPOSITORY / "slstr_cloud.py", *CONFIG, cwd=tmp_path, HOME=None)
    assert done.returncode == 2 and ERROR in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_closed_files_get_no_content_of_others(tmp_path, closed):
    code = (
        "import harness.startup, sys; file = open('results', 'w'); file.write('mine');"
        "print('out'); print('error', file=sys.stderr); sys.stdin.read(); assert file.fileno() > 2"
    )
    command = ["sh", "-c", f'{sys.executable} -c "{code}" {closed}']
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdin=subprocess.DEVNULL)
    assert (tmp_path / "results").read_text() == "mine"


def test_pictures_do_not_depend_on_the_notebook_that_started_the_program():
    code = "import harness.startup, matplotlib; print(matplotlib.get_backend())"
    done = run("-c", code, MPLBACKEND="module://not_installed.backend_inline")
    assert (done.stdout, done.stderr) == ("agg\n", "")


@pytest.mark.slow
def test_keras_leaves_no_files(tmp_path):
    done = run("-c", "import harness.startup, keras", HOME=tmp_path)
    assert (done.returncode, list(tmp_path.rglob("*keras*"))) == (0, [])
