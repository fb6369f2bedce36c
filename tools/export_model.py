r"""Turn a trained model into a file that runs without Keras: ONNX or TensorFlow's SavedModel.

    python tools/export_model.py RUN_DIR --format onnx -o cloudmask.onnx
    python tools/export_model.py model.keras --format savedmodel -o cloudmask

The exported network computes in float32, whatever precision it was trained in. It takes `channels`,
float32 (batch, rows, cols, 9), normalised: reflectance of S1 to S6 - 0.5, then (brightness
temperature of S7 to S9 [K] - 270) / 22. It gives `probability`, (batch, rows, cols, 1), of cloud.
Rows and columns may be any multiples of 8, unless the model has layers that want one size: then it
keeps that. The normalisation goes along, in ONNX's metadata or cloudmask.json.

Before a file gets its name, its outputs are compared with those of Keras on random images of
several sizes; the largest difference is printed. Above the tolerance the exit status is 1 and there
is no file. What exists is never replaced.

Converters to ONNX that were tried, with TensorFlow 2.21, Keras 3.15.1, NumPy 2.4 and onnx 1.23:
- tf2onnx 1.17, `convert.from_function`: works, up to opset 18 and with any size of image. Taken.
- tf2onnx 1.17, `convert.from_keras`: works, with the same graph, and leaves the output unnamed.
- Keras' own `model.export(format="onnx")`: works, with the same graph, as it calls tf2onnx too. It
  wants a model that was called before, and asks NumPy for `object`, which NumPy warns of.
- keras2onnx 1.7, archived: fails on `onnx.mapping`, which onnx no longer has.
"""

import argparse
import contextlib
import functools
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # GPUs round to TF32, and outputs are to be compared

import harness.quiet_tensorflow  # noqa: F401
from _command import exit_status

# isort: split
import keras
import numpy as np
import tensorflow as tf

from data_loader import BT_OFFSET, BT_SCALE, REFLECTANCE_OFFSET
from harness.config import load_config
from harness.console import log_to_screen
from harness.errors import Failure, UserError
from harness.files import file_sha256, write_json
from harness.networks.model_files import cast_model, read_model

OPSET = 18  # of ONNX; the newest that tf2onnx writes, read by onnxruntime since 1.14
TOLERANCE = {"onnx": 1e-4, "savedmodel": 1e-5}  # of a probability
SIZES = ((64, 64), (64, 120), (136, 72))  # of the images compared; multiples of 8
IMAGES = 4  # of each size

log = logging.getLogger("export_model")


class Disagreement(Failure):
    """The exported model computes something else than Keras does; the message is complete."""


def find_model(path):
    """The model file of a run's folder; any other path is one itself."""
    return path / load_config(path / "config.yaml").model_file if path.is_dir() else path


def network_in_float32(model):
    """Copy a model to float32 and to images of any size, where its layers allow that.

    Args:
        model: keras.Model of one input, (batch, rows, cols, channels).

    Raises:
        UserError: If it is another one.
    """
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4:
        raise UserError(
            "The model should have one input, (batch, rows, cols, channels), found "
            f"{[tuple(each.shape) for each in model.inputs]}. Take one that CloudMask trained."
        )
    with contextlib.suppress(UserError):
        return cast_model(model, "float32", (None, None))
    rows, cols = model.input_shape[1:3]
    log.info("The model takes images of %s x %s pixels alone, and so will the file.", rows, cols)
    return cast_model(model, "float32")


def serving(network):
    """The network as a function of TensorFlow from `channels` to {'probability': ...}."""
    channels = tf.TensorSpec(network.input_shape, tf.float32, name="channels")
    return tf.function(
        lambda channels: {"probability": network(channels, training=False)},
        input_signature=[channels],
    )


def write_onnx(network, path, about):
    """Write a network as ONNX.

    Args:
        network: keras.Model in float32.
        path: New file.
        about: Texts that go along.

    Returns:
        What was written, for people.
    """
    import onnx
    import tf2onnx

    function = serving(network)
    signature = function.input_signature
    model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    for value in (*model.graph.input, *model.graph.output):
        sizes = value.type.tensor_type.shape.dim
        for size, name in zip(sizes, ("batch", "rows", "cols"), strict=False):
            if size.dim_param:  # one that varies
                size.dim_param = name
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return f"ONNX, opset {OPSET}"


