"""CloudMask: train a U-Net on Sentinel-3 SLSTR scenes, then mask scenes with it, and time both.

python slstr_cloud.py --config config.yaml
"""

import argparse
import functools
import json
import logging
import math
import shutil
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import harness.quiet_tensorflow  # noqa: F401  (before all that imports TensorFlow)

# isort: split
import h5py
import keras
import numpy as np

import data_loader
from data_loader import PatchBatches, SceneError
from harness import mlperf_log, scores
from harness.config import UserError, load_config
from harness.devices import open_devices, watch_ranks
from harness.launch import Meeting, detect_launch
from harness.mlperf_log import keys
from harness.run import Run, log_to_screen, make_folder, progress, replacing, write_csv
from harness.training import POLICIES, Predictor, Trainer, translated_errors
from model import unet

CLAIMS = ".claims"  # folder with an empty file for each scene that a device has taken
THRESHOLD = 0.5  # cloud where the probability is above
HISTORY_COLUMNS = (
    "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "patches_per_second",
)  # fmt: skip

log = logging.getLogger("cloudmask")


def train(config, devices, run, train_paths, test_paths):
    """Train on scenes; keep the model with the best validation loss in the run's model file."""
    trainer = Trainer(
        devices.strategy,
        functools.partial(
            unet,
            (config.patch_size, config.patch_size, config.n_channels),
            POLICIES[config.precision],
        ),
        config.learning_rate,
        config.batch_size,
        devices.micro_batch(config.micro_batch, config.batch_size),
        config.clip_offset,
        config.cloud_weight,
        loss_scaling=config.precision == "float16",
        xla=config.xla,
    )
    batches = training_batches(config, devices, trainer.micro_batch)
    training = batches(train_paths, shuffle=True)
    validation = batches(test_paths, shuffle=False, n_lanes=devices.n_ranks)
    training_feed = devices.distribute(training.dataset)
    validation_feed = devices.distribute(validation.dataset)
    log_hyperparameters(config, devices, run.mllog, training.n_patches, validation.n_patches)
    run.mllog.end(keys.INIT_STOP)

    run.start()
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
        if best is None or history[-1]["val_loss"] < best["val_loss"]:
            best = history[-1]
            if run.is_chief:
                with replacing(run.model_file) as temporary:
                    trainer.model.save(temporary)
        if run.is_chief:
            write_csv(run.path("history.csv"), HISTORY_COLUMNS, history)
            run.results["training"] = training_results(
                history, best, (train_paths, test_paths), (training, validation)
            )
        if not math.isfinite(history[-1]["loss"]):
            raise FloatingPointError(
                f"The loss became {history[-1]['loss']} in epoch {epoch}. Lower learning_rate "
                f"({config.learning_rate}), or set precision: float32."
            )
        if config.target_accuracy and history[-1]["val_accuracy"] >= config.target_accuracy:
            log.info("Reached target_accuracy %s.", config.target_accuracy)
            break
        if config.patience and epoch - best["epoch"] >= config.patience:
            log.info("No better validation loss for %d epochs.", config.patience)
            break
    run.write_line(training_line(config, devices, history, best, training.n_patches))


