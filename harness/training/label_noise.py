"""Training on wrong labels: a model of their errors, and their correction.

All learn from counts of labels and predictions that the trainer adds up while it trains. What they
do in an epoch follows from the counts of earlier epochs alone, which the history keeps: all ranks
agree, and a resumed run continues exactly. Each has

    n_counts: how many counts there are.
    count(channels, label, probability, corrected, weight): float64 (n_counts,) of a micro-batch,
        for float32 channels (m, p, p, 9), normalised; label, probability and corrected label
        (m, p, p, V), 0 to 1, where V is the number of views, mostly 1; and weight (m,), 0 or 1.
    begin_epoch(counts): prepares an epoch; `counts` has those of each earlier epoch.
"""

import numpy as np
import tensorflow as tf

from data_loader import BT_OFFSET, BT_SCALE
from harness.inference.scores import THRESHOLD
from model import has_reflectance

# A mask errs differently by day and by night, in cold and in warm scenes, and where S8 - S9 is
# large, as it is for thin cirrus.
S9_LIMITS = (250.0, 265.0, 273.15, 280.0, 288.0)  # [K]
S8_S9_LIMITS = (0.6, 1.5)  # [K]
N_REGIMES = 2 * (len(S9_LIMITS) + 1) * (len(S8_S9_LIMITS) + 1)


class ForwardCorrection:
    """The loss sees the probability of the label instead of cloud: Patrini 2017, arXiv 1609.03944.

    Each regime has a confusion matrix: the probabilities of the labels of a true class. It starts
    as the identity, with which the loss is the cross-entropy. In each later epoch it is estimated
    from the pixels of whose class the network was confident in the epoch before, which stand for
    the anchor points of the paper. The loss has a lower bound above 0, the entropy of the labels of
    a true class. Errors of the label that follow from the channels are learned all the same.
    """

    CONFIDENT = 0.9  # probability of a class
    PRIOR_PIXELS = 1000.0  # with right labels, added to the counts of each class
    MAX_ERROR_RATE = 0.4  # below 1/2, or the classes could exchange their meanings

    n_counts = N_REGIMES * 4

    def __init__(self):
        self._confusion = tf.Variable(tf.eye(2, batch_shape=(N_REGIMES,)), trainable=False)

    def probability_of_label(self, probability, channels):
        """Probability that the label says cloud, from that of cloud; both (m, p, p, V)."""
        confusion = tf.gather(self._confusion, tf.cast(regimes(channels), tf.int32))
        # (m, p, p, 2, 2) -> (m, p, p, 1)
        if_clear, if_cloud = confusion[..., 0, 1:], confusion[..., 1, 1:]
        return probability * if_cloud + (1 - probability) * if_clear

    def count(self, channels, label, probability, corrected, weight):
        """Confident pixels by regime, predicted class and label."""
        is_cloud, is_clear = probability > self.CONFIDENT, probability < 1 - self.CONFIDENT
        classes = 2 * tf.cast(is_cloud, tf.float32) + tf.round(corrected)
        cells = 4 * regimes(channels)[..., None] + classes
        return _count_cells(cells, is_cloud | is_clear, weight, self.n_counts)

    def begin_epoch(self, counts):
        """Estimate the confusion matrices from the last epoch."""
        latest = counts[-1] if counts else np.zeros(self.n_counts)
        self._confusion.assign(self.confusion_matrices(latest))

    @classmethod
    def confusion_matrices(cls, counts):
        """Confusion matrices (N_REGIMES, true class, label) from the counts of an epoch."""
        counts = np.reshape(counts, (N_REGIMES, 2, 2)) + cls.PRIOR_PIXELS * np.eye(2)
        right = (counts / counts.sum(axis=2, keepdims=True))[:, (0, 1), (0, 1)]
        right = np.maximum(right, 1 - cls.MAX_ERROR_RATE)[..., None]
        return np.where(np.eye(2), right, 1 - right)


