r"""How fast the benchmark is on this machine, and how close to the machine's own limit.

    python tools/bench.py                          the whole table, within ten minutes on two cores
    python tools/bench.py --quick                  the main rows, within two
    python tools/bench.py --only loader train_step/bfloat16
    python tools/bench.py --against torch          besides, PyTorch on the same work

Scenes of full size and published dtypes are made in a temporary folder. What is compared is
measured in turn (a, b, a, b, ...); a row gives the median of the repeats, and the range.

ratio        times better than the baseline: of rates value / baseline, of seconds and bytes
             baseline / value.
limit_share  of the network: its rate of floating-point operations over that of a large matrix
             product (gemm) of the same precision, measured in the same minutes. Operations are
             those of the network's convolutions layer by layer; a program that computes the same
             with fewer, as harness/networks/fused_upsampling.py does, can come out above 1.
             Of the loader: its rate over that of h5py alone.

Rows torch/... are ours, beside PyTorch's as their baseline: eager or by torch.compile.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from unittest import mock

import _command  # noqa: F401
import harness.quiet_tensorflow  # noqa: F401
from harness import REPOSITORY

# isort: split
import h5py
import numpy as np
import tensorflow as tf
import yaml
from keras import layers

import data_loader
import slstr_cloud
from harness.config import load_config
from harness.files import write_text
from harness.inference.windows import StripGrid
from harness.networks.fused_upsampling import without_upsampling
from harness.parallel.devices import open_devices
from harness.records.run import git_commit
from harness.signals import Interrupted
from model import DOWNSCALING, RECEPTIVE_RADIUS, unet
from tools.make_scenes import make_scene, product_name, write_scene

GEMM_SIZE = {"CPU": 3072, "GPU": 16384}  # rows of the matrices; 2048 was 5 % slower on two cores
HALF_FLAGS = {"avx512_fp16", "amx_fp16", "fphp"}  # of CPUs that compute in float16
SCENE_CYCLE = 5  # steps of 32 patches in which 8 lanes use up a scene of 20 patches each
MEMORY_SCENES = (32, 128)  # in the directory; 0.8 of them train
READ = ("refs", "bts", "bayes")
TABLE_LINE = "{:34} {:9} {:>7} {:15} {:>5}  {:18} {:>5}"
MAX_DIFFERENCE = 1e-4  # of probabilities, between PyTorch's network and ours in float32

log = logging.getLogger("bench")


class BenchError(ValueError):
    """What the user can mend: shown as one line."""


# --- repeats and rows -----------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table; `value` is a median. What there is none of is None."""

    name: str
    unit: str
    value: float | None = None
    min: float | None = None
    max: float | None = None
    baseline: str | None = None
    baseline_value: float | None = None
    ratio: float | None = None
    limit_share: float | None = None


def make_row(name, unit, values, baseline=None, baseline_values=None, limit_share=None):
    """Make the row of repeated measurements; without any, a row of nothing but name and unit.

    Args:
        name: Of the row.
        unit: Ends in '/s' where more is better.
        values: Measured [unit].
        baseline: Name of what it is compared with.
        baseline_values: Measured there [unit].
        limit_share: Share of what the machine can do.
    """
    if not values:
        return Row(name, unit)
    value = statistics.median(values)
    base = statistics.median(baseline_values) if baseline_values else None
    ratio = None
    if base and value:
        ratio = value / base if unit.endswith("/s") else base / value
    return Row(name, unit, value, min(values), max(values), baseline, base, ratio, limit_share)


def alternate(functions, repeats, seconds=math.inf):
    """Call functions in turn, time and again, so that a slow minute of the machine slows all.

    Args:
        functions: Dictionary of functions without arguments.
        repeats: How often each is called.
        seconds: No round after the first begins that would end later than this.

    Returns:
        Dictionary of lists: what each function returned, by name.
    """
    results = {name: [] for name in functions}
    begin = time.perf_counter()
    for done in range(repeats):
        if done and (time.perf_counter() - begin) * (done + 1) / done > seconds:
            log.info("    %d of %d repeats: no time for more", done, repeats)
            break
        for name, function in functions.items():
            results[name].append(function())
    return results


def timed(function):
    """Let a function return the seconds that it takes instead of its result."""

    def run():
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return run


def per_second(work, seconds):
    """The rates of repeats that did the same work."""
    return [work / s for s in seconds]


def text_table(rows):
    """The rows for people, in 100 columns."""
    head = ("name", "unit", "value", "min - max", "ratio", "to", "limit")
    lines = [TABLE_LINE.format(*head)]
    for row in rows:
        if row.value is None:
            lines.append(TABLE_LINE.format(row.name, row.unit, "-", *[""] * 4))
            continue
        span = f"{number(row.min)} - {number(row.max)}"
        ratio, to = ("", "") if row.ratio is None else (f"{row.ratio:.2f}", row.baseline)
        if "/" in row.name:  # `train_step/float32` of `train_step/bfloat16` is `float32`
            to = to.removeprefix(row.name.partition("/")[0] + "/")
        to = to if len(to) <= 18 else to.partition("/")[0]
        share = "" if row.limit_share is None else f"{row.limit_share:.0%}"
        lines.append(
            TABLE_LINE.format(row.name[:34], row.unit, number(row.value), span, ratio, to, share)
        )
    return "\n".join(line.rstrip() for line in lines)


