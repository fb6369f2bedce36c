r"""Export a trained model as ONNX or as a TensorFlow SavedModel, which run without Keras.

    python tools/export_model.py RUN_DIR --format onnx -o cloudmask.onnx
    python tools/export_model.py model.keras --format savedmodel -o cloudmask

The exported network computes in float32, whatever precision it was trained in. Its input `channels`
is float32 (batch, rows, cols, 9), normalised: reflectance of S1 to S6 - 0.5, then (brightness
temperature of S7 to S9 [K] - 270) / 22. Its output `probability`, (batch, rows, cols, 1), is that
of cloud. Rows and columns may be any multiples of what the network needs, 8 for the U-Net, unless
the model has layers of a fixed size.
The metadata of the ONNX file (opset 18), or cloudmask.json beside the SavedModel's signature
`serving_default`, contain the normalisation.

The exported network is compared with Keras on random images of several sizes, and the largest
difference is printed. Above the tolerance the exit status is 1 and no file is written. An existing
file is never replaced.
"""

import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import numpy as np

from harness.config import load_config
from harness.console import log_to_screen
from harness.errors import Failure, UserError
from harness.files import file_sha256, write_json
from tools.lib.options import command_parser

OPSET = 18  # of ONNX: the newest that tf2onnx writes; onnxruntime reads it since 1.14
SIZES = ((64, 64), (64, 192), (128, 64))  # of the images compared; all our networks take them
IMAGES = 4  # of each size

log = logging.getLogger("export_model")


def read_network(path):
    """Read a model in float32 and, if its layers allow that, for images of any size.

    Raises:
        UserError: If the file cannot be read or holds another kind of model.
    """
    from harness.networks.model_files import cast_model, read_model

    model = read_model(path)
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4:
        raise UserError(
            "The model should have one input, (batch, rows, cols, channels), found "
            f"{[tuple(each.shape) for each in model.inputs]}. Use a model that CloudMask trained."
        )
    with contextlib.suppress(UserError):
        return cast_model(model, "float32", (None, None))
    log.info("The model accepts only images of %s x %s pixels.", *model.input_shape[1:3])
    return cast_model(model, "float32")


def serving(network):
    """The network as a tf.function from `channels` to {'probability': ...}."""
    import tensorflow as tf

    channels = tf.TensorSpec(network.input_shape, tf.float32, name="channels")
    return tf.function(
        lambda channels: {"probability": network(channels, training=False)},
        input_signature=[channels],
    )


def write_onnx(network, path, about):
    """Write a network as ONNX, with the texts `about` as metadata."""
    import onnx
    import tf2onnx

    function = serving(network)
    # Keras' model.export(format="onnx") calls tf2onnx too, but does not name the output.
    signature = function.input_signature
    model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        for dimension, name in zip(dimensions, ("batch", "rows", "cols"), strict=False):
            if dimension.dim_param:  # not of a fixed size
                dimension.dim_param = name
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def run_onnx(path):
    """A function that runs an ONNX file on images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probability"], {"channels": images})[0]


def write_savedmodel(network, path, about):
    """Write a network as a SavedModel, a folder, with the texts `about` in cloudmask.json."""
    import keras

    archive, function = keras.export.ExportArchive(), serving(network)
    archive.track(network)
    archive.add_endpoint("serve", function, input_signature=function.input_signature)
    archive.write_out(path, verbose=False)
    write_json(path / "cloudmask.json", about)


def run_savedmodel(path):
    """A function that runs a SavedModel on images."""
    import tensorflow as tf

    loaded = tf.saved_model.load(path)  # owns the variables
    function = loaded.signatures["serving_default"]
    return lambda images, loaded=loaded: function(channels=images)["probability"].numpy()


FORMATS = {  # how to write and run a file, and the tolerance of a probability
    "onnx": (write_onnx, run_onnx, 1e-4),
    "savedmodel": (write_savedmodel, run_savedmodel, 1e-5),
}


def largest_difference(network, run):
    """Compare a network with its exported form on random images.

    Args:
        network: keras.Model.
        run: Function from float32 (n, rows, cols, channels) to (n, rows, cols, 1).

    Returns:
        The largest difference of probabilities, NaN if one is NaN or the shapes differ.
    """
    *size, n_channels = network.input_shape[1:]
    random = np.random.default_rng(0)
    differences = []
    for rows, cols in SIZES if None in size else [size]:
        # Each channel has its own level: a trained network answers pure noise with 0 or 1.
        levels = random.normal(size=(IMAGES, 1, 1, n_channels))
        noise = random.normal(scale=0.3, size=(IMAGES, rows, cols, n_channels))
        images = (levels + noise).astype(np.float32)
        expected, found = network(images, training=False).numpy(), run(images)
        same_shape = expected.shape == found.shape
        differences.append(np.abs(expected - found).max() if same_shape else np.nan)
    return float(np.max(differences))


def export(source, kind, output):
    """Export a run's model or a model file in a format of FORMATS, and compare it with Keras.

    Raises:
        UserError: If the output exists, or the source is not a model for images.
        Failure: If the exported model differs from Keras; no file is written then.
    """
    if output.exists():
        raise UserError(f"{output} exists. Remove it or choose another path with -o.")
    if source.is_dir():
        source /= load_config(source / "config.yaml").model_file
    if not source.is_file():
        raise FileNotFoundError(f"No model file {source}. Give a run's folder or a .keras file.")

    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # GPUs round to TF32, which would be a difference
    import harness.quiet_tensorflow  # noqa: F401  (before any other import of TensorFlow)
    from data_loader import BT_OFFSET, BT_SCALE, REFLECTANCE_OFFSET
    from harness.inference.scores import THRESHOLD

    network = read_network(source)
    about = {
        "model_sha256": file_sha256(source),
        "channels": f"S1 to S6: reflectance - {REFLECTANCE_OFFSET}; "
        f"S7 to S9: (brightness temperature [K] - {BT_OFFSET}) / {BT_SCALE}",
        "probability": f"of cloud; the mask is cloud where it is above {THRESHOLD}",
    }
    write, run, tolerance = FORMATS[kind]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        temporary = Path(folder) / output.name
        write(network, temporary, about)
        difference = largest_difference(network, run(temporary))
        summary = f"largest difference from Keras {difference:.1e}, tolerance {tolerance:.0e}"
        if not difference <= tolerance:  # also if it is NaN
            raise Failure(f"The exported model differs: {summary}. No file was written.")
        temporary.rename(output)
    log.info("Wrote %s: %s.", output, summary)


def main(argv=None):
    """Run the command and return its exit status: 1 if the exported model differs from Keras."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("model", type=Path, metavar="RUN_DIR_or_MODEL", help="a run's folder, a .keras or .h5 file")
    add("--format", choices=FORMATS, required=True)
    add("-o", "--output", type=Path, required=True, help="ONNX file, or folder of the SavedModel")
    arguments = parser.parse_args(argv)
    log_to_screen(arguments.verbose)
    logging.getLogger("tf2onnx").setLevel(logging.INFO if arguments.verbose else logging.ERROR)
    return exit_status(
        lambda: export(arguments.model, arguments.format, arguments.output), arguments.verbose
    )


if __name__ == "__main__":
    sys.exit(main())
