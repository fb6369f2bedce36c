"""CloudMask: train a U-Net on Sentinel-3 SLSTR scenes, then mask scenes with it, and time both.

python slstr_cloud.py --config config.yaml
"""

import argparse
import errno
import functools
import hashlib
import json
import logging
import math
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import harness.quiet_tensorflow  # noqa: F401  (before all that imports TensorFlow)

# isort: split
import keras
import numpy as np

import data_loader
from data_loader import PatchBatches, SceneError
from harness import mlperf_log, results, scores
from harness.config import UserError, load_config
from harness.devices import open_devices, watch_ranks
from harness.launch import Meeting, detect_launch
from harness.masks import MaskFolder
from harness.mlperf_log import keys
from harness.prediction import Predictor, predictor_that_fits
from harness.run import Run, log_to_screen, make_folder, progress, replacing, write_csv
from harness.training import POLICIES, Trainer, translated_errors
from model import DOWNSCALING, RECEPTIVE_RADIUS, unet

THRESHOLD = 0.5  # cloud where the probability is above
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
        batches(train_paths, shuffle=True, batch_size=config.batch_size) as training,
        # The sums of validation are the same for any batch; a small one leaves memory to training.
        batches(
            test_paths,
            shuffle=False,
            batch_size=trainer.micro_batch * devices.n_replicas,
            n_lanes=devices.n_ranks,
        ) as validation,
    ):
        n_patches = training.n_patches, validation.n_patches
        mlperf_log.log_hyperparameters(config, devices, run.mllog, *n_patches)
        warm_up_seconds = trainer.warm_up(training.replica_batch, validation.replica_batch)
        run.mllog.end(keys.INIT_STOP)
        run.start()
        for history, best in train_epochs(config, devices, run, trainer, training, validation):
            run.results["training"] = results.training_results(
                history, best, (train_paths, test_paths), (training, validation), warm_up_seconds
            )
    n_scenes = len(train_paths) + len(test_paths)
    run.write_line(results.training_line(config, devices, history, best, n_scenes))


