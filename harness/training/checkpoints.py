"""Checkpoints: what a run needs to resume training as if it had never stopped."""

import errno
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from harness.files import file_sha256, open_regular, replacing, sync
from harness.training.state import TrainingState

KEPT = 2
STATE, DIGESTS, BEST_MODEL = "state.json", "SHA256SUMS", "best"

log = logging.getLogger(__name__)


class Checkpoints:
    """The folder of a run's checkpoints: the last two, each complete or absent.

    A checkpoint is a folder with TensorFlow's own checkpoint of model and optimizer, the model file
    of the best epoch, the training state in JSON, and the SHA-256 digests of all these files.

    Args:
        folder: Path; made with the first checkpoint.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def save(self, state, totals, trainer, model_file):
        """Write a checkpoint; then delete all but the last two.

        Args:
            state: TrainingState.
            totals: The trainer's `train_totals`.
            trainer: Trainer.
            model_file: Path of the best model so far; copied if an epoch has been completed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"epoch-{len(state.history):05d}-step-{state.step:07d}"
        temporary = self.folder / f".{name}.part"
        for unfinished in self.folder.glob(".epoch-*.part"):  # of a killed process
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir()
        try:
            _write_weights(trainer, temporary / "weights")
            if state.best:
                shutil.copyfile(model_file, temporary / f"{BEST_MODEL}{model_file.suffix}")
            values = {"state": asdict(state), "totals": totals}
            (temporary / STATE).write_text(json.dumps(values), encoding="utf-8")
            files = sorted(temporary.iterdir())
            lines = [f"{file_sha256(file)}  {file.name}\n" for file in files]
            (temporary / DIGESTS).write_text("".join(lines), encoding="utf-8")
            for path in (*files, temporary / DIGESTS, temporary):
                sync(path)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a damaged one with this name
            temporary.rename(self.folder / name)
            sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self):
        """Path and TrainingState of the newest undamaged checkpoint; None if there is none.

        Damaged checkpoints are skipped with a warning.
        """
        paths = self._all()
        for path in reversed(paths):
            try:
                _check_digests(path)
                return path, TrainingState(**_read_state(path)["state"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.warning("Skipped the damaged checkpoint %s: %s", path, error)
        if paths:
            log.warning("All checkpoints are damaged: training starts again at epoch 1.")
        return None

    def restore(self, path, trainer, model_file=None):
        """Load a checkpoint into a trainer, and restore the best model's file.

        Args:
            path: Path of the checkpoint, from `newest`.
            trainer: Trainer.
            model_file: Path of the best model; None if another process restores it.
        """
        with trainer.strategy.scope():
            _tracked(trainer).read(str(path / "weights")).assert_consumed()
        trainer.train_totals = _read_state(path)["totals"]
        for best in path.glob(f"{BEST_MODEL}.*"):
            if model_file is not None:
                with replacing(model_file) as temporary:
                    shutil.copyfile(best, temporary)

    def _all(self):
        return sorted(self.folder.glob("epoch-*-step-*"))


def _read_state(path):
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def _tracked(trainer):
    import tensorflow as tf

    return tf.train.Checkpoint(model=trainer.model, optimizer=trainer.optimizer)


def _write_weights(trainer, path):
    import tensorflow as tf

    try:
        _tracked(trainer).write(str(path))
    except tf.errors.OpError as error:  # TensorFlow's translation of a system error
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _check_digests(folder):
    """Raise ValueError or OSError unless all files are as they were written."""
    with open_regular(folder / DIGESTS) as file:
        lines = file.read().decode("utf-8").splitlines()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if STATE not in digests:
        raise ValueError(f"{DIGESTS} does not list {STATE}")
    for name, digest in digests.items():
        if file_sha256(folder / Path(name).name) != digest:
            raise ValueError(f"{name} has changed since it was written")
