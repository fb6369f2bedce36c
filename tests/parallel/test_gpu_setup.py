import os
import re

import pytest

from harness.parallel.gpu_setup import driver_version, has_nvidia_gpu, why_no_gpu

CUDA = {"is_cuda_build": True, "cuda_version": "12.5.1", "cudnn_version": "9"}
VERSION = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U16)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
DRIVER = {"proc/driver/nvidia/version": VERSION.format("550.54.15")}
CARD = {**DRIVER, "dev/nvidia0": "", "dev/nvidiactl": ""}
PCI = "sys/bus/pci/devices/0000:65:00.0/"


def why(tmp_path, files, build=CUDA, missing=(), **environ):
    """The reason on a machine with these files, on which some libraries cannot be loaded."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return why_no_gpu(build, tmp_path, environ, lambda name: name not in missing)


@pytest.mark.parametrize(
    ("files", "options", "reason"),
    [
        (CARD, {"build": {"is_cuda_build": False}}, r"built without CUDA.*tensorflow\[and-cuda\]"),
        (CARD, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is '', which hides.*Unset"),
        (CARD, {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES is '-1', which hides"),
        (
            CARD | {"proc/driver/nvidia/version": VERSION.format("525.9")},
            {},
            r"CUDA 12\.5\.1 needs the NVIDIA driver 525\.60\.13 or later, found 525\.9\. Update",
        ),
        (DRIVER, {"missing": ["libcuda.so.1"]}, "libcuda.so.1 cannot be loaded.*--gpus all"),
        (
            CARD,
            {"missing": ["libcudart.so.12", "libcudnn.so.9"], "CUDA_VISIBLE_DEVICES": "0,1"},
            r"CUDA libraries libcudart.so.12, libcudnn.so.9 are missing\. Install them",
        ),
        ({"dev/dxg": ""}, {"missing": ["libcublas.so.12"]}, "libraries libcublas.so.12 are"),
        (CARD, {"CUDA_VISIBLE_DEVICES": "GPU-8a5b"}, "the reason is unknown. --verbose shows"),
        ({PCI + "vendor": "0x10de\n", PCI + "class": "0x030200\n"}, {}, "no driver for it"),
        ({"dev/kfd": ""}, {}, "AMD GPU, but this TensorFlow is built for NVIDIA"),
    ],
)
def test_reason_for_an_unused_gpu_is_one_line(tmp_path, files, options, reason):
    found = why(tmp_path, files, **options)
    assert re.search(reason, found) and found.isprintable() and found.endswith(".")


def test_forbidden_device_is_named(tmp_path, monkeypatch):
    def forbid(path, flags, call=os.open):
        if str(path).startswith(str(tmp_path / "dev/nvidia")):
            raise PermissionError(13, "Permission denied", path)
        return call(path, flags)

    monkeypatch.setattr(os, "open", forbid)
    assert f"may not open {tmp_path}/dev/nvidia0. Request GPUs" in why(tmp_path, CARD)


@pytest.mark.parametrize(
    ("files", "build"),
    [
        ({"dev/nvidiactl": ""}, CUDA),  # a node without GPUs may have this file
        ({PCI + "vendor": "0x10de\n", PCI + "class": "0x020000\n"}, CUDA),  # a network card
        ({"dev/kfd": ""}, {"is_rocm_build": True}),
    ],
)
def test_machine_without_unused_gpu_needs_no_reason(tmp_path, files, build):
    assert why(tmp_path, files, build) is None
    assert not has_nvidia_gpu(tmp_path)


def test_driver_version_of_both_kernel_modules_is_read(tmp_path):
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(VERSION.format("560.35.03"))
    assert driver_version(tmp_path) == "560.35.03"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    assert driver_version(tmp_path) == "535.183.01"
    assert driver_version(tmp_path / "dev") is None