def training_batches(config, devices, micro_batch):
    """How training and validation read their scenes; lacks `paths` and `shuffle`."""
    shape = (config.image_h, config.image_w, config.n_channels)
    rows, cols = data_loader.training_crop(config.image_h, config.image_w, config.patch_size)
    read = functools.partial(data_loader.read_scene, shape=shape, rows=rows, cols=cols)
    if config.cache_dir:
        read = data_loader.cached(read, config.cache_dir, f"{shape} {rows} {cols}")
    return functools.partial(
        PatchBatches,
        read=read,
        patch_size=config.patch_size,
        patches_per_scene=(config.image_h // config.patch_size)
        * (config.image_w // config.patch_size),
        n_channels=config.n_channels,
        batch_size=config.batch_size,
        replicas=devices.replicas,
        n_replicas=devices.n_replicas,
        n_lanes=max(8, devices.n_ranks)
        if config.shuffle_scenes == "auto"
        else config.shuffle_scenes,
        seed=config.seed,
        multiple=micro_batch,
    )


def infer(config, devices, run, paths):
    """Mask scenes with the model of the run's model file, and score the masks."""
    devices.gather(0)  # the chief has written the model
    model = load_model(run.model_file, config)
    batch = devices.micro_batch(config.micro_batch, config.batch_size, replicas=1)
    predictors = [
        Predictor(model, device, batch, POLICIES[config.precision], config.xla)
        for device in devices.local
    ]
    for predictor in predictors:  # traced here, so that no scene waits for it
        predictor(np.zeros((batch, *model.input_shape[1:]), np.float32))
    if run.results["mode"] == "inference":
        log_hyperparameters(config, devices, run.mllog, 0, len(paths))
        run.mllog.end(keys.INIT_STOP)
        run.start()

    run.mllog.start(mlperf_log.INFERENCE_START)
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(predictors)) as pool:
        shown = [progress(paths, "Masking", len(paths)), *[paths] * (len(predictors) - 1)]
        mask = functools.partial(mask_scenes, config, devices, run)
        for _ in pool.map(mask, shown, predictors):  # raises what a thread raised
            pass
    seconds = devices.gather(time.perf_counter() - begin)
    run.mllog.end(mlperf_log.INFERENCE_STOP)

    if run.is_chief:
        shutil.rmtree(run.path(CLAIMS))
        rows = sorted((read_row(run, path) for path in paths), key=lambda row: row["scene"])
        write_csv(run.path("scenes.csv"), scores.SCENE_COLUMNS, rows)
        run.results["inference"] = inference_results(rows, max(seconds))
        run.write_line(inference_line(config, devices, run.results["inference"]))


def deal_scenes(paths, claims):
    """Yield the scenes that no other device, of any rank, has taken: who is faster masks more."""
    claims.mkdir(exist_ok=True)
    for path in paths:
        with suppress(FileExistsError):
            (claims / path.stem).touch(exist_ok=False)
            yield path


def mask_scenes(config, devices, run, paths, predictor):
    """Mask scenes with one device; the next one is read while the present one is masked."""
    shape = (config.image_h, config.image_w, config.n_channels)

    def read(path):
        begin = time.perf_counter()
        return path, data_loader.read_scene(path, shape), time.perf_counter() - begin

    mine = deal_scenes(paths, run.path(CLAIMS))
    last = time.perf_counter()
    for path, scene, read_seconds in data_loader.read_ahead(read, mine, n_ahead=1):
        clock = time.perf_counter()
        patches, network_seconds = predict_patches(
            predictor, scene.channels, config.patch_size, config.crop_size
        )
        probability = data_loader.reconstruct(patches, config.image_h, config.image_w)
        mask = (probability > THRESHOLD).astype(np.uint8)
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
            "stitch_seconds": scored - clock - network_seconds,
            "device": f"rank {devices.rank}, {predictor.device}",
        }
        write_mask(run, path, mask, probability if config.keep_probability else None, row)
        last = time.perf_counter()


