"""What results.json, the lines of cloudmask.log and the screen say about a run."""

import itertools
import textwrap

import numpy as np

from harness.console import counted, format_bytes, format_duration, table
from harness.files import jsonable
from harness.inference import scores
from harness.records.run_warnings import batch_warnings

HISTORY_COLUMNS = (
    "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "patches_per_second",
    "labels_replaced",  # share of all; empty without label_correction
)  # fmt: skip
# Three threads mask scenes, each with another scene: the slowest one is the limit.
STAGES = {"reading": ("read",), "network": ("network", "stitch"), "writing": ("score", "write")}
TRAINING_RESULT = ("val_loss", "val_accuracy", "target_accuracy", "seconds_to_target")
LABEL_SOURCES = {  # words for values of `labels`; others are folders
    "none": "the mixture model", "combined": "the mixture model and the Bayesian masks",
}  # fmt: skip
EPOCH_FORMAT = "{:>9} {:>8} {:>9} {:>9} {:>13} {:>8} {:>10}  {}"


def epoch_row(state, trained, validated, evaluation_seconds):
    """What is recorded about an epoch; history.csv shows HISTORY_COLUMNS of it.

    Args:
        state: TrainingState at the end of the epoch's training steps.
        trained: Of the training steps, see Trainer.pop_train_metrics.
        validated: The same of the validation.
        evaluation_seconds: Time that the validation took [s].
    """
    return {
        "epoch": state.epoch,
        **trained,
        **{f"val_{name}": value for name, value in validated.items()},
        "seconds": state.seconds + evaluation_seconds,
        "train_seconds": state.seconds,
        "input_seconds": state.input_seconds,
        "patches_per_second": trained["patches"] / state.seconds,
    }


