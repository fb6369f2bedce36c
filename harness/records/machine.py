"""The machine that a run uses, as far as the system describes it."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,driver_version",
    "--format=csv,noheader,nounits",
)


def describe_machine(kind):
    """Describe this node.

    Args:
        kind: Devices of the run, 'GPU' or 'CPU'.

    Returns:
        Dictionary with the name of the `processor`; `sockets`, `cores` and `threads` of the node;
        `memory` [bytes]; `operating_system`, `kernel`; and `gpus`, all NVIDIA GPUs of the node with
        `name`, `memory` [bytes] and `driver`. Unknown values are None.
    """
    return {
        **_processor(),
        "threads": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "operating_system": _operating_system(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpus": _gpus() if kind == "GPU" else [],
    }


def _processor():
    """Name, sockets and cores from /proc/cpuinfo, which lacks some on some architectures."""
    text = ""
    with contextlib.suppress(OSError):
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    threads = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        for lines in (block.splitlines() for block in text.split("\n\n"))
    ]
    names = [thread["model name"] for thread in threads if "model name" in thread]
    cores = {
        (thread["physical id"], thread["core id"]) for thread in threads if "core id" in thread
    }
    return {
        "processor": names[0] if names else None,
        "sockets": len({socket for socket, _ in cores}) or None,
        "cores": len(cores) or None,
    }


def _operating_system():
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return None


def _gpus():
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(SMI, capture_output=True, text=True, timeout=30, check=True)
        rows = [line.split(", ") for line in answer.stdout.splitlines()]
        return [
            {"name": name, "memory": int(mebibytes) << 20, "driver": driver}
            for name, mebibytes, driver in rows
        ]
    return None
