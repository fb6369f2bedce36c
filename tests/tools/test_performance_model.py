import json
import re
from types import SimpleNamespace

import pytest

import performance_model
from harness import REPOSITORY
from performance_model import Machine, stage_rates, throughput

# 0.2 x 322,000 GFLOP/s / 64.4 GFLOP = 1000 patches/s.
MACHINE = Machine(tflops=322, pcie=10, nvlink=78, infiniband=156, cores=4)
HOST = SimpleNamespace(
    cold_ms=2, cached_ms=0.5, patch_mb=1.25, two_threads=2, gpu_share=0.2, link_share=0.5,
    hop_us=100, node_read=5.2224, total_read=2 * 5.2224, batch=1.6,
)  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "gpus", "cached", "rates"),
    [
        # 4 cores / 2 ms; 0.5 x 10 GB/s / 1.25 MB; 5.2224 GB/s / (76,800 pixels x 68 bytes).
        (1, 1, False, {"decoding": 2000, "copying": 4000, "GPU": 1000, "reading": 1000}),
        (1, 1, True, {"decoding": 8000, "copying": 4000, "GPU": 1000}),
        # 2 x 1/2 x 7.8 MB / 39 GB/s = 0.2 ms, and 2 hops of 0.1 ms: 2 x 1.6 patches in 0.4 ms.
        (1, 2, True, {"decoding": 16000, "copying": 8000, "GPU": 2000, "network": 8000}),
        # 2 x 3/4 x 7.8 MB / 39 GB/s = 0.3 ms, and 4 hops: 4 x 1.6 patches in 0.7 ms. Of the file
        # system, which gives no more than two nodes can read, 2000.
        (4, 1, False, {"decoding": 8000, "copying": 16000, "GPU": 4000, "reading": 2000,
                       "network": 6.4 / 0.0007}),
    ],
)  # fmt: skip
def test_rates_of_stages_are_those_by_hand(nodes, gpus, cached, rates):
    assert stage_rates(MACHINE, nodes, gpus, cached, HOST) == pytest.approx(rates)


def test_threads_are_slowed_down_as_two_of_them_show():
    host = SimpleNamespace(**{**vars(HOST), "two_threads": 1.6})
    # A quarter is serial, 1 / (1/4 + 3/4 / 2) = 1.6; four threads: 1 / (1/4 + 3/16) = 16/7.
    assert stage_rates(MACHINE, 1, 1, False, host)["decoding"] == pytest.approx(500 * 16 / 7)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"decoding": 3000, "copying": 4000, "GPU": 2000, "network": 8000}, (1600, "GPU")),
        ({"decoding": 3000, "copying": 4000, "GPU": 8000, "network": 2000}, (1600, "network")),
        ({"decoding": 1500, "copying": 4000, "GPU": 2000, "network": 8000}, (1500, "decoding")),
        ({"decoding": 3000, "copying": 4000, "GPU": 1000, "reading": 900}, (900, "reading")),
    ],
)
def test_throughput_is_that_of_the_slowest_stage(rates, expected):
    assert throughput(rates) == (pytest.approx(expected[0]), expected[1])


def test_table_from_rows_of_the_bench(tmp_path, capsys):
    values = {"files/half": 10, "memory/half": 0.1}
    rows = [{"name": f"host/cpu/{name}", "value": n, "ratio": None} for name, n in values.items()]
    rows += [{"name": "host/bytes/half", "value": 1.25, "ratio": 1.95}]
    rows += [{"name": "host/threads/2", "value": 1234, "ratio": 2}]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(rows))
    assert performance_model.main([str(file), "--nodes", "1", "--node-read", "5.2224"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("1 x 1 GPU"))
    # V100: 0.2 x 125,000 / 64.4, less than its 5 cores decode in 10 ms; A100: 0.2 x 312,000 / 64.4,
    # less than the 1000 that a node reads; H100: these, and 0.2 x 989,000 / 64.4.
    assert line.split()[4:] == [
        "388", "GPU", "388", "GPU", "969", "GPU", "969", "GPU", "1000", "reading", "3070", "GPU"
    ]  # fmt: skip


def test_table_in_the_documentation_is_that_of_its_command(capsys):
    page = (REPOSITORY / "docs/performance.md").read_text(encoding="utf-8")
    shown = re.search(r"python tools/performance_model.py (.+)\n```\n\n```text\n([^`]+)```", page)
    assert performance_model.main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]


def test_missing_number_is_named(capsys):
    assert performance_model.main(["--cold-ms", "1"]) == 2
    assert "No row host/cpu/memory/half" in capsys.readouterr().err
