import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import fields
from statistics import median

import numpy as np
import pytest

from harness import REPOSITORY
from harness.config import load_config
from model import NETWORKS, unet
from tools import bench
from tools.lib.bench import exported, measurements, program, rows

KEYS = [field.name for field in fields(rows.Row)]
QUICK = ["--quick", "--size", "96", "96", "--patch", "32"]

# Multiply-adds per pixel of full resolution: rows, columns, inputs and outputs of each kernel over
# the pixels that share one of its results, 1, 4, 16 and 64 in the four stages.
DOWN = 9 * (9 * 32 + 32 * 32) + 9 * (32 * 64 + 64 * 64) / 4 + 9 * (64 * 128 + 128 * 128) / 16
BOTTOM = 9 * (128 * 256 + 256 * 256) / 64
UP = 9 * (384 * 128 + 128 * 128) / 16 + 9 * (192 * 64 + 64 * 64) / 4
LAST = 9 * (96 * 32 + 32 * 32) + 32
PIXEL = DOWN + BOTTOM + UP + LAST


def run(tmp_path, *arguments):
    """Run the program on scenes of 96 x 96; return its status and its rows by name."""
    output = tmp_path / "bench.json"
    status = bench.main([*QUICK, "-o", str(output), *arguments])
    found = json.loads(output.read_text()) if output.exists() else []
    assert all(list(row) == KEYS for row in found)
    return status, {row["name"]: row for row in found}


