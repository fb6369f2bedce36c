import itertools

import numpy as np
import pytest
import tensorflow as tf
from test_trainer import P, batch_of, small

from harness.parallel.devices import open_devices
from harness.parallel.rendezvous import SingleRank
from harness.training.label_noise import (
    LABEL_CORRECTIONS,
    N_REGIMES,
    EarlyLearning,
    ForwardCorrection,
    has_bent,
    regimes,
)
from harness.training.losses import cross_entropy
from harness.training.trainer import Trainer

CURVES = {  # values of 12 epochs, and the first epoch after which the slope has fallen by 90 %
    "saturates early": (lambda t: 0.9 * (1 - np.exp(-1.2 * t)), 4),  # exp(-1.2 (t - 1)) < 0.1: 3
    "saturates late": (lambda t: 0.9 * (1 - np.exp(-0.4 * t)), 7),  # exp(-0.4 (t - 1)) < 0.1: 6.8
    "rises on": (lambda t: 0.05 * t, None),
}


def test_regime_follows_from_day_s9_and_the_difference_of_s8_and_s9():
    rng = np.random.default_rng(0)
    s9 = rng.uniform(240, 300, (3, 4, 5))
    difference = rng.uniform(-1, 3, s9.shape)
    day = rng.random(s9.shape) > 0.5
    channels = np.full((*s9.shape, 9), -0.5, np.float32)
    channels[..., 2] += np.where(day, 0.3, 0)
    channels[..., 8], channels[..., 7] = (s9 - 270) / 22, (s9 + difference - 270) / 22
    ours = regimes(tf.constant(channels)).numpy()
    for index in itertools.product(*map(range, s9.shape)):
        warmer = sum(s9[index] > limit for limit in (250, 265, 273.15, 280, 288))
        larger = sum(difference[index] > limit for limit in (0.6, 1.5))
        assert ours[index] == (day[index] * 6 + warmer) * 3 + larger
    assert 0 <= ours.min() and ours.max() == N_REGIMES - 1


def test_confusion_matrices_are_the_rates_of_confident_pixels_below_a_limit():
    counts = np.zeros((N_REGIMES, 2, 2))
    counts[3] = [[9e6, 1e6], [2e6, 8e6]]  # true clear and cloud, by label
    counts[4] = [[1e6, 9e6], [0, 5e6]]
    matrices = ForwardCorrection.confusion_matrices(counts.ravel())
    np.testing.assert_allclose(matrices[3], [[0.9, 0.1], [0.2, 0.8]], atol=1e-3)
    np.testing.assert_allclose(matrices[4], [[0.6, 0.4], [0, 1]], atol=1e-3)
    np.testing.assert_array_equal(matrices[5], np.eye(2))  # without pixels


def test_forward_correction_mixes_the_probabilities_of_labels():
    counts = np.zeros((N_REGIMES, 2, 2)) + [[9e6, 1e6], [2e6, 8e6]]
    correction = ForwardCorrection()
    channels, probability = np.zeros((1, 2, 2, 9), np.float32), np.full((1, 2, 2, 1), 0.7)
    same = correction.probability_of_label(probability.astype(np.float32), channels)
    np.testing.assert_allclose(same, probability, rtol=1e-6)
    correction.begin_epoch([counts.ravel()])
    mixed = correction.probability_of_label(probability.astype(np.float32), channels)
    np.testing.assert_allclose(mixed, 0.7 * 0.8 + 0.3 * 0.1, rtol=1e-3)


@pytest.mark.parametrize("name", CURVES)
def test_bend_of_a_known_curve_is_found(name):
    curve, first = CURVES[name]
    values = curve(np.arange(1.0, 13))
    found = [n for n in range(4, 13) if has_bent(values[:n])]
    assert found == list(range(first, 13) if first else ())


def epochs_of(clear, cloud):
    """Counts of epochs from the shares of clear and cloud pixels that are predicted as labelled."""
    return [
        [1e6 * a, 1e6 * (1 - a), 1e6 * (1 - b), 1e6 * b, 0]
        for a, b in zip(clear, cloud, strict=True)
    ]


