r"""Compute, not measure, how fast GPUs would train the U-Net, and what would limit them.

    python tools/performance_model.py bench.json
    python tools/performance_model.py --cold-ms 1.3 --cached-ms 0.2 --patch-mb 1.2 --two-threads 1.9

Rows of `tools/bench.py -o bench.json --only host` describe the host; options replace them. Cold:
scenes are read from a shared file system. Cached: patches are in memory (cache: memory). Half
precision, one rank per GPU, and a global batch that grows with the GPUs. The slowest limits:

    reading   bytes of the scene files over the speed of the file system;
    decoding  processor time per patch over the cores of a GPU, by Amdahl's law with two threads;
    copying   bytes of a batch over PCIe;
    GPU       operations over the assumed share of the peak, and then
    network   the all-reduce of the gradients over NVLink or InfiniBand, which adds to that time.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from _command import exit_status
from harness.console import log_to_screen, table
from harness.errors import UserError
from tools.lib.options import command_parser, positive

GFLOP = 64.4  # of training a patch: 3 x 2 x 163,904 multiply-adds x 256 x 256 pixels
GRADIENT_BYTES = 7.8e6  # 1,948,609 float32
# Of a patch: whole rows of 1500 pixels hold five; float64 refs and bayes, float32 bts.
FILE_BYTES = 256 * 1500 // 5 * (6 * 8 + 3 * 4 + 8)
ANCHOR = 160, 1321  # patches/s of one and sixteen V100, first implementation, published
ROWS = {  # bench.json
    "cold_ms": "host/cpu/files/half",
    "cached_ms": "host/cpu/memory/half",
    "patch_mb": "host/bytes/half",
    "two_threads": "host/threads/2",
}


@dataclass(frozen=True)
class Machine:
    """A class of nodes with eight GPUs; speeds are published peaks in one direction."""

    tflops: float  # of a GPU, dense float16 or bfloat16
    pcie: float  # of a GPU to its host [GB/s]
    nvlink: float  # of a GPU to the others [GB/s]
    infiniband: float  # of a node [GB/s]
    cores: int  # of the node per GPU


MACHINES = {  # data sheets of the GPUs, and user guides of DGX-1, DGX A100 and DGX H100, by NVIDIA
    "V100": Machine(125, 16, 150, 4 * 12.5, 40 // 8),
    "A100": Machine(312, 32, 300, 8 * 25, 128 // 8),
    "H100": Machine(989, 64, 450, 8 * 50, 112 // 8),
}


def stage_rates(machine, n_nodes, gpus_per_node, cached, host):
    """Patches per second that each stage alone could take, by name; `host` has the options."""
    n = n_nodes * gpus_per_node
    serial = min(max(2 / host.two_threads - 1, 0), 1)
    threads = 1 / (serial + (1 - serial) / machine.cores)
    rates = {
        "decoding": n * threads * 1000 / (host.cached_ms if cached else host.cold_ms),
        "copying": n * host.link_share * machine.pcie * 1000 / host.patch_mb,
        "GPU": n * host.gpu_share * machine.tflops * 1000 / GFLOP,
    }
    if not cached:
        rates["reading"] = min(n_nodes * host.node_read, host.total_read) * 1e9 / FILE_BYTES
    if n > 1:
        link = machine.nvlink if n_nodes == 1 else min(machine.nvlink, machine.infiniband)
        moved = 2 * (n - 1) / n * GRADIENT_BYTES  # of a ring
        hops = 2 * math.ceil(math.log2(n))  # of a tree
        seconds = moved / (host.link_share * link * 1e9) + hops * host.hop_us * 1e-6
        rates["network"] = n * host.batch / seconds
    return rates


def throughput(rates):
    """Patches per second, and the stage that limits them."""
    parts = rates.keys() & {"GPU", "network"}  # of a step, one after the other
    training = 1 / sum(1 / rates[name] for name in parts)
    slowest = min(rates.keys() - parts, key=rates.get)
    if rates[slowest] < training:
        return rates[slowest], slowest
    return training, min(parts, key=rates.get)


def work(arguments):
    """Print the table."""
    text = arguments.bench.read_text(encoding="utf-8") if arguments.bench else "[]"
    rows = {row["name"]: row for row in json.loads(text)}
    for option, name in ROWS.items():
        if getattr(arguments, option) is None:
            if name not in rows:
                raise UserError(f"No row {name} of a bench.json, and no option that replaces it.")
            key = "ratio" if option == "two_threads" else "value"
            setattr(arguments, option, rows[name][key])
    columns = {}
    for name, machine in MACHINES.items():
        for state, cached in {"cold": False, "cached": True}.items():
            column = columns[f"{name} {state}"] = {}
            for nodes, gpus in [(1, 1), *((nodes, 8) for nodes in arguments.nodes)]:
                rate, limit = throughput(stage_rates(machine, nodes, gpus, cached, arguments))
                line = f"{nodes} x {gpus} GPU{'s' if gpus > 1 else ''}"
                column[line] = f"{float(f'{rate:.3g}'):.0f} {limit}"
    share = ANCHOR[0] * GFLOP / 1000 / MACHINES["V100"].tflops
    sys.stdout.write(
        f"Computed, not measured [patches/s, limit]\n\n{table(columns)}\n\nMeasured with the first "
        f"implementation: {ANCHOR[0]} on one V100, {share:.0%} of its peak\n(assumed above: "
        f"{arguments.gpu_share:.0%}), and {ANCHOR[1]} on sixteen.\n"
    )


def number(text):
    """Type of an option: a number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return float(text)


def main(argv=None):
    """Run the program and return its exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("bench", type=Path, nargs="?", metavar="bench.json", help="rows of tools/bench.py -o")
    for option, row in ROWS.items():
        add(f"--{option.replace('_', '-')}", type=number, metavar="N", help=f"instead of {row}")
    for option, default, text in (
        ("--gpu-share", 0.2, "share of a GPU's peak that training reaches"),
        ("--link-share", 0.8, "share of a link's peak that copies reach"),
        ("--hop-us", 10.0, "latency of a hop of the all-reduce [us]"),
        ("--node-read", 4.0, "speed at which a node reads files [GB/s]"),
        ("--total-read", 40.0, "speed of the file system, all nodes [GB/s]"),
        ("--batch", 32.0, "patches per GPU and step"),
    ):
        text += f", assumed ({default:g})"
        add(option, type=number, default=default, metavar="N", help=text)
    nodes = [1, 2, 4, 8, 16, 32, 64]
    add("--nodes", type=positive, nargs="+", metavar="N", default=nodes, help="numbers of nodes")
    arguments = parser.parse_args(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: work(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
