"""The table of scores: how well a cloud mask agrees with its label.

A new score is a function of `Pixels` and an entry in SCORES; scenes.csv, results.json, the report,
tools/compare.py and tools/submission.py then include it. Cloud is the positive class.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

THRESHOLD = 0.5  # cloud where the probability is higher
TARGET_ACCURACY = 0.9  # MLCommons Science, policy.adoc: mean over scenes
COUNTS = ("tp", "fp", "fn", "tn")  # true and false positives, false and true negatives
SCENE_PARTS = {  # of the time that a scene takes; columns and keys, and their words for people
    "read": "reading", "network": "network", "stitch": "stitching", "score": "scoring",
    "write": "writing",
}  # fmt: skip


@dataclass
class Pixels:
    """One scene as the scores see it.

    Attributes:
        mask: bool (H, W), the network's, also where there are no data; True is cloud.
        label: bool (H, W), the Bayesian mask; None if the scene has none.
        valid: bool (H, W), False where a brightness temperature is missing.
        bt_12um: float32 (H, W), brightness temperature of S9 [K]; 0 where missing.
        min_sst: The threshold baseline calls colder pixels cloud [K].
        n_pixels: Number of pixels that count; all by default.
        tp, fp, fn, tn: Numbers of pixels, see COUNTS; 0 without a label.
    """

    mask: np.ndarray
    label: np.ndarray | None
    valid: np.ndarray
    bt_12um: np.ndarray
    min_sst: float
    n_pixels: int | None = None

    def __post_init__(self):
        if self.n_pixels is None:
            self.n_pixels = self.mask.size
        self.tp = self.fp = self.fn = self.tn = 0
        if self.label is not None:
            self.tp = int(np.count_nonzero(self.mask & self.label))
            self.fp = int(np.count_nonzero(self.mask)) - self.tp
            self.fn = int(np.count_nonzero(self.label)) - self.tp
            self.tn = self.n_pixels - self.tp - self.fp - self.fn

    @functools.cached_property
    def with_data(self):
        """The same Pixels, of which only those with data count; mask and label are clear elsewhere.

        Three operations on bool arrays: copying the pixels would take ten times as long.
        """
        return replace(
            self,
            mask=self.mask & self.valid,
            label=self.label & self.valid,
            n_pixels=int(np.count_nonzero(self.valid)),
        )

    @functools.cached_property
    def cleared(self):
        """The same Pixels with a mask that is clear where there are no data, `no_data: clear`."""
        return replace(self, mask=self.mask & self.valid)

    @functools.cached_property
    def threshold(self):
        """The same Pixels with the mask of the threshold baseline; missing is cold."""
        return replace(self, mask=self.bt_12um < self.min_sst)


def accuracy(p):
    """Share of pixels where mask and label agree."""
    return ratio(p.tp + p.tn, p.n_pixels)


def valid_accuracy(p):
    """Accuracy among pixels with data."""
    return accuracy(p.with_data)


def balanced_accuracy(p):
    """Mean of the recalls of cloud and of clear; that of calling every pixel cloud is 0.5."""
    return (recall(p) + ratio(p.tn, p.tn + p.fp)) / 2


def valid_balanced_accuracy(p):
    """Balanced accuracy among pixels with data."""
    return balanced_accuracy(p.with_data)


def precision(p):
    """Share of the mask's cloud that is cloud in the label."""
    return ratio(p.tp, p.tp + p.fp)


def valid_precision(p):
    """Precision among pixels with data."""
    return precision(p.with_data)


def recall(p):
    """Share of the label's cloud that is cloud in the mask: the hit rate."""
    return ratio(p.tp, p.tp + p.fn)


def valid_recall(p):
    """Recall among pixels with data."""
    return recall(p.with_data)


def false_alarm_rate(p):
    """Share of the label's clear pixels that are cloud in the mask."""
    return ratio(p.fp, p.fp + p.tn)


