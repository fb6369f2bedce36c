"""The MLPerf log: `:::MLLOG` events, written and named.

harness/mlperf_rules.yaml defines which events a log has and in which order; the tables below say
where results.json has their values.
"""

import logging
import sys

from mlperf_logging.mllog import constants as keys
from mlperf_logging.mllog.mllog import MLLogger

from harness import VERSION
from harness.errors import UserError

# Keys of ours and of MLCommons Science that the package has no constant for.
SUBMISSION_VERSION = "submission_version"
SUBMISSION_COMMIT = "submission_github_commit_version"
NETWORK = "network"
PARAMETERS = "parameters"
LOSS_FUNCTION = "loss_function"
NUMBER_OF_RANKS = "number_of_ranks"
NUMBER_OF_NODES = "number_of_nodes"
ACCELERATORS_PER_NODE = "accelerators_per_node"
INFERENCE_START = "inference_start"
INFERENCE_STOP = "inference_stop"
RESULT = "result"
RESUMED = "resumed"  # the run was interrupted before this event and continues after it

# Events and the places of their values in results.json. The run logs by these tables, and
# tools/submission.py checks logs by them.
SUBMISSION = {
    keys.SUBMISSION_BENCHMARK: "config.benchmark",
    keys.SUBMISSION_ORG: "config.organisation",
    keys.SUBMISSION_DIVISION: "config.division",
    keys.SUBMISSION_STATUS: "config.status",
    keys.SUBMISSION_PLATFORM: "config.platform",
    keys.SUBMISSION_POC_NAME: "config.name",
    keys.SUBMISSION_POC_EMAIL: "config.email",
    SUBMISSION_VERSION: "config.submission.version",
    SUBMISSION_COMMIT: "git_commit",
}
HYPERPARAMETERS = {
    keys.SEED: "config.seed",
    keys.GLOBAL_BATCH_SIZE: "config.batch_size",
    keys.TRAIN_SAMPLES: "training.patches_train",
    keys.EVAL_SAMPLES: "training.patches_test",
    keys.OPT_BASE_LR: "config.learning_rate",
    NETWORK: "network.name",
    PARAMETERS: "network.parameters",
    LOSS_FUNCTION: "training.loss_function",
    NUMBER_OF_RANKS: "devices.ranks",
    NUMBER_OF_NODES: "devices.nodes",
    ACCELERATORS_PER_NODE: "devices.accelerators_per_node",
}


def open_mlperf_log(path, root_dir, n_bytes=0):
    """Return an MLLogger that appends to a file, or writes nowhere without a path.

    Args:
        path: File, or None.
        root_dir: Folder of the source files that events name.
        n_bytes: Bytes of an earlier part of the run to keep; the file is cut there.

    Raises:
        UserError: If the file is shorter.
    """
    logger = logging.Logger("cloudmask.mlperf", logging.INFO)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() < n_bytes:
                raise UserError(
                    f"{path} has {file.tell()} bytes, the run had written {n_bytes} by its last "
                    "checkpoint. Restore the file or start a new run."
                )
            file.truncate(n_bytes)
    logger.addHandler(_WholeFile(path) if path else logging.NullHandler())
    return MLLogger(logger, root_dir=str(root_dir))


class _WholeFile(logging.FileHandler):
    """A log file that raises an OSError if an event cannot be written, as on a full disk."""

    def handleError(self, record):
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        raise


def value_at(results, place):
    """The value at a place like 'config.submission.version' in nested dictionaries; None if absent.

    Args:
        results: What results.json holds, or the parts of it that are needed.
        place: Keys, joined by dots.
    """
    for key in place.split("."):
        results = results.get(key) if isinstance(results, dict) else None
    return results


def log_submission(mllog, config, commit):
    """Log who submits what; to be followed by `cache_clear` and `init_start`."""
    results = {"config": config.model_dump(by_alias=True, mode="json"), "git_commit": commit}
    for key, place in SUBMISSION.items():
        metadata = {"cloudmask_version": VERSION} if key == SUBMISSION_COMMIT else None
        mllog.event(key, value_at(results, place), metadata)


def log_hyperparameters(config, devices, mllog, n_train, n_eval, network):
    """Log what is trained and how.

    Args:
        config: Config.
        devices: Devices; their numbers are those found.
        mllog: MLLogger.
        n_train: Patches to train on; 0 in inference alone.
        n_eval: Patches to validate on; scenes in inference alone.
        network: {"name": ..., "parameters": count, "layers": count}.
    """
    results = {
        "config": config.model_dump(by_alias=True, mode="json"),
        "devices": {
            "ranks": devices.n_ranks,
            "nodes": devices.n_nodes,
            "accelerators_per_node": devices.accelerators_per_node,
        },
        "network": network,
        "training": {
            "patches_train": n_train,
            "patches_test": n_eval,
            "loss_function": config.loss if n_train else None,
        },
    }
    mllog.event(keys.OPT_NAME, keys.ADAM)
    for key, place in HYPERPARAMETERS.items():
        if key != LOSS_FUNCTION or n_train:  # inference alone has none
            mllog.event(key, value_at(results, place))
