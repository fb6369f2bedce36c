import itertools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from data_loader import PatchBatches
from harness.errors import UserError
from harness.parallel.devices import open_devices
from harness.parallel.rendezvous import SingleRank
from harness.training.losses import LOSSES, cross_entropy
from harness.training.trainer import Trainer, replace_tensorflow_errors
from model import NETWORKS, unet

P = 16  # a patch; 4 a scene


def scene(number, patches):
    values = np.random.default_rng(number).normal(size=(4, P, P, 9))
    for i, (channels, cloud) in patches.items():
        channels[:], cloud[:] = values[i], values[i, ..., :1] > 0


def small(shape, dtype="float32"):
    """A network with the parts of the U-Net that is traced in a second."""
    inputs = keras.Input(shape)
    skip = layers.Conv2D(8, 3, padding="same", activation="relu", dtype=dtype)(inputs)
    x = layers.UpSampling2D(2, dtype=dtype)(layers.MaxPool2D(2, dtype=dtype)(skip))
    x = layers.Concatenate(dtype=dtype)([x, skip])
    x = layers.Conv2D(8, 3, padding="same", activation="relu", dtype=dtype)(x)
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")(x))


def trainer_and_feed(
    n_replicas, batch_size=11, micro_batch=2, policy="float32", build=small, loss=cross_entropy,
    **options,
):  # fmt: skip
    devices = open_devices(SingleRank(), cpu_devices=n_replicas, seed=5)
    trainer = Trainer(
        devices.strategy, lambda: build((P, P, 9), policy), loss, 1e-3,
        batch_size, devices.micro_batch(micro_batch, batch_size), 2, **options,
    )  # fmt: skip
    batches = PatchBatches(
        range(7), scene, P, 4, 9, batch_size, devices.replicas, devices.n_replicas,
        seed=1, multiple=trainer.micro_batch,
    )  # fmt: skip
    return trainer, batches, devices.distribute(batches.batches())


def train(n_replicas, n_epochs=2, **options):
    trainer, batches, feed = trainer_and_feed(n_replicas, **options)
    totals = []
    for _ in range(n_epochs):
        for _ in range(batches.n_steps):
            trainer.train_step(next(feed))
        totals.append(trainer.pop_train_metrics())
    return totals, trainer.model.get_weights()


def plain_training(build, n_epochs=2, batch_size=11):
    """The same training with Keras alone, on one device, one whole batch per step."""
    keras.utils.set_random_seed(5)
    model = build((P, P, 9))
    optimizer = keras.optimizers.Adam(1e-3)
    batches = PatchBatches(range(7), scene, P, 4, 9, batch_size, seed=1)
    elements = batches.batches()
    totals = []
    for _ in range(n_epochs):
        losses, right = [], []
        for x, y, weight, _ in itertools.islice(elements, batches.n_steps):
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
    ("build", "n_replicas", "micro_batch"),
    [
        (small, 1, 11), (small, 1, 2), (small, 1, 3), (small, 2, 2), (small, 3, 1), (small, 3, 4),
        (unet, 2, 2),
    ],
)  # fmt: skip
def test_training_equals_a_plain_loop_for_any_replicas_and_micro_batch(
    build, n_replicas, micro_batch
):
    # 28 patches in batches of 11: 11, 11 and 6
    totals, weights = train(n_replicas, micro_batch=micro_batch, build=build)
    plain_totals, plain_weights = plain_training(build)
    for ours, plain in zip(totals, plain_totals, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-4)
        assert ours["accuracy"] == pytest.approx(plain["accuracy"], abs=1e-3)
    for ours, plain in zip(weights, plain_weights, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-3)  # six steps of Adam at 1e-3


@pytest.mark.parametrize("n_replicas", [1, 3])
def test_validation_equals_numpy_for_28_patches_in_batches_of_11(n_replicas):
    trainer, batches, feed = trainer_and_feed(n_replicas)
    for _ in range(batches.n_steps):
        trainer.eval_step(next(feed))
    ours = trainer.pop_eval_metrics()
    elements = itertools.islice(PatchBatches(range(7), scene, P, 4, 9, 1, seed=1).batches(), 28)
    x, y = map(np.concatenate, list(zip(*elements, strict=True))[:2])
    p = trainer.model.predict(x, verbose=0)[:, 2:-2, 2:-2]
    y = y[:, 2:-2, 2:-2]
    assert ours["accuracy"] == pytest.approx(((p > 0.5) == (y > 0)).mean(), abs=1e-5)
    assert ours["loss"] == pytest.approx(-np.log(np.where(y, p, 1 - p)).mean(), abs=1e-5)
    assert ours["cloud"] == (y > 0).mean()


