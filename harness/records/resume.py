"""Which run is resumed, and with which configuration."""

import contextlib
import json
from pathlib import Path

from harness.config import FILE_KEYS, FOLDER_KEYS, check, load_config, resolved
from harness.errors import UserError
from harness.files import check_own, read_text
from harness.parallel.launchers import is_requeued, job_id
from harness.records.results import peaks, sampling_results
from harness.records.run_folder import FORMAT

# What reading a results.json that somebody has edited may raise.
DAMAGED = (
    OSError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ValueError,
)  # fmt: skip
MODES = ("benchmark", "train", "inference")
INPUT = ("model_file", "inference")  # a key of FILE_KEYS, and the mode that only reads it
# Keys that change neither the weights nor the masks of a run, or only when it stops.
FREE_KEYS = {
    "epochs", "target_accuracy", "patience", "training_seconds", "checkpoint_every",
    "on_bad_scene", "read_timeout", "cache_dir", "no_cache", "gpu", "nodes", "cpu_devices",
    "micro_batch", "reader_threads", "cache", "output_dir", "report", "sampling", "tensorboard",
    "profile_steps",
}  # fmt: skip


def load_resumed(folder, config_file=None, overrides=()):
    """Read the run to resume.

    Args:
        folder: The run's folder.
        config_file: YAML file with changed keys, or None.
        overrides: `KEY=VALUE` texts with changed keys.

    Returns:
        Config, and the content of results.json; its status is 'success' if nothing is left to do.

    Raises:
        UserError: If this is not the folder of a run, or keys that matter have changed.
    """
    folder = Path(folder)
    files = ("results.json", "config.yaml")
    if missing := [name for name in files if not (folder / name).exists()]:
        reason = f"it has no {' and no '.join(missing)}" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder} cannot be resumed: {reason}. --resume takes the folder of a run, with "
            f"{' and '.join(files)}."
        )
    check_own(folder.resolve())
    try:
        earlier = json.loads(read_text(folder / "results.json"))
        mode, parts, _ = earlier["mode"], earlier["parts"], earlier["status"]
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}")
        _ = [part["start"] + part["status"] for part in parts]
        _ = float(sum(part["seconds"] for part in parts))
        _ = peaks([*parts, {"peak_rss": 0, "peak_gpu_memory": [0]}])
        _ = parts and sampling_results([part.get("sampling") for part in parts])
    except DAMAGED as error:
        raise UserError(
            f"{folder} cannot be resumed: its results.json is damaged ({type(error).__name__}: "
            f"{error}). Restore it, or start a new run."
        ) from None
    if (found := earlier.get("format")) != FORMAT:
        raise UserError(
            f"{folder} cannot be resumed: its format is {found or 1} (1 is that of version 0.1.0), "
            f"this version continues runs of format {FORMAT}. Continue it with the version that "
            "made it, or start a new run."
        )
    file = folder / "config.yaml"
    config = load_config(file)
    if "config" in earlier:  # the run has begun; the file may have been edited since
        folders = {key: value for key, value in resolved(config).items() if key in FOLDER_KEYS}
        config = check({**earlier["config"], **folders}, folder / "results.json")
    wanted = load_config(config_file or file, overrides)
    if mode == "inference":
        wanted = wanted.model_copy(update={"model_file": wanted.model_file.absolute()})
    for key in FILE_KEYS:
        if (path := getattr(wanted, key)).is_absolute() and (key, mode) != INPUT:
            check_own(path)
    before, after = resolved(config), resolved(wanted)
    if wanted.run_name:
        before["run_name"], after["run_name"] = folder.resolve().name, wanted.run_name
    changed = [key for key in after if before[key] != after[key]]
    if rejected := [key for key in changed if key.lower() not in FREE_KEYS]:
        changes = "; ".join(f"{key} was {before[key]}, now {after[key]}" for key in rejected)
        raise UserError(
            f"{folder} cannot be resumed with other values: {changes}. Restore them, or start a "
            "new run."
        )
    if changed and earlier["status"] == "success":
        earlier["status"] = "extended"
    return wanted, {**earlier, "mode": mode, "parts": parts}


def find_requeued(config, mode):
    """The run of this job before Slurm requeued it, with the same configuration; or None.

    A job may start several runs: one that has not finished comes first.
    """
    if not is_requeued():
        return None
    finished = None
    for file in sorted(Path(config.output_dir).glob("*/results.json")):
        with contextlib.suppress(*DAMAGED):
            found = json.loads(read_text(file))
            if (found["job"], found["mode"]) != (job_id(), mode):
                continue
            check_own(file.parent)
            same = resolved(load_config(file.parent / "config.yaml")) == resolved(config)
            if same and config.run_name in (None, file.parent.name):
                if found["status"] != "success":
                    return file.parent
                finished = finished or file.parent
    return finished
