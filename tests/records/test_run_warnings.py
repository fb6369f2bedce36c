import math

import pytest

from harness.inference.scores import MEAN_SCORES
from harness.records.run_warnings import batch_warnings, mask_warnings, training_warnings

# Training losses of `make demo`, and of the demo with learning_rate 0.5 and seed 1.
DEMO = [0.7256, 0.4891, 0.4290, 0.4143, 0.3695, 0.3900, 0.4040, 0.3589, 0.3373, 0.3026]
DEAD = [9.1513, 9.4507, 9.4507, 9.4507, 9.4507]


def epochs(losses, val_accuracy=0.8641, val_cloud=0.4554):
    return [
        {"loss": loss, "val_loss": loss, "val_accuracy": val_accuracy, "val_cloud": val_cloud}
        for loss in losses
    ]


@pytest.mark.parametrize(
    ("losses", "warns"),
    [
        (DEMO, False),
        (DEAD, True),
        (DEAD[:3], False),  # too few epochs to tell
        ([0.69, 0.69, 0.69, 0.69], True),
        ([0.7, 0.4, 0.5, 0.9, 0.8, 0.7], True),  # learned, then lost it
        ([0.7, 0.4, 0.3, 0.3, 0.9], False),  # a single bad epoch
        ([0.7, 0.69, 0.68, 0.67], False),  # slowly
    ],
)
def test_training_loss_must_fall(losses, warns):
    found = training_warnings(epochs(losses), 240, 8)
    assert [text.startswith("The training loss did not fall") for text in found] == [True] * warns


@pytest.mark.parametrize(
    ("val_accuracy", "val_cloud", "constant"),
    [
        (0.8641, 0.4554, None),
        (0.5446, 0.4554, "clear, 0.5446"),
        (0.8, 0.81, "cloud, 0.8100"),
        (0.82, 0.81, None),
        (1.0, 1.0, None),  # all scenes are cloud, and the network finds it
        (0.1, None, None),  # epochs of an earlier version
    ],
)
def test_validation_must_beat_a_constant(val_accuracy, val_cloud, constant):
    found = training_warnings(epochs(DEMO, val_accuracy, val_cloud), 240, 8)
    assert len(found) == bool(constant) and all(f"every pixel {constant}" in t for t in found)


@pytest.mark.parametrize(("n_patches", "n_warnings"), [(31, 1), (32, 1), (33, 0)])
def test_an_epoch_must_have_several_steps(n_patches, n_warnings):
    assert len(batch_warnings(n_patches, 32)) == n_warnings
    assert len(training_warnings(epochs(DEMO), n_patches, 32)) == n_warnings


def means(**known):
    return dict.fromkeys(MEAN_SCORES, math.nan) | known


# All pixels, then pixels with data: mask, all cloud, threshold; of `make demo`.
KEYS = [
    f"{pixels}{kind}accuracy"
    for pixels in ("", "valid_", "no_data_clear_")
    for kind in ("", "all_cloud_", "threshold_")
]


def accuracies(values):
    """Means with values of KEYS; a mask made clear without data is as good as that with data."""
    return means(**dict(zip(KEYS, [*values, *values[3:]], strict=True)))


GOOD = (0.777, 0.716, 0.648, 0.906, 0.847, 0.767)


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        (GOOD, []),
        # A mask that looks good only beside the baseline of other pixels.
        ((0.716, 0.716, 0.648, 0.847, 0.847, 0.767), ["all pixels", "pixels with data"]),
        ((0.777, 0.716, 0.648, 0.84, 0.847, 0.767), ["pixels with data"]),
        ((0.777, 0.716, 0.78, 0.906, 0.847, 0.767), ["all pixels"]),
        ((math.nan,) * 6, []),  # no labels
        ((1.0, 0.4, 1.0, 1.0, 0.5, 1.0), []),  # nothing is better than perfect
    ],
)
def test_masks_must_beat_the_best_baseline_on_the_same_pixels(values, rows):
    found = mask_warnings([0.3, 1.0], accuracies(values))
    assert len(found) == bool(rows)
    for text in found:
        assert [row for row in ("all pixels", "pixels with data") if row in text] == rows


@pytest.mark.parametrize(
    ("balanced", "threshold", "warns"),
    [(0.807, 0.871, True), (0.871, 0.871, True), (0.9, 0.871, False), (1.0, 1.0, False)],
)
def test_accuracy_does_not_hide_that_a_threshold_is_better_balanced(balanced, threshold, warns):
    scores = accuracies(GOOD) | {
        "valid_balanced_accuracy": balanced,
        "valid_threshold_balanced_accuracy": threshold,
        "valid_false_alarm_rate": 0.33,
        "valid_recall": 0.944,
    }
    found = mask_warnings([0.3, 1.0], scores)
    assert len(found) == warns
    assert all("call 33% of the clear sky cloud and miss 6% of the cloud" in t for t in found)


ALL_CLOUD = (0.716, 0.716, 0.648, 0.847, 0.847, 0.767)  # of a dead network on the same scenes
ALL_CLEAR = (0.284, 0.716, 0.648, 0.153, 0.847, 0.767)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize(
    ("fractions", "values", "words"),
    [
        ([1.0, 1.0], ALL_CLOUD, "every pixel of 2 masks is cloud."),
        ([0.0], ALL_CLEAR, "every pixel of 1 mask is clear."),
        ([1.0], (math.nan,) * 6, "every pixel of 1 mask is cloud."),  # no label says it is right
        ([0.0, 1.0], ALL_CLOUD, "no better than a baseline"),
        ([1.0], (1.0, 1.0, 0.648, 1.0, 1.0, 0.767), None),  # a scene full of cloud
        ([0.0], (0.9, 0.1, 0.8, 0.9, 0.1, 0.8), None),  # above all baselines
        # A scene full of cloud with missing pixels, which are clear in the label
        ([1.0], (0.9, 0.9, 0.9, 1.0, 1.0, 1.0), "baseline: accuracy, all pixels"),
    ],
)
def test_masks_must_not_be_constant_unless_that_is_right(fractions, values, words, is_trained):
    found = mask_warnings(fractions, accuracies(values), is_trained)
    assert len(found) == bool(words) and all(words in text for text in found)
    # Who only masks cannot train.
    assert all(("learning_rate" in text) == is_trained for text in found)
