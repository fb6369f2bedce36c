"""Why TensorFlow uses no GPU on a machine that has one; TensorFlow itself falls back silently."""

import contextlib
import ctypes
import os
import re
from pathlib import Path

# Oldest driver for each major version of CUDA: NVIDIA's "CUDA Toolkit Release Notes", the table of
# minor version compatibility.
OLDEST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
INSTALL = 'Install them: pip install "tensorflow[and-cuda]"'


def has_nvidia_gpu(root=Path("/")):
    """Whether this machine has NVIDIA GPUs with a driver, as far as the system shows them.

    Args:
        root: Folder of the file system.
    """
    return bool(_device_files(root)) or (root / "proc/driver/nvidia/version").exists()


def why_no_gpu(build, root=Path("/"), environ=os.environ, can_load=None):
    """Find out why TensorFlow lists no GPU on a machine that has one.

    Args:
        build: Dictionary of tf.sysconfig.get_build_info().
        root: Folder of the file system.
        environ: Environment variables.
        can_load: Function of the name of a shared library: whether it can be loaded; None for
            TensorFlow's own folders and the system.

    Returns:
        One line: what was expected, what was found, what to do. None on a machine without a GPU.
    """
    if not has_nvidia_gpu(root):
        if _has_pci_gpu(root):
            return (
                "This machine has an NVIDIA GPU, but no driver for it is visible. Install or load "
                "the driver; start a container with GPUs: apptainer --nv, docker --gpus all."
            )
        if (root / "dev/kfd").exists() and not build.get("is_rocm_build"):
            return (
                "This machine has an AMD GPU, but this TensorFlow is built for NVIDIA GPUs and "
                "runs on the CPU. Install tensorflow-rocm."
            )
        return None
    cause = _cause(build, root, environ, can_load or _can_load)
    return f"TensorFlow uses no GPU, although this machine has one: {cause}."


def _cause(build, root, environ, can_load):
    if not build.get("is_cuda_build"):
        return f"it is built without CUDA. {INSTALL}"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible):
        return (
            f"CUDA_VISIBLE_DEVICES is '{visible}', which hides all GPUs. Unset it, or request GPUs "
            "from the scheduler"
        )
    for path in _device_files(root):
        try:
            os.close(os.open(path, os.O_RDWR))
        except PermissionError:
            return (
                f"this user may not open {path}. Request GPUs from the scheduler, or ask the "
                "administrator for access"
            )
        except OSError:  # what else is wrong shows below
            continue
    cuda = build["cuda_version"].partition(".")[0]
    driver, oldest = driver_version(root), OLDEST_DRIVER.get(cuda)
    if driver and oldest and _numbers(driver) < _numbers(oldest):
        return (
            f"its CUDA {build['cuda_version']} needs the NVIDIA driver {oldest} or later, found "
            f"{driver}. Update the driver, or install a TensorFlow for an older CUDA"
        )
    if not can_load("libcuda.so.1"):
        return (
            "the driver's library libcuda.so.1 cannot be loaded. In a container, start it with "
            "GPUs: apptainer --nv, docker --gpus all"
        )
    names = {"libcudart": cuda, "libcublas": cuda, "libcudnn": build["cudnn_version"]}
    missing = [n for name, version in names.items() if not can_load(n := f"{name}.so.{version}")]
    if missing:
        return f"the CUDA libraries {', '.join(missing)} are missing. {INSTALL}"
    return "the reason is unknown. --verbose shows TensorFlow's messages; see nvidia-smi too"


def driver_version(root=Path("/")):
    """Version of the NVIDIA driver, '560.35.03'; None if the system does not show it."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"NVRM version:.*?\s(\d+\.[\d.]+)\s", text)
    return found and found[1]


def _has_pci_gpu(root):
    """Whether the PCI bus has a GPU by NVIDIA."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):  # NVIDIA; display controllers
                return True
    return False


def _device_files(root):
    """The files through which programs reach NVIDIA GPUs; on WSL there is one for all GPUs."""
    return [*sorted((root / "dev").glob("nvidia[0-9]*")), *(root / "dev").glob("dxg")]


def _numbers(version):
    return [int(number) for number in version.split(".")]


def _can_load(name):
    import tensorflow as tf

    packages = Path(tf.__file__).parents[1] / "nvidia"  # of pip install tensorflow[and-cuda]
    if any(packages.glob(f"*/lib/{name}")):
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