class EarlyLearning:
    """Labels are replaced once the network begins to learn their errors: ADELE, arXiv 2110.03740.

    A network learns what is common before it learns the errors of a class's labels: the agreement
    of predictions with labels rises, and bends. From then on, a label of this class is replaced
    where the network contradicts it with confidence, in the patch and in the patch turned by 180
    degrees. (The paper, Liu et al. 2022, averages three scales instead.)
    """

    CONFIDENT = 0.9  # probability of the other class; 0.8 in the paper, which is the share of cloud
    BEND = 0.9  # loss of slope since the first epoch, from the paper
    MIN_AGREEMENT = 0.5  # of both classes: no label is replaced by a network that learned nothing
    MIN_EPOCHS = 4  # one more than the curve has parameters

    n_counts = 5

    def __init__(self):
        # Whether labels of clear and of cloud are replaced, 0 or 1. In host memory, where int32
        # stays: no step waits for a device to say whether there is something to replace.
        with tf.device("/CPU:0"):
            self.state = tf.Variable([0, 0], trainable=False)

    def corrected(self, label, probability, probability_of_turned, state):
        """Replace the labels that are contradicted.

        Args:
            label: float32 (m, p, p, V), 0 or 1.
            probability: float32 (m, p, p, V), of cloud.
            probability_of_turned: Function that returns the same for the turned patches, turned
                back; called only if labels are replaced at all.
            state: int32 (2,), the value of `state`.
        """

        def replace():
            turned = probability_of_turned()
            is_cloud = tf.minimum(probability, turned) > self.CONFIDENT
            is_clear = tf.maximum(probability, turned) < 1 - self.CONFIDENT
            without_clear = tf.where(is_cloud & (state[0] > 0), 1.0, label)
            return tf.where(is_clear & (state[1] > 0), 0.0, without_clear)

        return tf.cond(state[0] + state[1] > 0, replace, lambda: label)

    def count(self, channels, label, probability, corrected, weight):
        """Pixels by label and predicted class, and those whose label is replaced."""
        del channels
        cells = 2 * tf.round(label) + tf.cast(probability > THRESHOLD, tf.float32)
        agreement = _count_cells(cells, tf.ones_like(cells, bool), weight, 4)
        replaced = _count_cells(tf.zeros_like(cells), label != corrected, weight, 1)
        return tf.concat([agreement, replaced], axis=0)

    @staticmethod
    def share_replaced(counts):
        """Share of all labels that are replaced, from the counts of an epoch."""
        return float(counts[4] / np.sum(counts[:4]))

    def begin_epoch(self, counts):
        """Find the classes whose agreement has bent by now."""
        self.state.assign(np.int32(self.bent_classes(counts)))

    @classmethod
    def bent_classes(cls, counts):
        """Whether labels of clear and of cloud are to be replaced, after epochs of these counts."""
        table = np.reshape(counts, (-1, cls.n_counts))[:, :4].reshape(-1, 2, 2)
        both = np.trace(table, axis1=1, axis2=2)
        agreement = [  # intersection over union of predictions and labels, by class
            table[:, c, c] / np.maximum(table.sum(axis=(1, 2)) - both + table[:, c, c], 1)
            for c in (0, 1)
        ]
        n_epochs = len(table)
        ready = [
            n
            for n in range(cls.MIN_EPOCHS, n_epochs + 1)
            if min(a[n - 1] for a in agreement) >= cls.MIN_AGREEMENT
        ]
        return [any(has_bent(a[:n]) for n in ready) for a in agreement]


def has_bent(agreement):
    """Whether a (1 - exp(-b t**c)), fitted to a value per epoch, has lost BEND of its slope."""
    from scipy.optimize import curve_fit

    epochs = np.arange(1.0, len(agreement) + 1)
    bounds = (0, 1e-3, 0.1), (1, 10, 3)
    try:
        (a, b, c), _ = curve_fit(
            lambda t, a, b, c: a * (1 - np.exp(-b * t**c)), epochs, agreement,
            p0=(max(agreement), 0.5, 1.0), bounds=bounds,
        )  # fmt: skip
    except RuntimeError:  # no convergence
        return False
    slope = epochs ** (c - 1) * np.exp(-b * epochs**c)
    return bool(slope[-1] < (1 - EarlyLearning.BEND) * slope[0])