def number(value):
    """Three digits, and no exponent."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"


def is_wanted(name, only):
    """Whether a row, or some row below it, begins with one of the names; all do if none is given.

    `train_step` is wanted where `train_step/float32` is: it may hold it.
    """
    return not only or any(name.startswith(o) or o.startswith(f"{name}/") for o in only)


# --- what the measurements share ------------------------------------------------------------


@dataclass
class Bench:
    """Settings, scenes, devices, and the rows measured so far."""

    arguments: argparse.Namespace
    folder: Path
    rows: list = field(default_factory=list)
    gemm_rates: dict = field(default_factory=dict)  # [GFLOP/s] of each precision, all repeats
    limits: dict = field(default_factory=dict)  # [GFLOP/s], of the latest group

    def __post_init__(self):
        self.height, self.width = self.arguments.size
        self.patch = self.arguments.patch
        self.quick = self.arguments.quick
        self.repeats = 2 if self.quick else 3
        self.crop = 2 * round(self.patch * 80 / 256 / 2)  # as 80 of 256 pixels, and even
        self.rows_read, self.cols_read = data_loader.training_crop(
            self.height, self.width, self.patch
        )
        self.patches_per_scene = (self.height // self.patch) * (self.width // self.patch)
        self.config = self.configure(train_dir=self.folder, inference_dir=self.folder)
        self.devices = open_devices(
            gpu="auto", deterministic=self.config.deterministic, seed=self.config.seed
        )
        self.precisions = ["float32", "bfloat16"]
        if self.devices.kind == "GPU" or HALF_FLAGS & cpu_flags():
            self.precisions.append("float16")
        self._trainers = {}

    def configure(self, **settings):
        """The program's configuration for these scenes."""
        settings = {
            "IMAGE_H": self.height,
            "IMAGE_W": self.width,
            "PATCH_SIZE": self.patch,
            "CROP_SIZE": self.crop,
            "clip_offset": round(self.patch * 15 / 256),
            "output_dir": self.folder / "runs",
            **settings,
        }
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump({k: _plain(v) for k, v in settings.items()}))
        return load_config(file, [])

    @functools.cached_property
    def scenes(self):
        """Paths of scenes made for the purpose, by storage; each has a file of its own.

        Only the datasets that are read are written. Every other scene is by night.
        """
        n_scenes = 2 if self.quick else 4
        log.info("Making %d scenes of %d x %d ...", n_scenes, self.height, self.width)
        stored = {"contiguous": [], "gzip": []}
        for i in range(n_scenes):
            arrays = make_scene(np.random.default_rng(i), self.height, self.width, day=i % 2 == 0)
            arrays = {name: arrays[name] for name in READ}
            for storage, paths in stored.items():
                path = self.folder / storage / product_name("one-day", i)
                path.parent.mkdir(exist_ok=True)
                compression = {"compression": "gzip", "shuffle": True} if storage == "gzip" else {}
                write_scene(path, arrays, **compression)
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # or the page cache cannot be dropped
                paths.append(path)
        return stored

    def links(self, name, n_scenes, storage="contiguous"):
        """A new folder of so many scenes, which are hard links to the few files that there are."""
        folder = self.folder / name
        folder.mkdir()
        files = self.scenes[storage]
        for i in range(n_scenes):
            os.link(files[i % len(files)], folder / product_name("one-day", i))
        return folder

    def trainer(self, precision, xla=False):
        """The program's Trainer, made once."""
        if (precision, xla) not in self._trainers:
            # On CPUs the rate depends on the micro-batch alone; two of them show adding up too.
            batch = self.config.batch_size if self.devices.kind == "GPU" else 8
            self._trainers[precision, xla] = make_trainer(self, precision, batch, xla)
        return self._trainers[precision, xla]

    def alternate(self, functions, seconds=math.inf, repeats=None, precisions=()):
        """Measure in turn, matrix products of `precisions` in between; see `alternate`."""
        products = {f"gemm/{p}": functools.partial(gemm, self, p) for p in precisions}
        results = alternate({**products, **functions}, repeats or self.repeats, seconds)
        for precision in precisions:
            rates = results.pop(f"gemm/{precision}")
            self.limits[precision] = statistics.median(rates)
            self.gemm_rates.setdefault(precision, []).extend(rates)
        return results

    def add(self, name, unit, values, baseline=None, baseline_values=None, limit_share=None):
        """Add a row; a baseline without values is a row that stands above."""
        if not is_wanted(name, self.arguments.only):
            return
        self.rows.append(make_row(name, unit, values, baseline, baseline_values, limit_share))

    def limit_share(self, gflop, seconds, precision):
        """Share of the matrix product's rate at which an operation count was done."""
        return gflop / statistics.median(seconds) / self.limits[precision]

    def wants(self, *names):
        """Whether any of these rows, or rows below them, is asked for."""
        return any(is_wanted(name, self.arguments.only) for name in names)


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def cpu_flags():
    """What this CPU can do, in the words of Linux; nothing where that is not to be had."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith(("flags", "Features")):
                return set(line.split(":")[1].split())
    return set()


def forward_gflop(n_rows, n_cols, n_channels=9):
    """Operations of one pass through the network, 10^9: two for each multiply-add of its layers.

    163,904 multiply-adds a pixel, so that 1200 x 1504 pixels take 592 GFLOP, 63 patches of
    256 x 256 1353 GFLOP. Training takes three times as much, 64.4 GFLOP a patch: gradients of the
    weights and of the inputs cost a pass each.
    """
    total = 0
    for layer in unet((n_rows, n_cols, n_channels)).layers:
        if isinstance(layer, layers.Conv2D):
            _, height, width, _ = layer.output.shape
            total += 2 * height * width * math.prod(layer.kernel.shape)
    return total / 1e9


# --- calls into the program -----------------------------------------------------------------


def make_trainer(bench, precision, batch_size, xla=False):
    """The program's Trainer."""
    changed = {"precision": precision, "batch_size": batch_size, "xla": xla}
    return slstr_cloud.open_trainer(bench.config.model_copy(update=changed), bench.devices)


