import os
import stat

from harness.records import machine

# Two sockets of two cores with two threads each, in the kernel's format.
CPUINFO = "".join(
    f"processor\t: {n}\nmodel name\t: AMD EPYC 7763\nphysical id\t: {n % 2}\n"
    f"core id\t\t: {n // 2 % 2}\n\n"
    for n in range(8)
)
# What a program of that name prints for SMI on two GPUs of a driver.
TWO_GPUS = "NVIDIA A100-SXM4-40GB, 40960, 535.104.05\nNVIDIA A100-SXM4-40GB, 40960, 535.104.05\n"


def nvidia_smi(tmp_path, monkeypatch, script):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_this_machine_is_described():
    found = machine.describe_machine("CPU")
    assert found["threads"] == os.cpu_count() and found["memory"] > 1e9
    assert found["gpus"] == [] and found["kernel"].startswith("Linux")


def test_sockets_and_cores_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = machine.describe_machine("CPU")
    assert (found["processor"], found["sockets"], found["cores"]) == ("AMD EPYC 7763", 2, 4)


def test_what_the_system_does_not_tell_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    for content in (None, "processor\t: 0\nBogoMIPS\t: 50.00\n"):  # as on an ARM
        if content:
            (tmp_path / "cpuinfo").write_text(content)
        found = machine.describe_machine("CPU")
        assert (found["processor"], found["sockets"], found["cores"]) == (None, None, None)


def test_gpus_are_listed(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, f"cat <<EOF\n{TWO_GPUS}EOF")
    gpu = {"name": "NVIDIA A100-SXM4-40GB", "memory": 40960 * 2**20, "driver": "535.104.05"}
    assert machine.describe_machine("GPU")["gpus"] == [gpu, gpu]


def test_gpus_that_cannot_be_listed_are_none(tmp_path, monkeypatch):
    for script in ("exit 9", "echo 'NVIDIA A100, [N/A], 535'", "echo No devices were found"):
        nvidia_smi(tmp_path, monkeypatch, script)
        assert machine.describe_machine("GPU")["gpus"] is None
