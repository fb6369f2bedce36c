"""What looks wrong in a run, one line each with what to try: most of all, that it learned nothing.

The rules take numbers alone. They hold for any data: a mask has to be better than baselines that
learn nothing, in balanced accuracy too, because a high accuracy can come from the frequent class.
"""

import math
import statistics

from harness.console import counted
from harness.inference.scores import COMPARED, compare_with_baselines

EPOCHS_TO_LEARN = 4  # in fewer epochs the loss need not fall
ADVICE = "Lower learning_rate, or train for more epochs."


def batch_warnings(n_patches, batch_size):
    """Whether an epoch is a single step of the optimizer.

    Args:
        n_patches: Number of training patches.
        batch_size: Global batch size.
    """
    if n_patches > batch_size:
        return []
    return [
        f"An epoch is a single training step: batch_size {batch_size} is not smaller than the "
        f"number of training patches, {n_patches}. Lower batch_size."
    ]


def training_warnings(history, n_patches, batch_size):
    """What looks wrong in a training.

    Args:
        history: Dictionaries of `results.epoch_row`, at least one.
        n_patches: Number of training patches.
        batch_size: Global batch size.
    """
    found = batch_warnings(n_patches, batch_size)
    losses = [row["loss"] for row in history]
    # The median: single epochs may be worse, or by chance better, than the others.
    late = statistics.median(losses[len(losses) // 2 :])
    if len(losses) >= EPOCHS_TO_LEARN and late >= losses[0]:
        found.append(
            f"The training loss did not fall: {losses[0]:.4f} in the first epoch, {late:.4f} in "
            f"the later half of {len(losses)} epochs. Lower learning_rate."
        )
    best = min(history, key=lambda row: row["val_loss"])
    cloud = best.get("val_cloud")  # absent in epochs of an earlier version
    if cloud is not None and _is_no_better(best["val_accuracy"], share := max(cloud, 1 - cloud)):
        found.append(
            f"The validation accuracy, {best['val_accuracy']:.4f}, is not above that of calling "
            f"every pixel {_kind(cloud >= 0.5)}, {share:.4f}. {ADVICE}"
        )
    return found


def mask_warnings(cloud_fractions, means, is_trained=True):
    """What looks wrong in masks.

    Args:
        cloud_fractions: Share of cloud in the mask of each scene, at least one.
        means: Dictionary with the means of scores; NaN if no scene has a label.
        is_trained: Whether the run trained the network, so that advice on training is of use.
    """
    advice = f" {ADVICE}" if is_trained else ""
    rows = compare_with_baselines(means)
    compared = {what: values for what, values in rows.items() if COMPARED[what][1]}
    worse = [
        f"{what} {mask:.4f}, best baseline {max(baselines):.4f}"
        for what, (mask, *baselines) in compared.items()
        if _is_no_better(mask, max(baselines))
    ]
    is_unknown = math.isnan(means["accuracy"])
    constant = min(cloud_fractions)
    is_constant = constant in (0, 1) and max(cloud_fractions) == constant
    if is_constant and (is_unknown or len(worse) == len(compared)):
        masks = counted(len(cloud_fractions), "mask")
        kind = _kind(constant)
        return [f"The network has learned nothing: every pixel of {masks} is {kind}.{advice}"]
    found = []
    if worse:
        found.append(f"The masks are no better than a baseline: {'; '.join(worse)}.{advice}")
    balanced, _, threshold = rows["balanced, pixels with data"]
    if _is_no_better(balanced, threshold):
        found.append(
            f"The balanced accuracy of pixels with data, {balanced:.4f}, is not above that of the "
            f"threshold, {threshold:.4f}: the masks call {means['valid_false_alarm_rate']:.0%} of "
            f"the clear sky cloud and miss {1 - means['valid_recall']:.0%} of the cloud.{advice}"
        )
    return found


def _is_no_better(accuracy, baseline):
    """Whether a baseline reaches the accuracy; not if that is perfect. NaN is not known."""
    return accuracy <= baseline and accuracy < 1


def _kind(is_cloud):
    return "cloud" if is_cloud else "clear"
