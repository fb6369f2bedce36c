"""The losses of training: the table LOSSES.

A loss is a function of (label, probability) that returns the loss of each pixel:

    label: float32 (m, p, p, 1), 1 is cloud, 0 is clear.
    probability: float32 (m, p, p, 1), of cloud.
    Returns: float32 (m, p, p), finite also where the probability is 0 or 1.

`cloud_weight` and the mean over pixels and patches are applied by the trainer.
"""

import keras


def cross_entropy(label, probability):
    """Binary cross-entropy; Keras keeps the probability 1e-7 away from 0 and 1."""
    return keras.losses.binary_crossentropy(label, probability)


LOSSES = {
    "cross_entropy": cross_entropy,
}
