"""What results.json, the lines of cloudmask.log and the screen say of a run."""

import itertools

import numpy as np

from harness.console import format_bytes, format_duration
from harness.files import jsonable
from harness.inference import scores

EPOCH_FORMAT = "{:>9} {:>8} {:>9} {:>9} {:>13} {:>8} {:>10}  {}"


def training_results(state, paths, batches, warm_up_seconds):
    """The part `training` of results.json."""
    history, best = state.history, state.best
    seconds = [row["train_seconds"] for row in history]
    later = seconds[1:] or seconds  # the first epoch finds cold caches
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
        "input_seconds_per_epoch": [row.get("input_seconds") for row in history],  # of these
        "warm_up_seconds": warm_up_seconds,  # tracing and compiling, before the run starts
        "patches_per_second": batches[0].n_patches * len(later) / sum(later),
        **{name: best[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
    }


def inference_results(rows, seconds):
    """The part `inference` of results.json."""
    return {
        **scene_results(rows),
        "seconds": seconds,
        "seconds_per_scene": seconds / len(rows),
        "seconds_per_scene_parts": {
            part: float(np.mean([row[f"{part}_seconds"] for row in rows]))
            for part in ("read", "network", "stitch", "score", "write")
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
    }


def scene_results(rows):
    """What of `inference` the rows of scenes.csv tell: counts and scores."""
    return {
        "scenes": len(rows),
        "scenes_labelled": sum(any(row[count] for count in scores.COUNTS) for row in rows),
        **scores.mean_scores(rows),
        "out_of_range": sum(row["out_of_range"] for row in rows),
        **{
            kind: scores.mean_scores(of_kind)
            for kind in ("day", "night")
            if (of_kind := [row for row in rows if row["day_night"] == kind])
        },
    }


def sampling_results(parts):
    """The part `sampling` of results.json: totals of several ranks, or of parts of a run, added up.

    What one of them could not measure, or did not live to tell, is None: the sum without it would
    be too small. `energy_joules` is that of processors and GPUs together.

    Args:
        parts: Dictionaries of sampling.Sampler.totals, or None.
    """
    if not all(parts):
        return None
    total = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        add = max if key == "peak_memory" else sum
        total[key] = None if None in values else add(values)
    joules = total["cpu_energy_joules"], total["gpu_energy_joules"]
    return {**total, "energy_joules": None if None in joules else sum(joules)}


def peaks(parts):
    """Most memory that any part of a run took, of the process and by GPU [bytes]."""
    by_gpu = [part.get("peak_gpu_memory", []) for part in parts]
    return {
        "peak_rss": max(part.get("peak_rss", 0) for part in parts),
        "peak_gpu_memory": [max(gpu) for gpu in itertools.zip_longest(*by_gpu, fillvalue=0)],
    }


def training_line(config, devices, state, n_scenes):
    """The training line of cloudmask.log: v1.1's fields, then ours."""
    history, best = state.history, state.best
    per_epoch = sum(row["seconds"] for row in history) / len(history)
    return (
        f"CloudMask training, samples = {n_scenes}, epochs={len(history)}, "
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
    return jsonable(
        {
            **{name: training[name] for name in ("val_loss", "val_accuracy") if training},
            **{name: inference[name] for name in ("accuracy", "seconds_per_scene") if inference},
        }
    )


# --- for the screen -------------------------------------------------------------------------


def work_ahead(config, mode, n_train, n_test, n_masked):
    """Lines that say what a run will do, from its configuration and numbers of scenes."""
    size = config.patch_size
    per_scene = (config.image_h // size) * (config.image_w // size)
    shape = f"{config.image_h} x {config.image_w}"
    lines = []
    if mode != "inference":
        lines += [
            f"training    {n_train} scenes of {shape}, {n_train * per_scene} patches of {size}; "
            f"{n_test} to validate",
            f"            {config.epochs} epochs, batch {config.batch_size}, Adam "
            f"{config.learning_rate:g}, {config.precision}, seed {config.seed}",
        ]
    if mode != "train":
        how = {"patches": f"patches of {size}, overlap {config.crop_size}", "scene": "one pass"}
        lines.append(f"inference   {n_masked} scenes of {shape}, {how[config.inference_mode]}")
    return lines


def epoch_header():
    """The line above those of the epochs."""
    return EPOCH_FORMAT.format(
        *("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "patches/s", "left")
    ).rstrip()


def epoch_line(history, n_epochs):
    """An epoch that has ended, and the time that those to come will take."""
    row = history[-1]
    left = (n_epochs - row["epoch"]) * float(np.median([row["seconds"] for row in history[-5:]]))
    scores_of_epoch = (
        f"{row[key]:.4f}" for key in ("loss", "accuracy", "val_loss", "val_accuracy")
    )
    speed = f"{row['seconds']:.1f}", f"{row['patches_per_second']:.1f}"
    number = f"{row['epoch']}/{n_epochs}"
    return EPOCH_FORMAT.format(
        number, *scores_of_epoch, *speed, format_duration(left) if left else ""
    ).rstrip()


def summary(results):
    """Lines that say what a run has reached, from what results.json holds."""
    training, inference = results["training"], results["inference"]
    lines = []
    if inference and inference["scenes_labelled"]:
        lines += [
            f"accuracy    {inference['accuracy']:.3f} of pixels agree with the Bayesian mask; "
            "the target is 0.9",
            f"            {inference['valid_accuracy']:.3f} of those with data; all cloud "
            f"{inference['all_cloud_accuracy']:.3f}, threshold "
            f"{inference['threshold_accuracy']:.3f}",
        ]
    if inference and (n := inference["scenes"] - inference["scenes_labelled"]):
        lines.append(f"no scores   of {n} scene(s) without a Bayesian mask")
    if training:
        lines += [
            f"validation  accuracy {training['val_accuracy']:.3f}, loss {training['val_loss']:.4f} "
            f"after epoch {training['best_epoch']} of {training['epochs_run']}, the best",
            f"training    {training['seconds'] / training['epochs_run']:.1f} s an epoch, "
            f"{training['patches_per_second']:.1f} patches/s",
        ]
    if inference:
        parts = inference["seconds_per_scene_parts"]
        lines.append(
            f"inference   {inference['seconds_per_scene']:.2f} s a scene, "
            f"{inference['scenes']} scenes; the network {parts['network']:.2f} s"
        )
    if bad := results["bad_scenes"]:
        lines.append(f"left out    {len(bad)} bad scenes, named in results.json")
    taken = f"in all      {format_duration(results['seconds'])}, {format_bytes(results['peak_rss'])} of memory"
    if (results["sampling"] or {}).get("energy_joules") is not None:
        taken += f", {results['sampling']['energy_joules'] / 3.6e6:.3f} kWh"
    return [*lines, taken]
