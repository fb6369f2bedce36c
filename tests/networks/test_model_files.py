import json
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

from harness.errors import UserError
from harness.networks.geometry import geometry
from harness.networks.model_files import (
    build_network,
    cast_model,
    check_model,
    describe,
    read_model,
    save_model,
)
from model import NETWORKS, unet

SHAPE = (32, 32, 9)


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def assert_equal_weights(first, second):
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
    """A small trained network and its file."""
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    model = keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x))
    model.save(tmp_path / "small.keras")
    return model, tmp_path / "small.keras"


@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_the_table_is_that_of_its_function(name):
    keras.utils.set_random_seed(3)
    ours = build_network(name, (64, 64, 9))
    keras.utils.set_random_seed(3)
    assert_equal_weights(ours, NETWORKS[name]((64, 64, 9)))
    half = build_network(name, (64, 64, 9), "mixed_bfloat16")
    assert half.layers[-2].compute_dtype == "bfloat16"
    assert describe(name, ours) == {
        "name": name,
        "layers": len(ours.layers),
        "parameters": ours.count_params(),
        "multiplications_per_pixel": geometry(ours).multiplications_per_pixel,
    }


def test_network_from_a_file_starts_from_its_weights(saved):
    model, path = saved
    ours = build_network(str(path), SHAPE, "mixed_bfloat16")
    assert_equal_weights(ours, model)
    assert [layer.compute_dtype for layer in ours.layers[1:]] == ["bfloat16", "float32"]
    assert len(ours.trainable_variables) == 4
    # 3 * 3 * 9 * 4 + 4 weights, then 4 + 1
    cost = {"parameters": 333, "multiplications_per_pixel": 3 * 3 * 9 * 4 + 4}
    assert describe(path, ours) == {"name": "small", "layers": 3, **cost}


def test_multiplications_of_unknown_layers_are_not_described():
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, layers.Conv2D(1, 1)(layers.GroupNormalization(1)(inputs)))
    assert describe("mine.keras", model) == {
        "name": "mine", "layers": 3, "parameters": 28, "multiplications_per_pixel": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("unett", r"Unknown network 'unett'.* unet.*\.keras"),
        ("model.h5", r"Unknown network 'model.h5'.*\.keras"),
        ("absent.keras", "No model file absent.keras. Set network"),
    ],
)
def test_unknown_network_gives_what_is_known(network, reason):
    with pytest.raises((UserError, FileNotFoundError), match=reason):
        build_network(network, SHAPE)


def test_patch_size_that_the_network_cannot_halve_is_rejected():
    with pytest.raises(UserError, match="unet .* divide by 8, found 36 x 32.*PATCH_SIZE"):
        build_network("unet", (36, 32, 9))


def test_file_for_other_patches_is_rejected(saved):
    model, path = saved
    with pytest.raises(UserError, match=r"small.keras takes \(32, 32, 9\).*\(32, 32, 5\)"):
        build_network(str(path), (32, 32, 5))
    with pytest.raises(UserError, match=r"takes .*\(40, 40, 9\)"):
        check_model(model, path, (40, 40, 9))
    many = keras.Model(model.input, layers.Conv2D(3, 1)(model.output))
    with pytest.raises(UserError, match=r"gives \(32, 32, 3\) .*probability of cloud, \(32, 32, 1"):
        check_model(many, path, SHAPE)
    assert check_model(unet((None, None, 9)), path, SHAPE)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_sequential_model_is_read_as_a_functional_one(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    model = keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(1, 3, padding="same", activation="sigmoid")]
    )
    model.save(path)
    other = cast_model(read_model(path), "float32", (48, 40))
    x = images(1, 48, 40, 9)
    np.testing.assert_allclose(other(x), model.layers[0](x), atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", bytes(5000)])
def test_damaged_file_is_rejected_in_one_line(tmp_path, content):
    path = tmp_path / "model.keras"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a Keras model") as error:
        read_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("2.15.0", "written by Keras 2.15.0, .*model.save"), ("3.0.0", "a.*…$")],
)
def test_reason_of_keras_is_short(tmp_path, monkeypatch, version, reason):
    """Keras 3 answers a file of Keras 2.15 with the whole configuration of the model."""

    def fail(*arguments, **options):
        raise TypeError("a" * 21_166)

    monkeypatch.setattr(keras.models, "load_model", fail)
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
    with pytest.raises(UserError, match=f"cannot be read as a Keras model: .*{reason}") as error:
        read_model(path)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_cast_model_keeps_weights_and_ends_in_float32():
    model = unet(SHAPE)
    half = cast_model(model, "mixed_bfloat16")
    assert {layer.compute_dtype for layer in half.layers[1:-1]} == {"bfloat16"}
    assert half.layers[-1].compute_dtype == "float32"
    assert_equal_weights(half, model)


