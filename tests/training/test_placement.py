"""Every operation of a step has a kernel for GPUs, and no step waits for a copy from the device.

Augmentations are not here: they are NumPy functions of the threads that read.
"""

import itertools
import re

import numpy as np
import pytest
import tensorflow as tf
from placement import faults
from test_trainer import P, small, trainer_and_feed

from data_loader import PatchGrid
from harness.inference.predictor import Predictor
from harness.networks.fused_upsampling import fuse_upsampling
from harness.training.label_noise import LABEL_CORRECTIONS, ForwardCorrection
from harness.training.losses import LOSSES, cross_entropy
from harness.training.trainer import POLICIES
from model import NETWORKS

pytestmark = pytest.mark.skipif(
    not tf.test.is_built_with_cuda(), reason="this TensorFlow is built without kernels for GPUs"
)
PATCHES = tf.TensorSpec((2, P, P, 9))


def faults_of(function, *arguments):
    return faults(tf.function(function).get_concrete_function(*arguments))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_on_a_gpu(name, policy):
    model = NETWORKS[name]((P, P, 9), policy)
    network = fuse_upsampling(model)

    def gradients(patches):
        with tf.GradientTape() as tape:
            probability = network(patches, training=True)
        return tape.gradient(probability, [v.value for v in model.trainable_variables])

    assert faults_of(gradients, PATCHES) == []


# Each loss once, and each correction with each precision.
COMBINATIONS = [
    *zip(LOSSES, itertools.cycle(POLICIES), itertools.cycle(LABEL_CORRECTIONS)),  # noqa: B905
    ("forward_correction", "float16", "early_learning"),
]


@pytest.mark.parametrize(("loss", "precision", "label_correction"), COMBINATIONS)
def test_steps_stay_on_a_gpu(loss, precision, label_correction):
    build = NETWORKS["two_views"] if label_correction == "co_teaching" else small
    trainer, _, feed = trainer_and_feed(
        1, policy=POLICIES[precision], build=build, loss=LOSSES[loss],
        loss_scaling=precision == "float16",
        forward_correction=ForwardCorrection if loss == "forward_correction" else None,
        label_correction=LABEL_CORRECTIONS[label_correction],
    )  # fmt: skip
    batch = next(feed)
    for step in (trainer.traced_train_step, trainer.eval_step):
        assert faults(step.get_concrete_function(batch)) == []


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_prediction_stays_on_a_gpu(policy):
    predictor = Predictor(small((P, P, 9)), "/CPU:0", PatchGrid(40, 50, P, 4), 2, policy)
    height, width = np.max(predictor.grid.corners, axis=0) + P
    scene = tf.TensorSpec((height, width, 9))
    assert faults(predictor._predict.get_concrete_function(scene)) == []


def calls_python(x):
    return tf.ensure_shape(tf.py_function(lambda array: array + 1, [x], tf.float32), x.shape)


def convolves_in_float64(x):
    return tf.nn.conv2d(tf.cast(x, tf.float64), np.ones((3, 3, 9, 1)), 1, "SAME")


def has_no_kernel(x):
    return tf.nn.fractional_max_pool(x, [1, 1.5, 1.5, 1])[0]


def branches_by_a_value(x):
    return tf.cond(tf.reduce_max(x) > 0, lambda: x, lambda: -x)


def counts_by_a_value(x):
    n = tf.reduce_sum(tf.cast(x > 0, tf.int32))
    return tf.while_loop(lambda i: i < n, lambda i: i + 1, [0])[0]


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (calls_python, r"\(EagerPyFunc\) calls Python"),
        (convolves_in_float64, r"\(Conv2D\) computes in float64"),
        (has_no_kernel, r"\(FractionalMaxPool\) has no kernel for float32, int64 on a GPU"),
        (branches_by_a_value, r"\(StatelessIf\) waits until \S+ \(Greater\) is copied"),
        (counts_by_a_value, r"\(Sum\) waits until \S+ \(Cast\) is copied"),
    ],
)
def test_planted_faults_are_found_wherever_they_are(planted, message):
    def in_a_loop(x):
        for _ in tf.range(3):
            inner = tf.function(lambda y: tf.reduce_sum(tf.cast(planted(y), tf.float32)))
            x = x + inner(x)
        return x

    for function in (planted, in_a_loop):
        found = faults_of(function, PATCHES)
        assert any(re.search(message, fault) for fault in found), found


def test_planted_loss_is_found():
    def loss(label, probability):
        return cross_entropy(label, calls_python(probability))

    trainer, _, feed = trainer_and_feed(1, loss=loss)
    found = faults(trainer.traced_train_step.get_concrete_function(next(feed)))
    assert any("(EagerPyFunc) calls Python" in fault for fault in found)
