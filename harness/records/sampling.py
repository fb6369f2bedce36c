"""What a run uses of its machine, sampled every second: CPU, memory, files, GPUs and energy."""

import contextlib
import csv
import logging
import os
import threading
import time
from pathlib import Path

import psutil

INTERVAL = 1.0  # [s]
POWERCAP = Path("/sys/class/powercap")
COLUMNS = ("time", "cpu_percent", "memory", "read_rate", "write_rate", "cpu_watts")
GPU_COLUMNS = ("percent", "memory", "watts")

log = logging.getLogger(__name__)


class Sampler:
    """A thread that appends a row per second to a CSV file during a run.

    The columns are those of COLUMNS: Unix time [s]; CPU use of this process, 100 is one core; its
    resident memory [bytes]; what it reads and writes [bytes/s], from the cache or the disk; power
    of all processor packages of the node [W]. Each GPU i adds `gpu<i>_percent`, `gpu<i>_memory`
    [bytes] and `gpu<i>_watts`. Values that cannot be measured are empty.

    Args:
        path: CSV file; rows are appended to those of an earlier part of the run.
        gpus: Numbers of the GPUs that this process uses, among those that TensorFlow finds.
        owns_node: Whether this rank counts the energy of the node's processors; one per node does.
        interval: Seconds between rows.
    """

    def __init__(self, path, gpus=(), owns_node=True, interval=INTERVAL):
        self._path, self._interval = path, interval
        self._process, self._cpu = psutil.Process(), CpuEnergy() if owns_node else None
        self._gpus, self._has_gpus = open_gpus(gpus), bool(gpus)
        columns = [
            *COLUMNS,
            *(f"gpu{i}_{name}" for i in range(len(self._gpus)) for name in GPU_COLUMNS),
        ]
        self._file = _continue_table(path, columns)
        self._first = self._last = self._read()
        self._peak, self._thread_seconds = self._first["memory"], 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)
        self._thread.start()

    def close(self):
        """Write the last row and end the thread."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # of a full disk, which has been reported
            self._file.close()

    def totals(self):
        """What was used from the start to the last row; None for what cannot be measured.

        The energy of processors is 0 if another rank of the node counts it.
        """
        taken = {key: _difference(self._last[key], self._first[key]) for key in self._first}
        return {
            "cpu_seconds": taken["cpu_seconds"],
            "peak_memory": self._peak,
            "read_bytes": taken["read_bytes"],
            "written_bytes": taken["written_bytes"],
            "cpu_energy_joules": taken["cpu_joules"] if self._cpu else 0.0,
            "gpu_energy_joules": taken["gpu_joules"] if self._has_gpus else 0.0,
            "sampling_cpu_seconds": self._thread_seconds,  # used by the sampling itself
        }

    def _read(self):
        with self._process.oneshot():
            used, memory = self._process.cpu_times(), self._process.memory_info().rss
        try:
            io = self._process.io_counters()
            read, written = io.read_chars, io.write_chars
        except (AttributeError, OSError, psutil.Error):  # some systems and containers have none
            read = written = None
        joules = [gpu.joules() for gpu in self._gpus]
        return {
            "time": time.perf_counter(),
            "unix": time.time(),
            "cpu_seconds": used.user + used.system,
            "memory": memory,
            "read_bytes": read,
            "written_bytes": written,
            "cpu_joules": self._cpu.joules() if self._cpu else None,
            "gpu_joules": None if None in joules or not joules else sum(joules),
        }

    def _sample(self):
        writer, over = csv.writer(self._file, lineterminator="\n"), False
        while not over:
            over = self._over.wait(self._interval)
            row = self._row()
            try:
                if writer:
                    writer.writerow(row)
                    self._file.flush()
            except OSError as error:
                log.warning("Stopped writing samples of the system to %s: %s", self._path, error)
                writer = None
            self._thread_seconds = time.thread_time()

    def _row(self):
        now, last = self._read(), self._last
        self._last, self._peak = now, max(self._peak, now["memory"])
        seconds = now["time"] - last["time"]

        def rate(key, factor=1.0):
            n = _difference(now[key], last[key])
            return None if n is None else round(factor * n / seconds, 1)

        return [
            round(now["unix"], 3),
            rate("cpu_seconds", 100),
            now["memory"],
            *(rate(key) for key in ("read_bytes", "written_bytes", "cpu_joules")),
            *(value for gpu in self._gpus for value in gpu.values()),
        ]


def open_sampler(path, devices):
    """A Sampler of this rank's process and GPUs and, on one rank per node, of the processors."""
    return Sampler(path, devices.gpu_numbers, devices.is_first_on_node)