def predict_patches(predictor, channels, patch_size, crop_size):
    """Predict a scene's overlapping patches and trim their borders.

    Returns:
        float32 (n_rows, n_cols, p, p, 1) with p = patch_size - crop_size, and the seconds that the
        network took.
    """
    patches = data_loader.overlapping_patches(channels, patch_size, crop_size)
    n_rows, n_cols = patches.shape[:2]
    trimmed = slice(crop_size // 2, patch_size - crop_size // 2)
    p = patch_size - crop_size
    probability = np.empty((n_rows * n_cols, p, p, 1), np.float32)
    network_seconds = 0.0
    for first in range(0, len(probability), predictor.batch):
        cells = range(first, min(first + predictor.batch, len(probability)))
        batch = np.stack([patches[divmod(cell, n_cols)] for cell in cells])
        begin = time.perf_counter()
        probability[cells.start : cells.stop] = predictor(batch)[:, trimmed, trimmed]
        network_seconds += time.perf_counter() - begin
    return probability.reshape(n_rows, n_cols, p, p, 1), network_seconds


def write_mask(run, path, mask, probability, row):
    """Write masks/<scene>.h5, whole or not at all; it carries its row of scenes.csv."""
    with replacing(run.path("masks") / f"{path.stem}.h5") as temporary:
        begin = time.perf_counter()
        with h5py.File(temporary, "w") as file:
            file.create_dataset("mask", data=mask, compression="gzip", compression_opts=1)
            if probability is not None:
                file.create_dataset("probability", data=probability)
            file.attrs["scene"] = path.name
            file.attrs["threshold"] = THRESHOLD
            file.attrs["model"] = str(run.model_file)
            seconds = time.perf_counter() - begin
            row = {**row, "write_seconds": seconds, "seconds": row["seconds"] + seconds}
            file.attrs["row"] = json.dumps(row)


def read_row(run, path):
    """The row of scenes.csv that a scene's mask carries, whichever rank wrote it."""
    with h5py.File(run.path("masks") / f"{path.stem}.h5", "r") as file:
        return json.loads(file.attrs["row"])


def load_model(path, config):
    """Load a Keras model that takes the scenes and patches of the configuration."""
    if not path.is_file():
        raise FileNotFoundError(
            f"No model file {path}. Train one, or set model_file to a .keras or .h5 file."
        )
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as a Keras model: {reason}") from error
    wanted = (None, config.patch_size, config.patch_size, config.n_channels)
    if model.input_shape != wanted:
        raise UserError(
            f"{path} takes patches of {model.input_shape[1:]}, PATCH_SIZE and N_CHANNELS make "
            f"{wanted[1:]}. Change these or the model."
        )
    return model


# --- what the logs say ----------------------------------------------------------------------


def log_hyperparameters(config, devices, mllog, n_train, n_eval):
    """Log what is trained how; numbers of devices are those found."""
    for key, value in {
        keys.SEED: config.seed,
        keys.GLOBAL_BATCH_SIZE: config.batch_size,
        keys.TRAIN_SAMPLES: n_train,
        keys.EVAL_SAMPLES: n_eval,
        keys.OPT_NAME: keys.ADAM,
        keys.OPT_BASE_LR: config.learning_rate,
        mlperf_log.NUMBER_OF_RANKS: devices.n_ranks,
        mlperf_log.NUMBER_OF_NODES: devices.n_nodes,
        mlperf_log.ACCELERATORS_PER_NODE: devices.accelerators_per_node,
    }.items():
        mllog.event(key, value)


def training_results(history, best, paths, batches):
    """The part `training` of results.json."""
    seconds = [row["train_seconds"] for row in history]
    later = seconds[1:] or seconds  # the first epoch traces and warms up
    return {
        "scenes_train": len(paths[0]),
        "scenes_test": len(paths[1]),
        "patches_train": batches[0].n_patches,
        "patches_test": batches[1].n_patches,
        "epochs_run": len(history),
        "best_epoch": best["epoch"],
        "seconds": sum(row["seconds"] for row in history),
        "seconds_per_epoch": [row["seconds"] for row in history],
        "train_seconds_per_epoch": seconds,
        "patches_per_second": batches[0].n_patches * len(later) / sum(later),
        **{name: best[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
    }


def inference_results(rows, seconds):
    """The part `inference` of results.json."""
    return {
        "scenes": len(rows),
        "seconds": seconds,
        "seconds_per_scene": seconds / len(rows),
        "seconds_per_scene_parts": {
            part: float(np.mean([row[f"{part}_seconds"] for row in rows]))
            for part in ("read", "network", "stitch", "write")
        },
        "devices": [
            {
                "device": device,
                "scenes": len(of_device),
                "seconds_per_scene": float(np.mean([row["seconds"] for row in of_device])),
            }
            for device in sorted({row["device"] for row in rows})
            if (of_device := [row for row in rows if row["device"] == device])
        ],
        **scores.mean_scores(rows),
        **{
            kind: scores.mean_scores(of_kind)
            for kind in ("day", "night")
            if (of_kind := [row for row in rows if row["day_night"] == kind])
        },
    }


def training_line(config, devices, history, best, n_patches):
    """The training line of cloudmask.log: v1.1's fields, then ours."""
    per_epoch = sum(row["seconds"] for row in history) / len(history)
    return (
        f"CloudMask training, samples = {n_patches}, epochs={len(history)}, "
        f"bs={config.batch_size}, nodes={devices.n_nodes}, gpus={devices.n_gpus}, "
        f"time_per_epoch={per_epoch:.2f}, replicas={devices.n_replicas}, "
        f"val_loss={best['val_loss']:.4f}, val_accuracy={best['val_accuracy']:.4f}, "
        f"best_epoch={best['epoch']}"
    )


def inference_line(config, devices, results):
    """The inference line of cloudmask.log: v1.1's fields, then ours."""
    return (
        f"CloudMask inference, inferences={results['scenes']}, bs={config.batch_size}, "
        f"nodes={devices.n_nodes}, gpus={devices.n_gpus}, "
        f"time_per_inference={results['seconds_per_scene']:.2f}, "
        f"accuracy={results['accuracy']:.3f}, replicas={devices.n_replicas}, "
        f"all_cloud_accuracy={results['all_cloud_accuracy']:.3f}, "
        f"threshold_accuracy={results['threshold_accuracy']:.3f}"
    )


def result_event(results):
    """The final metrics, for the event `result` of MLCommons Science."""
    training, inference = results["training"] or {}, results["inference"] or {}
    return {
        **{name: training[name] for name in ("val_loss", "val_accuracy") if training},
        **{name: inference[name] for name in ("accuracy", "seconds_per_scene") if inference},
    }


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


def run_benchmark(config, mode):
    """One run, from the configuration to the results."""
    train_paths = test_paths = inference_paths = ()
    if mode != "inference":
        paths = data_loader.find_scenes(config.train_dir)
        train_paths, test_paths = data_loader.split_scenes(paths, config.train_split)
    if mode != "train":
        inference_paths = data_loader.find_scenes(config.inference_dir)
    launch = detect_launch()
    with Meeting(launch, config.output_dir) if launch.n_ranks > 1 else nullcontext() as meeting:
        devices, folder = open_run(config, launch, meeting)
        end_on_sigterm()  # TensorFlow takes the signal when it connects several ranks
        with Run(config, devices, mode, folder) as run, watch_ranks(meeting):
            log.info("Run %s on %s", run.folder, devices.describe())
            mlperf_log.log_submission(run.mllog, config, run.results["git_commit"])
            run.mllog.event(keys.CACHE_CLEAR, False)  # the system's file cache is as we found it
            run.mllog.start(keys.INIT_START)
            if mode != "inference":
                train(config, devices, run, train_paths, test_paths)
            if mode != "train":
                infer(config, devices, run, inference_paths)
            run.mllog.event(mlperf_log.RESULT, result_event(run.results))
            devices.gather(0)  # nobody leaves while another needs it
    log.info("Results are in %s", run.folder)


def open_run(config, launch, meeting):
    """Open the devices, and the folder that the chief names."""
    with watch_ranks(meeting):
        folder = make_folder(config) if launch.rank == 0 else None
        try:
            devices = open_devices(
                *(config.gpu, config.nodes, config.cpu_devices, config.deterministic),
                *(config.xla, config.seed, meeting),
                folder=str(folder),
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
    log_to_screen(arguments.verbose, is_chief=detect_launch().rank == 0)
    end_on_sigterm()
    try:
        run_benchmark(load_config(arguments.config, arguments.set), arguments.mode)
    except Exception as error:
        if arguments.verbose:
            traceback.print_exc()
        log.error("Error: %s", one_line(error))
        return 2 if is_users_mistake(error) else 1
    return 0


def one_line(error):
    """An error for people: its message where it is ours, its kind and first line where not."""
    if is_users_mistake(error):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (--verbose shows where)"


def end_on_sigterm():
    """Let SIGTERM end the program in order: with an aborted run and exit status 143."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def is_users_mistake(error):
    """Whether the user can mend an error: a bad value, file or permission."""
    return isinstance(
        error,
        UserError | SceneError | FileNotFoundError | FileExistsError | NotADirectoryError
        | IsADirectoryError | PermissionError,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
