import csv
import io
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import results, rows, start

from harness import REPOSITORY
from harness.records import sampling
from harness.records.results import sampling_results


def read(path):
    return [{k: float(v) if v else None for k, v in row.items()} for row in rows(path)]


def test_samples_tell_of_processor_memory_and_reading(tmp_path):
    data = tmp_path / "data"
    data.write_bytes(bytes(8_000_000))
    sampler = sampling.Sampler(tmp_path / "samples.csv", interval=0.1)
    block = bytearray(60_000_000)  # held to the end
    end = time.process_time() + 0.5
    while time.process_time() < end:
        data.read_bytes()
    sampler.close()
    found, totals = read(tmp_path / "samples.csv"), sampler.totals()
    assert len(found) >= 4
    assert [row["time"] for row in found] == sorted(row["time"] for row in found)
    assert abs(found[-1]["time"] - time.time()) < 60
    assert max(row["cpu_percent"] for row in found) > 20
    assert max(row["memory"] for row in found) - found[0]["memory"] < 200e6
    assert totals["peak_memory"] == max(row["memory"] for row in found) > len(block)
    assert 0.5 <= totals["cpu_seconds"] < 60
    assert totals["read_bytes"] >= 8_000_000
    times = [row["time"] for row in found]
    spans = [b - a for a, b in zip(times, times[1:], strict=False)]
    read_later = sum(row["read_rate"] * s for row, s in zip(found[1:], spans, strict=True))
    assert read_later <= totals["read_bytes"] * 1.01
    assert max(row["read_rate"] for row in found) > max(row["write_rate"] for row in found)
    assert 0 < totals["sampling_cpu_seconds"] < totals["cpu_seconds"]


def test_rows_follow_those_of_an_earlier_part_without_its_torn_one(tmp_path):
    path = tmp_path / "samples.csv"
    sampling.Sampler(path).close()
    whole = path.read_text()
    path.write_text(whole + "17955,3")
    sampling.Sampler(path).close()
    assert path.read_text().startswith(whole) and len(rows(path)) == 2
    assert all(None not in row.values() for row in rows(path))


def test_rows_of_other_devices_are_kept_apart(tmp_path):
    path = tmp_path / "samples.csv"
    path.write_text("time,gpu0_percent\n1,2\n")
    sampling.Sampler(path).close()
    (old,) = tmp_path.glob("samples-until-*.csv")
    assert old.read_text() == "time,gpu0_percent\n1,2\n" and len(rows(path)) == 1


def test_full_disk_ends_the_file_and_not_the_measuring(monkeypatch, caplog):
    disk = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)
    monkeypatch.setattr(sampling, "_continue_table", lambda *arguments: disk)
    sampler = sampling.Sampler("samples.csv", interval=0.05)
    used = time.process_time() + 0.3
    while time.process_time() < used:
        pass
    sampler.close()
    assert sampler.totals()["cpu_seconds"] >= 0.2  # counted in hundredths
    assert sum("Stopped writing samples" in record.message for record in caplog.records) == 1


def zone(folder, name, energy, wraps_at=1000_000_000):
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")


def test_processor_energy_is_that_of_all_packages_over_a_wrap(tmp_path):
    zone(tmp_path / "intel-rapl:0", "package-0", 999_000_000)
    zone(tmp_path / "intel-rapl:1", "package-1", 5_000_000)
    zone(tmp_path / "intel-rapl:0:0", "dram", 1)
    zone(tmp_path / "intel-rapl:2", "psys", 1)  # holds the packages once more
    energy = sampling.CpuEnergy(tmp_path)
    assert energy.joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("2000000")  # 1 J to the top, 2 J after it
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("9000000")  # 4 J
    (tmp_path / "intel-rapl:2" / "energy_uj").write_text("70000000")
    assert energy.joules() == pytest.approx(7.0)
    assert energy.joules() == pytest.approx(7.0)


def test_energy_that_cannot_be_read_is_none(tmp_path):
    assert sampling.CpuEnergy(tmp_path).joules() is None
    zone(tmp_path / "intel-rapl:0", "package-0", "secret")
    assert sampling.CpuEnergy(tmp_path).joules() is None