def train_on(trainer, batch):
    """One step of the optimizer, to its end."""
    trainer.train_step(batch)
    trainer.take_totals()


def open_batches(bench, paths, batch_size, wrap_read=lambda read: read, **options):
    """The batches that the program trains on, to be closed: they read ahead."""
    micro_batch = bench.devices.micro_batch(bench.config.micro_batch, batch_size)
    batches = slstr_cloud.training_batches(bench.config, bench.devices, micro_batch)
    read = wrap_read(batches.keywords["read"])
    return batches(paths, shuffle=True, batch_size=batch_size, read=read, **options)


def thread_counts():
    """1, 2, 4, ... threads, as many as there are cores and the program would use."""
    most = min(n_cores(), data_loader.READER_THREADS)
    return [n for n in (1, 2, 4, 8, 16, 32) if n < most] + [most]


def n_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def mask_scenes(bench, name, scenes, model_file, **settings):
    """Run the program in this process; the part `inference` of its results, None if it failed."""
    run = bench.folder / "runs" / name
    config = bench.folder / f"{name}.yaml"
    settings = {
        **yaml.safe_load((bench.folder / "config.yaml").read_text()),
        "inference_dir": str(scenes),
        "model_file": str(model_file),
        "run_name": name,
        **settings,
    }
    config.write_text(yaml.safe_dump(settings))
    handlers = logging.getLogger().handlers[:]
    logging.disable(logging.WARNING)  # errors are shown
    try:
        # Beside its first scene `inference_mode: scene` takes the time for one in patches.
        with mock.patch.object(slstr_cloud, "compare_with_patches", lambda *_: None, create=True):
            status = slstr_cloud.main(["--config", str(config), "--mode", "inference"])
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().handlers[:] = handlers
    results = None if status else json.loads((run / "results.json").read_text())["inference"]
    shutil.rmtree(run, ignore_errors=True)
    return results


def open_predictor(bench, mode, precision, model):
    """The program's predictor: from a padded scene to its probabilities and the seconds taken."""
    config = bench.config.model_copy(update={"inference_mode": mode, "precision": precision})
    return slstr_cloud.open_predictor(config, bench.devices, model, bench.devices.local[0])


def few_steps(argv):
    """Run the program with all its loops cut to the first steps; print its peak memory [bytes].

    Args:
        argv: Number of steps, then the program's own arguments.
    """
    slstr_cloud.progress = lambda items, *_: islice(items, int(argv[0]))
    status = slstr_cloud.main(argv[1:])
    # Not ru_maxrss: a process inherits that of the one that started it.
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    sys.stdout.write(f"{int(peak) * 1024}\n")
    return status


# --- the machine ----------------------------------------------------------------------------


def gemm(bench, precision):
    """The rate of one large matrix product [GFLOP/s]."""
    n = min(GEMM_SIZE[bench.devices.kind], 32 * bench.patch)
    multiply, matrix = _product(n, precision)
    return 2 * n**3 / 1e9 / timed(lambda: multiply(matrix).numpy())()


@functools.cache
def _product(n, precision):
    matrix = tf.cast(tf.random.stateless_normal((n, n), seed=(1, 2)), precision)
    multiply = tf.function(lambda x: tf.linalg.matmul(x, x)[0, 0])
    multiply(matrix).numpy()
    return multiply, matrix


def measure_gemm(bench):
    """The rate of the matrix product, over all groups that needed it."""
    missing = [p for p in bench.precisions if p not in bench.gemm_rates]
    bench.alternate({}, precisions=missing)
    for precision in bench.precisions:
        bench.add(f"gemm/{precision}", "GFLOP/s", bench.gemm_rates[precision])


# --- reading --------------------------------------------------------------------------------


def measure_loading(bench):
    """Training input with nothing behind it, h5py alone, and the textbook pipeline."""
    counts = thread_counts()
    _ = bench.scenes  # made now, so that the first repeat does not wait for it
    functions = {}
    for storage, cache in (
        ("contiguous", "warm"), ("contiguous", "cold"), ("gzip", "warm"), ("gzip", "cold"),
    ):  # fmt: skip
        if bench.quick and (storage, cache) == ("gzip", "cold"):
            continue
        end = "" if cache == "warm" else "/cold"
        functions[("raw_read" if storage == "contiguous" else "raw_read/gzip") + end] = (
            functools.partial(read_with_h5py, bench, storage, cache)
        )
        few = bench.quick and storage == "gzip"
        for n in counts[-1:] if few or end else counts:
            name = f"loader/{storage}/{n} thread{'s' if n > 1 else ''}{end}"
            functions[name] = functools.partial(load, bench, storage, cache, n)
    functions["loader_naive"] = functools.partial(load_naively, bench)
    baselines = {"loader_naive", *(name for name in functions if name.startswith("raw_read"))}
    asked = {name for name in functions if bench.wants(name)}
    functions = {k: v for k, v in functions.items() if k in asked or (k in baselines and asked)}
    measured = bench.alternate(functions, seconds=30 if bench.quick else 100)

    rates = {name: [v for v in values if v] for name, values in measured.items()}
    for name in functions:
        cold = name.endswith("/cold")
        if not rates[name]:
            log.info("    %s: cannot tell, the page cache keeps the files", name)
        raw = f"raw_read{'/gzip' if '/gzip' in name else ''}{'/cold' if cold else ''}"
        baseline = share = None
        if name.startswith("loader/"):
            baseline = raw if "/gzip" in name or cold else "loader_naive"
            if rates[raw] and rates[name]:
                share = statistics.median(rates[name]) / statistics.median(rates[raw])
        bench.add(name, "patches/s", rates[name], baseline, rates.get(baseline), share)


