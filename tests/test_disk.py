"""Full and read-only disks, at each kind of write: what is complete stays, and the run resumes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import h5py
import keras
import pytest
from conftest import at_file, epochs_in, results, start
from test_resume import assert_same_outcome, resume

from harness.records.mlperf_log import open_mlperf_log

DISK_BYTES = 160_000_000  # a run wants 100 MB before it begins


@pytest.fixture
def disk(tmp_path):
    """A small disk, whose folder `out` is for runs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    yield folder / "out"
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk):
    """Take all the space that is left."""
    with (disk.parent / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(1 << 16))
    with (disk.parent / "filler").open("ab", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"0")


# The disk is full from the moment that a file has been written: the next write fails.
FULL_AFTER = {
    # then an MLPerf event
    "results.json of an epoch": ("run/results.json", {"when": lambda path: epochs_in(path) == 1}),
    "history.csv": ("run/history.csv", {"number": 2}),  # then the model, if it is the best
    "the best model": ("run/model.keras", {}),  # then a checkpoint
    "a checkpoint": ("checkpoints/epoch-*", {"number": 2}),  # then results.json
    "a mask": ("masks/*.h5", {}),  # then a mask
    "the last mask": ("masks/*.h5", {"number": 2}),  # then scenes.csv
    "scenes.csv": ("run/scenes.csv", {}),  # then the line of cloudmask.log
}


@pytest.mark.slow
@pytest.mark.parametrize("written", FULL_AFTER)
def test_full_disk_is_one_line_and_loses_nothing(disk, quick, whole, capfd, written):
    pattern, which = FULL_AFTER[written]
    with at_file(pattern, lambda: fill(disk), **which):
        run = start(disk, quick)
    error = capfd.readouterr().err
    assert run.status == 2
    last = error.splitlines()[-1]
    assert last.startswith("Error: ") and "No space left on device" in last, last
    assert "Traceback" not in error and "Logging error" not in error
    assert_readable(run.folder)
    (disk.parent / "filler").unlink()
    assert resume(run.folder) == 0
    assert_same_outcome(run.folder, whole)


def assert_readable(folder):
    """Every file that has its final name is complete."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or "checkpoints" in path.parts or not path.is_file():
            continue
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                assert file["mask"][:].any() and file.attrs["row"]
        elif path.suffix == ".keras":
            keras.models.load_model(path)
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n") and path.read_text().count("\n") > 1
    assert results(folder)["config"]
    for checkpoint in (folder / "checkpoints").glob("epoch-*"):
        assert (checkpoint / "SHA256SUMS").read_text()


def test_full_disk_at_the_start_leaves_no_folder(disk, quick, capsys):
    disk.mkdir()
    fill(disk)
    run = start(disk.parent.parent / "elsewhere", {**quick, "output_dir": str(disk)})
    assert run.status == 2
    assert "0 B free" in capsys.readouterr().err.splitlines()[-1]
    assert list(disk.iterdir()) == []


def test_read_only_disk_is_one_line(disk, quick, capsys):
    with at_file("run/history.csv", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        run = start(disk, quick)
    assert run.status == 143
    before = {path: path.stat().st_mtime_ns for path in disk.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(disk.parent)], check=True)
    try:
        capsys.readouterr()
        assert resume(run.folder) == 2
        assert "Read-only file system" in capsys.readouterr().err.splitlines()[-1]
        other = disk.parent.parent / "other"
        assert start(other, {**quick, "output_dir": str(disk), "run_name": "new"}).status == 2
        assert "Read-only file system" in capsys.readouterr().err.splitlines()[-1]
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk.parent)], check=True)
    assert before == {path: path.stat().st_mtime_ns for path in disk.rglob("*") if path.is_file()}


def test_scene_that_another_program_writes_is_named(dataset, settings, tmp_path, capsys):
    shutil.copytree(dataset / "ssts", tmp_path / "ssts")
    locked = sorted((tmp_path / "ssts").rglob("S3A*.hdf"))[0]
    code = f"import h5py, sys; f = h5py.File({str(locked)!r}, 'a'); print(flush=True); input()"
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        writer.stdout.readline()
        run = start(tmp_path / "out", {**settings, "inference_dir": str(tmp_path / "ssts")})
    finally:
        writer.communicate(b"\n")
    assert run.status == 2 and run.folder is None
    error = capsys.readouterr().err
    assert str(locked) in error and "HDF5_USE_FILE_LOCKING" in error


def test_mlperf_event_that_cannot_be_written_is_an_error(tmp_path):
    mllog = open_mlperf_log(tmp_path / "mlperf.log", tmp_path)
    (handler,) = mllog.logger.handlers
    mllog.event("seed", 1)

    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    handler.setStream(SimpleNamespace(write=write, flush=int, close=int)).close()
    with pytest.raises(OSError, match="No space left on device") as raised:
        mllog.event("seed", 2)
    assert raised.value.filename == str(tmp_path / "mlperf.log")
