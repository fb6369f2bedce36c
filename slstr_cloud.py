"""CloudMask: train a network on Sentinel-3 SLSTR scenes, mask scenes with it, and time both.

Read it from top to bottom: main > run_benchmark > train, infer. TensorFlow takes seconds to
import: functions that need it import their modules themselves, so that mistakes are reported fast.
"""

import contextlib
import functools
import logging
import sys
import traceback
from dataclasses import replace

sys.path.insert(0, __file__.rpartition("/")[0])  # python -P and -I omit it
import harness.startup  # noqa: F401, isort: skip  (before all packages)
import numpy as np

import data_loader
from harness import build
from harness.check import check
from harness.clock import active_seconds
from harness.command_line import choose_task, parse_arguments
from harness.console import log_to_screen, progress
from harness.data.prefetch import ReaderPool, exit_process
from harness.errors import is_user_error, one_line
from harness.inference import scores
from harness.inference.background import BackgroundThread, call_in_threads
from harness.inference.masks import compare_masks
from harness.parallel.launchers import detect_launch
from harness.parallel.rendezvous import open_rendezvous
from harness.preflight import choose_skipped
from harness.records import mlperf_log, results
from harness.signals import Interrupted, check_signals, deferred, install_handlers

STEPS_UNWATCHED = 50  # training steps between checks for a loss that is not finite

log = logging.getLogger("cloudmask")


def main(argv=None):
    """Run the program and return its exit status.

    0 is success, 2 an error that the user can fix, 143 SIGTERM, 130 SIGINT, 1 any other error.
    """
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    try:
        launch = detect_launch()
        log_to_screen(arguments.verbose, is_chief=launch.rank == 0)
        task = choose_task(arguments)
        if task.is_finished:
            is_checked = task.mode == "inference"
            left = "nothing is left to do" if is_checked else "its files were not checked"
            log.info("Run %s has finished: %s.", task.folder, left)
            return 0
        with open_rendezvous(launch, task.config.output_dir) as ranks, ranks.translated_errors():
            if task.mode == "check":
                check(task.config, ranks)
            else:
                run_benchmark(task, ranks)
    except Interrupted as error:
        log.error("Stopped: %s.", error)
        return error.code
    except Exception as error:
        if arguments.verbose:
            traceback.print_exc()
        log.error("Error: %s", one_line(error))
        return 2 if is_user_error(error) else 1
    return 0


def run_benchmark(task, ranks):
    """Make one run, from the scenes on disk to the results; or the rest of it if it is resumed."""
    config, mode, is_chief = task.config, task.mode, ranks.launch.rank == 0
    skipped = choose_skipped(config, mode, task.found, task.folder) if is_chief else {}
    with build.open_run(task, ranks, task.found, skipped) as (run, devices, scenes):
        log.info("Run %s", run.folder)
        for line in results.plan(config, mode, scenes, devices):
            log.info("  %s", line)
        run.begin(build.clear_file_cache(config, devices, task.found.all))
        if mode != "inference":
            train(config, devices, run, scenes)
        if mode != "train":
            infer(config, devices, run, scenes.inference)
        check_signals()
        run.mllog.event(mlperf_log.RESULT, results.result_event(run.results))
        devices.gather(0)  # no rank leaves while another one needs it
    if is_chief:
        run.log_summary()


def train(config, devices, run, scenes):
    """Train a network on scenes; the model with the lowest validation loss is run.model_file."""
    labels = build.open_labels(config, devices, run, scenes)
    trainer = build.open_trainer(config, devices)
    skipping = run.bad_scenes.handler
    with (
        build.open_batches(
            config, devices, scenes.train, labels, on_bad_scene=skipping("training", scenes.train)
        ) as training,
        build.open_batches(
            config, devices, scenes.validation, labels, validate=True,
            on_bad_scene=skipping("validation", scenes.validation),
        ) as validation,
    ):  # fmt: skip
        warm_up_seconds = trainer.warm_up(training.replica_batch, validation.replica_batch)
        facts = {
            "scenes_train": len(scenes.train),
            "scenes_test": len(scenes.validation),
            "patches_train": training.n_patches,
            "patches_test": validation.n_patches,
            "loss_function": config.loss,
            "warm_up_seconds": warm_up_seconds,  # tracing and compiling, before the run starts
        }
        state = run.start_training(trainer, facts)
        if config.tensorboard and run.is_chief:
            run.open_tensorboard(*build.board_patches(config, scenes.validation[0]))
        training_feed = devices.distribute(training.batches(state.epoch - 1, state.step))
        validation_feed = devices.distribute(validation.batches())
        log.info("%s", results.epoch_header())
        with run.checkpoint_on_interrupt(trainer, state):
            while not (reason := run.stop_reason(state)):
                run.begin_epoch(trainer, state)
                train_epoch(run, trainer, training, training_feed, state)
                run.begin_evaluation(state)
                begin = active_seconds()
                validated = evaluate(trainer, validation, validation_feed)
                evaluation_seconds = active_seconds() - begin
                with deferred(always=True):
                    trained = trainer.pop_train_metrics()
                    row = results.epoch_row(state, trained, validated, evaluation_seconds)
                    run.end_epoch(trainer, state, row, facts)
    log.info("%s", reason)
    n_scenes = len(scenes.train) + len(scenes.validation)
    run.write_line(results.training_line(config, devices, state, n_scenes))