def test_classes_are_replaced_one_by_one_and_not_by_a_network_that_learned_nothing():
    t = np.arange(1.0, 9)
    early, late = (0.95 * (1 - np.exp(-rate * t)) for rate in (1.5, 0.25))
    assert EarlyLearning.bent_classes([]) == [False, False]
    assert EarlyLearning.bent_classes(epochs_of(early, early)) == [True, True]
    assert EarlyLearning.bent_classes(epochs_of(early, late)[:3]) == [False, False]
    all_cloud = np.zeros(8), np.ones(8)
    assert EarlyLearning.bent_classes(epochs_of(*all_cloud)) == [False, False]
    # Both fall back later: what has bent once stays replaced.
    assert EarlyLearning.bent_classes([*epochs_of(early, early), [1, 9, 9, 1, 0]]) == [True, True]


@pytest.mark.parametrize("replaces", list(np.ndindex(2, 2)))
def test_labels_are_replaced_where_both_views_contradict_them(monkeypatch, replaces):
    monkeypatch.setattr(
        EarlyLearning, "bent_classes", lambda self, counts: [bool(r) for r in replaces]
    )
    correction = EarlyLearning()
    correction.begin_epoch([])
    rng = np.random.default_rng(0)
    label = rng.choice([0.0, 1.0], (2, 8, 8, 1)).astype(np.float32)
    one, two = rng.choice([0.02, 0.2, 0.5, 0.8, 0.98], (2, *label.shape)).astype(np.float32)
    ours = correction.corrected(tf.constant(label), tf.constant(one), lambda: tf.constant(two))
    expected = label.copy()
    if replaces[0]:
        expected[(label == 0) & (one > 0.9) & (two > 0.9)] = 1
    if replaces[1]:
        expected[(label == 1) & (one < 0.1) & (two < 0.1)] = 0
    np.testing.assert_array_equal(ours, expected)
    assert (expected != label).any() == any(replaces)


def trainer_with(n_replicas=1, **options):
    devices = open_devices(SingleRank(), cpu_devices=n_replicas, seed=5)
    return Trainer(
        devices.strategy, lambda: small((P, P, 9)), cross_entropy, 1e-3, 4, 2, clip_offset=2,
        **options,
    )  # fmt: skip


def test_training_with_right_labels_is_that_of_the_cross_entropy():
    """The confusion matrices are the identity, and no label is replaced."""
    after = []
    for options in (
        {},
        {
            "forward_correction": ForwardCorrection,
            "label_correction": LABEL_CORRECTIONS["early_learning"],
        },
    ):
        trainer = trainer_with(**options)
        trainer.begin_epoch([])
        for _ in range(3):
            trainer.train_step(batch_of((1, 1, 1, 0)))
        after.append((trainer.model.get_weights(), trainer.pop_train_metrics()))
    (plain, plain_metrics), (ours, metrics) = after
    for a, b in zip(plain, ours, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert metrics["labels_replaced"] == 0
    assert metrics["accuracy"] == plain_metrics["accuracy"]


def test_trainer_counts_labels_and_predictions_like_numpy(monkeypatch):
    monkeypatch.setattr(EarlyLearning, "bent_classes", lambda self, counts: [True, True])
    monkeypatch.setattr(EarlyLearning, "CONFIDENT", 0.5)
    monkeypatch.setattr(ForwardCorrection, "CONFIDENT", 0.55)
    trainer = trainer_with(forward_correction=ForwardCorrection, label_correction=EarlyLearning)
    trainer.begin_epoch([])
    batch = batch_of((1, 1, 0, 0))
    channels, cloud = batch[:2]
    cut = np.s_[:2, 2:-2, 2:-2]
    p = trainer.model(channels).numpy()
    turned = trainer.model(channels[:, ::-1, ::-1]).numpy()[:, ::-1, ::-1]
    p, turned, label = p[cut], turned[cut], cloud.numpy()[cut].astype(bool)
    trainer.train_step(batch)
    metrics = trainer.pop_train_metrics()
    of_regimes, of_classes = metrics["label_counts"]
    agreement = [((label == a) & ((p > 0.5) == b)).sum() for a, b in np.ndindex(2, 2)]
    replaced = ((p > 0.5) == (turned > 0.5)) & ((p > 0.5) != label)
    assert of_classes == [*agreement, replaced.sum()] and replaced.any()
    assert metrics["labels_replaced"] == replaced.mean()
    corrected = np.where(replaced, ~label, label)
    confident = [
        (((p > 0.55) if is_cloud else (p < 0.45)) & (corrected == says_cloud)).sum()
        for is_cloud, says_cloud in np.ndindex(2, 2)
    ]
    assert np.reshape(of_regimes, (N_REGIMES, 2, 2)).sum(axis=0).ravel().tolist() == confident
