"""What bench.py measures: each function `measure_...` yields the rows of one group."""

import itertools
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from functools import cache, cached_property, partial
from pathlib import Path

from tools.lib.bench import program  # first: it imports TensorFlow without its messages

# isort: split
import h5py
import keras
import numpy as np
import tensorflow as tf

import data_loader
from harness import REPOSITORY
from harness.build import MAX_READER_THREADS
from harness.config import load_config
from harness.networks.fused_upsampling import fuse_upsampling
from harness.networks.geometry import geometry
from tools.lib.bench.rows import Plan, Row, alternate, is_wanted, make_row, rate
from tools.make_scenes import make_scene, product_name, write_scene

GEMM_SIZE = {"CPU": 3072, "GPU": 16384}  # rows of the matrices; 2048 was 5 % slower on two cores
FILLING_STEPS = 3  # training steps that empty the queues of the loader, which fill up at the start
EPOCH_STEPS = 5  # steps of 32 patches in which 8 mixed scenes of 20 patches each are used up
MANY_SCENES = 1000  # for the time to the first batch
# In the directory; 0.8 of them train. 32 fill the 8 mixed scenes and what is read ahead: 16 took
# 2.10 to 2.13 GB on two cores, 24, 32, 64, 128 and 256 took 2.18, 2.28, 2.25, 2.24 and 2.20 GB.
MEMORY_SCENES = (32, 128)
MEMORY_STEPS = 3  # of training and of validation
READ = ("refs", "bts", "bayes")

log = logging.getLogger("bench")