class CoTeaching:
    """Two views teach each other: each replaces the other's labels where it is sure of the class.

    A view is sure of a class where its probability is above the mean that it gives to pixels whose
    label is this class (Northcutt et al. 2021, arXiv 1911.00068), as measured in the epoch before:
    the limit rises as the labels get better. A view that gives less than 1/2 to either class has
    not learned to tell them apart, and teaches nothing. The student view must predict the class
    itself, since one view alone does not see all that matters: thin cirrus is hardly visible in
    S1-S6, and snow is as cold as cloud. By night there is one view, and all labels stay.

    The idea is co-training (Blum and Mitchell 1998, doi:10.1145/279943.279962), where views teach
    pixels without label, and co-teaching (Han et al. 2018, arXiv 1804.06872), where two networks
    select each other's right labels.
    """

    n_counts = 10

    def __init__(self):
        # Limits of p(clear) and p(cloud), by view; no probability is above 1.
        self.state = tf.Variable(tf.ones((2, 2)), trainable=False)

    def corrected(self, label, probability, probability_of_turned, state):
        """Replace the labels of each view where the other one is sure and it has no objection.

        Args:
            label: float32 (m, p, p, 2), 0 to 1.
            probability: float32 (m, p, p, 2), of cloud; both are equal where there is one view.
            probability_of_turned: Not used.
            state: float32 (2, 2), the value of `state`.
        """
        del probability_of_turned
        teacher = probability[..., ::-1]
        if_clear, if_cloud = tf.unstack(state[:, ::-1])
        has_two = teacher != probability
        is_clear = has_two & (1 - teacher > if_clear) & (probability < THRESHOLD)
        is_cloud = has_two & (teacher > if_cloud) & (probability > THRESHOLD)
        return tf.where(is_cloud, 1.0, tf.where(is_clear, 0.0, label))

    def count(self, channels, label, probability, corrected, weight):
        """By view: pixels by label and sums of the label's probability; replaced and all labels.

        The first eight are of pixels with two views.
        """
        is_cloud = tf.round(label)
        weight = tf.broadcast_to(weight[:, None, None, None], label.shape)
        by_day = weight * tf.cast(has_reflectance(channels), tf.float32)
        of_class = by_day * (1 - is_cloud), by_day * is_cloud
        sums = [*of_class, of_class[0] * (1 - probability), of_class[1] * probability]
        by_view = [tf.reduce_sum(tf.cast(each, tf.float64), axis=(0, 1, 2)) for each in sums]
        replaced = weight * tf.cast(label != corrected, tf.float32)
        all_views = [tf.reduce_sum(tf.cast(each, tf.float64)) for each in (replaced, weight)]
        return tf.concat([*by_view, all_views], axis=0)

    @staticmethod
    def share_replaced(counts):
        """Share of all labels that are replaced, from the counts of an epoch."""
        return float(counts[8] / counts[9])

    def begin_epoch(self, counts):
        """Find the limits from the last epoch."""
        self.state.assign(self.limits(counts[-1] if counts else np.zeros(self.n_counts)))

    @classmethod
    def limits(cls, counts):
        """Limits (class, view) from the counts of an epoch; 1 of views that do not teach."""
        n, total = np.reshape(counts[:8], (2, 2, 2))
        mean = total / np.maximum(n, 1)
        return np.where((mean > 0.5).all(axis=0), mean, 1.0)


LABEL_CORRECTIONS = {
    "none": None,
    "early_learning": EarlyLearning,
    "co_teaching": CoTeaching,
}


def regimes(channels):
    """Regime of each pixel, 0 to N_REGIMES - 1: float32 (...), for normalised channels (..., 9).

    All is computed in float32: TensorFlow computes with int32 on the host, also beside a GPU.
    """
    s8, s9 = channels[..., 7], channels[..., 8]
    is_day = has_reflectance(channels)[..., 0]
    by_s9 = _number([s9 > (limit - BT_OFFSET) / BT_SCALE for limit in S9_LIMITS])
    by_difference = _number([s8 - s9 > limit / BT_SCALE for limit in S8_S9_LIMITS])
    by_day = tf.cast(is_day, tf.float32)
    return (by_day * (len(S9_LIMITS) + 1) + by_s9) * (len(S8_S9_LIMITS) + 1) + by_difference


def _number(conditions):
    return tf.add_n([tf.cast(condition, tf.float32) for condition in conditions])


def _count_cells(cells, is_counted, weight, n_cells):
    """Counted pixels of weight 1 by cell: float64 (n_cells,); exact, as below 2**24 pixels."""
    counted = tf.reshape(tf.cast(is_counted, tf.float32) * weight[:, None, None, None], [-1])
    cells = tf.cast(tf.reshape(cells, [-1]), tf.int32)
    return tf.cast(tf.math.unsorted_segment_sum(counted, cells, n_cells), tf.float64)
