import json
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import results, start

from harness.data import page_cache
from harness.data.page_cache import evict, file_system_types

SIZE = 100 * mmap.PAGESIZE - 7
SHM = Path("/dev/shm")


def file_system(path):
    """The type of a path's file system, by a program of others."""
    command = ["stat", "--file-system", "--format=%T", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cached_bytes(path):
    """How many bytes of a file are in the page cache, by a program of others."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def scene(tmp_path):
    """A file that was just written and read."""
    if file_system(tmp_path) == "tmpfs":
        pytest.skip("tests write to a file system in memory")
    path = tmp_path / "scene"
    path.write_bytes(os.urandom(SIZE))
    path.read_bytes()
    return path


@pytest.fixture
def in_memory():
    """A folder on a file system in memory."""
    if not SHM.is_dir() or file_system(SHM) != "tmpfs":
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        yield Path(folder)


needs_fincore = pytest.mark.skipif(not shutil.which("fincore"), reason="no fincore (util-linux)")


@needs_fincore
def test_evicted_files_are_no_longer_in_the_page_cache(scene, tmp_path):
    (tmp_path / "empty").touch()
    assert cached_bytes(scene) >= SIZE
    counts = evict([scene, tmp_path / "empty"])
    assert counts == {"bytes": SIZE, "remaining_bytes": 0, "unverified_bytes": 0}
    assert cached_bytes(scene) == 0


def test_pages_that_are_in_use_are_counted(scene):
    with scene.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert len(mapping[:]) == SIZE  # all pages are mapped
        assert evict([scene])["remaining_bytes"] == SIZE
    assert evict([scene])["remaining_bytes"] == 0


def test_files_in_memory_cannot_be_evicted(in_memory):
    path = in_memory / "scene"
    path.write_bytes(bytes(SIZE))
    assert evict([path])["remaining_bytes"] == SIZE


def test_files_of_which_the_kernel_does_not_tell_are_unverified(scene, tmp_path, monkeypatch):
    assert evict([tmp_path / "none"])["unverified_bytes"] == 1
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert evict([scene])["unverified_bytes"] == 0  # it may be written to
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert evict([scene])["unverified_bytes"] == SIZE


def test_file_systems_with_a_cache_of_their_own_are_unverified(scene, monkeypatch):
    device = os.stat(scene).st_dev
    own = f"{os.major(device)}:{os.minor(device)}"
    assert file_system_types()[own]
    monkeypatch.setattr(page_cache, "file_system_types", lambda: {own: "fuse.sshfs"})
    assert evict([scene])["unverified_bytes"] == SIZE


@pytest.mark.parametrize("place", ["scene", "in_memory"])
def test_log_says_that_the_cache_was_cleared_only_if_it_was(
    place, request, finished, settings, tmp_path, capsys
):
    folder, is_clear = request.getfixturevalue(place), place == "scene"
    data = tmp_path / "data" if is_clear else folder
    shutil.copytree(settings["inference_dir"], data, dirs_exist_ok=True)
    changed = {**settings, "inference_dir": str(data), "clear_file_cache": True}
    model = str(finished / "model.keras")
    run = start(tmp_path / "out", changed, "--mode", "inference", "--model", model)
    assert run.status == 0
    lines = (run.folder / "mlperf_cloudmask.log").read_text().splitlines()
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    assert [e["value"] for e in events if e["key"] == "cache_clear"] == [is_clear]
    n_bytes = sum(path.stat().st_size for path in data.rglob("S3A*.hdf"))
    (part,) = results(run.folder)["parts"]
    assert part["file_cache"]["cleared"] == is_clear
    assert part["file_cache"]["bytes"] == n_bytes
    assert part["file_cache"]["remaining_bytes"] == (0 if is_clear else n_bytes)
    assert ("The file cache is not clear" in capsys.readouterr().err) != is_clear