def train_epochs(config, devices, run, trainer, training, validation):
    """Yield after each epoch the rows of all so far, and the best of them."""
    training_feed = devices.distribute(training.dataset)
    validation_feed = devices.distribute(validation.dataset)
    history, best = [], None
    for epoch in range(1, config.epochs + 1):
        numbered = {"epoch_num": epoch}
        run.mllog.start(keys.EPOCH_START, metadata=numbered)
        begin = time.perf_counter()
        with translated_errors(training):
            for _ in progress(range(training.n_steps), f"Epoch {epoch}", training.n_steps):
                trainer.train_step(next(training_feed))
            trained = trainer.take_totals()
        train_seconds = time.perf_counter() - begin
        run.mllog.end(keys.EPOCH_STOP, metadata=numbered)

        run.mllog.start(keys.EVAL_START, metadata=numbered)
        with translated_errors(validation):
            for _ in progress(range(validation.n_steps), "Validation", validation.n_steps):
                trainer.eval_step(next(validation_feed))
            validated = trainer.take_totals()
        run.mllog.event(keys.EVAL_ACCURACY, validated["accuracy"], metadata=numbered)
        run.mllog.end(keys.EVAL_STOP, metadata=numbered)

        history.append(
            {
                "epoch": epoch,
                **trained,
                **{f"val_{name}": value for name, value in validated.items()},
                "seconds": time.perf_counter() - begin,
                "train_seconds": train_seconds,
                "patches_per_second": training.n_patches / train_seconds,
            }
        )
        log.info(
            "Epoch %d of %d: loss %.4f, accuracy %.4f, val_loss %.4f, val_accuracy %.4f, "
            "%.1f s, %.1f patches/s",
            *(epoch, config.epochs, *(history[-1][name] for name in HISTORY_COLUMNS[1:])),
        )
        if run.is_chief:
            write_csv(run.path("history.csv"), HISTORY_COLUMNS, history)
        if not math.isfinite(history[-1]["loss"] + history[-1]["val_loss"]):
            raise FloatingPointError(
                f"The loss became {history[-1]['loss']} in epoch {epoch}, on validation "
                f"{history[-1]['val_loss']}. Lower learning_rate ({config.learning_rate}), or set "
                "precision: float32."
            )
        if best is None or history[-1]["val_loss"] < best["val_loss"]:
            best = history[-1]
            if run.is_chief:
                with replacing(run.model_file) as temporary:
                    trainer.model.save(temporary)
        yield history, best
        if config.target_accuracy and history[-1]["val_accuracy"] >= config.target_accuracy:
            log.info("Reached target_accuracy %s.", config.target_accuracy)
            break
        if config.patience and epoch - best["epoch"] >= config.patience:
            log.info("No better validation loss for %d epochs.", config.patience)
            break


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
        read = data_loader.cached(read, config.cache_dir, f"{shape} {config.patch_size}")
    return functools.partial(
        PatchBatches,
        read=read,
        patch_size=config.patch_size,
        patches_per_scene=(config.image_h // config.patch_size)
        * (config.image_w // config.patch_size),
        n_channels=config.n_channels,
        replicas=devices.replicas,
        n_replicas=devices.n_replicas,
        n_lanes=max(data_loader.SCENES_MIXED, devices.n_ranks)
        if config.shuffle_scenes == "auto"
        else config.shuffle_scenes,
        seed=config.seed,
        multiple=micro_batch,
    )


def infer(config, devices, run, paths, starts_run):
    """Mask scenes with the model of the run's model file, and score the masks."""
    devices.gather(0)  # the chief has written the model
    model = load_model(run.model_file, config)
    predictors = [open_predictor(config, devices, model, device) for device in devices.local]
    modes = {"inference_mode": config.inference_mode, "windows": len(predictors[0].grid.corners)}
    if config.inference_mode == "scene" and devices.is_chief:
        modes["differs"] = compare_with_patches(config, devices, model, predictors[0], paths[0])
    if starts_run:
        mlperf_log.log_hyperparameters(config, devices, run.mllog, 0, len(paths))
        run.mllog.end(keys.INIT_STOP)
        run.start()

    masks = MaskFolder(run.path("masks"), devices.check_ranks)
    devices.gather(0)  # all begin together
    run.mllog.start(mlperf_log.INFERENCE_START)
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(predictors)) as pool:
        shown = [progress(paths, "Masking", len(paths)), *[paths] * (len(predictors) - 1)]
        try:
            for _ in pool.map(
                functools.partial(mask_scenes, config, devices, run, masks), shown, predictors
            ):
                pass  # raises what a thread raised
        except BaseException:
            masks.stop()  # or leaving the pool would wait for all scenes
            raise
    seconds = devices.gather(time.perf_counter() - begin)
    run.mllog.end(mlperf_log.INFERENCE_STOP)

    if run.is_chief:
        rows = masks.collect(paths)
        write_csv(run.path("scenes.csv"), scores.SCENE_COLUMNS, rows)
        run.results["inference"] = modes | results.inference_results(rows, max(seconds))
        run.write_line(results.inference_line(config, devices, run.results["inference"]))


def mask_scenes(config, devices, run, masks, paths, predictor):
    """Mask scenes with one device; the next one is read while the present one is masked."""
    shape = (config.image_h, config.image_w, config.n_channels)

    def read(path):
        begin = time.perf_counter()
        scene = data_loader.read_scene(path, shape, padding=predictor.grid.padding)
        return path, scene, time.perf_counter() - begin

    last = time.perf_counter()
    with ThreadPoolExecutor(1) as reader:
        for path, scene, read_seconds in data_loader.read_ahead(reader, read, masks.deal(paths), 1):
            clock = time.perf_counter()
            probability, network_seconds = predictor(scene.channels)
            mask = (probability > THRESHOLD).astype(np.uint8)
            stitched = time.perf_counter()
            row = scores.score_scene(
                mask, scene.cloud[..., 0], scene.valid, scene.bt_12um, config.min_sst
            )
            scored = time.perf_counter()
            row |= {
                "scene": path.stem,
                "day_night": data_loader.day_or_night(path),
                "seconds": scored - last,
                "read_seconds": read_seconds,
                "network_seconds": network_seconds,
                "stitch_seconds": stitched - clock - network_seconds,
                "score_seconds": scored - stitched,
                "device": f"rank {devices.rank}, {predictor.device}",
            }
            masks.write(
                path,
                mask,
                probability if config.keep_probability else None,
                row,
                threshold=THRESHOLD,
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
    grids = (
        data_loader.StripGrid(height, width, n, RECEPTIVE_RADIUS, DOWNSCALING) for n in STRIPS_TRIED
    )
    return predictor_that_fits(model, device, grids, policy, config.xla)


def compare_with_patches(config, devices, model, predictor, path):
    """Say how many pixels of a scene `inference_mode: patches` in float32 calls otherwise."""
    reference = {"inference_mode": "patches", "precision": "float32", "xla": False}
    patches = open_predictor(config.model_copy(update=reference), devices, model, predictor.device)
    shape = (config.image_h, config.image_w, config.n_channels)
    masks = []
    for each in (predictor, patches):
        scene = data_loader.read_scene(path, shape, padding=each.grid.padding)
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
    if not path.is_file():
        raise FileNotFoundError(
            f"No model file {path}. Set model_file to the .keras or .h5 file of a trained model."
        )
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be read as a Keras model: {reason}") from error
    wanted = (None, config.patch_size, config.patch_size, config.n_channels)
    if model.input_shape != wanted:
        raise UserError(
            f"{path} takes patches of {model.input_shape[1:]}, PATCH_SIZE and N_CHANNELS make "
            f"{wanted[1:]}. Change these or the model."
        )
    return model


# --- the program ----------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml", help="YAML file (default config.yaml)")
    parser.add_argument(
        "--mode",
        default="benchmark",
        choices=("benchmark", "train", "inference"),
        help="benchmark trains, then masks (default)",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="override keys of the configuration",
    )  # fmt: skip
    parser.add_argument(
        "--verbose", action="store_true", help="show tracebacks and TensorFlow's messages"
    )
    return parser.parse_args(argv)


def run_benchmark(config, mode, launch):
    """One run, from the configuration to the results."""
    meeting = Meeting(launch, config.output_dir) if launch.n_ranks > 1 else None
    with meeting or nullcontext(), watch_ranks(meeting):
        train_paths = test_paths = inference_paths = ()
        if mode != "inference":
            paths = data_loader.find_scenes(config.train_dir)
            train_paths, test_paths = data_loader.split_scenes(paths, config.train_split)
        if mode != "train":
            inference_paths = data_loader.find_scenes(config.inference_dir)
        names = [path.name for path in (*train_paths, *test_paths, *inference_paths)]
        devices, folder = open_run(config, launch, meeting, [mode, repr(config), names])
        end_on_sigterm()  # TensorFlow takes the signal when it connects several ranks
        with Run(config, devices, mode, folder) as run, watch_ranks(meeting):
            log.info("Run %s on %s", run.folder, devices.describe())
            mlperf_log.log_submission(run.mllog, config, run.results["git_commit"])
            run.mllog.event(keys.CACHE_CLEAR, False)  # the system's file cache is as we found it
            run.mllog.start(keys.INIT_START)
            if mode != "inference":
                train(config, devices, run, train_paths, test_paths)
            if mode != "train":
                infer(config, devices, run, inference_paths, starts_run=mode == "inference")
            run.mllog.event(mlperf_log.RESULT, results.result_event(run.results))
            devices.gather(0)  # nobody leaves while another needs it
    log.info("Results are in %s", run.folder)


def open_run(config, launch, meeting, work):
    """Open the devices, and the folder that the chief names; all ranks do the same work."""
    folder = make_folder(config) if launch.rank == 0 else None
    try:
        devices = open_devices(
            *(config.gpu, config.nodes, config.cpu_devices, config.deterministic),
            *(config.xla, config.seed, meeting),
            folder=str(folder),
            work=hashlib.sha256(json.dumps(work).encode()).hexdigest(),
        )
        if config.batch_size < devices.n_replicas:
            raise UserError(
                f"batch_size {config.batch_size} is the batch of all replicas together: there "
                f"are {devices.n_replicas}. Set it to {devices.n_replicas} at least."
            )
    except BaseException:
        if folder:
            folder.rmdir()
        raise
    return devices, folder or Path(devices.cards[0]["folder"])


def main(argv=None):
    """Run the program and return its exit status: 0, 2 for the user's mistake, 1 for the rest."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    end_on_sigterm()
    try:
        launch = detect_launch()
        log_to_screen(arguments.verbose, is_chief=launch.rank == 0)
        run_benchmark(load_config(arguments.config, arguments.set), arguments.mode, launch)
    except Exception as error:
        if arguments.verbose:
            traceback.print_exc()
        log.error("Error: %s", one_line(error))
        return 2 if is_users_mistake(error) else 1
    return 0


def one_line(error):
    """An error for people: its message where it is ours, its kind and first line where not."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. Mend it, or set another path."
    if is_users_mistake(error):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (--verbose shows where)"


def is_users_mistake(error):
    """Whether the user can mend an error: a bad value, file or permission."""
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return True
    return isinstance(
        error,
        UserError | SceneError | FileNotFoundError | FileExistsError | NotADirectoryError
        | IsADirectoryError | PermissionError,
    )  # fmt: skip


def end_on_sigterm():
    """Let SIGTERM end the program in order: with an aborted run and exit status 143."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


if __name__ == "__main__":
    sys.exit(main())
