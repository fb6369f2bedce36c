"""The training and validation steps, on every replica of a strategy at once.

`Model.fit` is not used: under a strategy Keras 3.15 counts an empty step at the end of the data,
which makes means n/(n+1) too small, and it fails on several workers (keras issue 20585).
"""

import contextlib
import itertools
import time

import keras
import numpy as np
import tensorflow as tf

from harness.errors import UserError
from harness.inference.scores import THRESHOLD
from harness.networks.fused_upsampling import fuse_upsampling
from harness.networks.model_files import with_views
from harness.parallel.devices import on_replicas
from harness.training.loss_scaling import LossScaling

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Trainer:
    """A model, its optimizer, and the steps that train and evaluate it.

    Every step gets, per replica, the elements of `data_loader.PatchBatches`: channels
    (S, P, P, 9), cloud (S, P, P, 1), weight (S,), which is 0 for padding at the end and for
    patches of scenes that cannot be read, and n_used (), the slots up to the last one of weight 1.

    Loss and accuracy are means over the pixels that `clip_offset` leaves of all patches of weight
    1, whatever the numbers of replicas and patches: sums are kept on the devices, in float64.
    A network of several views is trained by the mean of their losses, and validated by its output.

    Patches of weight 0 have no influence on training, and neither have the numbers of replicas and
    of patches in a micro-batch. A layer with a state of its own breaks this: BatchNormalization
    learns the statistics of a micro-batch including its padding, and the random numbers of Dropout
    depend on the number of micro-batches and are not part of checkpoints. Networks with such
    layers are rejected; LayerNormalization and frozen BatchNormalization work.

    A step whose patches all have weight 0 is still a step of Adam: its gradients are 0, and the
    momentum of the steps before it moves the weights.

    Args:
        strategy: tf.distribute.Strategy.
        build_model: Function that returns the keras.Model.
        loss: Function of label and probability, see harness/training/losses.py.
        learning_rate: Of Adam.
        batch_size: Global batch size.
        micro_batch: Patches that pass through the network at once; gradients of a replica's share
            are added up. S is a multiple of it.
        clip_offset: Pixels cut from each side of prediction and label.
        cloud_weight: Weight of cloud pixels in the loss.
        loss_scaling: Whether gradients are scaled against underflow, for float16.
        xla: Whether the network is compiled.
        label_one: Number in `cloud` that says cloud; smaller ones are probabilities times this.
        forward_correction: Class label_noise.ForwardCorrection, or None.
        label_correction: A class in label_noise.LABEL_CORRECTIONS, or None.
        patch_dtype: Of the channels in batches, 'float32' or 'float16'.

    Raises:
        UserError: If the network cannot be trained this way.
    """

    def __init__(
        self, strategy, build_model, loss, learning_rate, batch_size, micro_batch,
        clip_offset=0, cloud_weight=1.0, loss_scaling=False, xla=False,
        label_one=1, forward_correction=None, label_correction=None, patch_dtype="float32",
    ):  # fmt: skip
        self.strategy, self.batch_size, self.micro_batch = strategy, batch_size, micro_batch
        self._loss, self._clip_offset, self._cloud_weight = loss, clip_offset, cloud_weight
        self._loss_scaling, self._label_one = loss_scaling, float(label_one)
        self._label_correction = label_correction and label_correction()  # for all replicas
        self._patch_dtype = patch_dtype
        with strategy.scope():
            self.model = build_model()
            check_trainable(self.model)
            self._network = fuse_upsampling(with_views(self.model))
            self.optimizer = keras.optimizers.Adam(learning_rate)
            if loss_scaling:
                self.optimizer = LossScaling(self.optimizer)
            self.optimizer.build(self.model.trainable_variables)
            self._forward_correction = forward_correction and forward_correction()
            noise = self._forward_correction, self._label_correction
            self._counters = [counter for counter in noise if counter]
            # Sums of loss, correct pixels and pixels; in training also what counters count, in
            # evaluation also cloud in the labels.
            n_sums = 3 + sum(counter.n_counts for counter in self._counters)
            self._train_sums = _per_replica(
                tf.zeros(n_sums, tf.float64), tf.VariableAggregation.SUM
            )
            self._eval_sums = _per_replica(tf.zeros(4, tf.float64), tf.VariableAggregation.SUM)
            # Training steps, and the first of them whose loss was not finite, or 0.
            first_replica = tf.VariableAggregation.ONLY_FIRST_REPLICA
            self._steps = _per_replica(tf.zeros(2, tf.int64), first_replica)
        self._train_graphs = {}  # by shape and type of the channels of a replica
        self._gradients_of = tf.function(self._gradients, jit_compile=xla or None)
        self._sums_of = tf.function(self._sums, jit_compile=xla or None)

    def train_step(self, batch):
        """Take one step of the optimizer on a distributed batch."""
        # TensorFlow finds the graph by the types of the batch and of all variables of all devices,
        # which is a third of the Python of a step.
        channels = self.strategy.experimental_local_results(batch[0])[0]
        kind = channels.shape, channels.dtype
        if kind not in self._train_graphs:
            self._train_graphs[kind] = self.traced_train_step.get_concrete_function(batch)
        self._train_graphs[kind](batch)

    @tf.function(reduce_retracing=True)
    def traced_train_step(self, batch):
        """What `train_step` does, for TensorFlow."""
        self.strategy.run(self._train_replica, args=batch)

    @tf.function(reduce_retracing=True)
    def eval_step(self, batch):
        """Add a distributed batch to the sums of evaluation, without training."""
        self.strategy.run(self._eval_replica, args=batch)

    # --- one replica ------------------------------------------------------------------------

    def _train_replica(self, channels, cloud, weight, n_used):
        gradients, sums = self._sum_over_micro_batches(channels, cloud, weight, n_used)
        self._train_sums.assign_add(sums)
        context = tf.distribute.get_replica_context()
        share = tf.stack([tf.reduce_sum(weight), tf.cast(sums[0], tf.float32)])
        n_patches, loss = tf.unstack(context.all_reduce("sum", share))
        self._count_step(loss)
        # Gradients are means over `batch_size` patches; a smaller batch counts by its true size.
        # Without any patch of weight 1 they are 0, and stay 0.
        correction = tf.math.divide_no_nan(float(self.batch_size), n_patches)
        gradients = [g * correction for g in gradients]
        if self._loss_scaling:
            gradients = _share_overflow(gradients, context)
        self.optimizer.apply(gradients, self.model.trainable_variables)  # adds up all replicas

    def _eval_replica(self, channels, cloud, weight, n_used):
        i, n = tf.constant(0), self._micro_batches(n_used)
        while i < n:
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # memory of one
            self._eval_sums.assign_add(self._sums_of(*self._cut(i, channels, cloud, weight)))
            i += 1

    def _sum_over_micro_batches(self, channels, cloud, weight, n_used):
        """Gradients of the objective, and float64 (n_sums,) sums over pixels, of a replica."""
        gradients = [tf.zeros_like(v.value) for v in self.model.trainable_variables]
        sums = tf.zeros(self._train_sums.shape, tf.float64)
        # An argument, since compiled code on a GPU cannot read a variable in host memory.
        state = self._label_correction and self._label_correction.state.value()
        i, n = tf.constant(0), self._micro_batches(n_used)
        while i < n:
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # memory of one
            arrays = self._cut(i, channels, cloud, weight)
            part, part_sums = self._gradients_of(*arrays, state)
            gradients = [total + g for total, g in zip(gradients, part, strict=True)]
            sums += part_sums
            i += 1
        return gradients, sums

    def _micro_batches(self, n_used):
        """Number of the micro-batches up to the last patch of weight 1.

        TensorFlow keeps int32 in the memory of the host, also beside a GPU: the loop waits for no
        copy from the device. `for i in tf.range(n)` would, as its length passes through the device.
        """
        return (n_used + self.micro_batch - 1) // self.micro_batch

    def _cut(self, i, *arrays):
        first, m = i * self.micro_batch, self.micro_batch
        return [tf.ensure_shape(a[first : first + m], (m, *a.shape[1:])) for a in arrays]

    def _count_step(self, loss):
        steps = self._steps + [1, 0]
        taken, bad = steps[0], steps[1]  # tf.unstack of int64 would be in host memory
        is_first_bad = (bad == 0) & ~tf.math.is_finite(loss)
        self._steps.assign([taken, tf.where(is_first_bad, taken, bad)])

    # --- one micro-batch --------------------------------------------------------------------

    def _gradients(self, channels, cloud, weight, state):
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            sums, objective = self._forward(channels, cloud, weight, True, state)
            if self._loss_scaling:
                objective = self.optimizer.scale_loss(objective)
        return tape.gradient(objective, [v.value for v in variables]), sums

    def _sums(self, channels, cloud, weight):
        sums, _ = self._forward(channels, cloud, weight, training=False)
        is_cloud = tf.cast(self._label(cloud) > THRESHOLD, tf.float32)
        cloudy = tf.cast(
            weight * tf.reduce_sum(is_cloud, axis=(1, 2, 3)), tf.float64
        )  # (m,), exact
        return tf.concat([sums, [tf.reduce_sum(cloudy)]], axis=0)

    def _forward(self, channels, cloud, weight, training, state=None):
        """Return float64 (n_sums,) sums over pixels, and float32 loss per patch of a full batch."""
        channels = tf.cast(channels, tf.float32)
        views = self._clipped(self._network(channels, training=training))  # (m, p, p, V)
        probability = tf.reduce_mean(views, axis=-1, keepdims=True)  # (m, p, p, 1)
        if not training:
            views = probability  # what the model is used for
        label = self._label(cloud)
        given = tf.broadcast_to(label, views.shape)  # to each view
        target, expected, counts = given, views, []
        if self._label_correction and training:
            target = self._label_correction.corrected(
                given,
                views,
                lambda: self._clipped(_turned(self._network(_turned(channels)))),
                state,
            )
            target = tf.stop_gradient(target)
        if self._forward_correction:
            expected = self._forward_correction.probability_of_label(views, self._clipped(channels))
        if training:
            facts = self._clipped(channels), given, views, target, weight
            counts = [counter.count(*facts) for counter in self._counters]
        loss = self._loss_of_views(target, expected)  # (m, p, p)
        patch_loss = weight * tf.reduce_mean(loss, axis=(1, 2))  # (m,)
        correct = tf.reduce_sum(
            tf.cast((probability > THRESHOLD) == (label > THRESHOLD), tf.float32), axis=(1, 2, 3)
        )  # (m,), exact: below 2^24 pixels
        pixels = float(label.shape[1] * label.shape[2])
        sums = tf.stack([patch_loss * pixels, weight * correct, weight * pixels])  # (3, m)
        objective = tf.reduce_sum(patch_loss) / self.batch_size
        sums = tf.reduce_sum(tf.cast(sums, tf.float64), axis=1)
        return tf.concat([sums, *counts], axis=0) if counts else sums, objective

    def _loss_of_views(self, target, probability):
        """Mean loss (m, p, p) of the views, with targets of their own; both (m, p, p, V)."""
        n_views = probability.shape[-1]
        parts = (tf.split(each, n_views, axis=-1) for each in (target, probability))
        losses = [
            self._loss(one, p) * (1 + (self._cloud_weight - 1) * one[..., 0])
            for one, p in zip(*parts, strict=True)
        ]
        return tf.add_n(losses) / n_views

    def _label(self, cloud):
        """Label of each pixel that counts: float32 (m, p, p, 1), 0 to 1."""
        return tf.cast(self._clipped(cloud), tf.float32) / self._label_one

    def _clipped(self, pixels):
        clip = slice(self._clip_offset, pixels.shape[1] - self._clip_offset)
        return pixels[:, clip, clip]

    # --- between steps ----------------------------------------------------------------------

    def begin_epoch(self, history):
        """Prepare what depends on earlier epochs; `history` has their rows."""
        with self.strategy.scope():
            for i, counter in enumerate(self._counters):
                counter.begin_epoch([row["label_counts"][i] for row in history])

    @property
    def train_totals(self):
        """Sums over the training steps since `pop_train_metrics`: loss, correct pixels, pixels."""
        return self._train_sums.numpy().tolist()

    @train_totals.setter
    def train_totals(self, values):
        self._train_sums.assign(tf.constant(values, tf.float64))

    def pop_train_metrics(self):
        """Return loss, accuracy and number of patches since the last call; restart all counters."""
        self._steps.assign(tf.zeros(2, tf.int64))
        metrics, _, counts = self._pop(self._train_sums)
        if self._counters:
            ends = np.cumsum([counter.n_counts for counter in self._counters])
            parts = np.split(counts, ends[:-1])
            metrics["label_counts"] = [part.tolist() for part in parts]
        if self._label_correction:
            metrics["labels_replaced"] = self._label_correction.share_replaced(parts[-1])
        return metrics

    def pop_eval_metrics(self):
        """Return the same of `eval_step`, and the share of cloud in the labels of these pixels."""
        metrics, pixels, (cloud,) = self._pop(self._eval_sums)
        return metrics | {"cloud": float(cloud / pixels)}

    def _pop(self, sums):
        (loss, correct, pixels), others = np.split(sums.numpy(), [3])
        sums.assign(tf.zeros(sums.shape, tf.float64))
        clipped = self.model.input_shape[1] - 2 * self._clip_offset
        metrics = {
            "loss": float(loss / pixels),
            "accuracy": float(correct / pixels),
            "patches": round(pixels / clipped**2),
        }
        return metrics, pixels, others

    def first_bad_step(self):
        """Return the first training step with a loss that is not finite, or 0.

        Steps are counted from 1 since `pop_train_metrics`.
        """
        return int(self._steps.numpy()[1])

    def warm_up(self, train_patches, eval_patches):
        """Trace and compile both steps, so that no epoch waits for it; nothing else is changed.

        Args:
            train_patches: Patches in a replica's batch of training.
            eval_patches: Patches in a replica's batch of validation.

        Returns:
            Seconds that it took.
        """
        begin = time.perf_counter()
        variables = [*self.model.variables, *self.optimizer.variables]
        state = [variable.numpy() for variable in variables]
        self.train_step(self._empty_batch(train_patches))
        self.eval_step(self._empty_batch(eval_patches))
        self.pop_train_metrics()
        self.pop_eval_metrics()
        with self.strategy.scope():
            for variable, value in zip(variables, state, strict=True):
                variable.assign(value)
        return time.perf_counter() - begin

    def _empty_batch(self, n_patches):
        """A distributed batch of zeros, of which the first patch has weight 1."""
        p, _, n_channels = self.model.input_shape[1:]
        weight = np.eye(1, n_patches, dtype=np.float32)[0]
        arrays = (
            np.zeros((n_patches, p, p, n_channels), self._patch_dtype),
            np.zeros((n_patches, p, p, 1), np.uint8),
            weight,
            np.int32(1),
        )
        return on_replicas(self.strategy, itertools.repeat(arrays))


