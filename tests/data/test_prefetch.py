import subprocess
import sys
import threading

import pytest
import yaml

from harness import REPOSITORY
from harness.data.prefetch import ReaderPool


def test_items_keep_their_order_and_are_read_at_the_same_time():
    together = threading.Barrier(3)  # breaks unless three items are being read

    def read(item):
        together.wait(60)
        return item

    with ReaderPool(4) as pool:
        assert list(pool.prefetch(read, range(21), 3)) == list(range(21))


def test_no_more_items_are_read_ahead_than_asked():
    begun = []
    with ReaderPool(4) as pool:
        results = pool.prefetch(begun.append, range(20), 3)
        for n in range(1, 10):
            next(results)
            assert len(begun) <= n + 3


def test_file_that_hangs_is_named_and_not_waited_for():
    answer = threading.Event()
    with (
        pytest.raises(TimeoutError, match=r"^two could not be read within read_timeout, 0.2 s"),
        ReaderPool(2, 0.2) as pool,
    ):
        list(pool.prefetch(lambda item: answer.wait(), ["two"], 2))
    answer.set()


def test_timeout_that_a_read_raises_is_passed_on():
    def read(item):
        raise TimeoutError("the server does not answer")

    with ReaderPool(1, 60) as pool, pytest.raises(TimeoutError, match="the server does not answer"):
        list(pool.prefetch(read, [1], 1))


EXITS = """
import threading
from harness.data.prefetch import ReaderPool, exit_process
print("the last line")
try:
    with ReaderPool(1, 0.1) as pool:
        list(pool.prefetch(lambda item: threading.Event().wait(), ["one"], 1))
except TimeoutError:
    exit_process(3)
"""


def test_exit_while_a_reader_hangs_keeps_the_output_and_the_status():
    run = subprocess.run(
        [sys.executable, "-c", EXITS],
        capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (3, "the last line\n")


HANGS = """
import sys, time
import slstr_cloud, harness.build
from harness.data.prefetch import exit_process
def hang(path, patches, **how):
    time.sleep(1000)
harness.build.read_patches = hang
exit_process(slstr_cloud.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_program_exits_while_a_reader_hangs(tmp_path, settings):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path), "read_timeout": 1}))
    run = subprocess.run(
        [sys.executable, "-c", HANGS, "--config", str(file), "--set", "run_name=run"],
        capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert "S3A" in last and "could not be read within read_timeout, 1 s" in last
    assert '"status": "aborted"' in (tmp_path / "run/results.json").read_text()