def test_training_and_evaluation_are_summed_separately_and_restart():
    trainer, batches, feed = trainer_and_feed(2)
    first, second = next(feed), next(feed)
    trainer.train_step(first)
    totals = trainer.train_totals
    trainer.eval_step(second)
    assert trainer.train_totals == totals
    evaluated = trainer.pop_eval_metrics()
    trained = trainer.pop_train_metrics()
    n_pixels = 11 * (P - 4) ** 2  # one batch; 2 pixels are cut from each side
    assert totals[2] == n_pixels and trained["patches"] == evaluated["patches"] == 11
    assert trained["loss"] == totals[0] / n_pixels
    assert trained["accuracy"] == totals[1] / n_pixels
    assert trainer.train_totals == [0, 0, 0]
    trainer.eval_step(second)
    assert trainer.pop_eval_metrics() == evaluated


@pytest.mark.parametrize("n_replicas", [1, 2])
def test_sums_of_an_interrupted_epoch_can_be_restored(n_replicas):
    trainer, batches, feed = trainer_and_feed(n_replicas)
    trainer.train_step(next(feed))
    totals = trainer.train_totals
    trainer.pop_train_metrics()
    trainer.train_totals = totals
    assert trainer.train_totals == totals
    trainer.train_step(next(feed))
    assert trainer.pop_train_metrics()["patches"] == 22


@pytest.mark.parametrize("n_replicas", [1, 2])
def test_first_step_with_a_loss_that_is_not_finite_is_found(n_replicas):
    def infinite_where_all_is_cloud(label, probability):
        is_cloud = tf.reduce_all(label > 0, axis=(1, 2, 3))[:, None, None]
        return cross_entropy(label, probability) + tf.where(is_cloud, np.inf, 0.0)

    trainer, batches, _ = trainer_and_feed(n_replicas, loss=infinite_where_all_is_cloud)
    elements = list(itertools.islice(batches.batches(), 3 * n_replicas))
    steps = [elements[i : i + n_replicas] for i in range(0, len(elements), n_replicas)]
    trainer.train_step(distributed(trainer, steps[0]))
    assert trainer.first_bad_step() == 0
    steps[1][-1][1][0] = 1  # a patch of the last replica
    steps[2][0][1][0] = 1
    trainer.train_step(distributed(trainer, steps[1]))
    trainer.train_step(distributed(trainer, steps[2]))
    assert trainer.first_bad_step() == 2
    trainer.pop_train_metrics()
    assert trainer.first_bad_step() == 0


def small_trainer(build, loss=cross_entropy, batch_size=4, micro_batch=4, learning_rate=1e-3):
    devices = open_devices(SingleRank(), seed=5)
    return Trainer(devices.strategy, build, loss, learning_rate, batch_size, micro_batch)


def batch_of(weight, padding=0.0, size=P):
    """A batch whose patches of weight 0 contain a value."""
    rng = np.random.default_rng(0)
    weight = np.array(weight, np.float32)
    channels = rng.normal(size=(len(weight), size, size, 9)).astype(np.float32)
    cloud = (channels[..., :1] > 0).astype(np.uint8)
    channels[weight == 0], cloud[weight == 0] = padding, padding > 0
    return tuple(map(tf.constant, (channels, cloud, weight, np.int32(len(weight)))))


@pytest.mark.parametrize("name", NETWORKS)
def test_patches_of_weight_0_have_no_influence(name):
    trainer = small_trainer(lambda: NETWORKS[name]((64, 64, 9)), micro_batch=2)
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    start, after = [v.numpy() for v in variables], []
    for padding in (0.0, 5.0):
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        # The first micro-batch is padded in part, the second contains nothing else.
        trainer.train_step(batch_of((0, 1, 0, 0), padding, size=64))
        after.append([*(v.numpy() for v in variables), trainer.pop_train_metrics()["loss"]])
    for without, with_padding in zip(*after, strict=True):
        np.testing.assert_array_equal(without, with_padding)
    assert any((old != new).any() for old, new in zip(start, after[0], strict=False))


def test_batches_of_other_sizes_and_types_are_trained_on_too():
    trainer, losses = small_trainer(lambda: small((P, P, 9)), learning_rate=0.0), []
    for n, dtype in [(4, tf.float32), (8, tf.float32), (8, tf.float16), (4, tf.float32)]:
        channels, *others = batch_of([1] * 4 + [0] * (n - 4))
        trainer.train_step((tf.cast(channels, dtype), *others))
        metrics = trainer.pop_train_metrics()
        assert metrics["patches"] == 4
        losses.append(metrics["loss"])
    assert losses[0] == losses[3] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


def test_first_batch_without_patches_changes_no_weight():
    trainer = small_trainer(lambda: small((P, P, 9)))
    before = trainer.model.get_weights()
    trainer.train_step(batch_of((0, 0, 0, 0)))
    for a, b in zip(before, trainer.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert trainer.train_totals == [0, 0, 0] and trainer.first_bad_step() == 0


def test_first_step_of_adam_moves_weights_by_the_learning_rate():
    trainer = small_trainer(lambda: small((P, P, 9)), learning_rate=0.02)
    before = trainer.model.get_weights()
    trainer.train_step(batch_of((1, 1, 1, 1)))
    steps = [abs(b - a).max() for a, b in zip(before, trainer.model.get_weights(), strict=True)]
    assert steps == pytest.approx([0.02] * len(steps), rel=1e-3)


def with_layer(layer):
    inputs = keras.Input((P, P, 9))
    x = layer(layers.Conv2D(4, 3, padding="same")(inputs))
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x))