class Bench:
    """The settings, scenes and devices that the measurements share.

    Args:
        config_file: The configuration of the runs, in a folder for scenes and runs.
        quick: Whether fewer rows are measured, with fewer repeats.
        only: Names that the wanted rows start with; all rows if empty.
        against: Names of other programs to compare with.
    """

    def __init__(self, config_file, quick, only, against=()):
        self.config_file, self.folder = config_file, config_file.parent
        self.quick, self.only, self.repeats = quick, only, 2 if quick else 3
        self.against = against
        self.config = load_config(config_file)
        self.devices = program.open_devices(self.config)
        height, width, patch = self.config.image_h, self.config.image_w, self.config.patch_size
        self.patches_per_scene = (height // patch) * (width // patch)
        self.precisions = ["float32", "bfloat16"] + ["float16"] * (self.devices.kind == "GPU")
        self.gemm_rates = defaultdict(list)  # [GFLOP/s] of each precision, in all groups
        self._trainers = {}

    def wants(self, *names):
        """Whether any of these rows, or rows below them, is asked for."""
        return any(is_wanted(name, self.only) for name in names)

    @cached_property
    def scenes(self):
        """Paths of scenes made for the purpose, by storage; every other scene is at night."""
        n_scenes = 2 if self.quick else 4
        height, width = self.config.image_h, self.config.image_w
        log.info("Making %d scenes of %d x %d ...", n_scenes, height, width)
        options = {"contiguous": {}, "gzip": {"compression": "gzip", "shuffle": True}}
        stored = {storage: [] for storage in options}
        for i in range(n_scenes):
            arrays = make_scene(np.random.default_rng(i), height, width, day=i % 2 == 0)
            for storage, paths in stored.items():
                path = self.folder / storage / product_name("one-day", i)
                path.parent.mkdir(exist_ok=True)
                write_scene(path, {name: arrays[name] for name in READ}, **options[storage])
                paths.append(path)
        return stored

    def links(self, name, n_scenes, storage="contiguous"):
        """A folder of `n_scenes` scenes, which are hard links to the few files that exist."""
        folder, files = self.folder / name, self.scenes[storage]
        if not folder.exists():
            folder.mkdir()
            for i in range(n_scenes):
                os.link(files[i % len(files)], folder / product_name("one-day", i))
        return folder

    def trainer(self, precision, network=None):
        """The trainer of a precision, built once, and of another network than the bench's."""
        network = network or self.config.network
        if (precision, network) not in self._trainers:
            # On CPUs the rate depends on the micro-batch only; 8 patches are two of them.
            batch_size = self.config.batch_size if self.devices.kind == "GPU" else 8
            changed = {"precision": precision, "batch_size": batch_size, "network": network}
            config = self.config.model_copy(update=changed)
            self._trainers[precision, network] = program.build_trainer(config, self.devices)
        return self._trainers[precision, network]

    def alternate(self, functions, seconds=math.inf, precisions=()):
        """Measure in turn, with matrix products in `precisions`; see `rows.alternate`."""
        n = min(GEMM_SIZE[self.devices.kind], 32 * self.config.patch_size)
        products = {f"gemm/{precision}": matrix_product(n, precision) for precision in precisions}
        measured = alternate({**products, **functions}, self.repeats, seconds)
        for precision in precisions:
            self.gemm_rates[precision] += measured[f"gemm/{precision}"]
        return measured

    def rows(self, plans, seconds=math.inf):
        """Measure plans in turn, {name: Plan}; their rows. Limits are measured with them."""
        precisions = list(dict.fromkeys(plan.precision for plan in plans.values()))
        precisions = [precision for precision in precisions if precision]
        functions = {name: plan.function for name, plan in plans.items()}
        measured = self.alternate(functions, seconds, precisions)
        for name, plan in plans.items():
            values, share = measured[name], None
            if plan.precision:
                share = limit_share(measured, plan.precision, plan.gflop, values, plan.unit)
            elif plan.limit:
                share = statistics.median(values) / statistics.median(measured[plan.limit])
            base = measured.get(plan.baseline, ()) if plan.target is None else [plan.target]
            yield make_row(name, plan.unit, values, plan.baseline, base, share)


def n_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def count(items):
    """Number of items, each of which is taken and dropped."""
    return sum(1 for _ in items)


# --- the limit of the machine ---------------------------------------------------------------


@cache
def matrix_product(n, precision):
    """A function that multiplies a matrix (n, n) by itself and returns its rate [GFLOP/s]."""
    matrix = tf.cast(tf.random.stateless_normal((n, n), seed=(1, 2)), precision)
    multiply = tf.function(lambda: tf.linalg.matmul(matrix, matrix)[0, 0])
    multiply().numpy()  # traces
    return rate(lambda: multiply().numpy(), 2 * n**3 / 1e9)


def limit_share(measured, precision, gflop, values, unit):
    """The network's rate of operations over that of matrix products measured with it.

    Args:
        measured: Of `Bench.alternate`.
        precision: Of the network and the matrix products.
        gflop: Operations, 10^9, of one unit: of a patch at 'patches/s', of a scene at 's/scene'.
        values: Of the network, in the unit.
        unit: Of the row.
    """
    value = statistics.median(values)
    found = gflop * value if unit.endswith("/s") else gflop / value
    return found / statistics.median(measured[f"gemm/{precision}"])


def network_gflop(network):
    """Operations of one pass of one window, 10^9: two for each multiply-add of the layers.

    The U-Net has 163,904 multiply-adds per pixel, so that 1200 x 1504 pixels take 592 GFLOP and 63
    patches of 256 x 256 take 1353 GFLOP.
    """
    return 2e-9 * geometry(network).multiplications_per_pixel * math.prod(network.input_shape[1:3])


def training_gflop(config):
    """Operations of training a patch, 10^9: gradients of weights and inputs cost a pass each."""
    return 3 * network_gflop(program.build_network(config))  # 64.4 for the U-Net


def inference_gflop(config):
    """Operations for one scene, 10^9, by `inference_mode`."""
    return {
        mode: len(grid.corners) * network_gflop(program.build_network(config, grid.window))
        for mode, grid in program.inference_grids(config).items()
    }


def measure_gemm(bench):
    """Matrix products; all repeats of the other groups count."""
    bench.alternate({}, precisions=[p for p in bench.precisions if p not in bench.gemm_rates])
    for precision in bench.precisions:
        yield make_row(f"gemm/{precision}", "GFLOP/s", bench.gemm_rates[precision])


# --- reading --------------------------------------------------------------------------------


def measure_loading(bench):
    """Training input alone, compared with h5py and a textbook pipeline."""
    most = min(n_cores(), MAX_READER_THREADS)
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n < most] + [most]
    plans = {"loader_naive": Plan("patches/s", partial(naive_rate, bench))}
    for storage, raw in (("contiguous", "raw_read"), ("gzip", "raw_read/gzip")):
        plans[raw] = Plan("patches/s", partial(h5py_rate, bench, bench.scenes[storage]))
        baseline = "loader_naive" if storage == "contiguous" else raw
        for n in counts[-1:] if bench.quick and storage == "gzip" else counts:
            name = f"loader/{storage}/{n} thread{'s' if n > 1 else ''}"
            if bench.wants(name):
                function = partial(loader_rate, bench, storage, n)
                plans[name] = Plan("patches/s", function, baseline, limit=raw)
    yield from bench.rows(plans, 30 if bench.quick else 100)


