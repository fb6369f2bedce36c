import importlib.util
import json
from dataclasses import fields

import pytest

from model import unet
from tools import bench

KEYS = [field.name for field in fields(bench.Row)]


def run(tmp_path, *arguments):
    """Run the program on scenes of 96 x 96; return its status and its rows by name."""
    output = tmp_path / "bench.json"
    status = bench.main(
        ["--quick", "--size", "96", "96", "--patch", "32", "-o", str(output), *arguments]
    )
    rows = json.loads(output.read_text()) if output.exists() else []
    assert all(list(row) == KEYS for row in rows)
    return status, {row["name"]: row for row in rows}


def test_operations_of_the_network_are_those_of_an_independent_count():
    # Multiply-adds a pixel of full resolution: rows, columns, inputs and outputs of each kernel
    # over the pixels that share one of its results. 1 / 4 / 16 / 64 for the four stages.
    down = 9 * (9 * 32 + 32 * 32) + 9 * (32 * 64 + 64 * 64) / 4 + 9 * (64 * 128 + 128 * 128) / 16
    bottom = 9 * (128 * 256 + 256 * 256) / 64
    up = 9 * (384 * 128 + 128 * 128) / 16 + 9 * (192 * 64 + 64 * 64) / 4
    last = 9 * (96 * 32 + 32 * 32) + 32
    pixel = down + bottom + up + last
    assert pixel == 163_904
    assert bench.forward_gflop(1200, 1504) == pytest.approx(2e-9 * pixel * 1200 * 1504)
    assert bench.forward_gflop(1200, 1504) == pytest.approx(592, abs=0.5)
    assert 3 * bench.forward_gflop(256, 256) == pytest.approx(64.4, abs=0.05)
    assert 63 * bench.forward_gflop(256, 256) == pytest.approx(1353, abs=0.5)


def test_operations_follow_the_model(monkeypatch):
    monkeypatch.setattr(bench, "unet", lambda shape: unet((*shape[:2], 1)))
    # One input channel instead of nine: 8 x 9 x 32 multiply-adds a pixel less.
    assert bench.forward_gflop(8, 8) == pytest.approx(2e-9 * 64 * (163_904 - 8 * 9 * 32))


def test_alternate_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    assert bench.alternate(functions, 2) == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}
    assert "".join(calls) == "abcabc"


def test_alternate_stops_in_time_but_not_before_the_first_round():
    assert bench.alternate({"a": lambda: 1, "b": lambda: 2}, 5, seconds=0) == {"a": [1], "b": [2]}


@pytest.mark.parametrize(("unit", "ratio"), [("patches/s", 2.0), ("s/scene", 0.5), ("GB", 0.5)])
def test_ratio_is_how_many_times_better(unit, ratio):
    row = bench.make_row("ours", unit, [4.0, 40.0, 3.0], "theirs", [1.0, 2.0, 30.0], 0.9)
    assert (row.value, row.min, row.max) == (4.0, 3.0, 40.0)
    assert (row.baseline, row.baseline_value, row.ratio) == ("theirs", 2.0, ratio)
    assert row.limit_share == 0.9


def test_what_could_not_be_measured_is_null():
    row = bench.make_row("ours", "s", [], "theirs", [1.0])
    assert [getattr(row, name) for name in KEYS] == ["ours", "s", *[None] * 7]
    assert "-" in bench.text_table([row])


def test_table_is_readable_at_100_columns():
    rows = [
        bench.make_row(f"torch/infer_patches/{p}/compile", "patches/s", [v, 2 * v], b, [v], 0.5)
        for p in ("float32", "bfloat16")
        for v in (1e-4, 0.123456, 99.96, 12345.6)
        for b in ("torch.compile", "infer_patches/float32/network")
    ]
    lines = bench.text_table(rows).splitlines()
    assert len(lines) == len(rows) + 1
    assert max(map(len, lines)) <= 100
    assert {len(line.split()) for line in lines[1:]} == {9}  # no column runs into another


def test_numbers_show_three_digits():
    assert [bench.number(v) for v in (1234.5, 99.96, 1.5, 0.01234, 0.0)] == [
        "1234", "100.0", "1.50", "0.0123", "0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "only", "wanted"),
    [
        ("train_step/float32", ["train_step"], True),
        ("train_step", ["train_step/float32"], True),  # holds it
        ("train_step/bfloat16", ["train_step/float32"], False),
        ("train_epoch/bfloat16", ["train_step", "train"], True),
        ("gemm/float32", [], True),
    ],
)
def test_only_selects_by_prefix(name, only, wanted):
    assert bench.is_wanted(name, only) is wanted