class CpuEnergy:
    """Energy counters of the processor packages of this node (Linux powercap, RAPL).

    On most systems only the administrator can read them.

    Args:
        folder: Folder of the powercap counters.
    """

    def __init__(self, folder=POWERCAP):
        self._zones = []
        for zone in sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else ():
            with contextlib.suppress(OSError, ValueError):
                if (zone / "name").read_text().startswith("package"):
                    wraps_at = int((zone / "max_energy_range_uj").read_text())
                    self._zones.append((zone / "energy_uj", wraps_at))
        self._last, self._joules = self._read(), 0.0

    def joules(self):
        """Energy since this object was created [J]; None if it cannot be read."""
        now = self._read()
        if now is None or self._last is None:
            self._last = None
            return None
        for value, last, (_, wraps_at) in zip(now, self._last, self._zones, strict=True):
            self._joules += ((value - last) % wraps_at) / 1e6  # counters start again at 0
        self._last = now
        return self._joules

    def _read(self):
        try:
            return [int(file.read_text()) for file, _ in self._zones] or None
        except (OSError, ValueError):
            return None


class Gpu:
    """One NVIDIA GPU, read through NVML.

    Args:
        nvml: The module pynvml, initialised.
        handle: NVML handle of the GPU.
    """

    def __init__(self, nvml, handle):
        self._nvml, self._handle = nvml, handle

    def values(self):
        """Utilisation [%], used memory [bytes] and power [W], in the order of GPU_COLUMNS."""
        return (
            self._ask(lambda: self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            self._ask(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used),
            self._ask(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000),  # mW
        )

    def joules(self):
        """Energy since the driver was loaded [J]; None on GPUs older than Volta."""
        return self._ask(
            lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000  # mJ
        )

    def _ask(self, question):
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def open_gpus(numbers, environ=os.environ):
    """The GPUs with these numbers among those that CUDA shows to this process; [] without NVML."""
    if not numbers:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        shown = environ.get("CUDA_VISIBLE_DEVICES")
        names = shown.split(",") if shown else [str(i) for i in range(max(numbers) + 1)]
        return [Gpu(pynvml, _gpu_handle(pynvml, names[i].strip())) for i in numbers]
    except (pynvml.NVMLError, ValueError, IndexError) as error:
        log.warning("GPUs are not sampled: %s", error)
        return []


def _gpu_handle(nvml, name):
    """CUDA names GPUs by number or by the beginning of their UUID, 'GPU-8932f937'."""
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    for i in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(i)
        if nvml.nvmlDeviceGetUUID(handle).startswith(name):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(name)  # a part of a GPU (MIG)


def _continue_table(path, columns):
    """Open a CSV file to append rows; an incomplete last row of a killed process is removed."""
    header = ",".join(columns) + "\n"
    if path.exists():
        with path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
        if content.startswith(header.encode()):
            return path.open("a", newline="", encoding="utf-8")
        if b"\n" in content:  # an earlier part of the run had other devices
            path.replace(path.with_name(f"{path.stem}-until-{int(time.time())}.csv"))
    file = path.open("w", newline="", encoding="utf-8")
    file.write(header)
    return file


def _difference(a, b):
    return None if a is None or b is None else a - b
