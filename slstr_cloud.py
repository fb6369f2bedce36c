"""CloudMask: train a U-Net on Sentinel-3 SLSTR scenes, then mask scenes with it, and time both.

python slstr_cloud.py --config config.yaml
"""

import argparse
import functools
import json
import logging
import math
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import harness.quiet_tensorflow  # noqa: F401  (before all that imports TensorFlow)

# isort: split
import keras
import numpy as np

import data_loader
from data_loader import PatchBatches, SceneError
from harness.config import load_config
from harness.console import format_bytes, format_duration, log_to_screen, progress, table
from harness.data.cache import cached
from harness.data.hdf5 import shape_matches
from harness.data.prefetch import ReaderPool, exit_process
from harness.data.preflight import (
    DURING_START,
    BadScenes,
    check_disk,
    check_scenes,
    describe_scenes,
    results_bytes,
)
from harness.errors import UserError, is_user_error, one_line
from harness.files import file_sha256, json_sha256, replacing, write_csv
from harness.inference import scores
from harness.inference.masks import MaskFolder
from harness.inference.predictor import Predictor, predictor_that_fits
from harness.inference.windows import StripGrid
from harness.parallel.devices import open_devices, watch_ranks
from harness.parallel.launchers import detect_launch
from harness.parallel.rendezvous import Rendezvous
from harness.records import mlperf_log, results
from harness.records.mlperf_log import keys
from harness.records.resume import MODES, find_requeued, load_resumed, sole_user
from harness.records.run import Run, make_folder, make_report, peak_rss
from harness.records.tensorboard import TensorBoard
from harness.signals import Interrupted, check_signals, deferred, install_handlers
from harness.training.trainer import POLICIES, Trainer, translated_errors
from model import DOWNSCALING, RECEPTIVE_RADIUS, unet

STEPS_UNWATCHED = 50  # of training, between looks for a loss that is not finite
THRESHOLD = 0.5  # cloud where the probability is above
SCENES_SAMPLED = 8  # of each set, by --mode check
STEPS_MEASURED = 3
BOARD_PATCHES = 4  # whose masks TensorBoard shows
STRIPS_TRIED = (1, 2, 4, 8)  # of a scene, until they fit the memory; 8 predict most rows twice
HISTORY_COLUMNS = (
    "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "patches_per_second",
)  # fmt: skip

log = logging.getLogger("cloudmask")


def train(config, devices, run, train_paths, test_paths):
    """Train on scenes; keep the model with the best validation loss in the run's model file."""
    trainer = open_trainer(config, devices)
    batches = training_batches(config, devices, trainer.micro_batch)
    with (
        batches(
            train_paths,
            shuffle=True,
            batch_size=config.batch_size,
            on_bad_scene=how_to_leave_out(config, run, "training", train_paths),
        ) as training,
        # The sums of validation are the same for any batch; a small one leaves memory to training.
        batches(
            test_paths,
            shuffle=False,
            batch_size=trainer.micro_batch * devices.n_replicas,
            n_mixed_scenes=devices.n_ranks,
            on_bad_scene=how_to_leave_out(config, run, "validation", test_paths),
        ) as validation,
    ):
        warm_up_seconds = trainer.warm_up(training.replica_batch, validation.replica_batch)
        state = run.restore(trainer)
        if not run.goes_on:
            n_patches = training.n_patches, validation.n_patches
            mlperf_log.log_hyperparameters(config, devices, run.mllog, *n_patches)
            run.start()
        if config.tensorboard and run.is_chief:
            run.board = open_board(config, run, test_paths[0])
            if config.profile_steps and config.profile_steps[0] > config.epochs * training.n_steps:
                log.warning("profile_steps are beyond the last step: none is profiled.")
        for _ in train_epochs(config, devices, run, trainer, training, validation, state):
            run.results["training"] = results.training_results(
                state, (train_paths, test_paths), (training, validation), warm_up_seconds
            )
            run.save_results("running")
    n_scenes = len(train_paths) + len(test_paths)
    run.write_line(results.training_line(config, devices, state, n_scenes))