def test_loader_is_compared_with_h5py_and_the_textbook_pipeline(tmp_path):
    status, rows = run(tmp_path, "--only", "raw_read", "load")
    assert status == 0
    ours = rows["loader/contiguous/1 thread"]
    assert ours["baseline"] == "loader_naive"
    assert ours["baseline_value"] == rows["loader_naive"]["value"]
    assert ours["ratio"] == pytest.approx(ours["value"] / ours["baseline_value"])
    assert ours["limit_share"] == pytest.approx(ours["value"] / rows["raw_read"]["value"])
    assert {"raw_read/gzip", "raw_read/cold"} <= set(rows)
    assert any(name.startswith("loader/gzip/") for name in rows)


def test_training_states_its_share_of_the_matrix_product(tmp_path, capsys):
    status, rows = run(tmp_path, "--only", "train_step/float32", "strategy", "gemm")
    assert status == 0
    assert set(rows) == {"gemm/float32", "gemm/bfloat16", "train_step/float32", "strategy_overhead"}
    # 3 passes of 2 x 163,904 operations a pixel of 32 x 32
    gflop = 3 * 2e-9 * 163_904 * 32 * 32
    step, limit = rows["train_step/float32"], rows["gemm/float32"]
    assert limit["min"] <= step["value"] * gflop / step["limit_share"] <= limit["max"]
    table = capsys.readouterr().out
    assert "tensorflow 2." in table and "commit" in table
    assert table.index("gemm/float32") < table.index("train_step/float32")


def test_epoch_states_how_long_it_waits(tmp_path):
    status, rows = run(tmp_path, "--only", "input_stall", "train_epoch", "time_to")
    assert status == 0
    assert set(rows) == {"time_to_first_batch", "train_epoch/bfloat16", "input_stall"}
    assert 0 <= rows["input_stall"]["value"] <= 1


def test_inference_is_measured_by_the_program_itself(tmp_path):
    status, rows = run(tmp_path, "--only", "infer_patches", "overhead/patches")
    assert status == 0
    name = "infer_patches/float32"
    parts = {f"{name}/{part}" for part in ("read", "network", "stitch", "score", "write")}
    assert set(rows) == {name, *parts, "overhead/patches/float32"}
    assert rows[name]["value"] > rows[f"{name}/network"]["value"] > 0
    assert rows[name]["limit_share"] < rows[f"{name}/network"]["limit_share"]


@pytest.mark.slow
def test_peak_memory_is_that_of_the_program_alone(tmp_path):
    status, rows = run(tmp_path, "--only", "peak_rss")
    assert status == 0
    few, many = rows["peak_rss/32 scenes"], rows["peak_rss/128 scenes"]
    assert 0.1 < few["value"] < 2
    assert many["baseline"] == "peak_rss/32 scenes"


def test_unknown_name_is_one_clear_error(tmp_path, capsys):
    status, rows = run(tmp_path, "--only", "trainstep")
    assert (status, rows) == (2, {})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "trainstep" in lines[0] and "train_step" in lines[0]


def test_missing_pytorch_says_what_to_type(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, "--against", "torch") == (2, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert "-m pip install torch" in line


def test_failed_measurement_leaves_the_others(tmp_path, monkeypatch, capsys):
    def fail(bench):
        """Fails."""
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench, "SUBJECTS", {fail: ("loader",), bench.measure_gemm: ("gemm",)})
    status, rows = run(tmp_path)
    assert status == 1
    assert set(rows) >= {"gemm/float32"}
    assert "out of luck" in capsys.readouterr().err


def test_interrupt_shows_what_there_is(tmp_path, monkeypatch, capsys):
    def interrupt(bench):
        """Stops."""
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "SUBJECTS", {bench.measure_gemm: ("gemm",), interrupt: ("loader",)})
    status, rows = run(tmp_path)
    assert status == 130
    assert "gemm/float32" in rows
    assert "gemm/float32" in capsys.readouterr().out


def test_pytorch_does_the_same_work(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not among the requirements")
    status, rows = run(tmp_path, "--only", "torch/infer_scene", "torch/train_step/float32")
    assert status == 0
    assert rows["torch/infer_scene/float32/eager"]["baseline"] == "torch"
    assert rows["torch/train_step/float32/eager"]["ratio"] > 0
