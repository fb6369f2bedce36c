"""ONNX Runtime and OpenVINO with the file that export_model.py writes, next to our inference.

Both compute on the CPU, with as many threads as ours, and know the size of a scene beforehand, as
ours does: with sizes that vary they are slower.
"""

import contextlib
import logging
import sys

import numpy as np

from tools.export_model import export
from tools.lib.bench import measurements, program
from tools.lib.bench.rows import make_row, timed

# Of the largest difference of a probability from ours. Those of all networks, untrained, were up to
# 7e-6, 0.19 and 0.7: OpenVINO also rounds the spectral features, which ours keep in float32.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.4, "int8": 1.0}
OURS = {"int8": "bfloat16"}  # what is compared with a precision that we do not have

log = logging.getLogger("bench")


def onnxruntime_network(file, precision, windows):
    """ONNX Runtime, which has no bfloat16 for CPUs: see openvino_network."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = measurements.n_cores()
    for name, length in zip(("batch", "rows", "cols"), (1, *windows.shape[1:3]), strict=True):
        options.add_free_dimension_override_by_name(name, length)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda window: session.run(None, {"channels": window})[0]


def openvino_network(file, precision, windows):
    """OpenVINO, int8 by NNCF with its defaults.

    Args:
        file: ONNX file.
        precision: 'float32', 'bfloat16' or 'int8'.
        windows: float32 (n, H, W, C), the images, which also calibrate int8.

    Returns:
        Function from a window (1, H, W, C) to probabilities (1, H, W, 1).
    """
    import openvino

    core = openvino.Core()
    network = core.read_model(file)
    network.reshape([1, *windows.shape[1:]])
    if precision == "int8":
        import nncf

        nncf.set_log_level(logging.ERROR)
        with contextlib.redirect_stdout(sys.stderr):  # a bar of progress
            network = nncf.quantize(network, nncf.Dataset([window[None] for window in windows]))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": measurements.n_cores(),
        "INFERENCE_PRECISION_HINT": "f32" if precision == "float32" else "bf16",
    }
    compiled = core.compile_model(network, "CPU", settings)
    return lambda window: compiled(window)[0]


PEERS = {  # what makes it, and its precisions
    "onnx": (onnxruntime_network, ("float32",)),
    "openvino": (openvino_network, ("float32", "bfloat16", "int8")),
}


def export_network(bench):
    """The network, and the ONNX file that export_model.py makes of it."""
    network = program.build_network_without_zeros(bench.config)
    network.save(bench.folder / "exported.keras")
    file = bench.folder / "exported.onnx"
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    export(bench.folder / "exported.keras", "onnx", file)
    return network, file


def check_same(name, precision, theirs, ours):
    """Raise RuntimeError if probabilities differ more than their precision explains."""
    difference = np.abs(theirs - ours).max()
    log.info("    %s, %s: largest difference from ours %.1e", name, precision, difference)
    if not difference <= TOLERANCES[precision]:
        raise RuntimeError(
            f"The probabilities of {name} in {precision} should differ from ours by at most "
            f"{TOLERANCES[precision]}, found {difference}: the networks do not do the same work."
        )


def measure_against_exported(bench):
    """ONNX Runtime and OpenVINO with the exported network: a scene in one pass, without reading."""
    wanted = [
        (name, precision)
        for name in bench.against
        for precision in PEERS.get(name, ((), ()))[1]
        if bench.wants(f"{name}/infer_scene/{precision}")
    ]
    network, file = export_network(bench)
    functions, predictors = {}, {}
    for name, precision in wanted:
        own = OURS.get(precision, precision)
        if own not in predictors:
            changed = {"inference_mode": "scene", "precision": own}
            config = bench.config.model_copy(update=changed)
            predictors[own] = program.build_predictor(config, bench.devices, network)
        ours = predictors[own]
        scene, windows = measurements.random_scene(bench, ours.grid)
        functions["ours", own] = lambda ours=ours, scene=scene: ours(scene)[1]
        run = PEERS[name][0](file, precision, windows)

        def predict(run=run, windows=windows):
            return np.concatenate([run(window[None]) for window in windows])[..., 0]

        check_same(name, precision, ours.grid.stitch(predict()), ours(scene)[0])
        functions[name, precision] = timed(predict)
    measured = bench.alternate(functions, 60 if bench.quick else 240, list(predictors))
    gflop = measurements.inference_gflop(bench.config)["scene"]
    for name, precision in wanted:
        own = OURS.get(precision, precision)
        values = measured["ours", own]
        share = measurements.limit_share(measured, own, gflop, values, "s/scene")
        yield make_row(
            f"{name}/infer_scene/{precision}", "s/scene", values, f"{name} {precision}",
            measured[name, precision], share,
        )  # fmt: skip