def run_onnx(path):
    """A function that runs an ONNX file on images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probability"], {"channels": images})[0]


def write_savedmodel(network, path, about):
    """Write a network as a SavedModel, a folder; `about` goes along as cloudmask.json."""
    archive, function = keras.export.ExportArchive(), serving(network)
    archive.track(network)
    archive.add_endpoint("serve", function, input_signature=function.input_signature)
    archive.write_out(path, verbose=False)
    write_json(path / "cloudmask.json", about)
    return "SavedModel, signature serving_default"


def run_savedmodel(path):
    """A function that runs a SavedModel on images."""
    loaded = tf.saved_model.load(path)  # which owns the variables
    function = loaded.signatures["serving_default"]
    return lambda images, loaded=loaded: function(channels=images)["probability"].numpy()


FORMATS = {"onnx": (write_onnx, run_onnx), "savedmodel": (write_savedmodel, run_savedmodel)}


def largest_difference(network, run):
    """Compare a network with its exported self on random images.

    Each image has a level of its own in each channel: of noise alone a trained network makes
    nothing but 0 or 1.

    Args:
        network: keras.Model.
        run: Function from float32 (n, rows, cols, channels) to (n, rows, cols, 1).

    Returns:
        The largest difference of probabilities, NaN if there is any, and the lowest and highest
        probability by Keras.
    """
    *size, n_channels = network.input_shape[1:]
    random = np.random.default_rng(0)
    differences, values = [], []
    for rows, cols in SIZES if None in size else [size]:
        levels = random.normal(size=(IMAGES, 1, 1, n_channels))
        noise = random.normal(scale=0.3, size=(IMAGES, rows, cols, n_channels))
        images = (levels + noise).astype(np.float32)
        wanted, found = network(images, training=False).numpy(), run(images)
        if wanted.shape != found.shape:
            raise Disagreement(f"Keras gives {wanted.shape} for {images.shape}, it {found.shape}.")
        differences.append(np.abs(wanted - found).max())
        values += [wanted.min(), wanted.max()]
    return float(np.max(differences)), float(min(values)), float(max(values))


def export(source, kind, output):
    """Export a model, and see that it computes what it should.

    Args:
        source: A run's folder, or a model file.
        kind: Of FORMATS.
        output: New path.

    Raises:
        UserError: If the output exists, or the source is no model for images.
        Disagreement: If the exported model is not the same; nothing is left of it then.
    """
    if output.exists():
        raise UserError(f"{output} exists. Remove it or choose another name with -o.")
    model_file = find_model(source)
    network = network_in_float32(read_model(model_file))
    about = {
        "model_sha256": file_sha256(model_file),
        "channels": f"S1 to S6: reflectance - {REFLECTANCE_OFFSET}; "
        f"S7 to S9: (brightness temperature [K] - {BT_OFFSET}) / {BT_SCALE}",
        "probability": "of cloud; the mask is cloud where it is above 0.5",
    }
    write, run = FORMATS[kind]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        temporary = Path(folder) / output.name
        written = write(network, temporary, about)
        difference, lowest, highest = largest_difference(network, run(temporary))
        verdict = (
            f"{written}: differs from Keras in float32 by {difference:.1e} at most, tolerance "
            f"{TOLERANCE[kind]:.0e}, probabilities {lowest:.3f} to {highest:.3f}"
        )
        if not difference <= TOLERANCE[kind]:  # NaN is no agreement
            raise Disagreement(f"{verdict}. Nothing was written.")
        temporary.rename(output)
    log.info("%s. It is %s", verdict, output)


# --- the program ----------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="RUN_DIR_or_MODEL", help="a run's folder, a .keras or .h5 file")
    add("--format", choices=FORMATS, required=True)
    add("-o", "--output", type=Path, required=True, help="ONNX file, or folder of the SavedModel")
    add("--verbose", action="store_true", help="show tracebacks and TensorFlow's messages")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the program and return its exit status: 1 where the exported model is not the same."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    logging.getLogger("tf2onnx").setLevel(logging.INFO if arguments.verbose else logging.ERROR)
    work = functools.partial(export, arguments.model, arguments.format, arguments.output)
    return exit_status(work, arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