def training_results(state, facts, target_accuracy=None):
    """The dictionary `training` of results.json.

    Args:
        state: TrainingState with at least one epoch.
        facts: Numbers of scenes and patches, name of the loss, seconds of the warm-up.
        target_accuracy: The validation accuracy to reach; None for that of MLCommons Science.
    """
    target = target_accuracy or scores.TARGET_ACCURACY
    history, best = state.history, state.best
    seconds = [row["train_seconds"] for row in history]
    later = seconds[1:] or seconds  # the first epoch reads files that are not cached yet
    return {
        **facts,
        "epochs_run": len(history),
        "best_epoch": best["epoch"],
        "seconds": sum(row["seconds"] for row in history),
        "seconds_per_epoch": [row["seconds"] for row in history],
        "train_seconds_per_epoch": seconds,
        "input_seconds_per_epoch": [row["input_seconds"] for row in history],  # part of these
        "patches_per_second": facts["patches_train"] * len(later) / sum(later),
        "target_accuracy": target,
        "seconds_to_target": state.seconds_to(target),
        **{name: best[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
        # Of the pixels of val_accuracy; None if an earlier version trained the epoch.
        "baselines": {"all_cloud_accuracy": best.get("val_cloud")},
    }


def inference_results(rows, seconds):
    """The dictionary `inference` of results.json."""
    parts = {
        part: float(np.mean([row[f"{part}_seconds"] for row in rows]))
        for part in scores.SCENE_PARTS
    }
    of_device = float(np.mean([row["seconds"] for row in rows]))
    shares = {part: scores.ratio(part_seconds, of_device) for part, part_seconds in parts.items()}
    stages = {name: sum(map(shares.get, members)) for name, members in STAGES.items()}
    return {
        **scene_results(rows),
        "seconds": seconds,
        "seconds_per_scene": seconds / len(rows),
        "seconds_per_scene_parts": parts,
        "shares": shares,
        "limited_by": max(stages, key=stages.get),
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
    """The counts and scores in `inference`, from the rows of scenes.csv."""
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
    """The dictionary `sampling` of results.json: the totals of ranks, or of parts of a run.

    A total is None if one of them did not measure it: the sum of the others would be too small.
    `energy_joules` is that of processors and GPUs. `gpu_energy_joules` is None without a GPU too.

    Args:
        parts: Dictionaries of sampling.Sampler.totals; None for a part that was killed.
    """
    if not all(parts):
        return None
    total = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        add = max if key == "peak_memory" else sum
        total[key] = None if None in values else add(values)
    joules = total["cpu_energy_joules"], total["gpu_energy_joules"]
    energy = None if None in joules else sum(joules)
    return {**total, "gpu_energy_joules": joules[1] or None, "energy_joules": energy}


def peaks(parts):
    """Peak memory of all parts of a run, of the process and by GPU [bytes]."""
    by_gpu = [part.get("peak_gpu_memory", []) for part in parts]
    return {
        "peak_rss": max(part.get("peak_rss", 0) for part in parts),
        "peak_gpu_memory": [max(gpu) for gpu in itertools.zip_longest(*by_gpu, fillvalue=0)],
    }


def training_line(config, devices, state, n_scenes):
    """The training line of cloudmask.log: the fields of v1.1, then ours."""
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
    """The inference line of cloudmask.log: the fields of v1.1, then ours."""
    return (
        f"CloudMask inference, inferences={results['scenes']}, bs={config.batch_size}, "
        f"nodes={devices.n_nodes}, gpus={devices.n_gpus}, "
        f"time_per_inference={results['seconds_per_scene']:.2f}, "
        f"accuracy={results['accuracy']:.3f}, replicas={devices.n_replicas}, "
        f"all_cloud_accuracy={results['all_cloud_accuracy']:.3f}, "
        f"threshold_accuracy={results['threshold_accuracy']:.3f}, "
        f"no_data_clear_accuracy={results['no_data_clear_accuracy']:.3f}, "
        f"valid_accuracy={results['valid_accuracy']:.3f}, "
        f"valid_all_cloud_accuracy={results['valid_all_cloud_accuracy']:.3f}, "
        f"valid_threshold_accuracy={results['valid_threshold_accuracy']:.3f}, "
        f"limited_by={results['limited_by']}, "
        + ", ".join(f"{part}_share={share:.2f}" for part, share in results["shares"].items())
    )


def result_event(results):
    """The final metrics, for the event `result` of MLCommons Science."""
    training, inference = results["training"] or {}, results["inference"] or {}
    return jsonable(
        {
            **{name: training[name] for name in TRAINING_RESULT if training},
            **{name: inference[name] for name in ("accuracy", "seconds_per_scene") if inference},
        }
    )


# --- for the screen -------------------------------------------------------------------------


def plan(config, mode, scenes, devices):
    """Lines that say what a run will do.

    Args:
        config: Config.
        mode: 'benchmark', 'train' or 'inference'.
        scenes: data.preflight.Scenes.
        devices: Devices.
    """
    size, per_scene = config.patch_size, config.patches_per_scene
    shape = f"{config.image_h} x {config.image_w}"
    lines = ["devices     " + devices.describe()]
    if mode != "inference":
        n, n_patches = len(scenes.train), len(scenes.train) * per_scene
        lines += [
            f"training    {counted(n, 'scene')} of {shape}, {counted(n_patches, 'patch')} of "
            f"{size}; {len(scenes.validation)} for validation",
            f"            {counted(config.epochs, 'epoch')}, batch {config.batch_size}, Adam "
            f"{config.learning_rate:g}, {config.precision}, seed {config.seed}",
        ]
        lines += _warnings(batch_warnings(n_patches, config.batch_size))
    if mode != "train":
        how = {"patches": f"patches of {size}, overlap {config.crop_size}", "scene": "one pass"}
        n = counted(len(scenes.inference), "scene")
        size = "" if mode == "inference" else f" of {shape}"  # which takes any size
        lines.append(f"inference   {n}{size}, {how[config.inference_mode]}")
        if config.no_data == "clear":
            lines.append("            clear where a brightness temperature is missing")
    if scenes.synthetic:
        lines.append(f"data        synthetic scenes in {' and '.join(sorted(scenes.synthetic))}")
    return lines


def network_line(network, loss=None):
    """One line about the network: its name, layers, parameters and loss."""
    text = f"network     {network['name']}, {network['layers']} layers, "
    text += f"{network['parameters']:,} parameters"
    return text + (f", loss {loss}" if loss else "")


def epoch_header():
    """The header of the lines of epochs."""
    return EPOCH_FORMAT.format(
        *("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "patches/s", "left")
    ).rstrip()


def epoch_line(history, n_epochs, training_seconds=None):
    """The line of a completed epoch, with the time that the remaining ones will take at most."""
    row = history[-1]
    left = (n_epochs - row["epoch"]) * float(np.median([row["seconds"] for row in history[-5:]]))
    if training_seconds:
        left = min(left, max(training_seconds - sum(row["seconds"] for row in history), 0))
    scores_of_epoch = (
        f"{row[key]:.4f}" for key in ("loss", "accuracy", "val_loss", "val_accuracy")
    )
    speed = f"{row['seconds']:.1f}", f"{row['patches_per_second']:.1f}"
    number = f"{row['epoch']}/{n_epochs}"
    return EPOCH_FORMAT.format(
        number, *scores_of_epoch, *speed, format_duration(left) if left else ""
    ).rstrip()


def summary(results):
    """Lines that summarise a completed run, from the content of results.json."""
    training, inference = results["training"], results["inference"]
    lines = []
    if inference and (n := inference["scenes_labelled"]):
        noun = "synthetic scene" if inference["synthetic"] else "scene"
        lines += [
            f"scores      agreement with the Bayesian mask, mean of {counted(n, noun)}",
            *(f"            {line}" for line in _score_table(inference).splitlines()),
        ]
    if inference and (n := inference["scenes"] - inference["scenes_labelled"]):
        lines.append(f"no scores   for {counted(n, 'scene')} without a Bayesian mask")
    if training:
        lines.append(
            f"validation  accuracy {training['val_accuracy']:.3f}, loss {training['val_loss']:.4f} "
            f"in the best epoch, {training['best_epoch']} of {training['epochs_run']}"
        )
        if (labels := results["config"]["labels"]) != "bayes":
            source = LABEL_SOURCES.get(labels, labels)
            lines.append(f"            against labels from {source}, as in training")
        if target := target_text(training, results["config"]):
            lines.append(f"target      {target}")
        lines += [
            f"training    {training['seconds'] / training['epochs_run']:.1f} s per epoch, "
            f"{training['patches_per_second']:.1f} patches/s",
        ]
    if inference:
        network = f"{inference['seconds_per_scene_parts']['network']:.2f} s"
        network += " on each device" if results["devices"]["replicas"] > 1 else ""
        lines.append(
            f"inference   {inference['seconds_per_scene']:.2f} s per scene, "
            f"{counted(inference['scenes'], 'scene')}; the network {network}"
        )
        shares = (f"{part} {100 * share:.0f}" for part, share in inference["shares"].items())
        lines.append(f"            limit: {inference['limited_by']}; {', '.join(shares)} %")
    if bad := results["bad_scenes"]:
        lines.append(f"skipped     {counted(len(bad), 'bad scene')}, listed in results.json")
    total = f"total       {format_duration(results['seconds'])}, "
    total += f"peak memory {format_bytes(results['peak_rss'])}"
    if (results["sampling"] or {}).get("energy_joules") is not None:
        total += f", {results['sampling']['energy_joules'] / 3.6e6:.3f} kWh"
    return [*lines, total, *_warnings(results["warnings"])]


def target_text(training, config):
    """When the validation accuracy reached its target, as text.

    Args:
        training: Of results.json.
        config: Of results.json.

    Returns:
        None if the target is that of MLCommons Science, an agreement with Bayesian masks, and the
        labels are others.
    """
    if config.get("labels", "bayes") != "bayes" and not config.get("target_accuracy"):
        return None
    seconds, text = training.get("seconds_to_target"), f"accuracy {training['target_accuracy']:g}"
    if seconds is None:
        return f"{text} not reached in validation"
    return f"{text} reached in validation after {format_duration(seconds)}"


def _warnings(texts):
    """Warnings as lines of at most 78 characters."""
    lines = (textwrap.wrap(text, 66) for text in texts)
    return [
        f"{'' if i else 'warning':12}{line}" for wrapped in lines for i, line in enumerate(wrapped)
    ]


def _score_table(means):
    """Mask, baselines and target in columns; each row has one score, of the same pixels."""
    rows = scores.compare_with_baselines(means)
    columns = {
        title: {what: f"{row[i]:.3f}" for what, row in rows.items()}
        for i, title in enumerate(("mask", "all cloud", "threshold"))
    }
    first = next(iter(rows))  # the accuracy of all pixels
    return table({**columns, "target": {first: str(scores.TARGET_ACCURACY)}})
