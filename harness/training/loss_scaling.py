"""Scaling of the loss for float16, without a branch."""

import keras
import tensorflow as tf


class LossScaling(keras.optimizers.LossScaleOptimizer):
    """The optimizer of Keras that scales the loss; no step waits for a copy from its device.

    Keras skips a step whose gradients are not finite, and the host waits to know whether they are.
    Here each step is taken, and if they are not finite, what it changed gets its old value.

    `apply` must be called in a replica context, with gradients that are finite on all replicas or
    on none.
    """

    def apply(self, grads, trainable_variables):
        """Take a step with gradients of the scaled loss; change the scale as Keras does."""
        finite, scale, count = self.check_finite(grads), self.dynamic_scale, self.step_counter
        ready = tf.equal(count, self.dynamic_growth_steps - 1)
        new_scale = scale * tf.where(finite, tf.where(ready, 2.0, 1.0), 0.5)
        new_count = tf.where(finite & ~ready, count + 1, 0)
        changed = [v.value for v in (*self.inner_optimizer.variables, *trainable_variables)]
        old = [tf.identity(variable) for variable in changed]
        self.inner_optimizer.apply([g / scale for g in grads], trainable_variables)
        new = [tf.where(finite, *both) for both in zip(changed, old, strict=True)]
        variables = [*changed, self.dynamic_scale.value, self.step_counter.value]
        values = [*new, new_scale, new_count]

        def assign(strategy, values):
            for variable, value in zip(variables, values, strict=True):
                strategy.extended.update(variable, lambda v, x: v.assign(x), args=(value,))

        tf.distribute.get_replica_context().merge_call(assign, args=(values,))