def loader_rate(bench, storage, n_threads):
    """The rate of the benchmark's training input [patches/s].

    Timed over steps in which the mixed scenes are used up, after as many that fill the queues: what
    was read before the first timed step is as much as what has been read ahead at the last one.
    """
    paths = data_loader.find_scenes(bench.links(f"loader-{storage}", 16, storage))
    batch_size = bench.config.batch_size
    n_steps = -(-data_loader.MIXED_SCENES * bench.patches_per_scene // batch_size)
    n_timed = n_steps if storage == "gzip" else 2 * n_steps
    with program.build_batches(bench.config, bench.devices, paths, n_threads) as batches:
        feed = iter(batches.batches())
        count(itertools.islice(feed, n_steps))
        return rate(lambda: count(itertools.islice(feed, n_timed)), n_timed * batch_size)()


def h5py_rate(bench, paths):
    """The rate at which h5py reads the training crop in one thread [patches/s]."""
    n_patches = len(paths) * bench.patches_per_scene
    return rate(lambda: count(read_crop(bench, path) for path in paths), n_patches)()


def read_crop(bench, path):
    """Read the training crop of a scene with h5py: the arrays of READ."""
    config = bench.config
    crop = data_loader.training_crop(config.image_h, config.image_w, config.patch_size)
    with h5py.File(path, "r") as file:
        return [file[name][crop] for name in READ]


def naive_rate(bench):
    """The rate of a textbook pipeline [patches/s]: one thread, whole scenes, plain operations.

    It is as fast as such a pipeline gets: only the crop is read, the arithmetic is in float32 where
    possible, and missing values remain. With float64, all rows and missing values replaced it took
    twice the time.
    """
    p, paths = bench.config.patch_size, bench.scenes["contiguous"]

    def scenes():
        for path in paths:
            refs, bts, bayes = read_crop(bench, path)
            refs = (refs - data_loader.REFLECTANCE_OFFSET).astype(np.float32)
            bts = (bts - data_loader.BT_OFFSET) / data_loader.BT_SCALE
            yield np.concatenate([refs, bts], axis=-1), (bayes != 0).astype(np.uint8)

    def cut(image):  # (H, W, C) to (n, p, p, C)
        tiles = tf.image.extract_patches(
            image[None], (1, p, p, 1), (1, p, p, 1), (1, 1, 1, 1), "VALID"
        )
        return tf.reshape(tiles, (-1, p, p, image.shape[-1]))

    signature = (
        tf.TensorSpec((None, None, bench.config.n_channels), tf.float32),
        tf.TensorSpec((None, None, 1), tf.uint8),
    )
    dataset = tf.data.Dataset.from_generator(scenes, output_signature=signature)
    dataset = dataset.map(lambda channels, cloud: (cut(channels), cut(cloud)))
    dataset = dataset.unbatch().batch(bench.config.batch_size)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    n_patches = len(paths) * bench.patches_per_scene
    return rate(lambda: count(dataset.with_options(options)), n_patches)()


def measure_first_batch(bench):
    """From a directory of a thousand scenes to the first batch."""
    folder = bench.links("many", MANY_SCENES)

    def first_batch():
        begin = time.perf_counter()
        paths, _ = data_loader.split_scenes(data_loader.find_scenes(folder), 0.8)
        with program.build_batches(bench.config, bench.devices, paths) as batches:
            next(iter(batches.batches()))
            return time.perf_counter() - begin  # before the wait for the readers to close

    yield from bench.rows({"time_to_first_batch": Plan("s", first_batch)})


# --- training -------------------------------------------------------------------------------


def measure_training(bench):
    """Steps on data in memory, and the cost of the distribution strategy."""
    plans, gflop = {}, training_gflop(bench.config)
    for precision in bench.precisions:
        name, base = f"train_step/{precision}", "train_step/float32"
        if precision == "float32" or bench.wants(name):
            step = training_rate(bench, bench.trainer(precision))
            plans[name] = Plan("patches/s", step, base, precision=precision, gflop=gflop)
    if bench.wants("strategy_overhead"):
        plain = plain_step(bench)
        plain()  # traces
        ours, plain = (
            plans["train_step/float32"].function,
            rate(plain, bench.trainer("float32").batch_size),
        )
        plans["strategy_overhead"] = Plan("ratio", lambda: plain() / ours())
    yield from bench.rows(plans, 30 if bench.quick else 100)


def training_rate(bench, trainer):
    """A function that takes a traced step on data in memory and returns its rate [patches/s]."""
    batch = next(bench.devices.distribute(in_memory(bench, trainer)))
    step = partial(program.train_on, trainer, batch)
    step()  # traces
    return rate(step, trainer.batch_size)


def in_memory(bench, trainer):
    """Yield the same batch for the replicas of a trainer without end."""
    share = -(-trainer.batch_size // bench.devices.n_replicas)
    share = -(-share // trainer.micro_batch) * trainer.micro_batch
    rng = np.random.default_rng(0)
    shape = (share, *(bench.config.patch_size,) * 2)
    batch = (
        rng.standard_normal((*shape, bench.config.n_channels), np.float32),
        rng.integers(0, 2, (*shape, 1), np.uint8),
        np.ones(share, np.float32),
        np.int32(share),
    )
    return itertools.repeat(tuple(map(tf.constant, batch)))


def plain_step(bench):
    """The float32 step as a plain loop without strategy and trainer: a function to be timed."""
    trainer, config = bench.trainer("float32"), bench.config
    model = program.build_network(config)
    network = fuse_upsampling(model)
    optimizer = keras.optimizers.Adam(config.learning_rate)
    optimizer.build(model.trainable_variables)
    clip = slice(config.clip_offset, config.patch_size - config.clip_offset)

    @tf.function
    def gradients_of(channels, cloud):
        with tf.GradientTape() as tape:
            probability = network(channels, training=True)[:, clip, clip]
            label = tf.cast(cloud[:, clip, clip], tf.float32)
            loss = tf.reduce_mean(keras.losses.binary_crossentropy(label, probability))
        return tape.gradient(loss, model.trainable_variables)

    @tf.function
    def step(channels, cloud):
        n, m = channels.shape[0], trainer.micro_batch
        total = [tf.zeros_like(v) for v in model.trainable_variables]
        for first in tf.range(0, n, m):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            part = [
                tf.ensure_shape(a[first : first + m], (m, *a.shape[1:])) for a in (channels, cloud)
            ]
            total = [t + g * (m / n) for t, g in zip(total, gradients_of(*part), strict=True)]
        optimizer.apply(total, model.trainable_variables)

    with tf.device(bench.devices.local[0]):
        batch = [tf.constant(a) for a in next(in_memory(bench, trainer))[:2]]

    def run():
        step(*batch)
        model.trainable_variables[-1].numpy()  # waits

    return run


def measure_epoch(bench):
    """Training from files, and how long its steps wait for data.

    In the precision that trains fastest, which waits longest. The steps from files follow one
    another directly: anything between them would give the loader time.
    """
    precision = "bfloat16"
    batch_size = 4 if bench.quick else bench.config.batch_size
    config = bench.config.model_copy(update={"precision": precision, "batch_size": batch_size})
    trainer = program.build_trainer(config, bench.devices)
    train = partial(program.train_on, trainer)
    memory = bench.devices.distribute(in_memory(bench, trainer))
    train(next(memory))
    baseline = time_steps(memory, train, 1)
    paths = data_loader.find_scenes(bench.links("loader-contiguous", 16))
    with program.build_batches(config, bench.devices, paths) as batches:
        feed = bench.devices.distribute(batches.batches())
        time_steps(feed, train, FILLING_STEPS)
        steps = time_steps(feed, train, EPOCH_STEPS)
    baseline += time_steps(memory, train, 1)
    rates, base_rates = ([batch_size / s for _, s in each] for each in (steps, baseline))
    yield make_row(f"train_epoch/{precision}", "patches/s", rates, "in memory", base_rates)
    waits = [waited / seconds for waited, seconds in steps]
    yield Row("input_stall", "share", waiting_share(steps), min(waits), max(waits))


def time_steps(feed, train, n_steps, clock=time.perf_counter):
    """Train on the next batches; [(seconds waited for the batch, seconds of the step)]."""
    steps = []
    for _ in range(n_steps):
        begin = clock()
        batch = next(feed)
        waited = clock() - begin
        train(batch)
        steps.append((waited, clock() - begin))
    return steps


def waiting_share(steps):
    """Share of the time of all steps that was spent waiting for data."""
    return sum(waited for waited, _ in steps) / sum(seconds for _, seconds in steps)


# --- inference ------------------------------------------------------------------------------


def measure_inference(bench):
    """The benchmark's inference from files to masks in each mode, and its network alone."""
    model_file = bench.folder / "model.keras"
    program.build_network(bench.config).save(model_file)
    n_scenes = {"patches": 1, "scene": 1} if bench.quick else {"patches": 2, "scene": 4}
    folders = {mode: bench.links(f"infer-{mode}", n) for mode, n in n_scenes.items()}
    kinds = [f"{mode}/{precision}" for mode in folders for precision in bench.precisions]
    if bench.quick:
        kinds = ["patches/float32", "scene/bfloat16"]
    base, *others = kinds
    kinds = [base, *(k for k in others if bench.wants(f"infer_{k}", f"overhead/{k}"))]
    found, plans, gflop = {}, {}, inference_gflop(bench.config)

    def run(kind):
        mode, precision = kind.split("/")
        results = program.run_inference(
            bench.config, bench.config_file, inference_dir=folders[mode], model_file=model_file,
            run_name=kind.replace("/", "-"), inference_mode=mode, precision=precision,
        )  # fmt: skip
        whole, network = results["seconds_per_scene"], results["seconds_per_scene_parts"]["network"]
        found[kind] = whole, network
        return whole

    for kind in kinds:
        mode, precision = kind.split("/")
        # `run` is called first; the other rows take their parts of what it found.
        for part, function in {"": run, "/network": lambda k: found[k][1]}.items():
            plans[f"infer_{kind}{part}"] = Plan(
                "s/scene", partial(function, kind), f"infer_patches/float32{part}",
                precision=precision, gflop=gflop[mode],
            )  # fmt: skip
        plans[f"overhead/{kind}"] = Plan("ratio", lambda k=kind: found[k][0] / found[k][1])
    yield from bench.rows(plans, 40 if bench.quick else 150)


def random_scene(bench, grid):
    """A scene of noise with the padding of a grid, and its windows (n, rows, cols, C)."""
    (rows, cols), corners = grid.window, grid.corners
    shape = (*np.max(corners, axis=0) + grid.window, bench.config.n_channels)
    scene = np.random.default_rng(0).standard_normal(shape, np.float32)
    return scene, np.stack([scene[i : i + rows, j : j + cols] for i, j in corners])


# --- next to the reference ------------------------------------------------------------------


def measure_against_unet(bench):
    """The network next to the reference: training steps, and a scene without reading it."""
    plans, networks = {}, dict.fromkeys(("unet", str(bench.config.network)))
    for precision, network in itertools.product(bench.precisions[:2], networks):

        def add(work, unit, function, gflop, precision=precision, network=network):
            rows = f"unet/{work}/{precision}"
            plans[f"{rows}/{Path(network).stem}"] = Plan(
                unit, function, f"{rows}/unet", precision=precision, gflop=gflop
            )

        changed = {"network": network, "precision": precision}
        config = bench.config.model_copy(update=changed)
        if bench.wants(f"unet/train_step/{precision}"):
            step = training_rate(bench, bench.trainer(precision, network))
            add("train_step", "patches/s", step, training_gflop(config))
        for mode, gflop in inference_gflop(config).items():
            if bench.wants(f"unet/infer_{mode}/{precision}"):
                config = config.model_copy(update={"inference_mode": mode})
                model = program.build_network(config)
                predictor = program.build_predictor(config, bench.devices, model)
                scene, _ = random_scene(bench, predictor.grid)
                predict = partial(predictor, scene)
                add(f"infer_{mode}", "s/scene", lambda predict=predict: predict()[1], gflop)
    yield from bench.rows(plans, 60 if bench.quick else 240)


# --- memory ---------------------------------------------------------------------------------


def measure_memory(bench):
    """Peak memory of training in a process of its own, and with four times the scenes."""
    if bench.quick and not bench.only:
        return
    peaks = {}
    for n_scenes in MEMORY_SCENES:
        log.info("    %d scenes ...", n_scenes)
        folder = bench.links(f"memory-{n_scenes}", n_scenes)
        settings = [f"train_dir={folder}", f"run_name=memory-{n_scenes}", "epochs=1"]
        command = "from tools.lib.bench import program; program.run_few_steps()"
        answer = subprocess.run(
            [sys.executable, "-c", command, str(MEMORY_STEPS), "--config", bench.config_file,
             "--mode", "train", "--set", *settings],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if answer.returncode:
            raise RuntimeError(answer.stderr.strip().rpartition("\n")[2])
        peaks[f"peak_rss/{n_scenes} scenes"] = [int(answer.stdout.split()[-1]) / 1e9]
    first = next(iter(peaks))
    for name, values in peaks.items():
        yield make_row(name, "GB", values, first, peaks[first])
