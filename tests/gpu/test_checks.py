"""The checks for GPUs, on virtual CPUs: each passes where it should, and can fail."""

import re

import checks
import numpy as np
import pytest
import tensorflow as tf
import test_gpu

from data_loader import find_scenes
from harness.build import open_devices
from harness.config import Config
from harness.parallel.rendezvous import SingleRank

BUILD = {
    "cuda_version": "12.5.1",
    "cudnn_version": "9",
    "cuda_compute_capabilities": ["sm_60", "sm_80", "compute_90"],
}
V100 = {"device_name": "Tesla V100", "compute_capability": (7, 0)}
K80 = {"device_name": "Tesla K80", "compute_capability": (3, 7)}


@pytest.fixture(scope="module")
def two_cpus(settings):
    """Config, Devices with two virtual CPUs, and scenes."""
    config = Config.model_validate(
        settings | {"network": "pixel", "cpu_devices": 2, "batch_size": 6, "clip_offset": 0}
    )
    return config, open_devices(config, SingleRank()), find_scenes(config.train_dir)


def test_table_of_checks_is_that_of_the_tests():
    assert list(checks.CHECKS) == list(test_gpu.CHECKS)


@pytest.mark.parametrize(
    ("gpu", "driver", "cudnn", "reason"),
    [
        (V100, "550.54.15", "9.3.0", None),
        (V100, None, None, None),  # unknown
        (V100, "470.82", "9.3.0", "The driver is 470.82, CUDA 12.5.1 needs 525"),
        (V100, "550.54.15", "8.9.2", "cuDNN is 8.9.2, TensorFlow needs 9"),
        (K80, "550.54.15", "9.3.0", "Tesla K80 is older"),
    ],
)
def test_versions_are_compared(gpu, driver, cudnn, reason):
    if reason is None:
        assert checks.check_versions(BUILD, [gpu], driver, cudnn)["gpus"] == [gpu]
        return
    with pytest.raises(checks.Failed, match=reason) as error:
        checks.check_versions(BUILD, [gpu], driver, cudnn)
    assert error.value.facts["driver"] == driver  # the report has the facts all the same


def test_precisions_are_compared_with_float32_on_the_cpu(two_cpus, monkeypatch):
    config, devices, paths = two_cpus
    monkeypatch.setitem(checks.TOLERANCES, "bfloat16", (1, 1, 1e-6))
    with pytest.raises(checks.Failed) as error:  # of bfloat16 alone
        checks.check_agreement(config, checks.on(devices, "/CPU:1"), devices, paths)
    assert re.search("CPU: bfloat16 gradient [^,]*, allowed 1e-06$", str(error.value))
    gradient = {name: found["gradient"] for name, found in error.value.facts.items()}
    assert gradient["float32"] < 1e-5 < gradient["float16"] < gradient["bfloat16"]


def test_repeated_training_is_compared(two_cpus, monkeypatch):
    config, devices, paths = two_cpus
    assert len(checks.check_repeats(config, devices, paths, 2)["losses"]) == 2
    weights = iter(([np.zeros(3)], [np.array([0, 0, 1e-9])]))
    monkeypatch.setattr(checks, "losses_of", lambda *_, **__: ([0.5], 1.0, [], next(weights)))
    with pytest.raises(checks.Failed, match="Two runs differ: .* 1 weight"):
        checks.check_repeats(config, devices, paths)


@pytest.mark.parametrize("xla", [False, True])
def test_losses_of_other_devices_and_of_xla_are_compared(two_cpus, xla):
    config, devices, paths = two_cpus
    other = config.model_copy(update={"xla": xla})
    found = checks.check_same_losses(
        paths, config, checks.on(devices, "/CPU:0"), other, devices, steps=2
    )
    assert len(found["losses"][0]) == 2 and min(found["seconds_per_step"]) > 0
    ours, others = found["losses"]
    with pytest.raises(checks.Failed, match=r"Losses differ by more than 0\.1%"):
        checks.compare_losses(ours, [others[0], 1.002 * others[1]])


@pytest.mark.parametrize(
    ("waited", "peak", "faults"),
    [
        (0.1, 2.2e9, []),
        (1.0, 2.2e9, ["10.0% of the time waited for batches, allowed 5%"]),
        (0.1, 3e9, ["3e+09 bytes of GPU memory, --mode check said 2.1e+09"]),
    ],
)
def test_runs_are_compared(waited, peak, faults):
    training = {
        "input_seconds_per_epoch": [9.0, waited, waited],  # the first epoch fills the file cache
        "train_seconds_per_epoch": [20.0, 10.0, 10.0],
        "patches_per_second": 99.0,
        "warm_up_seconds": 5.0,
    }
    printed = (
        "devices  1 GPU replica\nmemory   1.2 GB and 2.1 GB of each GPU at the peak of this check\n"
    )
    estimate = checks.estimated_memory(printed)
    results = {"training": training, "peak_gpu_memory": [1e9, peak]}
    facts, found = checks.check_run(results, estimate)
    assert found == faults and facts["share_of_time_waiting_for_batches"] == waited / 10


def test_checks_without_gpus_skip_or_explain(tmp_path, monkeypatch):
    assert checks.report(checks.CHECKS["two_ranks"], tmp_path) == {
        "status": "skipped", "reason": "it needs 2 GPUs, TensorFlow lists 0",
    }  # fmt: skip
    monkeypatch.setattr(checks, "why_no_gpu", lambda build: f"CUDA {build['cuda_version']}")
    found = checks.report(checks.CHECKS["versions"], tmp_path)
    assert found == {"status": "failed",
                     "reason": f"CUDA {tf.sysconfig.get_build_info()['cuda_version']}"}  # fmt: skip


def test_check_that_ends_its_process_is_a_failure(tmp_path):
    found = test_gpu.run("no such check", tmp_path)
    assert found["status"] == "failed" and "KeyError: 'no such check'" in found["reason"]