LIMITS = []  # of the quick run: arguments and results of limit_share


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The rows of a whole `--quick` run."""
    limit_share = measurements.limit_share

    def recorded(measured, precision, gflop, values, unit):
        share = limit_share(measured, precision, gflop, values, unit)
        LIMITS.append((share, precision, gflop, median(measured[f"gemm/{precision}"])))
        return share

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "limit_share", recorded)
        status, found = run(tmp_path_factory.mktemp("bench"))
    assert status == 0
    return found


@pytest.mark.parametrize(
    ("rows_cols", "channels", "pixel"),
    [
        ((1200, 1504), 9, 163_904),
        ((256, 256), 9, 163_904),
        # One channel instead of nine: 9 x 8 x 32 multiply-adds fewer per pixel.
        ((8, 8), 1, 163_904 - 9 * 8 * 32),
    ],
)
def test_operations_of_the_network_agree_with_a_count_by_hand(rows_cols, channels, pixel):
    assert PIXEL == 163_904
    n_rows, n_cols = rows_cols
    gflop = measurements.network_gflop(unet((n_rows, n_cols, channels)))
    assert gflop == pytest.approx(2e-9 * pixel * n_rows * n_cols)


def test_table_is_printed_and_a_file_written_only_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench.main([*QUICK, "--only", "gemm/float32"]) == 0
    assert "gemm/float32  GFLOP/s" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quick_run_has_all_rows(quick):
    threads = {f"loader/contiguous/{n} thread{'s' * (n > 1)}" for n in thread_counts()}
    most = max(thread_counts())
    assert set(quick) == threads | {
        *(f"host/cpu/{source}/{kind}" for source in ("files", "disk", "memory")
          for kind in ("float32", "half")),
        "host/bytes/float32", "host/bytes/half", "host/threads/1", "host/threads/2",
        "host/python", "host/copy_hidden",
        "gemm/float32", "gemm/bfloat16", "raw_read", "raw_read/gzip", "loader_naive",
        f"loader/gzip/{most} thread{'s' * (most > 1)}", "time_to_first_batch",
        "train_step/float32", "train_step/bfloat16", "strategy_overhead",
        "train_epoch/bfloat16", "input_stall",
        "infer_patches/float32", "infer_patches/float32/network",
        "infer_scene/bfloat16", "infer_scene/bfloat16/network",
        "overhead/patches/float32", "overhead/scene/bfloat16",
    }  # fmt: skip
    assert next(iter(quick)).startswith("gemm/")


def thread_counts():
    most = min(len(os.sched_getaffinity(0)), 16)
    return {n for n in (1, 2, 4, 8) if n < most} | {most}


@pytest.mark.slow
def test_rows_are_consistent(quick):
    for row in quick.values():
        assert row["min"] <= row["value"] <= row["max"]
        if row["baseline"] in quick:
            assert row["baseline_value"] == quick[row["baseline"]]["value"]
        if row["ratio"] is not None:
            ratio = row["value"] / row["baseline_value"]
            expected = ratio if row["unit"].endswith("/s") else 1 / ratio
            assert row["ratio"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("loader/contiguous/1 thread", "loader_naive"),
        ("host/cpu/disk/half", "target"),
        ("host/threads/2", "host/threads/1"),
        ("train_step/bfloat16", "train_step/float32"),
        ("train_epoch/bfloat16", "in memory"),
        ("infer_scene/bfloat16", "infer_patches/float32"),
        ("infer_scene/bfloat16/network", "infer_patches/float32/network"),
        ("train_step/float32", None),
        ("infer_patches/float32", None),
    ],
)
def test_rows_are_compared_with_their_baseline(quick, name, baseline):
    assert quick[name]["baseline"] == baseline


@pytest.mark.parametrize(
    ("name", "gflop"),  # of one unit of the row: a patch or a scene
    [
        # Training takes three passes of 32 x 32 pixels.
        ("train_step/float32", 3 * 2e-9 * PIXEL * 32 * 32),
        ("train_step/bfloat16", 3 * 2e-9 * PIXEL * 32 * 32),
        # Patches of 32 overlap by 10 pixels: stride 22, ceil(96 / 22) = 5 in each direction.
        ("infer_patches/float32", 25 * 2e-9 * PIXEL * 32 * 32),
        ("infer_patches/float32/network", 25 * 2e-9 * PIXEL * 32 * 32),
        # These cover 120 rows, 12 of padding above; a pass has 12 % 8 = 4 above, in all 104 rows.
        ("infer_scene/bfloat16", 2e-9 * PIXEL * 104 * 104),
        ("infer_scene/bfloat16/network", 2e-9 * PIXEL * 104 * 104),
    ],
)
def test_limit_is_the_rate_of_the_matrix_products_of_the_same_precision(quick, name, gflop):
    row = quick[name]
    rate = gflop * row["value"] if row["unit"] == "patches/s" else gflop / row["value"]
    ((precision, of_one, limit),) = [rest for share, *rest in LIMITS if share == row["limit_share"]]
    assert precision == name.split("/")[1] and of_one == pytest.approx(gflop)
    # The matrix products that were measured in turn with the row, not those of another one.
    assert row["limit_share"] == pytest.approx(rate / limit)


def test_limit_of_the_loader_is_h5py_on_the_same_storage(quick):
    for name, row in quick.items():
        if name.startswith("loader/"):
            raw = quick["raw_read/gzip" if "gzip" in name else "raw_read"]
            assert row["limit_share"] == pytest.approx(row["value"] / raw["value"])


def test_inference_from_file_to_mask_includes_the_network(quick):
    for kind in ("patches/float32", "scene/bfloat16"):
        whole, network = quick[f"infer_{kind}"], quick[f"infer_{kind}/network"]
        assert whole["value"] > network["value"] > 0
        assert quick[f"overhead/{kind}"]["min"] > 1


def test_first_batch_is_taken_from_a_thousand_scenes(tmp_path, monkeypatch):
    counts = []
    build = program.build_batches

    def counting(config, devices, paths, n_threads=None):
        counts.append(len(paths))
        return build(config, devices, paths, n_threads)

    monkeypatch.setattr(program, "build_batches", counting)
    status, found = run(tmp_path, "--only", "time_to_first_batch")
    assert (status, set(found)) == (0, {"time_to_first_batch"})
    assert counts == [800, 800]  # 0.8 of 1000, in each of two repeats


def test_slow_reader_shows_in_the_waiting_share():
    now = [0.0]  # [s], of a clock that reading and training move

    def pass_time(seconds):
        now[0] += seconds

    def feed():
        for seconds in (3.0, 1.0, 0.0):
            pass_time(seconds)
            yield seconds

    steps = measurements.time_steps(feed(), lambda batch: pass_time(1.0), 3, clock=lambda: now[0])
    assert steps == [(3.0, 4.0), (1.0, 2.0), (0.0, 1.0)]
    assert measurements.waiting_share(steps) == 4 / 7  # of all time, not the mean of the shares


def test_alternate_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    assert rows.alternate(functions, 2) == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}
    assert "".join(calls) == "abcabc"


def test_alternate_completes_the_first_round_after_its_time_is_over():
    functions = {"a": lambda: 1, "b": lambda: 2}
    assert rows.alternate(functions, 5, seconds=0) == {"a": [1], "b": [2]}


@pytest.mark.parametrize(("unit", "ratio"), [("patches/s", 2.0), ("s/scene", 0.5), ("GB", 0.5)])
def test_ratio_is_how_many_times_better(unit, ratio):
    row = rows.make_row("ours", unit, [4.0, 40.0, 3.0], "theirs", [1.0, 2.0, 30.0], 0.9)
    assert row == rows.Row("ours", unit, 4.0, 3.0, 40.0, "theirs", 2.0, ratio, 0.9)


def test_row_that_is_its_own_baseline_has_no_ratio():
    row = rows.make_row("ours", "GB", [4.0], "ours", [4.0])
    assert (row.baseline, row.baseline_value, row.ratio) == (None, None, None)


def test_table_has_a_line_per_row_with_three_digits():
    table = rows.text_table(
        [
            rows.make_row("gemm/float32", "GFLOP/s", [1234.5, 99.96, 12345.6]),
            rows.make_row("train_step/float32", "patches/s", [1.5]),
            rows.make_row(
                "train_step/bfloat16", "s", [0.01234], "train_step/float32", [0.0617], 0.5
            ),
        ]
    )
    assert [line.split() for line in table.splitlines()] == [
        ["unit", "value", "min", "-", "max", "better", "than", "limit"],
        ["gemm/float32", "GFLOP/s", "1234", "100.0", "-", "12346"],
        ["train_step/float32", "patches/s", "1.50", "1.50", "-", "1.50"],
        ["train_step/bfloat16", "s", *"0.0123 0.0123 - 0.0123 5.00 float32 50%".split()],
    ]


@pytest.mark.parametrize(
    ("name", "only", "wanted"),
    [
        ("train_step/float32", ["train_step"], True),
        ("train_step", ["train_step/float32"], True),  # may contain it
        ("train_step/bfloat16", ["train_step/float32"], False),
        ("train_epoch/bfloat16", ["train_step", "train"], True),
        ("gemm/float32", [], True),
    ],
)
def test_only_selects_by_prefix(name, only, wanted):
    assert rows.is_wanted(name, only) is wanted


def test_only_measures_what_is_named(tmp_path, capsys):
    status, found = run(tmp_path, "--only", "train_step/bfloat16")
    assert (status, list(found)) == (0, ["train_step/bfloat16"])
    table = capsys.readouterr().out
    assert "tensorflow 2." in table and "train_step/bfloat16" in table


@pytest.mark.slow
def test_peak_memory_of_few_and_many_scenes(tmp_path):
    status, found = run(tmp_path, "--only", "peak_rss")
    assert (status, list(found)) == (0, ["peak_rss/32 scenes", "peak_rss/128 scenes"])
    few, many = found.values()
    assert 0.1 < few["value"] < 2  # [GB]; TensorFlow alone takes a few tenths
    assert (many["baseline"], many["baseline_value"]) == ("peak_rss/32 scenes", few["value"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "trainstep"], ["trainstep", "train_step"]),
        (["--only", "gemm/float99"], ["gemm/float99"]),
        (["--patch", "4"], ["PATCH_SIZE", "4"]),
        (["--network", "nonet"], ["Unknown network 'nonet'", "unet or"]),
    ],
)
def test_mistake_of_the_user_is_one_clear_error(tmp_path, capsys, arguments, words):
    status, _ = run(tmp_path, *arguments)
    assert status == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert all(word in error for word in words)


@pytest.mark.parametrize(
    ("arguments", "packages"),
    [
        (["--against", "unet", "torch"], "torch"),
        (["--only", "torch/train_step", "onnx"], "torch"),
        (["--against", "onnx"], "onnx onnxruntime tf2onnx"),
        (["--against", "openvino"], "openvino nncf onnx onnxruntime tf2onnx"),
    ],
)
def test_missing_packages_are_an_error_that_names_the_command(
    tmp_path, capsys, monkeypatch, arguments, packages
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, *arguments) == (2, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"-m pip install {packages}")


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no luck"), 1), (KeyboardInterrupt, 130)]
)
def test_rows_measured_before_an_error_are_kept(tmp_path, monkeypatch, capsys, error, status):
    def fail(config, devices):
        raise error

    monkeypatch.setattr(program, "build_trainer", fail)
    found_status, found = run(tmp_path, "--only", "raw_read", "train_step", "gemm")
    assert found_status == status
    printed = capsys.readouterr()
    assert "raw_read" in found and "raw_read" in printed.out
    assert ("gemm/float32" in found) == (status == 1)  # measured after the error
    assert "no luck" in printed.err or status == 130


def test_another_network_is_measured_against_its_own_operations(tmp_path, capsys, monkeypatch):
    gflop, limit_share = [], measurements.limit_share
    monkeypatch.setattr(
        measurements, "limit_share", lambda *a: (gflop.append(a[2]), limit_share(*a))[1]
    )
    status, found = run(tmp_path, "--network", "pixel", "--only", "train_step/float32")
    assert status == 0 and "Network pixel, scenes of 96 x 96" in capsys.readouterr().out
    assert found["train_step/float32"]["limit_share"] > 0
    # Three passes of two operations: 1x1 kernels on 32 x 32 pixels.
    assert gflop == [pytest.approx(3 * 2e-9 * (9 * 15 + 15 * 32 + 32 * 32 + 32) * 32**2)]


@pytest.mark.parametrize("option", ["--help", "--only=trainstep"])
def test_tensorflow_is_not_imported_for(option):
    code = (
        "import sys; from tools import bench\n"
        "try: bench.main(sys.argv[1:])\n"
        "finally: print([m for m in ('tensorflow', 'keras', 'scipy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, option]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tools")}
    answer = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.stdout.splitlines()[-1] == "[]"


def test_network_and_reference_are_measured_against_their_own_operations(tmp_path, monkeypatch):
    gflop, limit_share = [], measurements.limit_share
    monkeypatch.setattr(
        measurements, "limit_share", lambda *a: (gflop.append(a[2]), limit_share(*a))[1]
    )
    work = "unet/infer_scene/float32"
    status, found = run(tmp_path, "--network", "pixel", "--only", work)
    assert (status, list(found)) == (0, [f"{work}/unet", f"{work}/pixel"])
    assert found[f"{work}/pixel"]["baseline"] == f"{work}/unet"
    # A pass of the U-Net needs 104 rows and columns, see above; 1x1 kernels need no padding.
    pointwise = 9 * 15 + 15 * 32 + 32 * 32 + 32
    assert gflop == pytest.approx([2e-9 * PIXEL * 104**2, 2e-9 * pointwise * 96**2])


def test_network_that_is_compared_has_no_zeros(tmp_path):
    file = bench.write_config(tmp_path, (96, 96), 32, "stem_2x2")
    config = load_config(file)
    assert not all(w.any() for w in program.build_network(config).get_weights())
    assert all(w.any() for w in program.build_network_without_zeros(config).get_weights())


@pytest.mark.parametrize(
    ("precision", "difference", "agrees"),
    [
        ("float32", 1e-5, True),
        ("float32", 1e-3, False),
        ("float32", np.nan, False),
        ("bfloat16", 1e-3, True),
        ("bfloat16", 0.5, False),
        ("int8", 0.1, True),
        ("int8", np.nan, False),
    ],
)
def test_program_with_other_probabilities_is_an_error(precision, difference, agrees):
    ours = np.full((4, 4), 0.25)
    theirs = ours.copy()
    theirs[1, 2] += difference
    with contextlib.nullcontext() if agrees else pytest.raises(RuntimeError, match="openvino"):
        exported.check_same("openvino", precision, theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peers", "baselines"),
    [
        (["onnx"], ["onnx float32"]),
        (
            ["openvino", "onnx"],
            ["onnx float32", "openvino float32", "openvino bfloat16", "openvino int8"],
        ),
    ],
)
def test_exported_network_gives_our_probabilities(tmp_path, peers, baselines):
    if "openvino" in peers:
        pytest.importorskip("nncf", reason="OpenVINO is not among the requirements")
    status, found = run(tmp_path, "--against", *peers, "--only", *peers, "--network", "stem_2x2")
    assert status == 0
    assert {name: row["baseline"] for name, row in found.items()} == {
        each.replace(" ", "/infer_scene/"): each for each in baselines
    }
    assert all(row["ratio"] > 0 and row["limit_share"] > 0 for row in found.values())


@pytest.mark.slow
def test_pytorch_gives_the_probabilities_of_every_network(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not among the requirements")
    code = """
from pathlib import Path
import sys
import torch  # before TensorFlow, see below
from harness.config import load_config
from tools import bench
from tools.lib.bench import measurements, program, torch_network
for name in sys.argv[2:]:
    file = bench.write_config(Path(sys.argv[1]), (96, 96), 32, name)
    one = measurements.Bench(file, quick=True, only=())
    model = program.build_network_without_zeros(one.config)
    torch_network.check_same_network(torch_network.TorchProgram(one, model), model)
"""
    command = [sys.executable, "-c", code, tmp_path, *NETWORKS]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tools")}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)


@pytest.mark.slow
def test_pytorch_does_the_same_work(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not among the requirements")
    names = ["torch/infer_scene/float32", "torch/train_step/float32"]
    output = tmp_path / "bench.json"
    # In a process of its own: Triton, a part of PyTorch, must be imported before TensorFlow.
    command = [sys.executable, "tools/bench.py", *QUICK, "-o", output, "--only", *names]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    found = {row["name"]: row for row in json.loads(output.read_text())}
    assert set(found) == {f"{name}/eager" for name in names}
    assert all(row["baseline"] == "torch" and row["ratio"] > 0 for row in found.values())