class FakeNvml:
    """NVML with two GPUs; the second, older one counts no energy."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, i):
        return i

    def nvmlDeviceGetUUID(self, handle):
        return ("GPU-aa11", "GPU-bb22")[handle]

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=10 + handle)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=1000 + handle)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 250_500

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle == 1:
            raise self.NVMLError("Not Supported")
        self.millijoules = getattr(self, "millijoules", 5000) + 2000
        return self.millijoules


@pytest.mark.parametrize(
    ("visible", "numbers", "handles"),
    [(None, (0, 1), [0, 1]), ("1", (0,), [1]), ("GPU-bb,GPU-aa", (0, 1), [1, 0])],
)
def test_gpus_are_those_that_cuda_shows(monkeypatch, visible, numbers, handles):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    gpus = sampling.open_gpus(numbers, environ)
    assert [gpu.values() for gpu in gpus] == [(10 + h, 1000 + h, 250.5) for h in handles]


def test_gpus_have_columns_and_energy_of_all_or_none(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    sampler = sampling.Sampler(tmp_path / "one.csv", gpus=(0,))
    sampler.close()
    (row,) = read(tmp_path / "one.csv")
    assert (row["gpu0_percent"], row["gpu0_memory"], row["gpu0_watts"]) == (10, 1000, 250.5)
    assert sampler.totals()["gpu_energy_joules"] == pytest.approx(2.0)  # 2000 mJ between two looks
    sampler = sampling.Sampler(tmp_path / "two.csv", gpus=(0, 1))
    sampler.close()
    assert sampler.totals()["gpu_energy_joules"] is None


def test_totals_of_ranks_add_up_and_nothing_is_guessed():
    one = {"cpu_seconds": 2.0, "peak_memory": 7, "cpu_energy_joules": 3.0, "gpu_energy_joules": 0.0}
    two = {**one, "peak_memory": 9, "cpu_energy_joules": 0.0, "gpu_energy_joules": 5.0}
    both = sampling_results([one, two])
    assert (both["cpu_seconds"], both["peak_memory"], both["energy_joules"]) == (4.0, 9, 8.0)
    unknown = sampling_results([one, {**two, "cpu_energy_joules": None}])
    assert unknown["energy_joules"] is None and unknown["gpu_energy_joules"] == 5.0
    assert sampling_results([one, None]) is None  # a part that was killed
    without_gpu = sampling_results([one, one])
    assert without_gpu["gpu_energy_joules"] is None and without_gpu["energy_joules"] == 6.0


def test_run_leaves_samples_and_totals(finished):
    found, told = read(finished / "samples.csv"), results(finished)["sampling"]
    # The memory before the first row counts too.
    assert found and told["peak_memory"] >= max(row["memory"] for row in found)
    assert told["cpu_seconds"] > 0 and told["read_bytes"] > 1_000_000
    assert results(finished)["parts"][0]["sampling"]["read_bytes"] == told["read_bytes"]
    assert told["gpu_energy_joules"] is None


def test_epochs_tell_how_long_they_waited_for_batches(finished):
    training = results(finished)["training"]
    for waited, whole in zip(
        training["input_seconds_per_epoch"], training["train_seconds_per_epoch"], strict=True
    ):
        assert 0 < waited < whole


@pytest.mark.slow
def test_run_needs_no_package_of_what_is_off(settings, tmp_path):
    """Keras imports some of them where they are installed: here they cannot be."""
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({**settings, "output_dir": str(tmp_path), "epochs": 1, "sampling": False})
    )
    code = (
        "import sys\n"
        "for name in ('pynvml', 'matplotlib', 'jinja2', 'tensorboard', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import slstr_cloud\n"
        f"assert slstr_cloud.main(['--config', {str(tmp_path / 'c.yaml')!r}]) == 0\n"
        "assert 'harness.records.sampling' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_sampling_can_be_turned_off(settings, tmp_path):
    run = start(tmp_path, {**settings, "epochs": 1, "sampling": False}, "--mode", "train")
    assert run.status == 0 and not (run.folder / "samples.csv").exists()
    assert results(run.folder)["sampling"] is None


def test_csv_is_read_by_others(finished):
    with (finished / "samples.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == sampling.COLUMNS
