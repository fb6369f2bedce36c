"""Scenes for the tests, and runs of the program on them."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# What a test says must not depend on the machine; tests/gpu/test_gpu.py shows the GPUs again.
os.environ["GPUS_BEFORE_TESTS"] = os.environ.get(
    "GPUS_BEFORE_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all")
)
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import harness.quiet_tensorflow  # noqa: F401

# isort: split
import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from keras import layers

import slstr_cloud
from model import has_reflectance, split_views
from tools.make_scenes import make_dataset

# TensorFlow is set up once a process: as a deterministic run on up to three virtual replicas.
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3
)

# 100 x 135 pixels hold 3 x 4 = 12 patches of 32; 5 + 2 scenes make 60 + 24 patches.
HEIGHT, WIDTH, PATCH = 100, 135, 32


def pytest_addoption(parser):
    parser.addoption("--torture", type=int, default=1, help="runs that are killed or disturbed")
    parser.addoption("--torture-seed", type=int, help="in test_faults.py: only this run")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Seven training and two inference scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    make_dataset(folder, train=7, inference=2, height=HEIGHT, width=WIDTH, seed=7)
    return folder


@pytest.fixture(scope="session")
def settings(dataset):
    """A configuration for these scenes; 11 divides neither 60 nor 24."""
    return {
        "train_dir": str(dataset / "one-day"),
        "inference_dir": str(dataset / "ssts"),
        "IMAGE_H": HEIGHT,
        "IMAGE_W": WIDTH,
        "PATCH_SIZE": PATCH,
        "CROP_SIZE": 10,
        "clip_offset": 3,
        "epochs": 2,
        "batch_size": 11,
        "train_split": 0.75,
        # Weights that differ by a rounding at first end 2e-5 apart in losses; at 3e-4, 2e-3 apart.
        "learning_rate": 0.00001,
        "organisation": "tests",
        "platform": "pytest",
        "name": "Ada Lovelace",
        "email": "ada@example.org",
        "report": False,  # test_report.py makes them
    }


def build_product(folder, **options):
    """Build a SEN3 product in a process of its own; return its folder and what its pixels are."""
    builder = (
        Path(__file__).with_name("tools") / "sen3_product.py"
    )  # imports netCDF4, a second HDF5
    subprocess.run([sys.executable, builder, folder, json.dumps(options)], check=True, timeout=120)
    (product,) = folder.glob("*.SEN3")
    return product, dict(np.load(product.with_suffix(".npz")))


def start(folder, settings, *arguments):
    """Run the program; return its exit status and the run's folder (None where there is none)."""
    folder.mkdir(exist_ok=True)
    file = folder / "input.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder), "run_name": "run", **settings}))
    status = slstr_cloud.main(["--config", str(file), *arguments])
    run = folder / "run"
    return SimpleNamespace(status=status, folder=run if run.exists() else None)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, settings):
    """A whole run, training and inference: its folder, renames and what was on the screen."""
    with pytest.MonkeyPatch.context() as patch, recorded_renames(patch) as renames:
        screen = io.StringIO()
        with contextlib.redirect_stderr(screen):
            folder = tmp_path_factory.mktemp("finished")
            run = start(folder, {**settings, "keep_probability": True})
    assert run.status == 0, screen.getvalue()
    return SimpleNamespace(folder=run.folder, renames=renames, screen=screen.getvalue())


@pytest.fixture(scope="session")
def finished(finished_run):
    """The folder of a whole run, training and inference."""
    return finished_run.folder


EPOCHS = 3  # of 6 steps and 6 steps of validation


@pytest.fixture(scope="session")
def quick(settings):
    """Settings with which every epoch changes something."""
    return {**settings, "learning_rate": 0.001, "epochs": EPOCHS, "keep_probability": True}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, quick):
    """The folder of a run with these that was never stopped."""
    run = start(tmp_path_factory.mktemp("whole"), quick)
    assert run.status == 0
    return run.folder


def pixel_views(shape):
    """A small network of two views, each of one pixel."""
    inputs = keras.Input(shape)
    visible, thermal = (
        layers.Conv2D(1, 1)(layers.Conv2D(8, 1, activation="relu")(view))
        for view in split_views(inputs)
    )
    visible = keras.ops.where(has_reflectance(inputs), visible, thermal)
    logits = layers.Concatenate()([visible, thermal])
    views = layers.Activation("sigmoid", name="views")(logits)
    return keras.Model(inputs, keras.ops.mean(views, axis=-1, keepdims=True))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path, change=lambda name, values: values, **how):
    """Write a scene anew, its values changed and its datasets stored in another way."""
    with h5py.File(path) as file:
        values = {name: file[name][:] for name in ("refs", "bts", "bayes")}
    with h5py.File(path, "w") as file:
        for name, array in values.items():
            file.create_dataset(name, data=change(name, array), **how)


def damage_chunk(path, name):
    """Damage the first compressed chunk of a dataset: the headers stay good."""
    with h5py.File(path) as file:
        chunk = file[name].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + 2)
        file.write(b"\xff" * 8)


def spoil(path):
    """Make a scene that only reading finds to be bad: its brightness temperatures are damaged."""
    rewrite(path, compression="gzip")
    damage_chunk(path, "bts")


def at_call(monkeypatch, owner, name, number, action):
    """Perform an action before the call of that number, from 1, of a function."""
    function, calls = getattr(owner, name), [0]

    def wrapped(*arguments, **options):
        calls[0] += 1
        if calls[0] == number:
            action()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)


# --- watching what the program does to files


_watchers = []


def _watch(event, arguments):
    for watcher in _watchers if event in ("os.rename", "os.mkdir") else ():
        watcher(event, *map(Path, arguments[: 2 if event == "os.rename" else 1]))


sys.addaudithook(_watch)  # Python tells it of every rename before it happens; it cannot be removed


@contextlib.contextmanager
def watching(watcher):
    """Call watcher('os.rename', source, target) before renames, and ('os.mkdir', folder)."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def at_file(pattern, action, number=1, when=lambda source: True):
    """Perform an action before a file or folder gets its final name: everything is written then.

    Args:
        pattern: Of the final path, as of `Path.match`.
        action: Function without arguments; what it raises, the renaming raises.
        number: Which of those renames, from 1.
        when: Function of the temporary path: whether the rename counts.
    """
    count = 0

    def watcher(event, source, target=None):
        nonlocal count
        if event == "os.rename" and target.match(pattern) and when(source):
            count += 1
            if count == number:
                action()

    return watching(watcher)


def epochs_in(source):
    """How many epochs the results.json at a path has."""
    return (json.loads(source.read_text()).get("training") or {}).get("epochs_run")


@contextlib.contextmanager
def recorded_renames(patch):
    """Record every rename: its target, and the files that were not on the disk by then.

    Yields:
        List of (target, [files of the source that were written after their last fsync]).
    """
    renames, synced = [], {}

    def state(found):
        return found.st_ino, (found.st_size, found.st_mtime_ns)

    def fsync(descriptor, call=os.fsync):
        call(descriptor)
        synced.update([state(os.stat(descriptor))])

    def watcher(event, source, target=None):
        if event == "os.rename":
            files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
            states = {file: state(file.stat()) for file in files}
            late = [file.name for file, (inode, now) in states.items() if synced.get(inode) != now]
            renames.append((target, late))

    patch.setattr(os, "fsync", fsync)
    with watching(watcher):
        yield renames
