"""The command line: what the program is asked to do."""

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from harness.config import FILE_KEYS, MODEL_SUFFIXES, Config, load_config
from harness.data.mask_files import stamps_sha256
from harness.errors import UserError
from harness.preflight import FoundScenes, check_model
from harness.records.resume import INPUT, MODES, find_requeued, load_resumed


@dataclass(frozen=True)
class Task:
    """What the program is asked to do.

    Attributes:
        config: Config.
        mode: 'benchmark', 'train', 'inference' or 'check'.
        folder: Folder of the run to resume; None for a new run.
        earlier: Content of its results.json; None for a new run.
    """

    config: Config
    mode: str
    folder: Path | None = None
    earlier: dict | None = None

    @functools.cached_property
    def found(self):
        """The scenes on disk, FoundScenes."""
        config = self.config
        return FoundScenes.find(config.train_dir, config.inference_dir, self.mode, config.shard)

    @functools.cached_property
    def is_finished(self):
        """Whether nothing is left to do.

        --mode inference also masks scenes that are new, makes masks again that are missing or whose
        scene or model has changed, and tries scenes that were skipped again.
        """
        if self.earlier is None or self.earlier["status"] != "success":
            return False
        if self.mode != "inference":
            return True
        if self.earlier.get("scenes_sha256") != self.found.sha256 or self.earlier.get("bad_scenes"):
            return False
        scenes, model_file = self.found.inference, self.folder / self.config.model_file
        stamps = stamps_sha256(self.folder, scenes, model_file)
        return stamps is not None and stamps == self.earlier.get("stamps_sha256")


def parse_arguments(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="CloudMask: train a network on Sentinel-3 SLSTR scenes, mask scenes with it, "
        "and time both."
    )
    add = parser.add_argument
    add("--config", help="YAML file (default config.yaml)")
    add(
        "--mode",
        choices=(*MODES, "check"),
        help="benchmark: train, then mask (default); check: only inspect scenes, devices and disk",
    )
    add(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="override keys of the configuration",
    )  # fmt: skip
    add("--resume", metavar="RUN_DIR", type=Path, help="continue the run in this folder")
    add(
        "--model", metavar="FILE", type=Path,
        help="with --mode inference: the model to mask with (default model_file)",
    )  # fmt: skip
    add("--verbose", action="store_true", help="show tracebacks and TensorFlow's messages")
    return parser.parse_args(argv)


def choose_task(arguments):
    """Read the configuration, of a new run or of the one to resume.

    Args:
        arguments: Of `parse_arguments`.

    Returns:
        Task.

    Raises:
        UserError: If configuration and arguments cannot be used.
    """
    folder = arguments.resume
    if arguments.model and (arguments.mode != "inference" or folder):
        raise UserError("--model can only be used with --mode inference of a new run.")
    if arguments.model and arguments.model.suffix not in MODEL_SUFFIXES:
        raise UserError(f"--model takes a .keras or .h5 file, found {arguments.model}.")
    if folder is None:
        overrides = list(arguments.set)
        if arguments.model:
            overrides.append(f"model_file={json.dumps(str(arguments.model))}")
        config = load_config(arguments.config or "config.yaml", overrides)
        mode = arguments.mode or "benchmark"
        if mode == "inference":  # the model is an input, relative to the current directory
            config = config.model_copy(update={"model_file": config.model_file.absolute()})
        folder = None if mode == "check" else find_requeued(config, mode)
        if folder is None:
            check_model(config, mode)
            return Task(config, mode)
    config, earlier = load_resumed(folder, arguments.config, arguments.set)
    if arguments.mode not in (None, earlier["mode"]):
        raise UserError(f"{folder} is a run with --mode {earlier['mode']}: remove --mode.")
    task = Task(config, earlier["mode"], folder.resolve(), earlier)
    if not task.is_finished:
        check_model(config, task.mode)
        if arguments.resume and not arguments.config:
            _check_files(task, {text.partition("=")[0].strip() for text in arguments.set})
    return task


def _check_files(task, named):
    """Raise UserError if only a folder, perhaps of others, says that its run writes elsewhere.

    Args:
        task: Task.
        named: Keys that the command line sets.
    """
    for key in FILE_KEYS:
        path = task.folder / getattr(task.config, key)
        is_known = (key, task.mode) == INPUT or key in named or path.is_relative_to(task.folder)
        if not is_known:
            raise UserError(
                f"The run in {task.folder} writes to a file outside of it, {key}: {path}. If that "
                f"is right, add --set {key}={path}"
            )