def valid_false_alarm_rate(p):
    """False alarm rate among pixels with data."""
    return false_alarm_rate(p.with_data)


def f1(p):
    """Harmonic mean of precision and recall."""
    return ratio(2 * p.tp, 2 * p.tp + p.fp + p.fn)


def iou(p):
    """Cloud in both over cloud in either."""
    return ratio(p.tp, p.tp + p.fp + p.fn)


def valid_fraction(p):
    """Share of pixels with all brightness temperatures."""
    return float(p.valid.mean())


def cloud_fraction(p):
    """Share of cloud in the mask."""
    return float(p.mask.mean())


def all_cloud_accuracy(p):
    """Accuracy of calling every pixel cloud: the share of cloud in the label."""
    return ratio(p.tp + p.fn, p.n_pixels)


def threshold_accuracy(p):
    """Accuracy of calling pixels cloud where S9 is colder than MIN_SST; missing is cold."""
    return accuracy(p.threshold)


def threshold_balanced_accuracy(p):
    """Balanced accuracy of that threshold."""
    return balanced_accuracy(p.threshold)


def no_data_clear_accuracy(p):
    """Accuracy of the mask made clear where there are no data, as by `no_data: clear`."""
    return accuracy(p.cleared)


def no_data_clear_all_cloud_accuracy(p):
    """Accuracy of calling every pixel with data cloud and all others clear."""
    return accuracy(replace(p, mask=p.valid))


def no_data_clear_threshold_accuracy(p):
    """Accuracy of the threshold made clear where there are no data."""
    return accuracy(p.threshold.cleared)


def valid_all_cloud_accuracy(p):
    """Accuracy of calling every pixel cloud, among pixels with data."""
    return all_cloud_accuracy(p.with_data)


def valid_threshold_accuracy(p):
    """Accuracy of the threshold among pixels with data."""
    return accuracy(p.threshold.with_data)


def valid_threshold_balanced_accuracy(p):
    """Balanced accuracy of the threshold among pixels with data."""
    return balanced_accuracy(p.threshold.with_data)


def ratio(part, whole):
    """Part of a whole; NaN if the whole is 0."""
    return float(part / whole) if whole else math.nan


@dataclass(frozen=True)
class Score:
    """An entry of the table.

    Attributes:
        label: Name in tables and charts for people.
        value: Function of Pixels, a float; the first line of its docstring explains the score.
        kind: 'agreement' of mask and label; 'baseline' that a mask has to beat; 'fraction', which
            needs no label and has no mean over scenes.
        format: How people read a value, a format specification.
    """

    label: str
    value: Callable[[Pixels], float]
    kind: str = "agreement"
    format: str = ".4f"

    @property
    def meaning(self):
        """One sentence that explains the score."""
        return (self.value.__doc__ or "").partition("\n")[0]

    def show(self, value):
        """A value as text for people."""
        return format(value, self.format)