def test_operators_between_tensors_are_cast_too():
    keras.utils.set_random_seed(0)  # the rounding depends on the weights
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(1, 3, padding="same")(inputs)
    model = keras.Model(inputs, layers.Conv2D(1, 1)(x * 2.0 + x))
    half = cast_model(model, "mixed_bfloat16", (40, 48))
    x = images(1, 40, 48, 9)
    full = cast_model(model, "float32", (40, 48))
    np.testing.assert_allclose(half(x), full(x), atol=0.1)


def test_model_of_one_size_is_rejected_with_a_reason():
    inputs = keras.Input(SHAPE)
    x = layers.Dense(32 * 32)(layers.Flatten()(inputs))
    model = keras.Model(inputs, layers.Reshape((32, 32, 1))(x))
    with pytest.raises(UserError, match=r"\(48, 48, 9\).*inference_mode: patches"):
        cast_model(model, "float32", (48, 48))


# Loads models in plain Keras, and predicts an image and a larger one with each.
PLAIN_KERAS = """
import sys
import keras, numpy as np
images = np.load("images.npy")
for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    answers = (model(images[:, :rows, :cols]) for rows, cols in ((32, 32), (64, 96)))
    np.savez(path + ".npz", *answers)
assert not {"harness", "model", "cloudmask"} & set(sys.modules)
"""
POLICIES = ["float32", "mixed_bfloat16"]


@pytest.fixture(scope="module")
def saved_networks(tmp_path_factory):
    """All networks, their files and what these answer in plain Keras, by name and policy."""
    folder, built = tmp_path_factory.mktemp("networks"), {}
    np.save(folder / "images.npy", images(1, 64, 96, 9))
    for name in NETWORKS:
        for policy in POLICIES:
            path = folder / f"{name}-{policy}.keras"
            built[name, policy] = build_network(name, SHAPE, policy), path
            save_model(*built[name, policy])
    paths = [path for _, path in built.values()]
    subprocess.run([sys.executable, "-c", PLAIN_KERAS, *paths], check=True, cwd=folder)
    return {key: (*pair, np.load(f"{pair[1]}.npz")) for key, pair in built.items()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("policy", POLICIES)
def test_saved_model_takes_all_sizes_in_plain_keras(saved_networks, name, policy):
    model, path, found = saved_networks[name, policy]
    inputs = images(1, 64, 96, 9)
    large = NETWORKS[name]((64, 96, 9), policy)
    large.set_weights(model.get_weights())
    np.testing.assert_allclose(found["arr_0"], model(inputs[:, :32, :32]), atol=1e-5)
    np.testing.assert_allclose(found["arr_1"], large(inputs), atol=1e-5)
    again = build_network(str(path), SHAPE, policy)  # training starts from the file
    assert again.input_shape == model.input_shape
    assert describe(name, again) == describe(name, read_model(path)) == describe(name, model)
    assert_equal_weights(again, model)


@pytest.mark.parametrize(
    "layer",
    [
        layers.PReLU(),  # a weight for each pixel
        layers.Reshape(SHAPE),  # its output has one size, whatever the input
    ],
)
def test_model_of_one_size_is_saved_as_it_is(tmp_path, layer):
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, layers.Conv2D(1, 1)(layer(inputs)))
    save_model(model, tmp_path / "model.keras")
    saved = read_model(tmp_path / "model.keras")
    assert saved.input_shape == (None, *SHAPE)
    np.testing.assert_array_equal(saved(images(1, *SHAPE)), model(images(1, *SHAPE)))


def test_size_that_a_saved_model_cannot_halve_is_rejected(tmp_path):
    save_model(unet(SHAPE), tmp_path / "model.keras")
    model = read_model(tmp_path / "model.keras")
    reason = "cloudmask_unet .* divide by 8, found 36 x 32.*PATCH_SIZE"
    with pytest.raises(UserError, match=reason):
        build_network(str(tmp_path / "model.keras"), (36, 32, 9))
    with pytest.raises(UserError, match=reason):
        cast_model(model, "float32", (36, 32))
