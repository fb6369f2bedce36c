import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from data_loader import PatchBatches
from harness.parallel.devices import open_devices
from harness.training.trainer import Trainer
from model import unet

P = 16  # a patch; 4 a scene


def scene(number, patches):
    values = np.random.default_rng(number).normal(size=(4, P, P, 9))
    for i, (channels, cloud) in patches.items():
        channels[:], cloud[:] = values[i], values[i, ..., :1] > 0


def trainer_and_feed(n_replicas, batch_size=11, micro_batch=2, policy="float32", **options):
    devices = open_devices(cpu_devices=n_replicas, seed=5)
    trainer = Trainer(
        devices.strategy, lambda: unet((P, P, 9), policy), 1e-3,
        batch_size, devices.micro_batch(micro_batch, batch_size), 2, **options,
    )  # fmt: skip
    batches = PatchBatches(
        range(7), scene, P, 4, 9, batch_size, devices.replicas, devices.n_replicas,
        seed=1, multiple=trainer.micro_batch,
    )  # fmt: skip
    return trainer, batches, devices.distribute(batches.dataset())


def train(n_replicas, n_epochs=2, **options):
    trainer, batches, feed = trainer_and_feed(n_replicas, **options)
    totals = []
    for _ in range(n_epochs):
        for _ in range(batches.n_steps):
            trainer.train_step(next(feed))
        totals.append(trainer.take_totals())
    return totals, trainer.model.get_weights()


def plain_training(n_epochs=2, batch_size=11):
    """The same training in Keras' own words, one device and one whole batch a step."""
    keras.utils.set_random_seed(5)
    model = unet((P, P, 9))
    optimizer = keras.optimizers.Adam(1e-3)
    batches = PatchBatches(range(7), scene, P, 4, 9, batch_size, seed=1)
    elements = batches.batches()
    totals = []
    for _ in range(n_epochs):
        losses, right = [], []
        for x, y, weight in itertools.islice(elements, batches.n_steps):
            n = int(weight.sum())
            x, y = x[:n], y[:n, 2:-2, 2:-2].astype(np.float32)
            with tf.GradientTape() as tape:
                p = model(x, training=True)[:, 2:-2, 2:-2]
                loss = tf.reduce_mean(keras.losses.binary_crossentropy(y, p))
            optimizer.apply(
                tape.gradient(loss, [v.value for v in model.trainable_variables]),
                model.trainable_variables,
            )
            losses += [float(loss)] * n
            right += list(((p.numpy() > 0.5) == (y > 0.5)).mean(axis=(1, 2, 3)))
        totals.append({"loss": np.mean(losses), "accuracy": np.mean(right)})
    return totals, model.get_weights()


@pytest.mark.parametrize(
    ("n_replicas", "micro_batch"), [(1, 11), (1, 2), (1, 3), (2, 2), (3, 1), (3, 4)]
)
def test_training_equals_a_plain_loop_for_any_replicas_and_micro_batch(n_replicas, micro_batch):
    # 28 patches in batches of 11: 11, 11 and 6
    totals, weights = train(n_replicas, micro_batch=micro_batch)
    plain_totals, plain_weights = plain_training()
    for ours, plain in zip(totals, plain_totals, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-4)
        assert ours["accuracy"] == pytest.approx(plain["accuracy"], abs=1e-3)
    for ours, plain in zip(weights, plain_weights, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-3)  # six steps of Adam at 1e-3


@pytest.mark.parametrize("n_replicas", [1, 3])
def test_validation_equals_numpy_at_a_count_no_batch_divides(n_replicas):
    trainer, batches, feed = trainer_and_feed(n_replicas)
    for _ in range(batches.n_steps):
        trainer.eval_step(next(feed))
    ours = trainer.take_totals()
    elements = itertools.islice(PatchBatches(range(7), scene, P, 4, 9, 1, seed=1).batches(), 28)
    x, y, _ = (np.concatenate(parts) for parts in zip(*elements, strict=True))
    p = trainer.model.predict(x, verbose=0)[:, 2:-2, 2:-2]
    y = y[:, 2:-2, 2:-2]
    assert ours["accuracy"] == pytest.approx(((p > 0.5) == (y > 0)).mean(), abs=1e-5)
    assert ours["loss"] == pytest.approx(-np.log(np.where(y, p, 1 - p)).mean(), abs=1e-5)


def test_totals_start_anew():
    trainer, batches, feed = trainer_and_feed(2)
    for _ in range(batches.n_steps):
        trainer.eval_step(next(feed))
    first = trainer.take_totals()
    for _ in range(batches.n_steps):
        trainer.eval_step(next(feed))
    assert trainer.take_totals() == pytest.approx(first)


def test_cloud_weight_weighs_cloud_pixels():
    elements = next(PatchBatches(range(7), scene, P, 4, 9, 4, seed=1).batches())
    losses = {}
    for weight in (1.0, 3.0):
        devices = open_devices(seed=5)
        trainer = Trainer(
            devices.strategy, lambda: unet((P, P, 9)), 1e-3, 4, 4, cloud_weight=weight
        )
        trainer.eval_step(tuple(tf.constant(e) for e in elements))
        losses[weight] = trainer.take_totals()["loss"]
    p = trainer.model.predict(elements[0], verbose=0)
    y = elements[1]
    plain = -np.log(np.where(y, p, 1 - p))
    assert losses[1.0] == pytest.approx(plain.mean(), rel=1e-5)
    assert losses[3.0] == pytest.approx((np.where(y, 3, 1) * plain).mean(), rel=1e-5)


@pytest.mark.parametrize("n_replicas", [1, 2])
def test_overflow_under_float16_skips_the_step_on_all_replicas(n_replicas):
    trainer, batches, _ = trainer_and_feed(n_replicas, policy="mixed_float16", loss_scaling=True)
    before = trainer.model.get_weights()
    elements = list(itertools.islice(batches.batches(), n_replicas))
    elements[0][0][:] = np.inf  # on the first replica only
    trainer.train_step(distributed(trainer, elements))
    for old, new in zip(before, trainer.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.array(trainer.optimizer.dynamic_scale) == 2.0**14  # halved once
    trainer.train_step(distributed(trainer, list(itertools.islice(batches.batches(), n_replicas))))
    assert any((a != b).any() for a, b in zip(before, trainer.model.get_weights(), strict=True))


def distributed(trainer, elements):
    return tuple(
        trainer.strategy.experimental_distribute_values_from_function(
            lambda context, i=i: tf.constant(elements[context.replica_id_in_sync_group][i])
        )
        for i in range(3)
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_trains_as_float32_nearly_does(policy):
    full, _ = train(1)
    half, _ = train(1, policy=policy, loss_scaling=policy == "mixed_float16")
    for a, b in zip(full, half, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)


def test_compiled_training_equals_uncompiled():
    plain, _ = train(1)
    compiled, _ = train(1, xla=True)
    for a, b in zip(plain, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_training_repeats_bit_for_bit():
    first, second = train(1), train(1)
    assert first[0] == second[0]
    for a, b in zip(first[1], second[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_warm_up_traces_both_steps_and_changes_nothing():
    trainer, batches, feed = trainer_and_feed(2)
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    before = [variable.numpy() for variable in variables]
    assert trainer.warm_up(batches.replica_batch, batches.replica_batch) > 0
    for old, variable in zip(before, variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())
    trainer.eval_step(next(feed))
    trainer.train_step(next(feed))
    for step in (trainer.train_step, trainer.eval_step):
        assert step.experimental_get_tracing_count() == 1
