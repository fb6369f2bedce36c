import math

import numpy as np
import pytest
from sklearn import metrics

from harness.inference import scores

# What each score should be, from label and mask (flat), valid and S9's brightness temperature [K].
EXPECTED = {
    "accuracy": lambda y, p, valid, bt: metrics.accuracy_score(y, p),
    "valid_accuracy": lambda y, p, valid, bt: metrics.accuracy_score(y[valid], p[valid]),
    "balanced_accuracy": lambda y, p, valid, bt: metrics.balanced_accuracy_score(y, p),
    "valid_balanced_accuracy": lambda y, p, valid, bt: metrics.balanced_accuracy_score(
        y[valid], p[valid]
    ),
    "precision": lambda y, p, valid, bt: metrics.precision_score(y, p),
    "recall": lambda y, p, valid, bt: metrics.recall_score(y, p),
    "false_alarm_rate": lambda y, p, valid, bt: 1 - metrics.recall_score(~y, ~p),
    "valid_precision": lambda y, p, valid, bt: metrics.precision_score(y[valid], p[valid]),
    "valid_recall": lambda y, p, valid, bt: metrics.recall_score(y[valid], p[valid]),
    "valid_false_alarm_rate": lambda y, p, valid, bt: (
        1 - metrics.recall_score(~y[valid], ~p[valid])
    ),
    "f1": lambda y, p, valid, bt: metrics.f1_score(y, p),
    "iou": lambda y, p, valid, bt: metrics.jaccard_score(y, p),
    "valid_fraction": lambda y, p, valid, bt: np.mean(valid),
    "cloud_fraction": lambda y, p, valid, bt: np.mean(p),
    "all_cloud_accuracy": lambda y, p, valid, bt: np.mean(y),
    "threshold_accuracy": lambda y, p, valid, bt: np.mean((bt < 273.15) == y),
    "threshold_balanced_accuracy": lambda y, p, valid, bt: metrics.balanced_accuracy_score(
        y, bt < 273.15
    ),
    "no_data_clear_accuracy": lambda y, p, valid, bt: metrics.accuracy_score(
        y, np.where(valid, p, False)
    ),
    "no_data_clear_all_cloud_accuracy": lambda y, p, valid, bt: np.mean(y == valid),
    "no_data_clear_threshold_accuracy": lambda y, p, valid, bt: np.mean(
        np.where(valid, bt < 273.15, False) == y
    ),
    "valid_all_cloud_accuracy": lambda y, p, valid, bt: np.mean(y[valid]),
    "valid_threshold_accuracy": lambda y, p, valid, bt: np.mean((bt < 273.15)[valid] == y[valid]),
    "valid_threshold_balanced_accuracy": lambda y, p, valid, bt: metrics.balanced_accuracy_score(
        y[valid], bt[valid] < 273.15
    ),
}
NEEDS_LABEL = [key for key, score in scores.SCORES.items() if score.kind != "fraction"]


@pytest.fixture(params=range(3))
def scene(request):
    rng = np.random.default_rng(request.param)
    label = rng.random((40, 50)) < 0.7
    mask = np.where(rng.random((40, 50)) < 0.8, label, ~label)
    bt = rng.uniform(250, 300, (40, 50)).astype(np.float32)
    return label, mask, rng.random((40, 50)) < 0.9, bt


@pytest.mark.parametrize("key", scores.SCORES)
def test_score_equals_that_of_scikit_learn_or_numpy(scene, key):
    label, mask, valid, bt = scene
    row = scores.score_scene(255 * mask.astype(np.uint8), label.astype(np.uint8), valid, bt, 273.15)
    assert math.isfinite(row[key]) and key in scores.SCENE_COLUMNS
    assert scores.SCORES[key].show(row[key]) and scores.SCORES[key].meaning.endswith(".")
    if key in EXPECTED:
        flat = (array.ravel() for array in scene)
        assert row[key] == pytest.approx(EXPECTED[key](*flat), rel=1e-12)


def test_counts_are_those_of_the_confusion_matrix(scene):
    label, mask, valid, bt = scene
    row = scores.score_scene(mask, label, valid, bt, 273.15)
    tn, fp, fn, tp = metrics.confusion_matrix(label.ravel(), mask.ravel()).ravel()
    assert (row["tp"], row["fp"], row["fn"], row["tn"]) == (tp, fp, fn, tn)


def test_columns_of_scenes_csv_keep_names_and_order():
    known = [
        "scene", "day_night", "accuracy", "valid_accuracy", "balanced_accuracy", "precision",
        "recall", "f1", "iou", "tp", "fp", "fn", "tn", "valid_fraction", "cloud_fraction",
        "all_cloud_accuracy", "threshold_accuracy", "seconds", "out_of_range",
    ]  # fmt: skip
    assert [column for column in scores.SCENE_COLUMNS if column in known] == known


def test_network_that_calls_everything_cloud_equals_the_baseline_on_each_set_of_pixels(scene):
    label, _, valid, bt = scene
    label = label & valid  # as in the files: clear where there are no data
    means = scores.mean_scores([scores.score_scene(label | True, label, valid, bt, 273.15)])
    compared = scores.compare_with_baselines(means)
    assert len(compared) == 5
    for mask, all_cloud, _ in compared.values():
        assert mask == all_cloud
    all_pixels, with_data, cleared = (
        compared[f"accuracy, {what}"][0]
        for what in ("all pixels", "pixels with data", "no data is clear")
    )
    # The same mask: only one row's numbers may be compared.
    assert all_pixels < with_data < cleared == pytest.approx(all_pixels + np.mean(~valid))


def test_nothing_over_nothing_is_nan():
    clear = np.zeros((4, 4), bool)
    row = scores.score_scene(clear, clear, clear, np.zeros((4, 4)), 273.15)
    assert row["accuracy"] == 1
    for name in ("precision", "recall", "f1", "iou", "balanced_accuracy", "valid_accuracy"):
        assert math.isnan(row[name])


def test_without_a_label_only_fractions_are_known():
    cold = np.array([[260.0, 280.0]])
    row = scores.score_scene(cold < 270, None, cold > 0, cold, 273.15)
    assert all(math.isnan(row[name]) for name in NEEDS_LABEL)
    assert [row[name] for name in scores.COUNTS] == [0, 0, 0, 0]
    assert (row["cloud_fraction"], row["valid_fraction"]) == (0.5, 1)


def test_means_ignore_nan_and_counts_add_up():
    base = dict.fromkeys(scores.MEAN_SCORES, 0.5) | {"tp": 1, "fp": 2, "fn": 3, "tn": 4}
    rows = [{**base, "recall": math.nan}, {**base, "recall": 0.25}]
    mean = scores.mean_scores(rows)
    assert mean["recall"] == 0.25 and mean["accuracy"] == 0.5 and mean["fn"] == 6
    assert math.isnan(scores.mean_scores(rows[:1])["recall"])
    assert mean.keys() == {*NEEDS_LABEL, *scores.COUNTS}
