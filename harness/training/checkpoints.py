"""Checkpoints: what a run needs to go on training as if it had never stopped."""

import errno
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tensorflow as tf

from harness.files import file_sha256, open_regular, sync

KEPT = 2
STATE, DIGESTS, BEST_MODEL = "state.json", "SHA256SUMS", "best"

log = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """How far a training has come, besides the values of weights and optimizer.

    The order of patches follows from the seed and the numbers of epoch and step; whether training
    ends, from the history.

    Attributes:
        history: A dictionary for each completed epoch.
        step: Steps of training taken in the epoch after these.
        totals: Sums of these steps, see Trainer; None while the trainer has them.
        seconds: Time that these steps took [s].
        input_seconds: Time that these steps waited for their batches [s].
        mlperf_bytes: Length of the MLPerf log at this point.
    """

    history: list = field(default_factory=list)
    step: int = 0
    totals: list = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0
    input_seconds: float = 0.0
    mlperf_bytes: int = 0

    @property
    def epoch(self):
        """Number of the epoch that is under way, or comes next; the first is 1."""
        return len(self.history) + 1

    @property
    def best(self):
        """The row of the epoch with the lowest validation loss, the first of equals; or None."""
        return min(self.history, key=lambda row: row["val_loss"], default=None)

    def end_epoch(self, row, mlperf_bytes):
        """Take the row of the epoch that was under way, which has ended."""
        self.history.append(row)
        self.step, self.totals, self.seconds, self.input_seconds = 0, [0.0, 0.0, 0.0], 0.0, 0.0
        self.mlperf_bytes = mlperf_bytes


class Checkpoints:
    """The folder of a run's checkpoints: the last two, each whole or absent.

    Each is a folder of TensorFlow's own checkpoint of model and optimizer, the model file of the
    best epoch, the state in JSON, and the SHA-256 digests of all these.

    Args:
        folder: Path; made with the first checkpoint.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def save(self, state, trainer, model_file):
        """Write a checkpoint, and drop all but the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"epoch-{len(state.history):05d}-step-{state.step:07d}"
        temporary = self.folder / f".{name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write_weights(trainer, temporary / "weights")
            if state.best:
                shutil.copyfile(model_file, temporary / f"{BEST_MODEL}{model_file.suffix}")
            (temporary / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            files = sorted(temporary.iterdir())
            lines = [f"{file_sha256(file)}  {file.name}\n" for file in files]
            (temporary / DIGESTS).write_text("".join(lines), encoding="utf-8")
            for path in (*files, temporary / DIGESTS, temporary):
                sync(path)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a damaged one of that name
            temporary.rename(self.folder / name)
            sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self):
        """The path and the TrainingState of the newest checkpoint that is whole; None if none is.

        What is damaged is told of and passed over.
        """
        paths = self._all()
        for path in reversed(paths):
            try:
                _check_digests(path)
                values = json.loads((path / STATE).read_text(encoding="utf-8"))
                return path, TrainingState(**values)
            except (OSError, ValueError, TypeError) as error:
                log.warning("Passed over the damaged checkpoint %s: %s", path, error)
        if paths:
            log.warning("No checkpoint is whole: the training begins again, at epoch 1.")
        return None

    def restore(self, path, trainer, model_file=None):
        """Give model and optimizer the values of a checkpoint; and put the best model back.

        Args:
            path: Of the checkpoint, as `newest` gives it.
            trainer: Trainer.
            model_file: Where the best model belongs; None leaves it.
        """
        with trainer.strategy.scope():
            _tracked(trainer).read(str(path / "weights")).assert_consumed()
        for best in path.glob(f"{BEST_MODEL}.*"):
            if model_file is not None:
                temporary = model_file.with_name(f".{model_file.name}.{os.getpid()}.part")
                shutil.copyfile(best, temporary)
                sync(temporary)
                temporary.replace(model_file)

    def _all(self):
        return sorted(self.folder.glob("epoch-*-step-*"))


def _tracked(trainer):
    return tf.train.Checkpoint(model=trainer.model, optimizer=trainer.optimizer)


def _write_weights(trainer, path):
    try:
        _tracked(trainer).write(str(path))
    except tf.errors.OpError as error:  # TensorFlow's word for what the system said
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _check_digests(folder):
    """Raise ValueError or OSError unless all files are as they were written."""
    with open_regular(folder / DIGESTS) as file:
        lines = file.read().decode("utf-8").splitlines()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if STATE not in digests:
        raise ValueError(f"{DIGESTS} does not name {STATE}")
    for name, digest in digests.items():
        if file_sha256(folder / Path(name).name) != digest:
            raise ValueError(f"{name} is not what was written")