@pytest.mark.parametrize(
    ("make_layer", "reason"),
    [
        (lambda: layers.BatchNormalization(name="bn"), r"bn \(BatchNormalization\).*LayerNorm"),
        (lambda: layers.Dropout(0.5, name="drop"), r"drop \(Dropout\).*Remove it"),
        (lambda: layers.Dropout(0.5, name="drop", trainable=False), r"drop \(Dropout\)"),
        (lambda: layers.GaussianNoise(0.5, name="noise"), r"noise \(GaussianNoise\)"),
        (
            lambda: layers.Conv2D(4, 3, padding="same", kernel_regularizer="l2", name="decay"),
            r"decay \(Conv2D\).*regularizer",
        ),
    ],
)
def test_layer_that_changes_by_itself_is_rejected(make_layer, reason):
    with pytest.raises(UserError, match=reason):
        small_trainer(lambda: with_layer(make_layer()))


@pytest.mark.parametrize(
    "make_layer",
    [
        layers.LayerNormalization,
        lambda: layers.GroupNormalization(2),
        lambda: layers.BatchNormalization(trainable=False),
        lambda: layers.Normalization(mean=1.0, variance=4.0),
    ],
)
def test_layer_without_changing_state_trains_for_any_micro_batch(make_layer):
    weights = []
    for micro_batch in (4, 1):
        trainer = small_trainer(lambda: with_layer(make_layer()), micro_batch=micro_batch)
        before = [v.numpy() for v in trainer.model.non_trainable_variables]
        trainer.train_step(batch_of((1, 1, 1, 0), padding=9.0))
        for old, variable in zip(before, trainer.model.non_trainable_variables, strict=True):
            np.testing.assert_array_equal(old, variable.numpy())
        weights.append(trainer.model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_network_without_trainable_weights_is_rejected():
    def frozen():
        model = small((P, P, 9))
        model.trainable = False
        return model

    with pytest.raises(UserError, match="no trainable weights"):
        small_trainer(frozen)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_each_loss_is_learned(loss):
    trainer = small_trainer(lambda: small((P, P, 9)), loss, learning_rate=0.01)
    metrics = []
    for _ in range(30):
        trainer.train_step(batch_of((1, 1, 1, 1)))
        metrics.append(trainer.pop_train_metrics())
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["accuracy"] > 0.75  # cloud is where the first channel is positive


@pytest.mark.parametrize(
    ("policy", "micro_batch", "advice"),
    [
        ("float32", 4, "4 patches at once in float32. Set micro_batch: 2 or precision: bfloat16;"),
        ("mixed_float16", 2, "in float16. Set micro_batch: 1;"),
        ("mixed_bfloat16", 1, "1 patches at once in bfloat16. Set a smaller PATCH_SIZE;"),
    ],
)
def test_lack_of_memory_gives_advice(policy, micro_batch, advice):
    trainer = small_trainer(lambda: small((P, P, 9), policy), micro_batch=micro_batch)
    with pytest.raises(UserError, match=re.escape(advice)):
        with replace_tensorflow_errors(trainer):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")


def test_cloud_weight_weighs_cloud_pixels():
    elements = next(PatchBatches(range(7), scene, P, 4, 9, 4, seed=1).batches())
    losses = {}
    for weight in (1.0, 3.0):
        devices = open_devices(SingleRank(), seed=5)
        trainer = Trainer(
            devices.strategy, lambda: small((P, P, 9)), cross_entropy, 1e-3, 4, 4,
            cloud_weight=weight,
        )  # fmt: skip
        trainer.eval_step(tuple(tf.constant(e) for e in elements))
        losses[weight] = trainer.pop_eval_metrics()["loss"]
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
    elements[-1][0][:] = np.inf  # on the last replica only; Keras checks the first
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
        for i in range(4)
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


def test_micro_batches_pass_one_after_the_other():
    """Else TensorFlow keeps the memory of up to ten of them."""
    trainer, _, feed = trainer_and_feed(1)
    for step in (trainer.traced_train_step, trainer.eval_step):
        graph = step.get_concrete_function(next(feed)).graph
        loops = [op for op in graph.get_operations() if op.type in ("While", "StatelessWhile")]
        assert [op.get_attr("parallel_iterations") for op in loops] == [1]


def test_warm_up_traces_both_steps_and_changes_nothing():
    trainer, batches, feed = trainer_and_feed(2)
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    before = [variable.numpy() for variable in variables]
    assert trainer.warm_up(batches.replica_batch, batches.replica_batch) > 0
    for old, variable in zip(before, variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())
    assert trainer.train_totals == [0, 0, 0]
    trainer.eval_step(next(feed))
    assert trainer.pop_eval_metrics()["patches"] == 11
    trainer.train_step(next(feed))
    for step in (trainer.traced_train_step, trainer.eval_step):
        assert step.experimental_get_tracing_count() == 1
