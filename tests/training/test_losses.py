import numpy as np
import pytest
import tensorflow as tf

from harness.training.losses import LOSSES

# What an entry computes for a label and a probability of float64, where its formula is known.
FORMULAS = {"cross_entropy": lambda y, p: -(y * np.log(p) + (1 - y) * np.log(1 - p))}
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
