r"""Measure how fast the benchmark is on this machine, and how close to the machine's limit.

    python tools/bench.py                          the whole table, within ten minutes on two cores
    python tools/bench.py --quick                  the main rows, within two minutes
    python tools/bench.py --only loader train_step/bfloat16
    python tools/bench.py --network stem_2x2       another network than the U-Net
    python tools/bench.py --against torch          also compares with PyTorch on the same work
    python tools/bench.py --only unet torch onnx openvino --network stem_2x2
                                                   only compares, with the U-Net too

Scenes of full size in the published dtypes are made in a temporary folder. What is compared is
measured in turn (a, b, a, b, ...); a row gives the median and the range of the repeats.

better       How many times better than the baseline: value / baseline for rates, baseline / value
             for seconds and bytes. Below 1 is worse.
limit        Of the network: its rate of floating-point operations divided by that of a large matrix
             product (gemm) of the same precision, measured in the same minutes. The operations are
             those of the network's layers, one by one. A program that computes the same
             with fewer, as harness/networks/fused_upsampling.py does, can exceed 100 %.
             Of the loader: its rate divided by that of h5py alone.

Rows host/... say what a GPU would need from its host: processor time per patch from scene files,
the disk cache and memory (cpu) and of Python per training step, next to targets; size of a patch,
two reader threads against one, and the share of the time of copies to a (simulated) device that is
hidden behind its steps.

Rows torch/..., onnx/... and openvino/... give our value, with that of the other program as the
baseline: PyTorch, eager or with torch.compile; ONNX Runtime and OpenVINO with the file that
tools/export_model.py writes, one scene in one pass on the CPU (set CUDA_VISIBLE_DEVICES=-1 where
there are GPUs). OpenVINO's int8 is compared with our bfloat16. Each program must give our
probabilities. Rows unet/... have the network and the reference.

The JSON file of -o has all digits.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from _command import exit_status
from harness.config import load_config
from harness.console import format_duration, log_to_screen
from harness.errors import Failure, UserError
from harness.files import write_text
from harness.preflight import check_model
from tools.lib.bench.rows import is_wanted, text_table

# Functions of tools/lib/bench/measurements.py, or of the module in MODULES, and the first words of
# the names of their rows.
GROUPS = {
    "measure_loading": ("raw_read", "loader_naive", "loader"),
    "measure_first_batch": ("time_to_first_batch",),
    "measure_host": ("host",),
    "measure_training": ("train_step", "strategy_overhead"),
    "measure_epoch": ("train_epoch", "input_stall"),
    "measure_inference": ("infer_patches", "infer_scene", "overhead"),
    "measure_memory": ("peak_rss",),
    "measure_against_unet": ("unet",),
    "measure_against_torch": ("torch",),
    "measure_against_exported": ("onnx", "openvino"),
    "measure_gemm": ("gemm",),  # last, because it includes the matrix products of the others
}
MODULES = {
    "measure_host": "host",
    "measure_against_torch": "torch_network",
    "measure_against_exported": "exported",
}
EXPORT = ("onnx", "onnxruntime", "tf2onnx")
PEERS = {  # what the network is compared with, and the packages that it needs
    "unet": (),
    "torch": ("torch",),
    "onnx": EXPORT,
    "openvino": ("openvino", "nncf", *EXPORT),
}
WORDS = list(dict.fromkeys(["gemm", *(word for words in GROUPS.values() for word in words)]))

log = logging.getLogger("bench")


def measure(bench, groups, rows, output, verbose):
    """Measure groups, add their rows in the order of the table, and write them after each group.

    Args:
        bench: Bench.
        groups: Those of GROUPS that are wanted.
        rows: List of the rows, which grows.
        output: JSON file to write, or None.
        verbose: Whether to show the tracebacks of groups that failed.

    Returns:
        Number of groups that failed.
    """
    n_failed = 0
    for name, words in groups.items():
        module = MODULES.get(name, "measurements")
        begin = time.perf_counter()
        try:
            function = getattr(importlib.import_module(f"tools.lib.bench.{module}"), name)
            log.info("%s: %s", ", ".join(words), function.__doc__.partition("\n")[0])
            for row in function(bench):
                if is_wanted(row.name, bench.only):
                    rows.append(row)
        except Exception as error:  # the other groups are useful without this one
            n_failed += 1
            log.error("    failed: %s: %s", type(error).__name__, error, exc_info=verbose)
        finally:
            rows.sort(key=lambda row: WORDS.index(row.name.partition("/")[0]))
            if output:
                write_text(output, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        log.info("    %s", format_duration(time.perf_counter() - begin))
    return n_failed


def describe(bench):
    """Describe what was measured on."""
    from harness.records.run import git_commit
    from tools.lib.bench.measurements import n_cores

    packages = ["tensorflow", "keras", "numpy", "h5py"]
    packages += itertools.chain.from_iterable(PEERS[peer] for peer in bench.against)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in dict.fromkeys(packages))
    load = " ".join(f"{n:.1f}" for n in os.getloadavg())
    config = bench.config
    return (
        f"{bench.devices.describe()}, {n_cores()} cores, Python {platform.python_version()}, "
        f"{versions}, commit {git_commit()}\n"
        f"Load of the machine (1, 5, 15 minutes): {load}\n"
        f"Network {config.network}, scenes of {config.image_h} x {config.image_w}, patches of "
        f"{config.patch_size}; medians of up to {bench.repeats} repeats"
    )


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer repeats and fewer rows")
    add("--against", nargs="+", choices=PEERS, default=[], help="also compare with these")
    add("--only", nargs="+", metavar="NAME", default=[], help="rows whose names start with this")
    add("-o", "--output", type=Path, metavar="FILE", help="JSON file to write the rows to")
    add("--network", default="unet", help="a name in model.py, or a .keras file (default unet)")
    add("--size", type=int, nargs=2, default=(1200, 1500), metavar=("H", "W"), help="of a scene")
    add("--patch", type=int, default=256, metavar="P", help="rows and columns of a patch")
    add("--verbose", action="store_true", help="show tracebacks and TensorFlow's messages")
    arguments = parser.parse_args(argv)
    named = [peer for peer in PEERS if any(name.startswith(peer) for name in arguments.only)]
    arguments.against = list(dict.fromkeys([*arguments.against, *named]))
    return arguments


def wanted_groups(arguments):
    """The groups that the command line asks for.

    Raises:
        UserError: If no row starts with a name, or a package of another program is missing.
    """
    for name in arguments.only:
        if not any(is_wanted(word, [name]) for word in WORDS):
            raise UserError(f"--only {name}: no such row. Rows start with {', '.join(WORDS)}.")
    for peer in arguments.against:
        missing = [name for name in PEERS[peer] if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"--against {peer} needs packages that are not installed. Type: "
                f"{sys.executable} -m pip install {' '.join(missing)}"
            )
    return {
        name: words
        for name, words in GROUPS.items()
        if any(
            is_wanted(word, arguments.only) and (word not in PEERS or word in arguments.against)
            for word in words
        )
    }


def write_config(folder, size, patch, network):
    """Write the configuration of the runs, and return its path."""
    settings = {
        "IMAGE_H": size[0],
        "IMAGE_W": size[1],
        "PATCH_SIZE": patch,
        "CROP_SIZE": 2 * round(patch * 80 / 256 / 2),  # as 80 of 256 pixels, and even
        "clip_offset": round(patch * 15 / 256),
        "network": network,
        "train_dir": str(folder),
        "inference_dir": str(folder),
        "output_dir": str(folder / "runs"),
        "report": False,
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    check_model(load_config(file), "benchmark")  # raises before TensorFlow is imported
    return file


def work(arguments):
    """Measure what the command line asks for."""
    groups = wanted_groups(arguments)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = write_config(Path(folder), arguments.size, arguments.patch, arguments.network)
        # PyTorch imports Triton, which crashes if TensorFlow came first.
        if "torch" in arguments.against:
            with contextlib.suppress(ImportError):
                importlib.import_module("triton")
        from tools.lib.bench.measurements import Bench  # imports TensorFlow

        bench, rows = Bench(file, arguments.quick, arguments.only, arguments.against), []
        try:
            n_failed = measure(bench, groups, rows, arguments.output, arguments.verbose)
        finally:  # after Ctrl-C too
            if rows:
                sys.stdout.write(f"{describe(bench)}\n\n{text_table(rows)}\n\n")
    if n_failed:
        raise Failure(f"Measurements failed: {n_failed} of {len(groups)} groups, see above.")
    if not rows:
        raise UserError(f"No row starts with {' or '.join(arguments.only)}; see --help.")
    duration = format_duration(time.perf_counter() - begin)
    log.info("%s%s", duration, f"; all rows are in {arguments.output}" if arguments.output else "")


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: work(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
