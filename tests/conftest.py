"""Scenes for the tests, and runs of the program on them."""

import csv
import json
import os
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # what a test says must not depend on the machine

import harness.quiet_tensorflow  # noqa: F401

# isort: split
import h5py
import pytest
import tensorflow as tf
import yaml

import slstr_cloud
from tools.make_scenes import make_dataset

# TensorFlow is set up once a process: as a deterministic run on up to three virtual replicas.
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3
)

# 100 x 135 pixels hold 3 x 4 = 12 patches of 32; 5 + 2 scenes make 60 + 24 patches.
HEIGHT, WIDTH, PATCH = 100, 135, 32


def pytest_addoption(parser):
    parser.addoption("--torture", type=int, default=1, help="runs that test_kill.py kills")


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
        "report": False,  # test_report.py makes them
    }


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
def finished(tmp_path_factory, settings):
    """The folder of a whole run, training and inference."""
    run = start(tmp_path_factory.mktemp("finished"), {**settings, "keep_probability": True})
    assert run.status == 0
    return run.folder


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


def spoil(path):
    """Damage a compressed chunk: the headers stay good."""
    rewrite(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["bts"].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + 2)
        file.write(b"\xff" * 8)


def at_call(monkeypatch, owner, name, number, action):
    """Let an action precede the call of that number, from 1, of a function."""
    function, calls = getattr(owner, name), [0]

    def wrapped(*arguments, **options):
        calls[0] += 1
        if calls[0] == number:
            action()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)