def train_epoch(run, trainer, training, feed, state):
    """Take the remaining steps of an epoch; a signal waits for the end of the current step."""
    from harness.training.trainer import replace_tensorflow_errors

    begin = active_seconds() - state.seconds
    first, n_steps = state.step, training.n_steps
    steps = progress(range(first, n_steps), f"Epoch {state.epoch}", n_steps - first)
    for _ in run.board.profiled(steps, (state.epoch - 1) * n_steps + first + 1):
        with replace_tensorflow_errors(trainer), deferred():
            asked = active_seconds()
            batch = next(feed)
            state.input_seconds += active_seconds() - asked
            trainer.train_step(batch)
            state.step, state.seconds = state.step + 1, active_seconds() - begin
        if state.step % STEPS_UNWATCHED and state.step < n_steps:
            continue
        if n := trainer.first_bad_step():
            paths = training.scenes_of(state.epoch - 1, first + n - 1)
            raise FloatingPointError(
                f"The loss was not finite in epoch {state.epoch}, step {first + n} of {n_steps}, "
                f"with patches of {', '.join(path.name for path in paths)}. Lower learning_rate, "
                "above all in half precision."
            )
    state.seconds = active_seconds() - begin


def evaluate(trainer, validation, feed):
    """Mean loss and accuracy over all validation patches."""
    from harness.training.trainer import replace_tensorflow_errors

    with replace_tensorflow_errors(trainer):
        for _ in progress(range(validation.n_steps), "Validation", validation.n_steps):
            trainer.eval_step(next(feed))
        return trainer.pop_eval_metrics()


def infer(config, devices, run, paths):
    """Mask scenes with the model in run.model_file, and score the masks."""
    from harness.networks.model_files import load_model

    devices.gather(0)  # the chief has written the model
    model = load_model(run.model_file, config.patch_shape)
    predictors = [build.open_scene_predictor(config, devices, model, one) for one in devices.local]
    facts = {"inference_mode": config.inference_mode, "windows": predictors[0].n_windows}
    if config.inference_mode == "scene" and devices.is_chief:
        reference = build.open_reference_predictor(config, devices, model, devices.local[0])
        with contextlib.suppress(data_loader.SceneError):  # a bad scene is met again below
            facts["differs"] = compare_masks(predictors[0], reference, paths[0], config.n_channels)
    if run.mode == "inference":
        run.start_inference(model, paths)
    masks = build.open_masks(config, devices, run)
    if devices.is_chief:
        masks.remove_locks()
        run.bad_scenes.forget("inference")
    devices.gather(0)  # all ranks begin together
    run.mllog.start(mlperf_log.INFERENCE_START)
    begin = active_seconds()
    on_bad_scene = run.bad_scenes.handler("inference", paths)
    mask_with = functools.partial(mask_scenes, config, devices, run, masks, on_bad_scene)
    shown = [progress(paths, "Masking", len(paths)), *[paths] * (len(predictors) - 1)]
    call_in_threads(mask_with, shown, predictors, on_error=masks.stop)
    seconds = devices.gather(active_seconds() - begin)
    run.mllog.end(mlperf_log.INFERENCE_STOP)
    if run.is_chief:
        run.end_inference(masks, paths, max(seconds), facts)


def mask_scenes(config, devices, run, masks, on_bad_scene, paths, predictor):
    """Mask scenes with one device, while the next one is read and the one before is written."""

    def read(path):
        begin = active_seconds()
        try:
            scene = data_loader.read_scene(
                path, config.shape_in(run.mode), predictor.padding, run.mode != "inference"
            )
        except data_loader.SceneError as error:
            on_bad_scene(path, error)
            scene = None
        return path, scene, active_seconds() - begin

    def write(path, scene, probability, uncertainty, seconds):
        nonlocal last
        begin = active_seconds()
        mask = (probability > scores.THRESHOLD).astype(np.uint8)
        label = None if scene.cloud is None else scene.cloud[..., 0]
        row = scores.score_scene(mask, label, scene.valid, scene.bt_12um, config.min_sst)
        scored = active_seconds()
        row |= seconds | {
            "scene": path.stem,
            "day_night": data_loader.day_or_night(path),
            "seconds": scored - last,  # since the scene before; `write` adds its own
            "score_seconds": scored - begin,
            "out_of_range": scene.out_of_range,
            "device": f"rank {devices.rank}, {predictor.device}",
            "part": run.part,
        }
        kept = (probability, uncertainty) if config.keep_probability else (None, None)
        last = scored + masks.write(path, mask, scene.valid, *kept, row)  # which applies no_data

    last = active_seconds()
    with ReaderPool(1, config.read_timeout) as reader, BackgroundThread() as writer:
        for path, scene, read_seconds in reader.prefetch(read, masks.take(paths), 1):
            if scene is None:
                continue
            if scene.out_of_range:
                log.warning(data_loader.OUT_OF_RANGE_MESSAGE, path, scene.out_of_range)
            begin = active_seconds()
            probability, network_seconds, uncertainty = predictor(scene)
            masks.check_finite(path, probability)
            seconds = {"read_seconds": read_seconds, "network_seconds": network_seconds}
            seconds["stitch_seconds"] = active_seconds() - begin - network_seconds
            scene = replace(scene, channels=None)
            writer.submit(write, path, scene, probability, uncertainty, seconds)


if __name__ == "__main__":
    exit_process(main())