def train_epochs(config, devices, run, trainer, training, validation, state):
    """Train to the end, yielding after each epoch; the state goes along, and is saved."""
    training_feed = devices.distribute(training.dataset(state.epoch - 1, state.step))
    validation_feed = devices.distribute(validation.dataset())
    if state.history:
        yield
    log.info("%s", results.epoch_header())
    while not (reason := why_training_ends(config, state)):
        with run.saving_when_interrupted(trainer, state):
            numbered = {"epoch_num": state.epoch}
            if not state.step:
                run.mllog.start(keys.EPOCH_START, metadata=numbered)
            state.mlperf_bytes = run.mlperf_bytes()
            begin = time.perf_counter() - state.seconds
            train_epoch(run, trainer, training, training_feed, state, begin)
            with deferred():
                state.totals, trained = trainer.totals, trainer.take_totals()
            train_seconds = time.perf_counter() - begin
            run.mllog.end(keys.EPOCH_STOP, metadata=numbered)

            run.mllog.start(keys.EVAL_START, metadata=numbered)
            with translated_errors(validation, trainer):
                for _ in progress(range(validation.n_steps), "Validation", validation.n_steps):
                    trainer.eval_step(next(validation_feed))
                validated = trainer.take_totals()
            row = {
                "epoch": state.epoch,
                **trained,
                **{f"val_{name}": value for name, value in validated.items()},
                "seconds": time.perf_counter() - begin,
                "train_seconds": train_seconds,
                "input_seconds": state.input_seconds,
                "patches_per_second": trained["patches"] / train_seconds,
            }
            with deferred():
                run.mllog.event(keys.EVAL_ACCURACY, row["val_accuracy"], metadata=numbered)
                run.mllog.end(keys.EVAL_STOP, metadata=numbered)
                keep_epoch(config, run, trainer, state, row)
            yield
    log.info("%s", reason)


def train_epoch(run, trainer, training, feed, state, begin):
    """Take the steps of an epoch that are left; SIGTERM and SIGINT wait for the end of one."""
    first, n_steps = state.step, training.n_steps
    trainer.totals, state.totals = state.totals, None
    steps = progress(range(first, n_steps), f"Epoch {state.epoch}", n_steps - first)
    for _ in run.board.profiled(steps, (state.epoch - 1) * n_steps + first + 1):
        with translated_errors(training, trainer), deferred():
            trainer.train_step(next_batch(feed, state))
            state.step, state.seconds = state.step + 1, time.perf_counter() - begin
        if state.step % STEPS_UNWATCHED and state.step < n_steps:
            continue
        if n := trainer.first_bad_step():
            scenes = training.scenes_of(state.epoch - 1, first + n - 1)
            raise FloatingPointError(
                f"The loss was not finite in epoch {state.epoch}, step {first + n} of {n_steps}, "
                f"with patches of {', '.join(path.name for path in scenes)}. Lower learning_rate, "
                "or set precision: float32."
            )


def next_batch(feed, state):
    """The next batch; the time that it is waited for counts."""
    begin = time.perf_counter()
    batch = next(feed)
    state.input_seconds += time.perf_counter() - begin
    return batch


def keep_epoch(config, run, trainer, state, row):
    """Tell of an epoch that has ended, and keep what it earned."""
    state.end_epoch(row, run.mlperf_bytes())
    log.info("%s", results.epoch_line(state.history, config.epochs))
    if run.is_chief:
        write_csv(run.path("history.csv"), HISTORY_COLUMNS, state.history)
        run.board.write_epoch(row, trainer.model)
    if not math.isfinite(row["val_loss"]):
        raise FloatingPointError(
            f"The loss on validation became {row['val_loss']} in epoch {row['epoch']}. "
            f"Lower learning_rate ({config.learning_rate}), or set precision: float32."
        )
    if row is state.best and run.is_chief:
        with replacing(run.model_file) as temporary:
            trainer.model.save(temporary)
    if row["epoch"] % config.checkpoint_every == 0 or why_training_ends(config, state):
        run.save_checkpoint(trainer, state)


