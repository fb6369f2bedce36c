"""What a GPU needs from its host, measured on processors: `measure_host` yields the rows."""

import itertools
import threading
import time
from functools import cache, partial
from unittest import mock

from tools.lib.bench import program  # first: it imports TensorFlow without its messages

# isort: split
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as eager
from tensorflow.python.eager import executor

from harness.parallel.devices import on_replicas
from tools.lib.bench.measurements import count, loader_rate, time_steps
from tools.lib.bench.rows import Plan

PRECISIONS = {"float32": "float32", "half": "bfloat16"}  # half: patches travel as float16
TARGETS = {"files": 1.3, "disk": 0.3, "memory": 0.15}  # [ms] of one core per patch
PYTHON_TARGET = 1.0  # [ms] per step
FILLING_EPOCHS = 3  # fill the caches, and touch all the memory that batches use again
N_EPOCHS = 2  # that are timed after these
N_STEPS = 20  # whose Python is timed, and that the simulated device takes
COPY_SECONDS, STEP_SECONDS = 0.02, 0.04  # of the simulated device


def measure_host(bench):
    """What a GPU needs from its host: reading, Python, copies."""
    plans = {}
    for source, kind in itertools.product(TARGETS, PRECISIONS):
        cpu = partial(cpu_per_patch, bench, source, kind)
        plans[f"cpu/{source}/{kind}"] = Plan("ms/patch", cpu, "target", target=TARGETS[source])
    for kind in PRECISIONS:
        size = partial(patch_megabytes, bench, kind)
        plans[f"bytes/{kind}"] = Plan("MB/patch", size, "host/bytes/float32")
    for n in (1, 2):
        rate = partial(loader_rate, bench, "contiguous", n)
        plans[f"threads/{n}"] = Plan("patches/s", rate, "host/threads/1")
    python = partial(python_per_step, bench)
    plans["python"] = Plan("ms/step", python, "target", target=PYTHON_TARGET)
    plans["copy_hidden"] = Plan("share", partial(hidden_share, bench.devices))
    wanted = {  # with the rows of its kind, one of which may be the baseline
        f"host/{name}": plan
        for name, plan in plans.items()
        if bench.wants(f"host/{name.partition('/')[0]}")
    }
    yield from bench.rows(wanted, 20 if bench.quick else 90)


def open_batches(bench, source, kind):
    """The batches of a run that reads scenes of `source` in one thread."""
    changed = {"precision": PRECISIONS[kind]}
    if source == "disk":
        changed["cache_dir"] = str(bench.folder / "cache")
    if source == "memory":
        changed["cache"] = "memory"
    config = bench.config.model_copy(update=changed)
    return program.build_batches(config, bench.devices, bench.scenes["contiguous"], n_threads=1)


def cpu_per_patch(bench, source, kind):
    """Processor time that a patch takes from its source to its batch, all threads [ms]."""
    with open_batches(bench, source, kind) as batches:
        feed = batches.batches()
        count(itertools.islice(feed, FILLING_EPOCHS * batches.n_steps))
        n_steps = N_EPOCHS * batches.n_steps
        begin = time.process_time()
        count(itertools.islice(feed, n_steps))
        seconds = time.process_time() - begin
    return 1000 * seconds / (N_EPOCHS * batches.n_patches)


def patch_megabytes(bench, kind):
    """Size of what is copied to the device for each patch of a batch [MB]."""
    with open_batches(bench, "files", kind) as batches:
        element = next(batches.batches())
    return sum(part.nbytes for part in element) / len(element[0]) / 1e6


@cache
def small_trainer(bench):
    """A trainer of patches of 8 x 8 pixels, and its configuration."""
    sizes = {"image_h": 32, "image_w": 40, "patch_size": 8, "clip_offset": 0}  # 20 patches
    config = bench.config.model_copy(update=sizes)
    return program.build_trainer(config, bench.devices), config


def python_per_step(bench):
    """Processor time of the thread that feeds and starts training steps [ms].

    The patches are small and are not read, and the steps wait in a thread of TensorFlow, as in the
    queue of a GPU, so that what remains is the Python of batches, copies and steps.
    """
    trainer, config = small_trainer(bench)
    strategy, queue = bench.devices.strategy, executor.new_executor(enable_async=True)
    paths, gate = bench.scenes["contiguous"] * 4, threading.Event()  # more than a batch mixes
    with program.build_batches(config, bench.devices, paths) as batches:
        with mock.patch.object(batches, "read", lambda path, patches: 0):
            feed = batches.batches()
            trainer.train_step(on_replicas(strategy, feed))  # traces
            with eager.executor_scope(queue):
                tf.py_function(gate.wait, [], [tf.bool])
            try:
                begin = time.thread_time()
                for _ in range(N_STEPS):
                    batch = on_replicas(strategy, feed)
                    with eager.executor_scope(queue):
                        trainer.train_step(batch)
                seconds = time.thread_time() - begin
            finally:
                gate.set()
            queue.wait()
    return 1000 * seconds / N_STEPS


class SlowCopy:
    """An array whose copy takes COPY_SECONDS and, as that to a GPU, no processor."""

    def __array__(self, dtype=None, copy=None):
        time.sleep(COPY_SECONDS)
        return np.zeros(1, dtype)


def hidden_share(devices):
    """Share of the copies' time that is hidden behind the steps of a simulated device."""
    feed = devices.distribute(itertools.repeat((SlowCopy(),)))
    time_steps(feed, lambda batch: time.sleep(STEP_SECONDS), 2)  # start the copies
    steps = time_steps(feed, lambda batch: time.sleep(STEP_SECONDS), N_STEPS)
    feed.close()
    return 1 - sum(waited for waited, _ in steps) / (N_STEPS * COPY_SECONDS)
