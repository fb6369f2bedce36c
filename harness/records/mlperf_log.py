"""The MLPerf log: `:::MLLOG` events in the order that MLPerf HPC 3.0.0 asks for."""

import logging
import sys

from mlperf_logging.mllog import constants as keys
from mlperf_logging.mllog.mllog import MLLogger

from harness.errors import UserError

# Keys of ours and of MLCommons Science that the package has no constant for.
NUMBER_OF_RANKS = "number_of_ranks"
NUMBER_OF_NODES = "number_of_nodes"
ACCELERATORS_PER_NODE = "accelerators_per_node"
SUBMISSION_VERSION = "submission_version"
SUBMISSION_COMMIT = "submission_github_commit_version"
INFERENCE_START = "inference_start"
INFERENCE_STOP = "inference_stop"
RESULT = "result"
RESUMED = "resumed"  # the run was interrupted here, and goes on


def open_mlperf_log(path, root_dir, n_bytes=0):
    """Return an MLLogger that writes to a file, after its first bytes; to nowhere without a path.

    Args:
        path: File, or None.
        root_dir: Folder of the source files that events name.
        n_bytes: So many bytes of an earlier part of the run are kept.

    Raises:
        UserError: If there are fewer.
    """
    logger = logging.Logger("cloudmask.mlperf", logging.INFO)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() < n_bytes:
                raise UserError(
                    f"{path} has {file.tell()} bytes, the run had written {n_bytes} by its last "
                    "checkpoint. Put the file back, or start a new run."
                )
            file.truncate(n_bytes)
    logger.addHandler(_WholeFile(path) if path else logging.NullHandler())
    return MLLogger(logger, root_dir=str(root_dir))


class _WholeFile(logging.FileHandler):
    """A log that has every event: one that cannot be written is an error, to a full disk say."""

    def handleError(self, record):
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        raise


def log_submission(mllog, config, commit):
    """Log who submits what; to be followed by `cache_clear` and `init_start`."""
    mllog.event(keys.SUBMISSION_BENCHMARK, config.benchmark)
    mllog.event(keys.SUBMISSION_ORG, config.organisation)
    mllog.event(keys.SUBMISSION_DIVISION, config.division)
    mllog.event(keys.SUBMISSION_STATUS, config.status)
    mllog.event(keys.SUBMISSION_PLATFORM, config.platform)
    mllog.event(keys.SUBMISSION_POC_NAME, config.name)
    mllog.event(keys.SUBMISSION_POC_EMAIL, config.email)
    mllog.event(SUBMISSION_VERSION, config.submission.version)
    mllog.event(SUBMISSION_COMMIT, commit)


def log_hyperparameters(config, devices, mllog, n_train, n_eval):
    """Log what is trained how; numbers of devices are those found."""
    for key, value in {
        keys.SEED: config.seed,
        keys.GLOBAL_BATCH_SIZE: config.batch_size,
        keys.TRAIN_SAMPLES: n_train,
        keys.EVAL_SAMPLES: n_eval,
        keys.OPT_NAME: keys.ADAM,
        keys.OPT_BASE_LR: config.learning_rate,
        NUMBER_OF_RANKS: devices.n_ranks,
        NUMBER_OF_NODES: devices.n_nodes,
        ACCELERATORS_PER_NODE: devices.accelerators_per_node,
    }.items():
        mllog.event(key, value)
