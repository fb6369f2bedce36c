"""How well a cloud mask agrees with the label, in the names that results.json and scenes.csv use.

Cloud is the positive class. A ratio without anything below the line is NaN.
"""

import math
import warnings

import numpy as np

COUNTS = ("tp", "fp", "fn", "tn")
RATIOS = ("accuracy", "valid_accuracy", "balanced_accuracy", "precision", "recall", "f1", "iou")
BASELINES = ("all_cloud_accuracy", "threshold_accuracy")
SCENE_COLUMNS = (
    "scene", "day_night", *RATIOS, *COUNTS, "valid_fraction", "cloud_fraction", *BASELINES,
    "seconds", "out_of_range",
)  # fmt: skip


def confusion(mask, label):
    """Count pixels: true and false positives, false and true negatives.

    Args:
        mask: bool, any shape; True is cloud.
        label: bool, the same shape.

    Returns:
        Dictionary of int with the keys tp, fp, fn, tn.
    """
    tp = int(np.count_nonzero(mask & label))
    fp = int(np.count_nonzero(mask)) - tp
    fn = int(np.count_nonzero(label)) - tp
    return {"tp": tp, "fp": fp, "fn": fn, "tn": mask.size - tp - fp - fn}


def ratios(tp, fp, fn, tn):
    """Derive the scores from confusion counts."""
    recall = _divide(tp, tp + fn)
    specificity = _divide(tn, tn + fp)
    return {
        "accuracy": _divide(tp + tn, tp + fp + fn + tn),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": _divide(tp, tp + fp),
        "recall": recall,
        "f1": _divide(2 * tp, 2 * tp + fp + fn),
        "iou": _divide(tp, tp + fp + fn),
    }


def score_scene(mask, label, valid, bt_12um, min_sst):
    """Score one mask, and the two baselines that it has to beat.

    Args:
        mask: uint8 or bool (H, W), non-zero is cloud.
        label: The Bayesian mask, likewise; None where there is none to compare with.
        valid: bool (H, W), False where a brightness temperature is missing.
        bt_12um: float32 (H, W), brightness temperature of S9 [K]; 0 where missing.
        min_sst: The threshold baseline calls colder pixels cloud [K].

    Returns:
        Dictionary with the score columns of scenes.csv.
    """
    mask = mask.astype(bool)
    fractions = {"valid_fraction": float(valid.mean()), "cloud_fraction": float(mask.mean())}
    if label is None:
        unknown = dict.fromkeys(("valid_accuracy", *BASELINES), math.nan)
        counts = dict.fromkeys(COUNTS, 0)
        return {**ratios(**counts), **unknown, **counts, **fractions}
    label = label.astype(bool)
    counts = confusion(mask, label)
    return {
        **ratios(**counts),
        "valid_accuracy": ratios(**confusion(mask[valid], label[valid]))["accuracy"],
        **counts,
        **fractions,
        "all_cloud_accuracy": float(label.mean()),
        "threshold_accuracy": float(((bt_12um < min_sst) == label).mean()),
    }


def mean_scores(rows):
    """Means over scenes of the ratios and baselines, and sums of the counts.

    Args:
        rows: Dictionaries of `score_scene`. A NaN is left out of its mean.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        means = {
            key: float(np.nanmean([row[key] for row in rows] or [math.nan]))
            for key in (*RATIOS, *BASELINES)
        }
    return {**means, **{key: sum(row[key] for row in rows) for key in COUNTS}}


def _divide(a, b):
    return a / b if b else math.nan
