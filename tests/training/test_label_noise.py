import itertools

import numpy as np
import pytest
import tensorflow as tf
from conftest import pixel_views
from test_trainer import P, batch_of, small

from harness.networks.model_files import with_views
from harness.parallel.devices import open_devices
from harness.parallel.rendezvous import SingleRank
from harness.training.label_noise import (
    LABEL_CORRECTIONS,
    N_REGIMES,
    CoTeaching,
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
    no_cloud = np.ones(8), np.full(8, np.nan)  # neither in the labels nor predicted
    assert EarlyLearning.bent_classes(np.nan_to_num(epochs_of(*no_cloud))) == [False, False]
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
    ours = correction.corrected(
        tf.constant(label), tf.constant(one), lambda: tf.constant(two), correction.state
    )
    expected = label.copy()
    if replaces[0]:
        expected[(label == 0) & (one > 0.9) & (two > 0.9)] = 1
    if replaces[1]:
        expected[(label == 1) & (one < 0.1) & (two < 0.1)] = 0
    np.testing.assert_array_equal(ours, expected)
    assert (expected != label).any() == any(replaces)


def trainer_with(n_replicas=1, build=small, learning_rate=1e-3, **options):
    devices = open_devices(SingleRank(), cpu_devices=n_replicas, seed=5)
    return Trainer(
        devices.strategy, lambda: build((P, P, 9)), cross_entropy, learning_rate, 4, 2,
        clip_offset=2, **options,
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


def limits(**values):
    """Counts of an epoch in which views gave these mean probabilities to labels of a class."""
    mean = [values["clear"], values["cloud"]]  # by view
    return [*[1e6] * 4, *np.ravel(mean) * 1e6, 0, 4e6]


def test_limits_are_mean_probabilities_of_labels_and_views_without_a_clue_do_not_teach():
    found = CoTeaching.limits(limits(clear=(0.8, 0.45), cloud=(0.9, 0.99)))
    np.testing.assert_allclose(found, [[0.8, 1], [0.9, 1]])
    np.testing.assert_array_equal(CoTeaching.limits(np.zeros(CoTeaching.n_counts)), 1)


def test_views_replace_labels_of_each_other_like_numpy():
    rng = np.random.default_rng(0)
    label = np.repeat(rng.choice([0.0, 0.3, 1.0], (2, 8, 8, 1)), 2, axis=-1).astype(np.float32)
    views = rng.choice([0.02, 0.15, 0.4, 0.5, 0.6, 0.85, 0.98], (2, 8, 8, 2)).astype(np.float32)
    views[1, 4:] = views[1, 4:, :, 1:]  # by night: both are the thermal one
    correction = CoTeaching()
    np.testing.assert_array_equal(correction.corrected(label, views, None, correction.state), label)
    clear, cloud = (0.9, 0.8), (0.7, 0.95)
    correction.begin_epoch([limits(clear=(1, 1), cloud=(1, 1)), limits(clear=clear, cloud=cloud)])
    ours = correction.corrected(tf.constant(label), tf.constant(views), None, correction.state)
    expected = label.copy()
    for *place, taught in np.ndindex(label.shape):
        p, teacher = views[(*place, taught)], views[(*place, 1 - taught)]
        if teacher != p > 0.5 and teacher > cloud[1 - taught]:
            expected[(*place, taught)] = 1
        if teacher != p < 0.5 and 1 - teacher > clear[1 - taught]:
            expected[(*place, taught)] = 0
    np.testing.assert_array_equal(ours, expected)
    assert (expected != label)[0].any(axis=(0, 1)).all()  # of both views
    np.testing.assert_array_equal(expected[1, 4:], label[1, 4:])


def test_trainer_counts_and_weighs_two_views_like_numpy():
    trainer = trainer_with(build=pixel_views, label_correction=CoTeaching, cloud_weight=3.0)
    trainer.begin_epoch([{"label_counts": [limits(clear=(0.51, 0.51), cloud=(0.51, 0.51))]}])
    channels, cloud, *rest = map(np.array, batch_of((1, 1, 0, 0)))
    channels[1, ..., :6] = -0.5  # a night
    views = with_views(trainer.model)(channels).numpy()
    cut = np.s_[:2, 2:-2, 2:-2]
    views, label = views[cut], np.repeat(cloud[cut], 2, axis=-1).astype(np.float32)
    correction = trainer._label_correction
    target = correction.corrected(label, views, None, correction.state).numpy()
    trainer.train_step((channels, cloud, *rest))
    metrics = trainer.pop_train_metrics()
    of_class = np.where(label == 1, views, 1 - views)[0]  # by day
    sums = [[((label[0] == c) * x).sum(axis=(0, 1)) for c in (0, 1)] for x in (1, of_class)]
    replaced = (target != label).sum()
    np.testing.assert_allclose(
        metrics["label_counts"][0], [*np.ravel(sums), replaced, label.size], rtol=1e-5
    )
    assert metrics["labels_replaced"] == replaced / label.size and replaced
    loss = -(target * np.log(views) + (1 - target) * np.log(1 - views)) * (1 + 2 * target)
    assert metrics["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    is_right = (views.mean(axis=-1) > 0.5) == (label[..., 0] == 1)
    assert metrics["accuracy"] == pytest.approx(is_right.mean())
    trainer.eval_step((channels, cloud, *rest))  # validation is that of the output
    p, y = trainer.model(channels).numpy()[cut], cloud[cut]
    loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)) * (1 + 2 * y)
    assert trainer.pop_eval_metrics()["loss"] == pytest.approx(loss.mean(), rel=1e-5)


def test_labels_that_views_replace_agree_with_the_truth_more_often():
    """A fifth of the labels is wrong at random; by night none is replaced."""
    rng = np.random.default_rng(0)
    truth = rng.random((4, P, P, 1)) < 0.6
    channels = (2.0 * truth - 1 + 0.7 * rng.normal(size=(4, P, P, 9))).astype(np.float32)
    channels[3, ..., :6] = -0.5
    label = (truth ^ (rng.random(truth.shape) < 0.2)).astype(np.uint8)
    trainer = trainer_with(build=pixel_views, learning_rate=0.02, label_correction=CoTeaching)
    history = []
    for _ in range(3):
        trainer.begin_epoch(history)
        for _ in range(30):
            trainer.train_step((channels, label, np.ones(4, np.float32), np.int32(4)))
        history.append(trainer.pop_train_metrics())
    assert history[0]["labels_replaced"] == 0 < history[2]["labels_replaced"]
    correction = CoTeaching()
    correction.begin_epoch([row["label_counts"][0] for row in history])
    given = np.repeat(label, 2, axis=-1).astype(np.float32)
    views = with_views(trainer.model)(channels)
    corrected = correction.corrected(given, views, None, correction.state).numpy()
    wrong, wrong_before = ((each != truth).mean(axis=(0, 1, 2)) for each in (corrected, given))
    assert (wrong < 0.8 * wrong_before).all()
    np.testing.assert_array_equal(corrected[3], given[3])
