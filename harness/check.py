"""--mode check: whether a benchmark would run, its time and memory; nothing is written."""

import logging
import sys
import time

import numpy as np

from data_loader import OUT_OF_RANGE_MESSAGE, SceneError, read_scene
from harness.build import open_batches, open_devices, open_predictor, open_trainer
from harness.console import counted, format_bytes, format_duration, table
from harness.errors import UserError
from harness.labels.label_files import check_labels
from harness.parallel.gpu_setup import why_no_gpu
from harness.preflight import (
    FoundScenes,
    check_free_space,
    check_scenes,
    describe_scenes,
    reject_bad_scenes,
    results_bytes,
)
from harness.records.run import peak_rss

SCENES_SAMPLED = 8  # of each set
STEPS_MEASURED = 3

log = logging.getLogger(__name__)


def check(config, ranks):
    """Inspect all scenes by their headers and some completely, the disk and the devices.

    Args:
        config: Config.
        ranks: SingleRank; the check is made by one process.

    Raises:
        UserError: If a benchmark would not run.
    """
    if ranks.launch.n_ranks > 1:
        raise UserError(
            f"--mode check runs in one process, found {ranks.launch.n_ranks} ranks. Start it "
            "without srun, jsrun or mpirun."
        )
    found = FoundScenes.find(config.train_dir, config.inference_dir, "benchmark")
    check_labels(config.labels, found.train)
    labelled = found.labelled(config.uses_bayes)
    stored, bad = check_scenes(found.all, config.scene_shape, labelled, config.read_timeout)
    columns = {}
    for name, paths in (("train_dir", found.train), ("inference_dir", found.inference)):
        good = [path for path in paths if path in stored]
        samples = []
        for path in good[:: -(-len(good) // SCENES_SAMPLED)] if good else ():
            begin = time.perf_counter()
            try:
                scene = read_scene(path, config.scene_shape, labelled=path in labelled)
                samples.append((scene, time.perf_counter() - begin))
                if scene.out_of_range:
                    log.warning(OUT_OF_RANGE_MESSAGE, path, scene.out_of_range)
            except SceneError as error:
                bad[path] = str(error)
        kept = {path: stored[path] for path in good if path not in bad}
        columns[name] = describe_scenes(paths, kept, samples)
    sys.stdout.write(table(columns) + "\n")
    reject_bad_scenes(found.all, bad, config.on_bad_scene)
    for reason in bad.values():
        log.warning("Skipped: %s", reason)
    needed = results_bytes(config.scene_shape, len(found.inference), config.keep_probability)
    free = check_free_space(config.output_dir, needed)
    skipped = {str(path): reason for path, reason in bad.items()}
    lines = measure(config, ranks, found.split(config.train_split, skipped))
    lines["disk"] = (
        f"up to {format_bytes(needed)}, {format_bytes(free)} free in {config.output_dir}"
    )
    sys.stdout.write("\n" + table({"the run": lines}) + "\n")


def measure(config, ranks, scenes):
    """Train a few steps and mask one scene: {line of a table: text} about time and memory."""
    if config.gpu != 0:
        warn_of_unused_gpus()
    devices = open_devices(config, ranks)
    trainer = open_trainer(config, devices)
    seconds = []
    with open_batches(config, devices, scenes.train) as training:
        trainer.warm_up(training.replica_batch, training.replica_batch)
        feed = devices.distribute(training.batches())
        for _ in range(1 + STEPS_MEASURED):
            begin = time.perf_counter()
            trainer.train_step(next(feed))
            _ = trainer.train_totals  # waits for the devices
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        trainer.eval_step(next(feed))
        trainer.pop_eval_metrics()
        eval_seconds = time.perf_counter() - begin
        n_steps = training.n_steps
    share = len(scenes.validation) / len(scenes.train)
    epoch = n_steps * (np.median(seconds[1:]) + share * eval_seconds)
    predictor = open_predictor(config, devices, trainer.model, devices.local[0])
    scene = read_scene(scenes.inference[0], config.scene_shape, predictor.grid.padding)
    begin = time.perf_counter()
    predictor(scene.channels)
    inference = (time.perf_counter() - begin) * len(scenes.inference) / devices.n_replicas
    gpu_memory = [f"{format_bytes(n)} of each GPU" for n in devices.peak_gpu_memory()[:1]]
    return {
        "devices": devices.describe(),
        "training": f"{format_duration(epoch)} per epoch, {format_duration(epoch * config.epochs)} "
        f"for {counted(config.epochs, 'epoch')} (from {STEPS_MEASURED} steps)",
        "inference": f"{format_duration(inference)} for {counted(len(scenes.inference), 'scene')} "
        "(from one)",
        "memory": " and ".join([format_bytes(peak_rss()), *gpu_memory])
        + " at the peak of this check",
    }


def warn_of_unused_gpus():
    """Say why TensorFlow lists no GPU if this machine has one."""
    import harness.quiet_tensorflow  # noqa: F401, isort: skip  (before TensorFlow)
    import tensorflow as tf

    reason = why_no_gpu(tf.sysconfig.get_build_info())
    if reason and not tf.config.list_physical_devices("GPU"):
        log.warning("%s", reason)
