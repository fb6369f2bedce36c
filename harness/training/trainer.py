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
from harness.networks.fused_upsampling import without_upsampling
from harness.parallel.devices import on_replicas

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Trainer:
    """A model, its optimizer, and the steps that train and evaluate it.

    Every step gets, per replica, the elements of `data_loader.PatchBatches`: channels
    (S, P, P, 9), cloud (S, P, P, 1) and weight (S,), which is 0 for padding at the end.

    Loss and accuracy are means over the pixels that `clip_offset` leaves of all patches of weight
    1, whatever the numbers of replicas and patches: sums are kept on the devices, in float64.

    Args:
        strategy: tf.distribute.Strategy.
        build_model: Function that returns the keras.Model.
        learning_rate: Of Adam.
        batch_size: Global batch size.
        micro_batch: Patches that pass through the network at once; gradients of a replica's share
            are added up. S is a multiple of it.
        clip_offset: Pixels cut from each side of prediction and label.
        cloud_weight: Weight of cloud pixels in the loss.
        loss_scaling: Whether gradients are scaled against underflow, for float16.
        xla: Whether the network is compiled.
    """

    def __init__(
        self, strategy, build_model, learning_rate, batch_size, micro_batch,
        clip_offset=0, cloud_weight=1.0, loss_scaling=False, xla=False,
    ):  # fmt: skip
        self.strategy, self.batch_size, self.micro_batch = strategy, batch_size, micro_batch
        self.clip_offset, self.cloud_weight = clip_offset, cloud_weight
        with strategy.scope():
            self.model = build_model()
            self._network = without_upsampling(self.model)
            self.optimizer = keras.optimizers.Adam(learning_rate)
            if loss_scaling:
                self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
            self.optimizer.build(self.model.trainable_variables)
            # sums of loss, right pixels, pixels
            self._totals = _counter(tf.zeros(3, tf.float64), tf.VariableAggregation.SUM)
            # steps taken, and the first of these whose loss was not finite, or 0
            first_replica = tf.VariableAggregation.ONLY_FIRST_REPLICA
            self._steps = _counter(tf.zeros(2, tf.int64), first_replica)
        self._loss_scaling = loss_scaling
        self._gradients_of = tf.function(self._gradients, jit_compile=xla or None)
        self._sums_of = tf.function(self._sums, jit_compile=xla or None)

    @tf.function(reduce_retracing=True)
    def train_step(self, batch):
        """Take one step of the optimizer on a distributed batch."""
        self.strategy.run(self._train_replica, args=batch)

    @tf.function(reduce_retracing=True)
    def eval_step(self, batch):
        """Add a distributed batch to the totals, without training."""
        self.strategy.run(self._eval_replica, args=batch)

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
        self.take_totals()
        with self.strategy.scope():
            for variable, value in zip(variables, state, strict=True):
                variable.assign(value)
        return time.perf_counter() - begin

    def _empty_batch(self, n_patches):
        """A distributed batch of zeros, of which the first patch counts."""
        p, _, n_channels = self.model.input_shape[1:]
        weight = np.eye(1, n_patches, dtype=np.float32)[0]
        arrays = (
            np.zeros((n_patches, p, p, n_channels), np.float32),
            np.zeros((n_patches, p, p, 1), np.uint8),
            weight,
        )
        return on_replicas(self.strategy, itertools.repeat(arrays))

    @property
    def totals(self):
        """Sums over the steps since `take_totals`: loss, right pixels, pixels."""
        return self._totals.numpy().tolist()

    @totals.setter
    def totals(self, values):
        self._totals.assign(tf.constant(values, tf.float64))

    def take_totals(self):
        """Return loss, accuracy and patches of the steps since the last call, and start anew."""
        loss, right, pixels = self._totals.numpy()
        self.totals = [0, 0, 0]
        self._steps.assign(tf.zeros(2, tf.int64))
        clipped = self.model.input_shape[1] - 2 * self.clip_offset
        return {
            "loss": float(loss / pixels),
            "accuracy": float(right / pixels),
            "patches": round(pixels / clipped**2),
        }

    def first_bad_step(self):
        """Which training step since `take_totals` had a loss that is not finite; 0 if none had."""
        return int(self._steps.numpy()[1])

    def _train_replica(self, channels, cloud, weight):
        gradients = [tf.zeros_like(v.value) for v in self.model.trainable_variables]
        totals = tf.zeros(3, tf.float64)
        for i in self._micro_batches(weight):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # one's memory
            part, sums = self._gradients_of(*self._cut(i, channels, cloud, weight))
            gradients = [total + g for total, g in zip(gradients, part, strict=True)]
            totals += sums
        self._totals.assign_add(totals)
        # Each part is a mean over `batch_size` patches; a smaller batch counts by its true size.
        context = tf.distribute.get_replica_context()
        mine = tf.stack([tf.reduce_sum(weight), tf.cast(totals[0], tf.float32)])
        n_patches, loss = tf.unstack(context.all_reduce("sum", mine))
        taken, bad = tf.unstack(self._steps + [1, 0])
        is_first_bad = (bad == 0) & ~tf.math.is_finite(loss)
        self._steps.assign([taken, tf.where(is_first_bad, taken, bad)])
        # Where no patch counts, scenes were left out: nothing is learned from them.
        correction = tf.math.divide_no_nan(float(self.batch_size), n_patches)
        gradients = [g * correction for g in gradients]
        if self._loss_scaling:
            gradients = self._agree_on_overflow(gradients, context)
        self.optimizer.apply(gradients, self.model.trainable_variables)

    def _eval_replica(self, channels, cloud, weight):
        for i in self._micro_batches(weight):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            self._totals.assign_add(self._sums_of(*self._cut(i, channels, cloud, weight)))

    def _micro_batches(self, weight):
        """Numbers of the micro-batches that hold a patch; padding stands at the end."""
        n_used = tf.reduce_max(tf.where(weight > 0, tf.range(1, weight.shape[0] + 1), 0))
        return tf.range(-(-n_used // self.micro_batch))

    def _cut(self, i, *arrays):
        first, m = i * self.micro_batch, self.micro_batch
        return [tf.ensure_shape(a[first : first + m], (m, *a.shape[1:])) for a in arrays]

    def _gradients(self, channels, cloud, weight):
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            sums, objective = self._forward(channels, cloud, weight, training=True)
            if self._loss_scaling:
                objective = self.optimizer.scale_loss(objective)
        return tape.gradient(objective, [v.value for v in variables]), sums

    def _sums(self, channels, cloud, weight):
        return self._forward(channels, cloud, weight, training=False)[0]

    def _forward(self, channels, cloud, weight, training):
        """Return float64 (3,) sums over pixels, and the float32 loss per patch of a full batch."""
        clip = slice(self.clip_offset, channels.shape[1] - self.clip_offset)
        probability = self._network(channels, training=training)[:, clip, clip]
        label = tf.cast(cloud[:, clip, clip], tf.float32)
        loss = keras.losses.binary_crossentropy(label, probability)  # (m, p, p)
        loss *= 1 + (self.cloud_weight - 1) * label[..., 0]
        patch_loss = weight * tf.reduce_mean(loss, axis=(1, 2))  # (m,)
        right = tf.reduce_sum(
            tf.cast((probability > 0.5) == (label > 0.5), tf.float32), axis=(1, 2, 3)
        )  # (m,), exact: below 2^24 pixels
        pixels = float(label.shape[1] * label.shape[2])
        sums = tf.stack([patch_loss * pixels, weight * right, weight * pixels])  # (3, m)
        objective = tf.reduce_sum(patch_loss) / self.batch_size
        return tf.reduce_sum(tf.cast(sums, tf.float64), axis=1), objective

    def _agree_on_overflow(self, gradients, context):
        """Make an overflow on one replica one on all: Keras looks at its own replica alone."""
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        n_overflows = context.all_reduce("sum", tf.cast(~finite, tf.float32))
        poison = tf.where(n_overflows > 0, float("nan"), 0.0)
        return [g + poison for g in gradients]


def _counter(value, aggregation):
    """A variable that every replica counts up by itself."""
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=aggregation,
    )


@contextlib.contextmanager
def translated_errors(batches, trainer):
    """Raise what ended the reading of batches, or say what fits the memory, for TensorFlow's words.

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
            f"{precision}. Set {' or '.join(advice) or 'a smaller PATCH_SIZE'}; results stay those "
            f"of batch_size {trainer.batch_size}."
        ) from None
    except tf.errors.OpError:
        if batches.error is not None:
            raise batches.error from None
        raise