def load(bench, storage, cache, n_threads):
    """The rate of the program's training input [patches/s]; None if the cache stayed warm.

    Timed over steps in which every lane uses up whole scenes, after as many that fill the queues:
    what was read before the first timed step is as much as what is read ahead at the last.
    """
    paths = data_loader.find_scenes(loader_folder(bench, storage))
    batch_size = bench.config.batch_size
    n_steps = -(-data_loader.MIXED_SCENES * bench.patches_per_scene // batch_size)
    rounds = 2 if storage == "contiguous" and cache == "warm" else 1
    wrap = cold_read if cache == "cold" else lambda read: read
    with open_batches(bench, paths, batch_size, wrap, n_threads=n_threads) as batches:
        feed = iter(batches.dataset())
        for _ in islice(feed, n_steps):
            pass
        before, begin = bytes_from_disk(), time.perf_counter()
        for _ in islice(feed, rounds * n_steps):
            pass
        seconds = time.perf_counter() - begin
        n_scenes = rounds * n_steps * batch_size / bench.patches_per_scene
        was_cold = cache == "warm" or came_from_disk(before, n_scenes, paths)
    return rounds * n_steps * batch_size / seconds if was_cold else None


def loader_folder(bench, storage):
    """Sixteen scenes, two for each lane."""
    folder = bench.folder / f"loader-{storage}"
    if not folder.exists():
        bench.links(folder.name, 16, storage)
    return folder


def read_with_h5py(bench, storage, cache):
    """The rate at which h5py reads the training crop in one thread [patches/s], or None."""
    paths = bench.scenes[storage]
    if cache == "cold":
        for path in paths:
            drop_from_cache(path)
    before, begin = bytes_from_disk(), time.perf_counter()
    for path in paths:
        with h5py.File(path, "r") as file:
            for name in READ:
                file[name][bench.rows_read, bench.cols_read]
    seconds = time.perf_counter() - begin
    was_cold = cache == "warm" or came_from_disk(before, len(paths), paths)
    return len(paths) * bench.patches_per_scene / seconds if was_cold else None


def load_naively(bench):
    """The rate of the textbook pipeline [patches/s]: one thread, whole scenes, plain operations.

    As quick as a textbook would have it: only the crop is read, the arithmetic is in float32 as
    soon as may be, and missing values stay. In float64, all rows read, missing values replaced, it
    took twice the time.
    """
    p, paths = bench.patch, bench.scenes["contiguous"]

    def scenes():
        for path in paths:
            with h5py.File(path, "r") as file:
                refs, bts, bayes = (file[name][bench.rows_read, bench.cols_read] for name in READ)
            refs = (refs - data_loader.REFLECTANCE_OFFSET).astype(np.float32)
            bts = (bts - data_loader.BT_OFFSET) / data_loader.BT_SCALE
            yield np.concatenate([refs, bts], axis=-1), (bayes != 0).astype(np.uint8)

    def cut(image):
        tiles = tf.image.extract_patches(
            image[None], (1, p, p, 1), (1, p, p, 1), (1, 1, 1, 1), "VALID"
        )
        return tf.reshape(tiles, (-1, p, p, image.shape[-1]))

    shape = [cut.stop - cut.start for cut in (bench.rows_read, bench.cols_read)]
    signature = (
        tf.TensorSpec((*shape, bench.config.n_channels), tf.float32),
        tf.TensorSpec((*shape, 1), tf.uint8),
    )
    dataset = tf.data.Dataset.from_generator(scenes, output_signature=signature)
    dataset = dataset.map(lambda channels, cloud: (cut(channels), cut(cloud)))
    dataset = dataset.unbatch().batch(bench.config.batch_size)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    seconds = timed(lambda: sum(1 for _ in dataset.with_options(options)))()
    return len(paths) * bench.patches_per_scene / seconds


def cold_read(read):
    """Let a function that reads a scene find nothing of its file in the page cache.

    Dropping a file of 120 MB takes some milliseconds, which count.
    """

    def read_cold(path, *others):
        drop_from_cache(path)
        return read(path, *others)

    return read_cold


def drop_from_cache(path):
    """Ask the system to forget what it keeps of a file in memory."""
    if hasattr(os, "posix_fadvise"):
        with Path(path).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk():
    """Bytes that this process had fetched from storage, below the page cache; None if unknown."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/io").read_text().partition("read_bytes:")[2].split()[0])
    return None


def came_from_disk(before, n_scenes, paths):
    """Whether most of so many scenes came from storage since `before`, so that reading was cold."""
    after = bytes_from_disk()
    scene_bytes = sum(path.stat().st_size for path in paths) / len(paths)
    return None not in (before, after) and after - before > n_scenes * scene_bytes / 2


def measure_first_batch(bench):
    """From a directory of a thousand scenes to the first batch."""
    n_scenes = 50 if bench.height < 1000 else 1000
    folder = bench.links("many", n_scenes)

    def first_batch():
        begin = time.perf_counter()
        paths, _ = data_loader.split_scenes(data_loader.find_scenes(folder), 0.8)
        with open_batches(bench, paths, bench.config.batch_size) as batches:
            next(iter(batches.dataset()))
            return time.perf_counter() - begin

    seconds = bench.alternate({"first": first_batch})["first"]
    bench.add("time_to_first_batch", "s", seconds)


# --- training -------------------------------------------------------------------------------


def measure_training(bench):
    """Steps on data in memory, what tracing them takes, and what the strategy costs."""
    kinds = {}
    for precision in bench.precisions:
        kinds[precision] = (precision, False)
        if not bench.quick:
            kinds[f"{precision}/xla"] = (precision, True)
    kinds = {
        name: kind
        for name, kind in kinds.items()
        if bench.wants(f"train_step/{name}", f"first_step/{name}")
        or (name == "float32" and bench.wants("train_step", "strategy_overhead"))
    }
    functions, first = {}, {}
    for name, (precision, xla) in kinds.items():
        log.info("    tracing %s ...", name)
        trainer = bench.trainer(precision, xla)
        batch = next(bench.devices.distribute(in_memory(bench, trainer)))
        step = functools.partial(train_on, trainer, batch)
        first[name] = timed(step)()
        functions[name] = timed(step)
    if bench.wants("strategy_overhead"):
        functions["plain"] = timed(plain_step(bench))
        functions["plain"]()
    precisions = list(dict.fromkeys(precision for precision, _ in kinds.values()))
    measured = bench.alternate(functions, 30 if bench.quick else 100, precisions=precisions)

    n_patches = bench.trainer("float32").batch_size
    gflop = 3 * n_patches * forward_gflop(bench.patch, bench.patch)
    for name, (precision, xla) in kinds.items():
        base = precision if xla else "float32" if precision != "float32" else None
        bench.add(
            f"train_step/{name}",
            "patches/s",
            per_second(n_patches, measured[name]),
            base and f"train_step/{base}",
            base and per_second(n_patches, measured.get(base, [])),
            bench.limit_share(gflop, measured[name], precision),
        )
    for name in kinds:
        bench.add(f"first_step/{name}", "s", [first[name]])
    if "plain" in measured:
        pairs = zip(measured["float32"], measured["plain"], strict=True)
        bench.add("strategy_overhead", "ratio", [ours / plain for ours, plain in pairs])


def in_memory(bench, trainer):
    """One batch for ever, for the replicas of a Trainer."""
    share = -(-trainer.batch_size // bench.devices.n_replicas)
    share = -(-share // trainer.micro_batch) * trainer.micro_batch
    rng = np.random.default_rng(0)
    shape = (share, bench.patch, bench.patch)
    batch = (
        rng.standard_normal((*shape, bench.config.n_channels), np.float32),
        rng.integers(0, 2, (*shape, 1), np.uint8),
        np.ones(share, np.float32),
    )
    return itertools.repeat(tuple(map(tf.constant, batch)))


def plain_step(bench):
    """The same step written as a plain loop: no strategy, no Trainer. Returns a function."""
    ours = bench.trainer("float32")
    model = unet(ours.model.input_shape[1:])
    network = without_upsampling(model)
    optimizer = tf.keras.optimizers.Adam(bench.config.learning_rate)
    optimizer.build(model.trainable_variables)
    clip = slice(ours.clip_offset, bench.patch - ours.clip_offset)

    @tf.function
    def gradients_of(channels, cloud):
        with tf.GradientTape() as tape:
            probability = network(channels, training=True)[:, clip, clip]
            label = tf.cast(cloud[:, clip, clip], tf.float32)
            loss = tf.reduce_mean(tf.keras.losses.binary_crossentropy(label, probability))
        return tape.gradient(loss, model.trainable_variables)

    @tf.function
    def step(channels, cloud):
        n, m = channels.shape[0], ours.micro_batch
        total = [tf.zeros_like(v) for v in model.trainable_variables]
        for first in tf.range(0, n, m):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            part = [
                tf.ensure_shape(a[first : first + m], (m, *a.shape[1:])) for a in (channels, cloud)
            ]
            total = [t + g * (m / n) for t, g in zip(total, gradients_of(*part), strict=True)]
        optimizer.apply(total, model.trainable_variables)

    with tf.device(bench.devices.local[0]):
        batch = [tf.constant(a) for a in next(in_memory(bench, ours))[:2]]

    def run():
        step(*batch)
        model.trainable_variables[-1].numpy()  # waits

    return run


def measure_epoch(bench):
    """Training fed from files, at the program's batch, and how long its steps wait for data.

    In the precision that trains fastest, as that one waits longest. The steps from files come one
    after the other: what stood between them would give the loader time.
    """
    precision = "bfloat16"
    batch_size = 4 if bench.quick else bench.config.batch_size
    trainer = make_trainer(bench, precision, batch_size)
    paths = data_loader.find_scenes(loader_folder(bench, "contiguous"))
    memory = bench.devices.distribute(in_memory(bench, trainer))
    train_on(trainer, next(memory))

    def step(source):
        begin = time.perf_counter()
        batch = next(source)
        waited = time.perf_counter() - begin
        train_on(trainer, batch)
        return waited, time.perf_counter() - begin

    baseline = [step(memory)[1]]
    with open_batches(bench, paths, batch_size) as batches:
        feed = bench.devices.distribute(batches.dataset())
        for _ in range(3):  # empty the queues, which fill up at the start
            step(feed)
        steps = [step(feed) for _ in range(SCENE_CYCLE)]
    baseline.append(step(memory)[1])
    bench.add(
        f"train_epoch/{precision}",
        "patches/s",
        per_second(batch_size, [seconds for _, seconds in steps]),
        "in memory",
        per_second(batch_size, baseline),
    )
    waits = [waited / seconds for waited, seconds in steps]
    share = sum(waited for waited, _ in steps) / sum(seconds for _, seconds in steps)
    if bench.wants("input_stall"):  # of all time, which is not the median of the shares
        bench.rows.append(Row("input_stall", "share", share, min(waits), max(waits)))


# --- inference ------------------------------------------------------------------------------


def measure_inference(bench):
    """The program's own inference from files to masks, in each mode, and its parts."""
    model_file = bench.folder / "model.keras"
    unet((bench.patch, bench.patch, bench.config.n_channels)).save(model_file)
    scenes = {"patches": 1 if bench.quick else 2, "scene": 1 if bench.quick else 4}
    folders = {mode: bench.links(f"infer-{mode}", n) for mode, n in scenes.items()}
    names = [f"infer_{mode}/{p}" for mode in scenes for p in bench.precisions]
    if bench.quick:
        names = ["infer_patches/float32", f"infer_scene/{bench.precisions[-1]}"]
    names = [
        name for name in names
        if bench.wants(name, f"overhead/{name.removeprefix('infer_')}")
        or name == "infer_patches/float32"
    ]  # fmt: skip

    def run(name):
        mode, precision = name.removeprefix("infer_").split("/")
        return mask_scenes(
            bench, name.replace("/", "-"), folders[mode], model_file,
            precision=precision, inference_mode=mode,
        )  # fmt: skip

    measured = bench.alternate(
        {name: functools.partial(run, name) for name in names},
        seconds=40 if bench.quick else 150,
        precisions=list(dict.fromkeys(name.split("/")[1] for name in names)),
    )
    add_inference_rows(bench, measured)


def add_inference_rows(bench, measured):
    """Rows of each mode and precision; all are compared with the first, float32 in patches."""
    gflop = inference_gflop(bench)
    baseline = "infer_patches/float32"

    def seconds(name, part=None):
        runs = [run for run in measured[name] if run]
        if part is None:
            return [run["seconds_per_scene"] for run in runs]
        return [run["seconds_per_scene_parts"][part] for run in runs]

    for name, runs in measured.items():
        mode, precision = name.removeprefix("infer_").split("/")
        if None in runs:
            log.info("    %s: the program failed, its message stands above", name)
        for part in (None, "read", "network", "stitch", "score", "write"):
            values = seconds(name, part)
            share = None
            if values and part in (None, "network"):
                share = bench.limit_share(gflop[mode], values, precision)
            end = f"/{part}" if part else ""
            against = (baseline + end, seconds(baseline, part)) if name != baseline else ()
            bench.add(name + end, "s/scene", values, *against, limit_share=share)
        ratios = [
            total / network
            for total, network in zip(seconds(name), seconds(name, "network"), strict=True)
        ]
        bench.add(f"overhead/{mode}/{precision}", "ratio", ratios)


def inference_gflop(bench):
    """Operations for one scene by mode, 10^9: whole, and as overlapping patches."""
    patches = data_loader.PatchGrid(bench.height, bench.width, bench.patch, bench.crop)
    whole = StripGrid(bench.height, bench.width, 1, RECEPTIVE_RADIUS, DOWNSCALING)
    return {
        "patches": len(patches.corners) * forward_gflop(*patches.window),
        "scene": forward_gflop(*whole.window),
    }


# --- memory ---------------------------------------------------------------------------------


def measure_memory(bench):
    """Peak memory of the program, each time in a process of its own, and four times the scenes.

    Three steps of training and three of validation. The smaller number is enough to fill 8 lanes
    and what is read ahead: on two cores 16 scenes, of which 12 train, took 2.10 to 2.13 GB in three
    runs, 24, 32, 64, 128 and 256 scenes 2.18, 2.28, 2.25, 2.24 and 2.20 GB in one.
    """
    if bench.quick and not bench.arguments.only:
        return
    peaks = {}
    for n_scenes in MEMORY_SCENES:
        log.info("    %d scenes ...", n_scenes)
        folder = bench.links(f"memory-{n_scenes}", n_scenes)
        settings = [f"train_dir={folder}", f"run_name=memory-{n_scenes}", "epochs=1"]
        command = "import sys; from tools.bench import few_steps; sys.exit(few_steps(sys.argv[1:]))"
        answer = subprocess.run(
            [sys.executable, "-c", command, "3", "--config", bench.folder / "config.yaml",
             "--mode", "train", "--set", *settings],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        name = f"peak_rss/{n_scenes} scenes"
        peaks[name] = [int(answer.stdout.split()[-1]) / 1e9] if answer.returncode == 0 else []
        if answer.returncode:
            log.info("    failed: %s", answer.stderr.strip().rpartition("\n")[2])
        first = next(iter(peaks))
        bench.add(name, "GB", peaks[name], *((first, peaks[first]) if name != first else ()))


# --- against PyTorch ------------------------------------------------------------------------


class TorchNetwork:
    """The same U-Net, written as PyTorch's users would, on the same work.

    In this process: the thread pools do not disturb each other, as OpenMP's threads sleep some
    milliseconds after their work. On two quiet cores PyTorch trained 2.1 to 2.4 patches/s in
    float32 and 4.9 in bfloat16 in a process of its own, 2.3 to 2.4 and 4.5 to 5.1 here, between
    matrix products of TensorFlow, which kept their 210 GFLOP/s; OMP_WAIT_POLICY=passive slowed
    PyTorch down. Where others use the cores too, OpenMP, whose threads wait for one another, loses
    far more than TensorFlow: compare on a quiet machine.

    Args:
        bench: Bench.
        weights: List of the Keras model's arrays.
    """

    def __init__(self, bench, weights):
        import torch

        self.torch = torch
        torch.set_num_threads(n_cores())
        self.device = "cuda" if bench.devices.kind == "GPU" else "cpu"
        self.clip = slice(bench.config.clip_offset, bench.patch - bench.config.clip_offset)
        self.net = _torch_unet(torch, weights).to(self.device, memory_format=torch.channels_last)
        self.compiled = torch.compile(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), bench.config.learning_rate)

    def to_device(self, array):
        """NumPy (n, H, W, C) to (n, C, H, W), channels last in memory."""
        return self.torch.from_numpy(array).to(self.device).permute(0, 3, 1, 2)

    def half(self, precision):
        """The context of a precision."""
        torch = self.torch
        return torch.autocast(
            self.device, getattr(torch, precision), enabled=precision != "float32"
        )

    def predict(self, net, precision, windows, batch):
        """Probability for NumPy windows (n, H, W, C), `batch` at once: (n, H, W, 1)."""
        parts = []
        with self.torch.inference_mode(), self.half(precision):
            for first in range(0, len(windows), batch):
                x = self.to_device(np.ascontiguousarray(windows[first : first + batch]))
                parts.append(self.torch.sigmoid(net(x).float()).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def train_step(self, net, precision, channels, cloud, micro_batch):
        """One step of the optimizer.

        Gradients of micro-batches add up, as ours do: of 8 patches at once PyTorch trained 2.1 to
        2.2 patches/s in float32 and 4.2 to 4.5 in bfloat16, no more than four by four.
        """
        loss_of = self.torch.nn.functional.binary_cross_entropy_with_logits
        self.optimizer.zero_grad()
        for x, y in zip(channels.split(micro_batch), cloud.split(micro_batch), strict=True):
            with self.half(precision):
                logits = net(x)
            cut = (slice(None), slice(None), self.clip, self.clip)
            loss = loss_of(logits[cut].float(), y[cut])
            (loss * (len(x) / len(channels))).backward()
        self.optimizer.step()
        return loss.item()  # waits


def _torch_unet(torch, weights):
    """The U-Net of model.py with the weights of a Keras model; returns logits."""
    nn, functional = torch.nn, torch.nn.functional

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = nn.ModuleList()
            for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
                rows, cols, n_in, n_out = kernel.shape
                layer = nn.Conv2d(n_in, n_out, (rows, cols), padding="same")
                layer.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
                layer.bias.data = torch.from_numpy(bias.copy())
                self.convolutions.append(layer)

        def forward(self, x):
            convolutions = iter(self.convolutions)

            def block(x):
                x = functional.relu(next(convolutions)(x))
                return functional.relu(next(convolutions)(x))

            skips = []
            for _ in range(3):
                x = block(x)
                skips.append(x)
                x = functional.max_pool2d(x, 2)
            x = block(x)
            for skip in reversed(skips):
                x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = block(torch.cat([x, skip], dim=1))
            return next(convolutions)(x)

    return UNet()


def measure_against_torch(bench):
    """Training steps, and the network alone on a scene, beside PyTorch's."""
    model = unet((bench.patch, bench.patch, bench.config.n_channels))
    theirs = TorchNetwork(bench, model.get_weights())
    _torch_inference(bench, theirs, "infer_scene", "float32", model, check=True)
    kinds, functions, failures = {}, {}, {}
    for precision in bench.precisions[:2]:
        for work in ("train_step", "infer_patches", "infer_scene"):
            name = f"{work}/{precision}"
            if not bench.wants(f"torch/{name}"):
                continue
            kinds[name] = precision
            make = _torch_training if work == "train_step" else _torch_inference
            ours, eager, compiled = make(bench, theirs, work, precision, model)
            functions[name], functions[f"{name}/eager"] = ours, eager
            ours(), eager()  # traced, and memory taken
            if bench.quick or work == "infer_patches":  # half a minute each
                continue
            log.info("    torch.compile for %s ...", name)
            try:
                compiled()
                functions[f"{name}/compile"] = compiled
            except Exception as error:  # whatever its compiler stumbles over
                failures[name] = str(error).strip().partition("\n")[0]
                log.info("    failed: %s: %s", type(error).__name__, failures[name])
    precisions = list(dict.fromkeys(kinds.values()))
    measured = bench.alternate(functions, 60 if bench.quick else 240, precisions=precisions)
    gflop = inference_gflop(bench)
    n_patches = bench.trainer("float32").batch_size
    for name, precision in kinds.items():
        work = name.partition("/")[0]
        if work == "train_step":
            unit, convert = "patches/s", functools.partial(per_second, n_patches)
            operations = 3 * n_patches * forward_gflop(bench.patch, bench.patch)
        else:
            unit, convert = "s/scene", list
            operations = gflop[work.removeprefix("infer_")]
        share = bench.limit_share(operations, measured[name], precision)
        for kind, label in (("eager", "torch"), ("compile", "torch.compile")):
            full_name = f"torch/{name}/{kind}"
            if f"{name}/{kind}" in measured:
                theirs_values = convert(measured[f"{name}/{kind}"])
                bench.add(full_name, unit, convert(measured[name]), label, theirs_values, share)
            elif name in failures:
                bench.add(full_name, unit, [])


def _torch_training(bench, theirs, work, precision, model):
    """Functions that take one training step and return its seconds: ours, eager, compiled."""
    trainer = bench.trainer(precision)
    batch = next(bench.devices.distribute(in_memory(bench, trainer)))
    arrays = [
        theirs.to_device(array.numpy().astype(np.float32))
        for array in next(in_memory(bench, trainer))[:2]
    ]
    return [
        timed(functools.partial(train_on, trainer, batch)),
        *(
            timed(functools.partial(theirs.train_step, n, precision, *arrays, trainer.micro_batch))
            for n in (theirs.net, theirs.compiled)
        ),
    ]


def _torch_inference(bench, theirs, work, precision, model, check=False):
    """Functions that predict a scene and return the network's seconds: ours, eager, compiled.

    Raises:
        RuntimeError: If the networks disagree.
    """
    ours = open_predictor(bench, work.removeprefix("infer_"), precision, model)
    shape = (bench.height, bench.width, bench.config.n_channels)
    path = bench.scenes["contiguous"][0]
    scene = data_loader.read_scene(path, shape, padding=ours.grid.padding).channels
    rows, cols = ours.grid.window
    windows = np.stack([scene[i : i + rows, j : j + cols] for i, j in ours.grid.corners])
    batch = min(bench.trainer(precision).micro_batch, len(windows))
    eager, compiled = (
        functools.partial(theirs.predict, net, precision, windows, batch)
        for net in (theirs.net, theirs.compiled)
    )
    if check:
        difference = np.abs(ours(scene)[0] - ours.grid.stitch(eager()[..., 0])).max()
        log.info("    probabilities differ by %.1e at most", difference)
        if not difference <= MAX_DIFFERENCE:
            raise RuntimeError(
                f"PyTorch's probabilities differ from ours by {difference}, wanted "
                f"{MAX_DIFFERENCE} at most: the networks do not do the same work."
            )
    return lambda: ours(scene)[1], timed(eager), timed(compiled)


# --- the program ----------------------------------------------------------------------------

# What is measured together, with the first words of its rows. The table is in this order too, but
# for the matrix product, which is measured along with the others and stands first.
SUBJECTS = {
    measure_loading: ("raw_read", "loader_naive", "loader"),
    measure_first_batch: ("time_to_first_batch",),
    measure_training: ("train_step", "first_step", "strategy_overhead"),
    measure_epoch: ("train_epoch", "input_stall"),
    measure_inference: ("infer_patches", "infer_scene", "overhead"),
    measure_memory: ("peak_rss",),
    measure_against_torch: ("torch",),
    measure_gemm: ("gemm",),
}


def table_order(rows):
    """Rows in the order of the table."""
    words = ["gemm", *(word for words in SUBJECTS.values() for word in words)]
    return sorted(rows, key=lambda row: words.index(row.name.partition("/")[0]))


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer repeats, fewer rows")
    add("--against", choices=("torch",), help="compare with PyTorch, which must be installed")
    add("--only", nargs="+", metavar="NAME", default=[], help="rows whose names begin so")
    add("-o", "--output", type=Path, default=Path("bench.json"), help="default: bench.json")
    add("--size", type=int, nargs=2, default=(1200, 1500), metavar=("H", "W"), help="of a scene")
    add("--patch", type=int, default=256, metavar="P", help="rows and columns of a patch")
    arguments = parser.parse_args(argv)
    if any(name.startswith("torch") for name in arguments.only):
        arguments.against = "torch"
    return arguments


def check_arguments(arguments):
    """Raise BenchError where a name is none of a row's, or PyTorch is missing."""
    words = [word for words in SUBJECTS.values() for word in words]
    for name in arguments.only:
        if not any(is_wanted(word, [name]) for word in words):
            raise BenchError(
                f"--only {name}: no row begins so. Rows begin with {', '.join(words)}."
            )
    if arguments.against and importlib.util.find_spec("torch") is None:
        raise BenchError(
            f"--against torch needs PyTorch. Type: {sys.executable} -m pip install torch"
        )


def describe(bench):
    """What was measured on, for people."""
    packages = ["tensorflow", "keras", "numpy", "h5py", *["torch"] * bool(bench.arguments.against)]
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    return (
        f"{bench.devices.describe()}, {n_cores()} cores, Python {platform.python_version()}, "
        f"{', '.join(versions)}, commit {git_commit()}\n"
        f"Load of the machine (1, 5, 15 minutes): {' '.join(f'{n:.1f}' for n in os.getloadavg())}\n"
        f"Scenes of {bench.height} x {bench.width}, patches of {bench.patch}; medians of up to "
        f"{bench.repeats} repeats"
    )


def measure(bench):
    """Measure every subject that is asked for; return how many failed."""
    n_failed = 0
    for subject, words in SUBJECTS.items():
        if subject is measure_against_torch and not bench.arguments.against:
            continue
        if not bench.wants(*words):
            continue
        log.info("%s: %s", ", ".join(words), subject.__doc__.partition("\n")[0])
        begin = time.perf_counter()
        try:
            subject(bench)
        except Exception as error:  # the others are worth having all the same
            n_failed += 1
            log.error("    failed: %s: %s", type(error).__name__, error)
            log.debug("", exc_info=True)
        finally:
            rows = [asdict(row) for row in table_order(bench.rows)]
            write_text(bench.arguments.output, json.dumps(rows, indent=1) + "\n")
        log.info("    %.0f s", time.perf_counter() - begin)
    return n_failed


def main(argv=None):
    """Run the program and return its exit status: 0, 1 if a measurement failed, 2, or 130."""
    arguments = parse_arguments(argv)
    log.handlers[:] = [logging.StreamHandler(sys.stderr)]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # many functions are traced on purpose
    try:
        check_arguments(arguments)
    except BenchError as error:
        log.error("Error: %s", error)
        return 2
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(arguments, Path(folder))
        try:
            status = min(measure(bench), 1)
        except (KeyboardInterrupt, Interrupted):  # the program, once run, turns SIGINT into this
            status = 130
    if arguments.only and not bench.rows and not status:
        log.error("Error: no row begins with %s.", " or ".join(arguments.only))
        return 2
    sys.stdout.write(f"{describe(bench)}\n\n{text_table(table_order(bench.rows))}\n\n")
    log.info("%.0f s; %s", time.perf_counter() - begin, arguments.output)
    return status


if __name__ == "__main__":
    sys.exit(main())
