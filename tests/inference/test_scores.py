import math

import numpy as np
import pytest
from sklearn import metrics

from harness.inference import scores


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    label = rng.random((40, 50)) < 0.7
    mask = np.where(rng.random((40, 50)) < 0.8, label, ~label)
    valid = rng.random((40, 50)) < 0.9
    bt = rng.uniform(250, 300, (40, 50)).astype(np.float32)
    row = scores.score_scene(mask.astype(np.uint8), label.astype(np.uint8), valid, bt, 273.15)
    y, p = label.ravel(), mask.ravel()
    assert row["accuracy"] == pytest.approx(metrics.accuracy_score(y, p))
    assert row["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y, p))
    assert row["precision"] == pytest.approx(metrics.precision_score(y, p))
    assert row["recall"] == pytest.approx(metrics.recall_score(y, p))
    assert row["f1"] == pytest.approx(metrics.f1_score(y, p))
    assert row["iou"] == pytest.approx(metrics.jaccard_score(y, p))
    tn, fp, fn, tp = metrics.confusion_matrix(y, p).ravel()
    assert (row["tp"], row["fp"], row["fn"], row["tn"]) == (tp, fp, fn, tn)
    assert row["valid_accuracy"] == pytest.approx((mask == label)[valid].mean())
    assert row["all_cloud_accuracy"] == pytest.approx(label.mean())
    assert row["threshold_accuracy"] == pytest.approx(((bt < 273.15) == label).mean())
    assert row["cloud_fraction"] == pytest.approx(mask.mean())
    assert row["valid_fraction"] == pytest.approx(valid.mean())


def test_nothing_over_nothing_is_nan():
    clear = np.zeros((4, 4), bool)
    row = scores.score_scene(clear, clear, clear, np.zeros((4, 4)), 273.15)
    assert row["accuracy"] == 1
    for name in ("precision", "recall", "f1", "iou", "balanced_accuracy", "valid_accuracy"):
        assert math.isnan(row[name])


def test_without_a_label_nothing_is_scored():
    cold = np.array([[260.0, 280.0]])
    row = scores.score_scene(cold < 270, None, cold > 0, cold, 273.15)
    assert all(math.isnan(row[name]) for name in (*scores.RATIOS, *scores.BASELINES))
    assert [row[name] for name in scores.COUNTS] == [0, 0, 0, 0]
    assert (row["cloud_fraction"], row["valid_fraction"]) == (0.5, 1)


def test_means_leave_nan_out_and_counts_add_up():
    base = {name: 0.5 for name in (*scores.RATIOS, *scores.BASELINES)}
    counts = {"tp": 1, "fp": 2, "fn": 3, "tn": 4}
    rows = [{**base, **counts, "recall": math.nan}, {**base, **counts, "recall": 0.25}]
    mean = scores.mean_scores(rows)
    assert mean["recall"] == 0.25 and mean["accuracy"] == 0.5 and mean["fn"] == 6
    assert math.isnan(scores.mean_scores(rows[:1])["recall"])
