"""The optimizer for float16 gives what that of Keras does, bit for bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from harness.parallel.devices import open_devices
from harness.parallel.rendezvous import SingleRank
from harness.training.loss_scaling import LossScaling


def training(strategy, optimizer_class):
    """All variables after each of ten steps; two of them overflow, and the scale grows twice."""
    rng, values = np.random.default_rng(1), []
    with strategy.scope():
        weights = [keras.Variable(rng.normal(size=shape)) for shape in ((3, 2), (4,))]
        adam = keras.optimizers.Adam(0.01)
        optimizer = optimizer_class(adam, initial_scale=8.0, dynamic_growth_steps=3)
        optimizer.build(weights)

    @tf.function
    def step(gradients):
        strategy.run(lambda: optimizer.apply(gradients, weights))

    for number in range(10):
        gradients = [rng.normal(size=weight.shape).astype(np.float32) for weight in weights]
        if number in (0, 5):
            gradients[1][2] = {0: np.inf, 5: np.nan}[number]
        step([tf.constant(gradient) for gradient in gradients])
        values.append([np.array(v) for v in (*weights, *optimizer.variables)])
    assert optimizer.dynamic_scale == 8 / 2 * 2 / 2 * 2
    return values


@pytest.mark.parametrize("n_replicas", [1, 2])
def test_steps_and_scale_are_those_of_keras(n_replicas):
    strategy = open_devices(SingleRank(), cpu_devices=n_replicas, seed=5).strategy
    ours, theirs = (
        training(strategy, each) for each in (LossScaling, keras.optimizers.LossScaleOptimizer)
    )
    for found, expected in zip(ours, theirs, strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
