"""Networks from the table or from files: build, read, check, copy and describe them."""

import contextlib
import json
import zipfile
from pathlib import Path

import keras

from harness.errors import UserError
from harness.networks.geometry import geometry
from harness.networks.names import network_file
from model import NETWORKS, keeps_float32

MAX_REASON = 300  # characters of Keras' message in ours
MAX_METADATA = 1 << 16  # bytes of metadata.json that are read


def build_network(network, input_shape, policy="float32"):
    """Build the network that is trained.

    Args:
        network: Name in NETWORKS, or the path of a .keras file: training starts from its weights.
        input_shape: (P, P, C) of a patch.
        policy: Keras dtype policy of all layers but those that compute in float32, see model.py.

    Returns:
        keras.Model from (batch, P, P, C) to probabilities (batch, P, P, 1).

    Raises:
        UserError: If there is no such network or file, or it does not take such patches.
    """
    if path := network_file(network, NETWORKS):
        model = check_model(read_model(path), path, input_shape)
        return cast_model(model, policy, input_shape[:2])
    try:
        return check_model(NETWORKS[network](input_shape, policy), network, input_shape)
    except ValueError:  # which layer fails on a wrong size, and how, differs between networks
        any_size = (None, None, input_shape[2])
        _check_size(network, lambda: NETWORKS[network](any_size), input_shape[:2])
        raise


def _check_size(source, build, size):
    """Check a size against the multiple of a network, as far as its layers tell it.

    Args:
        source: Name of the network, for the error message.
        build: Function that returns the network for images of any size, or raises ValueError.
        size: (rows, cols), None where they vary.

    Raises:
        UserError: If rows or columns do not divide by the multiple.
    """
    try:
        multiple = geometry(build()).multiple
    except ValueError:
        return
    if any(n and n % multiple for n in size):
        raise UserError(
            f"The network {source} takes images whose rows and columns divide by {multiple}, "
            f"found {size[0]} x {size[1]}. Choose another PATCH_SIZE."
        ) from None


def read_model(path):
    """Load a functional Keras model; a file that contains code is rejected.

    Args:
        path: Of a .keras or .h5 file.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is not a Keras model, or contains code.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"No model file {path}. Set model_file to the .keras file of a trained model."
        )
    try:
        return as_functional(keras.models.load_model(path, compile=False, safe_mode=True))
    except Exception as error:
        # Keras' message continues with how to run the code of a trusted model, which has no use
        # here.
        reason = str(error).strip().partition("\n")[0].partition(" If you trust")[0]
        if len(reason) > MAX_REASON:  # the whole configuration of the model
            reason = f"{reason[:MAX_REASON]}…"
        if (version := _keras_version(path)).startswith("2."):
            reason = (
                f"it was written by Keras {version}, and Keras {keras.__version__} reads only .h5 "
                "files of Keras 2. Save it there with model.save('model.h5')."
            )
        raise UserError(f"{path} cannot be read as a Keras model: {reason}") from error


def _keras_version(path):
    """The version of Keras that wrote a .keras file; empty if it does not say."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        with archive.open("metadata.json") as file:
            return str(json.loads(file.read(MAX_METADATA))["keras_version"])
    return ""


def as_functional(model):
    """A model of one input and one output, perhaps Sequential or of lists of one, as a function."""
    if len(model.inputs) == len(model.outputs) == 1:
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return model


def check_model(model, source, patch_shape, advice="Change PATCH_SIZE, N_CHANNELS or the model."):
    """Return a model if it maps patches to probabilities of cloud.

    Args:
        model: keras.Model.
        source: Its path or name, for the error message.
        patch_shape: (P, P, C), P is None where the model takes any.
        advice: What to do about a model for other patches.

    Raises:
        UserError: If it does not.
    """
    found = [tuple(each.shape[1:]) for each in model.inputs]
    if len(found) != 1 or not _matches(found[0], patch_shape):
        raise UserError(
            f"{source} takes {_shown(found)}, expected {_shown([patch_shape])}. {advice}"
        )
    found, wanted = [tuple(each.shape[1:]) for each in model.outputs], (*patch_shape[:2], 1)
    if len(found) != 1 or not _matches(found[0], wanted):
        raise UserError(
            f"{source} gives {_shown(found)} for {_shown([patch_shape])}; a model for CloudMask "
            f"gives the probability of cloud, {_shown([wanted])}."
        )
    return model


def _shown(shapes):
    """Shapes as text; rows and columns that vary are None in Keras."""
    texts = (str(shape).replace("(None, None,", "(rows, columns,") for shape in shapes)
    return " and ".join(texts)


def _matches(shape, wanted):
    """Whether a shape, in which None is any length, can be the wanted one."""
    return len(shape) == len(wanted) and all(
        n in (None, m) for n, m in zip(shape, wanted, strict=True)
    )


def load_model(path, patch_shape):
    """Read a model file and check that it maps patches to probabilities of cloud."""
    model = check_model(read_model(path), path, patch_shape)
    _check_size(path, lambda: model, patch_shape[:2])
    return model


def cast_model(model, policy, window=None):
    """Copy a model of one input to another Keras dtype policy and size of image.

    Args:
        model: Functional keras.Model.
        policy: Keras dtype policy of all layers but those that compute in float32, see model.py;
            None keeps the model's own.
        window: (rows, cols) of the copy's input, None where they vary; the model's own by default.

    Raises:
        UserError: If the model does not take images of that size.
    """

    def convert(layer):
        if not isinstance(layer, keras.Layer):
            return layer  # an operator between tensors takes their dtype
        values = layer.get_config()
        if policy and layer is not model.layers[-1] and not keeps_float32(layer):
            values["dtype"] = policy
        return type(layer).from_config(values)

    shape = (*(window or model.input_shape[1:3]), model.input_shape[3])
    inputs = keras.Input(shape, dtype="float32")
    try:
        copy = keras.models.clone_model(model, input_tensors=inputs, clone_function=convert)
        copy.set_weights(model.get_weights())
    except (ValueError, TypeError) as error:  # TypeError: a layer calculates with None
        _check_size(model.name, lambda: model, shape[:2])
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"The model cannot take images of {shape}: {reason}. Use inference_mode: patches, or a "
            "model that consists of convolutions."
        ) from error
    return copy


def with_views(model):
    """A network that gives the probability by each of its views, (batch, rows, cols, views).

    Those are the outputs of the layer `views`, if there is one; most networks have a single view,
    which is their output. The weights are shared.
    """
    views = [layer.output for layer in model.layers if layer.name == "views"]
    return keras.Model(model.inputs[0], views[0], name=model.name) if views else model


def save_model(model, path):
    """Save a model for images of all sizes that its layers allow, whatever it was trained on.

    Args:
        model: Functional keras.Model.
        path: Of a .keras or .h5 file.
    """
    with contextlib.suppress(UserError):  # a model of one size is saved as it is
        copy = cast_model(model, None, (None, None))
        if copy.output_shape[1:3] == (None, None):
            model = copy
    model.save(path)


def describe(network, model):
    """What results.json says of a network; no multiplications if a layer's are unknown.

    Args:
        network: Name in NETWORKS, or the path of a model file.
        model: keras.Model.
    """
    cost = None
    with contextlib.suppress(UserError):
        cost = geometry(model).multiplications_per_pixel
    return {
        "name": str(network) if network in NETWORKS else Path(network).stem,
        "layers": len(model.layers),
        "parameters": model.count_params(),
        "multiplications_per_pixel": cost,
    }
