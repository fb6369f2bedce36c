"""Which run goes on, and with which configuration."""

import contextlib
import json
import os
from pathlib import Path

from harness.config import FOLDER_KEYS, check, load_config, resolved
from harness.errors import UserError
from harness.files import lock, open_regular
from harness.records.run import scheduler_job

MODES = ("benchmark", "train", "inference")
# Keys that change neither weights nor masks of a run, or only how long it goes on.
FREE_KEYS = {
    "epochs", "target_accuracy", "patience", "checkpoint_every", "on_bad_scene", "read_timeout",
    "name", "email", "cache_dir", "no_cache", "gpu", "nodes", "cpu_devices", "micro_batch",
    "output_dir", "report", "sampling", "tensorboard", "profile_steps",
}  # fmt: skip


def load_resumed(folder, config_file=None, overrides=()):
    """Read what is to be continued.

    Args:
        folder: The run's folder.
        config_file: YAML file of keys to change, or None.
        overrides: `KEY=VALUE` texts of keys to change.

    Returns:
        Config, and what results.json holds; its status is 'success' if nothing is left to do.

    Raises:
        UserError: If it is no run's folder, or keys that matter were changed.
    """
    folder = Path(folder)
    try:
        with open_regular(folder / "results.json") as results:
            earlier = json.loads(results.read())
        mode, parts, _ = earlier["mode"], earlier["parts"], earlier["status"]
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}")
        _ = [part["start"] + part["status"] for part in parts], sum(p["seconds"] for p in parts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder} cannot be resumed: --resume wants the folder of a run, with its "
            f"config.yaml and results.json ({type(error).__name__}: {error})."
        ) from None
    file = folder / "config.yaml"
    config = load_config(file)
    if "config" in earlier:  # of a run that has begun; the file may have been edited since
        folders = {key: value for key, value in resolved(config).items() if key in FOLDER_KEYS}
        config = check({**earlier["config"], **folders}, folder / "results.json")
    asked = load_config(config_file or file, overrides)
    if mode == "inference":
        asked = asked.model_copy(update={"model_file": asked.model_file.absolute()})
    before, after = resolved(config), resolved(asked)
    changed = [key for key in after if before[key] != after[key]]
    if refused := [key for key in changed if key.lower() not in FREE_KEYS]:
        changes = "; ".join(f"{key} was {before[key]}, now {after[key]}" for key in refused)
        raise UserError(
            f"{folder} cannot go on with other values: {changes}. Leave them as they were, or "
            "start a new run."
        )
    if changed and earlier["status"] == "success":
        earlier["status"] = "extended"
    return asked, {**earlier, "mode": mode, "parts": parts}


def find_requeued(config, mode):
    """The run of this job before Slurm requeued it, with this configuration; None if none is."""
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        return None
    for file in sorted(Path(config.output_dir).glob("*/results.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(file.read_text(encoding="utf-8"))
            if (found["job"], found["mode"]) != (scheduler_job(), mode):
                continue
            same = resolved(load_config(file.parent / "config.yaml")) == resolved(config)
            if same and config.run_name in (None, file.parent.name):
                return file.parent
    return None


def sole_user(folder):
    """Hold a lock on a run's folder; a UserError if another process holds it."""
    return lock(folder, f"{folder} is in use: another process is at this run.")
