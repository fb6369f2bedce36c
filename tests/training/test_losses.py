import numpy as np
import pytest
import tensorflow as tf

from harness.training.losses import LOSSES


def numpy_cross_entropy(y, p):
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


# What an entry computes for a label and a probability of float64, where its formula is known.
FORMULAS = {
    "cross_entropy": numpy_cross_entropy,
    "generalised_cross_entropy": lambda y, p: (1 - np.where(y == 1, p, 1 - p) ** 0.7) / 0.7,
    "symmetric_cross_entropy": lambda y, p: (
        0.1 * numpy_cross_entropy(y, p)
        - p * np.where(y == 1, 0, -4)  # p x log(label), cloud
        - (1 - p) * np.where(y == 0, 0, -4)  # the same of clear
    ),
    "bootstrapping": lambda y, p: numpy_cross_entropy(0.8 * y + 0.2 * (p > 0.5), p),
}
everything = pytest.mark.parametrize("name", LOSSES)


def label_and_probability(shape=(3, 8, 8, 1)):
    rng = np.random.default_rng(0)
    label = (rng.random(shape) > 0.5).astype(np.float32)
    return label, rng.uniform(0.01, 0.99, shape).astype(np.float32)


@everything
def test_loss_is_float32_for_each_pixel_and_equals_numpy(name):
    label, probability = label_and_probability()
    loss = LOSSES[name](tf.constant(label), tf.constant(probability))
    assert loss.shape == (3, 8, 8) and loss.dtype == tf.float32
    if name in FORMULAS:
        formula = FORMULAS[name](label.astype(float), probability.astype(float))
        np.testing.assert_allclose(loss, formula[..., 0], rtol=1e-4)


@everything
def test_pixels_and_patches_do_not_influence_each_other(name):
    label, probability = label_and_probability()
    loss = LOSSES[name](tf.constant(label), tf.constant(probability)).numpy()
    one = LOSSES[name](tf.constant(label[1:2, 2:3, 3:4]), tf.constant(probability[1:2, 2:3, 3:4]))
    np.testing.assert_allclose(one[0, 0, 0], loss[1, 2, 3], rtol=1e-6)


@everything
def test_loss_and_gradient_are_finite_at_0_and_1_and_less_where_the_label_is_right(name):
    label = tf.constant([0.0, 0.0, 1.0, 1.0], shape=(1, 2, 2, 1))
    probability = tf.Variable(tf.constant([0.0, 1.0, 0.0, 1.0], shape=(1, 2, 2, 1)))
    with tf.GradientTape() as tape:
        loss = LOSSES[name](label, probability)
    assert np.isfinite(loss).all() and np.isfinite(tape.gradient(loss, probability)).all()
    right, wrong = np.ravel(loss)[[0, 3]], np.ravel(loss)[[1, 2]]
    assert (right < wrong).all()


@everything
@pytest.mark.parametrize("value", [0.1, 0.5, 0.9])
def test_gradient_leads_to_the_label(name, value):
    label = tf.constant([0.0, 1.0], shape=(1, 1, 2, 1))
    probability = tf.Variable(tf.fill((1, 1, 2, 1), value))
    with tf.GradientTape() as tape:
        loss = LOSSES[name](label, probability)
    clear, cloud = np.ravel(tape.gradient(loss, probability))
    assert clear > 0 > cloud


@pytest.mark.parametrize(
    "name, limit",
    [
        ("generalised_cross_entropy", {"q": 0.01}),
        ("symmetric_cross_entropy", {"alpha": 1.0, "beta": 0.0}),
        ("bootstrapping", {"beta": 1.0}),
    ],
)
def test_limit_for_right_labels_is_the_cross_entropy(name, limit):
    label, probability = map(tf.constant, label_and_probability())
    loss = LOSSES[name](label, probability, **limit)
    np.testing.assert_allclose(loss, LOSSES["cross_entropy"](label, probability), rtol=0.03)


@pytest.mark.parametrize(
    "name", ["generalised_cross_entropy", "symmetric_cross_entropy", "bootstrapping"]
)
def test_wrong_label_pulls_less_than_with_the_cross_entropy(name):
    """Compared with a label that the network only doubts."""

    def pull(loss, value):
        label = tf.ones((1, 1, 1, 1))
        probability = tf.Variable(tf.fill((1, 1, 1, 1), value))
        with tf.GradientTape() as tape:
            value = loss(label, probability)
        return -tape.gradient(value, probability).numpy().item()

    def ratio(loss):
        return pull(loss, 0.02) / pull(loss, 0.6)

    assert ratio(LOSSES[name]) < ratio(LOSSES["cross_entropy"])
