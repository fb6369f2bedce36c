"""The losses of training: the table LOSSES.

A loss is a function of (label, probability) that returns the loss of each pixel:

    label: float32 (m, p, p, 1), 1 is cloud, 0 is clear.
    probability: float32 (m, p, p, 1), of cloud.
    Returns: float32 (m, p, p), finite also where the probability is 0 or 1.

`cloud_weight` and the mean over pixels and patches are applied by the trainer. All losses but the
cross-entropy are made for labels of which some are wrong; their constants are those of the papers.
"""

import keras
import tensorflow as tf

from harness.inference.scores import THRESHOLD

SMALLEST = 1e-7  # a probability is kept this far from 0, as in Keras
LOG_ZERO = -4.0  # stands for log(0) of a label in the reverse cross-entropy (Wang et al. 2019)


def cross_entropy(label, probability):
    """Binary cross-entropy; Keras keeps the probability 1e-7 away from 0 and 1."""
    return keras.losses.binary_crossentropy(label, probability)


def generalised_cross_entropy(label, probability, q=0.7):
    """(1 - p**q) / q of the label's probability p: Zhang and Sabuncu 2018, arXiv 1805.07836.

    A pixel that contradicts its label has less weight than with the cross-entropy, which is the
    limit of q to 0; q = 1 is the mean absolute error.
    """
    right = tf.maximum(_of_the_label(label, probability), SMALLEST)
    return (1 - right**q) / q


def symmetric_cross_entropy(label, probability, alpha=0.1, beta=1.0):
    """Cross-entropy and reverse cross-entropy, weighted: Wang et al. 2019, arXiv 1908.06112.

    The reverse cross-entropy takes the prediction for the truth: minus the sum over both classes of
    probability x log(label), in which LOG_ZERO stands for log(0).
    """
    reverse = -LOG_ZERO * (1 - _of_the_label(label, probability))
    return alpha * cross_entropy(label, probability) + beta * reverse


def bootstrapping(label, probability, beta=0.8):
    """Cross-entropy to beta x label + (1 - beta) x prediction: Reed et al. 2014, arXiv 1412.6596.

    The prediction is 0 or 1 ("hard"); beta = 1 is the cross-entropy.
    """
    prediction = tf.cast(probability > THRESHOLD, tf.float32)
    return cross_entropy(beta * label + (1 - beta) * prediction, probability)


def _of_the_label(label, probability):
    """Probability of the class that the label names, (m, p, p)."""
    return (label * probability + (1 - label) * (1 - probability))[..., 0]


LOSSES = {
    "cross_entropy": cross_entropy,
    "generalised_cross_entropy": generalised_cross_entropy,
    "symmetric_cross_entropy": symmetric_cross_entropy,
    "bootstrapping": bootstrapping,
    "forward_correction": cross_entropy,  # of the label's probability, see label_noise.py
}
