import re
import sys

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf

from model import NETWORKS
from tools import export_model
from tools.export_model import write_onnx


def images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def probability(model, x, name="unet"):
    """What Keras predicts for images of any size, computed in another way than by the command."""
    network = NETWORKS[name]((*x.shape[1:3], 9))
    network.set_weights(model.get_weights())
    return network(x).numpy()


def export(source, kind, output):
    return export_model.main([str(source), "--format", kind, "-o", str(output)])


@pytest.fixture(scope="module")
def model_file(finished):
    return finished / "model.keras"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A network of one layer, which is quickly converted."""
    path = tmp_path_factory.mktemp("small") / "small.keras"
    layer = keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")
    keras.Sequential([keras.Input((16, 16, 9)), layer]).save(path)
    return path


@pytest.mark.parametrize("shape", [(1, 32, 32, 9), (3, 32, 32, 9), (2, 104, 136, 9)])
def test_onnx_agrees_with_keras_at_any_size(onnx_file, model_file, shape):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    found = session.run(["probability"], {"channels": images(*shape)})[0]
    wanted = probability(keras.models.load_model(model_file, compile=False), images(*shape))
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def onnx_file(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "new" / "cloudmask.onnx"
    assert export(finished, "onnx", path) == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path


def test_onnx_contains_axis_names_and_normalisation(onnx_file):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()
    assert (inputs.name, inputs.shape) == ("channels", ["batch", "rows", "cols", 9])
    assert (outputs.name, outputs.shape) == ("probability", ["batch", "rows", "cols", 1])
    assert "- 270.0) / 22.0" in session.get_modelmeta().custom_metadata_map["channels"]
    opset = {each.domain: each.version for each in onnx.load(onnx_file).opset_import}
    assert opset[""] == export_model.OPSET


def test_export_prints_difference_and_tolerance(small_file, tmp_path, capsys):
    assert export(small_file, "onnx", tmp_path / "m.onnx") == 0
    line = capsys.readouterr().err
    assert "tolerance 1e-04" in line
    assert 0 < float(re.search(r"from Keras (\S+),", line)[1]) < 1e-4


def test_savedmodel_agrees_with_keras_at_any_size(finished, model_file, tmp_path):
    assert export(finished, "savedmodel", tmp_path / "saved") == 0
    loaded = tf.saved_model.load(tmp_path / "saved")
    x = images(2, 104, 136, 9)
    found = loaded.signatures["serving_default"](channels=tf.constant(x))["probability"]
    wanted = probability(keras.models.load_model(model_file, compile=False), x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_trained_in_bfloat16_is_exported_in_float32(tmp_path, name):
    model = NETWORKS[name]((32, 32, 9), "mixed_bfloat16")
    model.save(tmp_path / "half.keras")
    assert export(tmp_path / "half.keras", "onnx", tmp_path / "m.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = images(1, 48, 32, 9)
    found = session.run(None, {"channels": x})[0]
    np.testing.assert_allclose(found, probability(model, x, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", export_model.FORMATS)
def test_model_of_fixed_size_keeps_it(tmp_path, kind):
    inputs = keras.Input((16, 8, 9))
    dense = keras.layers.Dense(16 * 8, "sigmoid", dtype="mixed_bfloat16")
    x = dense(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, keras.layers.Reshape((16, 8, 1))(x))
    model.save(tmp_path / "m.h5" if kind == "onnx" else tmp_path / "m.keras")
    source = next(tmp_path.iterdir())
    assert export(source, kind, tmp_path / "out") == 0
    run = export_model.FORMATS[kind][1](tmp_path / "out")
    kernel, bias = dense.get_weights()
    logits = images(2, 16, 8, 9).reshape(2, -1) @ kernel + bias
    wanted = 1 / (1 + np.exp(-logits.reshape(2, 16, 8, 1)))
    np.testing.assert_allclose(run(images(2, 16, 8, 9)), wanted, rtol=0, atol=1e-5)


def other_weights(network, path, about):
    """Write a network with one weight changed."""
    weights = network.get_weights()
    weights[0][1, 1, 0, 0] += 0.5
    other = keras.models.clone_model(network)
    other.set_weights(weights)
    return write_onnx(other, path, about)


@pytest.mark.parametrize("what", ["other weights", "nan", "other shape"])
def test_disagreement_leaves_no_file(small_file, tmp_path, monkeypatch, capsys, what):
    write, run, tolerance = export_model.FORMATS["onnx"]
    replaced = {
        "other weights": (other_weights, run),
        "nan": (write, lambda path: lambda x: np.full((*x.shape[:3], 1), np.nan, np.float32)),
        "other shape": (write, lambda path: lambda x: np.zeros((1, 1), np.float32)),
    }
    monkeypatch.setitem(export_model.FORMATS, "onnx", (*replaced[what], tolerance))
    assert export(small_file, "onnx", tmp_path / "m.onnx") == 1
    assert "tolerance 1e-04. No file was written." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["exists", "absent", "no model", "code", "vectors"])
def test_what_cannot_be_exported_ends_in_one_line(model_file, tmp_path, capsys, what):
    source, output = tmp_path / "m.keras", tmp_path / "m.onnx"
    if what == "exists":
        source = model_file
        output.write_text("mine")
    elif what == "no model":
        source.write_bytes(b"PK")
    elif what == "code":
        code = keras.layers.Lambda(lambda x: x[..., :1], output_shape=(8, 8, 1))
        keras.Sequential([keras.Input((8, 8, 9)), code]).save(source)
    elif what == "vectors":
        keras.Sequential([keras.Input((9,)), keras.layers.Dense(1)]).save(source)
    capsys.readouterr()
    assert export(source, "onnx", output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    assert output.read_text() == "mine" if what == "exists" else not output.exists()


@pytest.mark.parametrize("package", ["tf2onnx", "onnx", "onnxruntime"])
def test_missing_package_is_reported_with_the_install_command(
    small_file, tmp_path, monkeypatch, capsys, package
):
    monkeypatch.setitem(sys.modules, package, None)
    assert export(small_file, "onnx", tmp_path / "m.onnx") == 2
    error = capsys.readouterr().err
    assert package in error and "pip install -r requirements-tools.txt" in error
    assert not list(tmp_path.iterdir())