def why_training_ends(config, state):
    """Say that there are epochs enough, the target is reached or patience is over; else None."""
    if not state.history:
        return None
    last = state.history[-1]
    if config.target_accuracy and last["val_accuracy"] >= config.target_accuracy:
        return f"Reached target_accuracy {config.target_accuracy}."
    if config.patience and last["epoch"] - state.best["epoch"] >= config.patience:
        return f"No better validation loss for {config.patience} epochs."
    if last["epoch"] >= config.epochs:
        return f"Trained {last['epoch']} epochs."
    return None


def open_trainer(config, devices):
    """A new network on all devices, ready to be trained as the configuration says."""
    shape = (config.patch_size, config.patch_size, config.n_channels)
    return Trainer(
        devices.strategy,
        functools.partial(unet, shape, POLICIES[config.precision]),
        config.learning_rate,
        config.batch_size,
        devices.micro_batch(config.micro_batch, config.batch_size),
        config.clip_offset,
        config.cloud_weight,
        loss_scaling=config.precision == "float16",
        xla=config.xla,
    )


def training_batches(config, devices, micro_batch):
    """How training and validation read their scenes; what they do differently is left."""
    shape = (config.image_h, config.image_w, config.n_channels)
    read = functools.partial(data_loader.read_patches, shape=shape, patch_size=config.patch_size)
    if config.cache_dir:
        read = cached(read, config.cache_dir, f"{shape} {config.patch_size}")
    return functools.partial(
        PatchBatches,
        read=read,
        patch_size=config.patch_size,
        patches_per_scene=(config.image_h // config.patch_size)
        * (config.image_w // config.patch_size),
        n_channels=config.n_channels,
        replicas=devices.replicas,
        n_replicas=devices.n_replicas,
        n_mixed_scenes=max(data_loader.MIXED_SCENES, devices.n_ranks)
        if config.shuffle_scenes == "auto"
        else config.shuffle_scenes,
        seed=config.seed,
        multiple=micro_batch,
        read_timeout=config.read_timeout,
    )


def open_board(config, run, path):
    """What TensorBoard shows of this run; the masks are those of patches of one scene."""
    shape, size = (config.image_h, config.image_w, config.n_channels), config.patch_size
    n_rows, n_cols = config.image_h // size, config.image_w // size
    first = n_rows // 2 * n_cols  # of the middle row of patches
    channels = np.zeros((min(n_cols, BOARD_PATCHES), size, size, config.n_channels), np.float32)
    cloud = np.zeros((*channels.shape[:3], 1), np.uint8)
    patches = {first + i: pair for i, pair in enumerate(zip(channels, cloud, strict=True))}
    with passing_over_bad_scenes(config):
        data_loader.read_patches(path, patches, shape, size)
    return TensorBoard(run.path("tensorboard"), channels, cloud, config.profile_steps)


def passing_over_bad_scenes(config):
    """A context that a scene which cannot be read does not leave as an error, if that is wanted."""
    return suppress(SceneError) if config.on_bad_scene == "skip" else nullcontext()


def how_to_leave_out(config, run, during, paths):
    """What to do about a scene that turns bad during the run."""
    if config.on_bad_scene == "stop":
        return data_loader.raise_error
    return run.bad_scenes.leave_out(during, len(paths))


def infer(config, devices, run, paths):
    """Mask scenes with the model of the run's model file, and score the masks."""
    devices.gather(0)  # the chief has written the model
    model = load_model(run.model_file, config)
    predictors = [open_predictor(config, devices, model, device) for device in devices.local]
    modes = {"inference_mode": config.inference_mode, "windows": len(predictors[0].grid.corners)}
    if config.inference_mode == "scene" and devices.is_chief:
        with passing_over_bad_scenes(config):
            modes["differs"] = compare_with_patches(config, devices, model, predictors[0], paths[0])
    if run.mode == "inference":
        mlperf_log.log_hyperparameters(config, devices, run.mllog, 0, len(paths))
        run.start()

    made_by = {"threshold": THRESHOLD, "model_sha256": file_sha256(run.model_file)}

    def check_all():
        check_signals()
        devices.check_ranks()

    masks = MaskFolder(run.path("masks"), check_all, made_by)
    if devices.is_chief:
        masks.forget_claims()
        run.bad_scenes.forget("inference")
    leave_out = how_to_leave_out(config, run, "inference", paths)
    devices.gather(0)  # all begin together
    run.mllog.start(mlperf_log.INFERENCE_START)
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(predictors)) as pool:
        shown = [progress(paths, "Masking", len(paths)), *[paths] * (len(predictors) - 1)]
        try:
            for _ in pool.map(
                functools.partial(mask_scenes, config, devices, run, masks, leave_out),
                shown,
                predictors,
            ):
                pass  # raises what a thread raised
        except BaseException:
            masks.stop()  # or leaving the pool would wait for all scenes
            raise
    seconds = devices.gather(time.perf_counter() - begin)
    run.mllog.end(mlperf_log.INFERENCE_STOP)

    if run.is_chief:
        left_out = run.bad_scenes.paths("inference")
        rows = masks.collect([path for path in paths if str(path) not in left_out])
        write_csv(run.path("scenes.csv"), scores.SCENE_COLUMNS, rows)
        # What earlier parts of the run masked took the devices this long, had they been as busy.
        earlier = [row["seconds"] for row in rows if row["part"] != run.part]
        total = max(seconds) + sum(earlier) / devices.n_replicas
        run.results["inference"] = modes | results.inference_results(rows, total)
        run.write_line(results.inference_line(config, devices, run.results["inference"]))


def mask_scenes(config, devices, run, masks, leave_out, paths, predictor):
    """Mask scenes with one device; the next one is read while the present one is masked."""
    shape = (config.image_h, config.image_w, config.n_channels)

    def read(path):
        begin = time.perf_counter()
        try:
            scene = data_loader.read_scene(path, shape, predictor.grid.padding, run.needs_labels)
        except SceneError as error:
            leave_out(path, error)
            scene = None
        return path, scene, time.perf_counter() - begin

    last = time.perf_counter()
    with ReaderPool(1, config.read_timeout) as readers:
        for path, scene, read_seconds in readers.prefetch(read, masks.deal(paths), 1):
            if scene is None:
                continue
            if scene.out_of_range:
                log.warning(data_loader.OUT_OF_RANGE_MESSAGE, path, scene.out_of_range)
            clock = time.perf_counter()
            probability, network_seconds = predictor(scene.channels)
            if not np.isfinite(probability).all():
                raise FloatingPointError(
                    f"{run.model_file} gives no finite probability for every pixel of {path}. Use "
                    "another model, or precision: float32."
                )
            mask = (probability > THRESHOLD).astype(np.uint8)
            stitched = time.perf_counter()
            label = None if scene.cloud is None else scene.cloud[..., 0]
            row = scores.score_scene(mask, label, scene.valid, scene.bt_12um, config.min_sst)
            scored = time.perf_counter()
            row |= {
                "scene": path.stem,
                "day_night": data_loader.day_or_night(path),
                "seconds": scored - last,
                "read_seconds": read_seconds,
                "network_seconds": network_seconds,
                "stitch_seconds": stitched - clock - network_seconds,
                "score_seconds": scored - stitched,
                "out_of_range": scene.out_of_range,
                "device": f"rank {devices.rank}, {predictor.device}",
                "part": run.part,
            }
            masks.write(
                path,
                mask,
                probability if config.keep_probability else None,
                row,
                model=str(run.model_file),
            )
            last = time.perf_counter()


def open_predictor(config, devices, model, device):
    """The model on one device, ready to predict scenes as `inference_mode` says."""
    height, width, policy = config.image_h, config.image_w, POLICIES[config.precision]
    if config.inference_mode == "patches":
        grid = data_loader.PatchGrid(height, width, config.patch_size, config.crop_size)
        batch = devices.micro_batch(config.micro_batch, config.batch_size, replicas=1)
        return Predictor(model, device, grid, batch, policy, config.xla)
    grids = (StripGrid(height, width, n, RECEPTIVE_RADIUS, DOWNSCALING) for n in STRIPS_TRIED)
    return predictor_that_fits(model, device, grids, policy, config.xla)


def compare_with_patches(config, devices, model, predictor, path):
    """Say how many pixels of a scene `inference_mode: patches` in float32 calls otherwise."""
    reference = {"inference_mode": "patches", "precision": "float32", "xla": False}
    patches = open_predictor(config.model_copy(update=reference), devices, model, predictor.device)
    shape = (config.image_h, config.image_w, config.n_channels)
    masks = []
    for each in (predictor, patches):
        scene = data_loader.read_scene(path, shape, each.grid.padding, labelled=False)
        masks.append(each(scene.channels)[0] > THRESHOLD)
    n_pixels = int(np.count_nonzero(masks[0] != masks[1]))
    share = n_pixels / masks[0].size
    log.info(
        "inference_mode scene differs from patches (float32) in %d pixels of %s, %.3f %%.",
        *(n_pixels, path.stem, 100 * share),
    )
    return {"scene": path.stem, "pixels": n_pixels, "share": share}


def load_model(path, config):
    """Load a Keras model that takes the scenes and patches of the configuration."""
    model = read_model(path)
    wanted = (config.patch_size, config.patch_size, config.n_channels)
    found = [tuple(each.shape[1:]) for each in model.inputs]
    if len(found) != 1 or not shape_matches(found[0], wanted):
        raise UserError(
            f"{path} takes {' and '.join(map(str, found))}, PATCH_SIZE and N_CHANNELS make patches "
            f"of {wanted}. Change these or the model."
        )
    found = [tuple(each.shape[1:]) for each in model.outputs]
    if len(found) != 1 or not shape_matches(found[0], (*wanted[:2], 1)):
        raise UserError(
            f"{path} gives {' and '.join(map(str, found))} for patches of {wanted}; a model for "
            f"CloudMask gives the probability of cloud, {(*wanted[:2], 1)}."
        )
    return model


def read_model(path):
    """Load a Keras model; one that carries code is refused."""
    if not path.is_file():
        raise FileNotFoundError(
            f"No model file {path}. Set model_file to the .keras or .h5 file of a trained model."
        )
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        # Keras goes on to tell how to run code of a model that is trusted; here there is no way.
        reason = str(error).strip().partition("\n")[0].partition(" If you trust")[0]
        raise UserError(f"{path} cannot be read as a Keras model: {reason}") from error


# --- the program ----------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="YAML file (default config.yaml)")
    parser.add_argument(
        "--mode",
        choices=(*MODES, "check"),
        help="benchmark trains, then masks (default); check looks at scenes, devices and disk only",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="override keys of the configuration",
    )  # fmt: skip
    parser.add_argument(
        "--resume", metavar="RUN_DIR", type=Path, help="go on with the run of this folder"
    )
    parser.add_argument(
        "--model", metavar="FILE", type=Path,
        help="with --mode inference: the model to mask with, model_file otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--verbose", action="store_true", help="show tracebacks and TensorFlow's messages"
    )
    return parser.parse_args(argv)


def run_benchmark(config, mode, launch, folder=None, earlier=None):
    """One run, from the configuration to the results; or what is left of it.

    Args:
        config: Config.
        mode: 'benchmark', 'train' or 'inference'.
        launch: Launch of this process.
        folder: Of the run that is resumed; None for a new one.
        earlier: What results.json holds of that.
    """
    meeting = Rendezvous(launch, config.output_dir) if launch.n_ranks > 1 else None
    with meeting or nullcontext(), watch_ranks(meeting):
        sets = find_sets(config, mode)
        bad = look_at_scenes(config, sets, folder) if launch.rank == 0 else {}
        names = [path.name for paths in sets for path in paths]
        work = [mode, repr(config), names, str(folder)]
        devices, folder, bad = open_run(config, mode, launch, meeting, work, folder, bad)
        train_paths, test_paths, inference_paths = usable_scenes(config, sets, bad)
        install_handlers(anew=False)  # TensorFlow takes SIGTERM when it connects several ranks
        with (
            sole_user(folder) if devices.is_chief else nullcontext(),
            Run(
                config, devices, mode, folder, BadScenes(folder), earlier, json_sha256(names)
            ) as run,
            watch_ranks(meeting),
        ):
            log.info("Run %s", run.folder)
            scenes = len(train_paths), len(test_paths), len(inference_paths)
            for line in (
                "devices     " + devices.describe(),
                *results.work_ahead(config, mode, *scenes),
            ):
                log.info("  %s", line)
            if devices.is_chief:
                for path, reason in bad.items():
                    run.bad_scenes.add(path, reason, DURING_START)
            run.begin()
            if mode != "inference":
                train(config, devices, run, train_paths, test_paths)
            if mode != "train":
                infer(config, devices, run, inference_paths)
            check_signals()
            run.mllog.event(mlperf_log.RESULT, results.result_event(run.results))
            devices.gather(0)  # nobody leaves while another needs it
    if devices.is_chief:
        tell_results(config, run)


def tell_results(config, run):
    """Say what a finished run has reached, and make its report; nothing here is timed."""
    for line in results.summary(run.results):
        log.info("  %s", line)
    log.info("Results are in %s", run.folder)
    if config.report and (report := make_report(run.folder)):
        log.info("Report: %s", report)


def find_sets(config, mode):
    """The scenes to train and validate with, and those to mask; none where the mode needs none."""
    train_paths = data_loader.find_scenes(config.train_dir) if mode != "inference" else []
    return train_paths, data_loader.find_scenes(config.inference_dir) if mode != "train" else []


def look_at_scenes(config, sets, folder):
    """See before a run that its scenes can be used, and that the disk holds its results.

    Args:
        config: Config.
        sets: Of `find_sets`.
        folder: Of the run that is resumed, which keeps the scenes it began with; or None.

    Returns:
        Reasons of the bad scenes that are left out, by path as text.

    Raises:
        SceneError: If there are bad scenes, and none may be left out or too few remain.
    """
    known = BadScenes(folder).all() if folder else []
    left_out = {bad["path"]: bad["reason"] for bad in known if bad["during"] == DURING_START}
    if folder and config.on_bad_scene == "skip":
        return left_out  # one that turned bad later is met, and left out, where it is needed
    paths = [path for paths in sets for path in paths if str(path) not in left_out]
    check_one = scene_check(config, labelled=bool(sets[0]))
    _, bad = check_scenes(paths, check_one, config.read_timeout)
    refuse_bad_scenes(config, paths, bad)
    left_out |= {str(path): reason for path, reason in bad.items()}
    usable_scenes(config, sets, left_out)
    if not folder:
        check_disk(config.output_dir, results_bytes(config, len(sets[1])))
    return left_out


def scene_check(config, labelled=True):
    """What `check_scenes` asks of every scene."""
    shape = (config.image_h, config.image_w, config.n_channels)
    return functools.partial(data_loader.check_scene, shape=shape, labelled=labelled)


def refuse_bad_scenes(config, paths, bad):
    """Raise SceneError where bad scenes are not to be skipped; each with a line on the screen."""
    if bad and len(bad) == len(paths):  # as with a wrong IMAGE_H
        raise SceneError(f"None of {len(paths)} scenes can be used: {bad[paths[0]]}")
    if bad and config.on_bad_scene == "stop":
        for reason in bad.values():
            log.error("Bad scene: %s", reason)
        raise SceneError(
            f"{len(bad)} of {len(paths)} scenes cannot be used, see above. Download or make them "
            "again, remove them, or leave them out with on_bad_scene: skip."
        )


def usable_scenes(config, sets, bad):
    """The scenes of training, validation and inference: those of the sets that are not bad.

    Raises:
        SceneError: If a set has too few of them.
    """
    train_paths = test_paths = ()
    good = [[path for path in paths if str(path) not in bad] for paths in sets]
    for paths, left in zip(sets, good, strict=True):
        if paths and not left:
            raise SceneError(f"None of {len(paths)} scenes can be used: {bad[str(paths[0])]}")
    if good[0]:
        train_paths, test_paths = data_loader.split_scenes(good[0], config.train_split)
    return train_paths, test_paths, good[1]


def check(config, launch):
    """--mode check: see whether a benchmark would run, and how long; no run's folder is made."""
    if launch.n_ranks > 1:
        raise UserError(f"--mode check is for one process, found {launch.n_ranks} ranks.")
    sets = find_sets(config, "benchmark")
    paths = [path for paths in sets for path in paths]
    stored, bad = check_scenes(paths, scene_check(config), config.read_timeout)
    shape = (config.image_h, config.image_w, config.n_channels)
    columns = {}
    for name, paths_of_set in zip(("train_dir", "inference_dir"), sets, strict=True):
        good = [path for path in paths_of_set if path in stored]
        samples = []
        for path in good[:: -(-len(good) // SCENES_SAMPLED)] if good else ():
            begin = time.perf_counter()
            try:
                scene = data_loader.read_scene(path, shape)
                samples.append((scene, time.perf_counter() - begin))
            except SceneError as error:
                bad[path] = str(error)
        columns[name] = describe_scenes(
            [data_loader.day_or_night(path) for path in paths_of_set],
            {path: stored[path] for path in good},
            [path for path in paths_of_set if path in bad],
            samples,
        )
    sys.stdout.write(table(columns) + "\n")
    refuse_bad_scenes(config, paths, bad)
    for reason in bad.values():
        log.warning("Left out: %s", reason)
    free = check_disk(config.output_dir, needed := results_bytes(config, len(sets[1])))
    run = measure(config, usable_scenes(config, sets, set(map(str, bad))))
    run["disk"] = f"up to {format_bytes(needed)}, {format_bytes(free)} free in {config.output_dir}"
    sys.stdout.write("\n" + table({"the run": run}) + "\n")


def measure(config, scenes):
    """Train a few steps and mask a scene: what memory and time a benchmark will take."""
    train_paths, test_paths, inference_paths = scenes
    devices = open_devices(
        *(config.gpu, config.nodes, config.cpu_devices, config.deterministic),
        *(config.xla, config.seed),
    )
    trainer = open_trainer(config, devices)
    batches = training_batches(config, devices, trainer.micro_batch)
    seconds = []
    with batches(train_paths, shuffle=True, batch_size=config.batch_size) as training:
        trainer.warm_up(training.replica_batch, training.replica_batch)
        feed = devices.distribute(training.dataset())
        for _ in range(1 + STEPS_MEASURED):
            begin = time.perf_counter()
            trainer.train_step(next(feed))
            _ = trainer.totals  # waits for the devices
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        trainer.eval_step(next(feed))
        _ = trainer.totals
        eval_seconds = time.perf_counter() - begin
    share = len(test_paths) / len(train_paths)
    epoch = training.n_steps * (np.median(seconds[1:]) + share * eval_seconds)
    predictor = open_predictor(config, devices, trainer.model, devices.local[0])
    shape = (config.image_h, config.image_w, config.n_channels)
    scene = data_loader.read_scene(inference_paths[0], shape, padding=predictor.grid.padding)
    begin = time.perf_counter()
    predictor(scene.channels)
    inference = (time.perf_counter() - begin) * len(inference_paths) / devices.n_replicas
    gpu_memory = [f"{format_bytes(n)} of a GPU's" for n in devices.peak_gpu_memory()[:1]]
    return {
        "devices": devices.describe(),
        "training": f"{format_duration(epoch)} an epoch, {format_duration(epoch * config.epochs)} for "
        f"{config.epochs} epochs (from {STEPS_MEASURED} steps)",
        "inference": f"{format_duration(inference)} for {len(inference_paths)} scenes (from one)",
        "memory": " and ".join([format_bytes(peak_rss()), *gpu_memory]) + " at most so far",
    }


def open_run(config, mode, launch, meeting, work, resumed, bad):
    """Open the devices, and what the chief says: the folder, and the scenes to leave out."""
    folder = resumed or (make_folder(config, mode) if launch.rank == 0 else None)
    try:
        devices = open_devices(
            *(config.gpu, config.nodes, config.cpu_devices, config.deterministic),
            *(config.xla, config.seed, meeting),
            folder=str(folder),
            bad=bad,
            work=json_sha256(work),
        )
        if config.batch_size < devices.n_replicas:
            raise UserError(
                f"batch_size {config.batch_size} is the batch of all replicas together: there "
                f"are {devices.n_replicas}. Set it to {devices.n_replicas} at least."
            )
    except BaseException:
        if folder and not resumed:
            shutil.rmtree(folder)
        raise
    chief = devices.cards[0]
    return devices, folder or Path(chief["folder"]), chief.get("bad", bad)


def choose_work(arguments):
    """What run_benchmark is to do: a new run or the rest of one; None if that has finished."""
    folder = arguments.resume
    if arguments.model and (arguments.mode != "inference" or folder):
        raise UserError("--model is for --mode inference alone, of a new run.")
    if folder is None:
        overrides = list(arguments.set)
        if arguments.model:
            overrides.append(f"model_file={json.dumps(str(arguments.model))}")
        config = load_config(arguments.config or "config.yaml", overrides)
        mode = arguments.mode or "benchmark"
        if mode == "check":
            return {"config": config, "mode": mode}
        if mode == "inference":  # the model is an input, and named from where one stands
            config = config.model_copy(update={"model_file": config.model_file.absolute()})
        folder = find_requeued(config, mode)
        if folder is None:
            return {"config": config, "mode": mode}
    config, earlier = load_resumed(folder, arguments.config, arguments.set)
    if arguments.mode not in (None, earlier["mode"]):
        raise UserError(f"{folder} is a run of --mode {earlier['mode']}: leave --mode out.")
    if earlier["status"] == "success":
        log.info("Run %s has finished: nothing is left to do.", folder)
        return None
    folder = folder.resolve()
    return {"config": config, "mode": earlier["mode"], "folder": folder, "earlier": earlier}


def main(argv=None):
    """Run the program and return its exit status.

    0, 2 for the user's mistake, 143 and 130 after SIGTERM and SIGINT, 1 for the rest.
    """
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    try:
        launch = detect_launch()
        log_to_screen(arguments.verbose, is_chief=launch.rank == 0)
        work = choose_work(arguments)
        if work is not None and work["mode"] == "check":
            check(work["config"], launch)
        elif work is not None:
            run_benchmark(launch=launch, **work)
    except Interrupted as error:
        log.error("Stopped: %s.", error)
        return error.code
    except Exception as error:
        if arguments.verbose:
            traceback.print_exc()
        log.error("Error: %s", one_line(error))
        return 2 if is_user_error(error) else 1
    return 0


if __name__ == "__main__":
    exit_process(main())