def check_trainable(model):
    """Check that training changes a model by gradients alone, see Trainer.

    Raises:
        UserError: If a layer keeps a state of its own or adds to the loss, or no weight is
            trainable.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            continue  # its mean and variance are constants
        # What stays besides the weights of a frozen layer is the state of random numbers.
        weights = () if layer.trainable else layer.weights
        known = {id(v) for v in (*layer.trainable_variables, *weights)}
        if any(id(v) not in known for v in layer.variables):
            raise UserError(
                f"The layer {layer.name} ({type(layer).__name__}) of the network {model.name} "
                "has a state that padding, micro_batch and the number of devices would change. "
                "Remove it, or replace BatchNormalization by LayerNormalization."
            )
        if layer.losses:
            raise UserError(
                f"The layer {layer.name} ({type(layer).__name__}) of the network {model.name} "
                "adds a loss of its own (a regularizer), which training does not use. Remove it."
            )
    if not model.trainable_variables:
        raise UserError(
            f"The network {model.name} has no trainable weights. Set trainable = True before "
            "saving it, or choose another network."
        )


def _turned(patches):
    """Patches (m, p, p, C) turned by 180 degrees."""
    return tf.reverse(patches, axis=(1, 2))


def _per_replica(value, aggregation):
    """A variable that every replica changes on its own, and that is aggregated when read."""
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=aggregation,
    )


def _share_overflow(gradients, context):
    """Make an overflow on one replica one on all: Keras checks only its own replica."""
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
    n_overflows = context.all_reduce("sum", tf.cast(~finite, tf.float32))
    poison = tf.where(n_overflows > 0, float("nan"), 0.0)
    return [g + poison for g in gradients]


@contextlib.contextmanager
def replace_tensorflow_errors(trainer):
    """Replace TensorFlow's error about memory by advice.

    Args:
        trainer: Trainer.

    Raises:
        UserError: If the device has too little memory.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        policy = trainer.model.layers[1].dtype_policy.name
        precision = next(name for name, value in POLICIES.items() if value == policy)
        advice = [f"micro_batch: {trainer.micro_batch // 2}"] * (trainer.micro_batch > 1)
        advice += ["precision: bfloat16"] * (precision == "float32")
        raise UserError(
            f"The device has too little memory for {trainer.micro_batch} patches at once in "
            f"{precision}. Set {' or '.join(advice) or 'a smaller PATCH_SIZE'}; the results do not "
            f"depend on micro_batch."
        ) from None