SCORES = {  # by the key in scenes.csv and results.json, in the order of all tables
    "accuracy": Score("accuracy", accuracy),
    "all_cloud_accuracy": Score("all cloud", all_cloud_accuracy, "baseline"),
    "threshold_accuracy": Score("threshold", threshold_accuracy, "baseline"),
    "no_data_clear_accuracy": Score("accuracy, no data is clear", no_data_clear_accuracy),
    "no_data_clear_all_cloud_accuracy": Score(
        "all cloud, no data is clear", no_data_clear_all_cloud_accuracy, "baseline"
    ),
    "no_data_clear_threshold_accuracy": Score(
        "threshold, no data is clear", no_data_clear_threshold_accuracy, "baseline"
    ),
    "valid_accuracy": Score("valid accuracy", valid_accuracy),
    "valid_all_cloud_accuracy": Score("valid all cloud", valid_all_cloud_accuracy, "baseline"),
    "valid_threshold_accuracy": Score("valid threshold", valid_threshold_accuracy, "baseline"),
    "balanced_accuracy": Score("balanced accuracy", balanced_accuracy),
    "threshold_balanced_accuracy": Score(
        "balanced threshold", threshold_balanced_accuracy, "baseline"
    ),
    "valid_balanced_accuracy": Score("valid balanced accuracy", valid_balanced_accuracy),
    "valid_threshold_balanced_accuracy": Score(
        "valid balanced threshold", valid_threshold_balanced_accuracy, "baseline"
    ),
    "precision": Score("precision", precision),
    "recall": Score("recall", recall),
    "false_alarm_rate": Score("false alarm rate", false_alarm_rate),
    "f1": Score("F1", f1),
    "iou": Score("IoU", iou),
    "valid_precision": Score("valid precision", valid_precision),
    "valid_recall": Score("valid recall", valid_recall),
    "valid_false_alarm_rate": Score("valid false alarm rate", valid_false_alarm_rate),
    "valid_fraction": Score("pixels with data", valid_fraction, "fraction"),
    "cloud_fraction": Score("cloud in mask", cloud_fraction, "fraction"),
}
# Scores and baselines of the same pixels: no others may be compared.
COMPARED = {  # what: keys of mask, all cloud (with a balanced accuracy of 0.5) and threshold
    "accuracy, all pixels": ("accuracy", "all_cloud_accuracy", "threshold_accuracy"),
    "accuracy, no data is clear": (
        "no_data_clear_accuracy", "no_data_clear_all_cloud_accuracy",
        "no_data_clear_threshold_accuracy",
    ),
    "accuracy, pixels with data": (
        "valid_accuracy", "valid_all_cloud_accuracy", "valid_threshold_accuracy",
    ),
    "balanced, all pixels": ("balanced_accuracy", None, "threshold_balanced_accuracy"),
    "balanced, pixels with data": (
        "valid_balanced_accuracy", None, "valid_threshold_balanced_accuracy",
    ),
}  # fmt: skip
MEAN_SCORES = {key: score for key, score in SCORES.items() if score.kind != "fraction"}


def _keys(kind):
    return [key for key, score in SCORES.items() if score.kind == kind]


SCENE_COLUMNS = (
    *("scene", "day_night", *_keys("agreement"), *COUNTS),
    *(*_keys("fraction"), *_keys("baseline"), "seconds", "out_of_range"),
)


def score_scene(mask, label, valid, bt_12um, min_sst):
    """Score one mask, and the baselines that it has to beat.

    Args:
        mask: uint8 or bool (H, W), the network's in all pixels; non-zero is cloud.
        label: The Bayesian mask, likewise; None if there is none to compare with.
        valid: bool (H, W), False where a brightness temperature is missing.
        bt_12um: float32 (H, W), brightness temperature of S9 [K]; 0 where missing.
        min_sst: The threshold baseline calls colder pixels cloud [K].

    Returns:
        Dictionary with the scores and COUNTS; without a label all but the fractions are NaN and 0.
    """
    label = None if label is None else label.astype(bool)
    pixels = Pixels(mask.astype(bool), label, valid, bt_12um, min_sst)
    values = {
        key: math.nan if label is None and score.kind != "fraction" else score.value(pixels)
        for key, score in SCORES.items()
    }
    return {**values, **{key: getattr(pixels, key) for key in COUNTS}}


def mean_scores(rows):
    """Means over scenes of MEAN_SCORES, and sums of the counts.

    Args:
        rows: Dictionaries of `score_scene`. Means ignore NaN.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        means = {
            key: float(np.nanmean([row[key] for row in rows] or [math.nan])) for key in MEAN_SCORES
        }
    return {**means, **{key: sum(row[key] for row in rows) for key in COUNTS}}


def compare_with_baselines(means):
    """What mask and baselines reach on the same pixels.

    Args:
        means: Dictionary with MEAN_SCORES.

    Returns:
        {what, as in COMPARED: (mask, all cloud, threshold)}.
    """
    return {
        what: tuple(0.5 if key is None else means[key] for key in keys)
        for what, keys in COMPARED.items()
    }
