import subprocess
import sys
import threading
import time

import pytest
import yaml

from harness import REPOSITORY
from harness.data.prefetch import Readers


def test_readers_keep_the_order_and_read_side_by_side():
    running = peak = 0
    lock = threading.Lock()

    def read(item):
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return item

    with Readers(4) as readers:
        assert list(readers.ahead(read, range(20), 3)) == list(range(20))
    assert peak == 3


def test_readers_name_the_file_that_hangs_and_do_not_wait_for_it():
    answers = threading.Event()
    begin = time.monotonic()
    with (
        pytest.raises(TimeoutError, match=r"^two could not be read within read_timeout, 0.2 s"),
        Readers(2, 0.2) as readers,
    ):
        for item in readers.ahead(
            lambda item: item == "two" and answers.wait(60), ["one", "two"], 2
        ):
            assert item is False
    assert time.monotonic() - begin < 30
    answers.set()


def test_timeout_that_a_read_raises_is_passed_on():
    def read(item):
        raise TimeoutError("the server said nothing")

    with Readers(1, 60) as readers, pytest.raises(TimeoutError, match="the server said nothing"):
        list(readers.ahead(read, [1], 1))


HANGS = """
import sys, time
import slstr_cloud, data_loader
from harness.data.prefetch import leave
def hang(path, patches, **how):
    time.sleep(1000)
data_loader.read_patches = hang
leave(slstr_cloud.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_program_ends_though_a_reader_hangs(tmp_path, settings):
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
