"""A network that is no U-Net through every part of the benchmark.

What can be tested with less is tested with every network: tests/test_model.py, tests/networks,
tests/training, tests/inference and the export.
"""

import os
import signal

import pytest
from conftest import at_file, epochs_in, results, start

import slstr_cloud


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_views"])  # has the most kinds of layers
def test_network_is_trained_resumed_and_masks_scenes(name, settings, tmp_path):
    """On two replicas in bfloat16, stopped by a signal after an epoch; then scenes in one pass."""
    changed = {
        **settings, "network": name, "inference_mode": "scene", "precision": "bfloat16",
        "cpu_devices": 2, "gpu": 0, "batch_size": 32,
    }  # fmt: skip
    with at_file(
        "run/results.json",
        lambda: os.kill(os.getpid(), signal.SIGTERM),
        when=lambda path: epochs_in(path) == 1,
    ):
        run = start(tmp_path, changed)
    assert run.status == 143 and results(run.folder)["training"]["epochs_run"] == 1
    assert slstr_cloud.main(["--resume", str(run.folder)]) == 0
    found = results(run.folder)
    assert found["network"]["name"] == name and found["devices"]["replicas"] == 2
    assert found["training"]["epochs_run"] == 2 and found["resumed"] == 1
    assert found["inference"]["scenes"] == found["inference"]["windows"] + 1 == 2
