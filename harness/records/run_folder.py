"""The folder of a new run, and what its results say about code and packages."""

import contextlib
import errno
import os
import platform
import secrets
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from harness import REPOSITORY, VERSION
from harness.config import FILE_KEYS, dump_config
from harness.errors import UserError
from harness.files import new_folder, write_json, write_text
from harness.parallel.launchers import job_id

FORMAT = 2  # of a run's folder; 1 (version 0.1.0) had other checkpoints and no `network`
PACKAGES = ("tensorflow", "keras", "numpy", "h5py", "scikit-learn", "mlperf-logging")


def make_folder(config, mode):
    """Make the folder of a new run, with what `--resume` needs from its first moment.

    Returns:
        The folder's absolute path.

    Raises:
        UserError: If a folder with this name exists, or a file of the run outside of it.
    """
    for key in FILE_KEYS:
        path = getattr(config, key)
        is_input = key == "model_file" and mode == "inference"
        if path.is_absolute() and os.path.lexists(path) and not is_input:
            raise UserError(
                f"{path} exists: a run does not overwrite the file of another run. To repeat the "
                f"run, add --set {key}={path.name}, which is in the run's own folder; or move the "
                "file."
            )
    name = config.run_name or default_name()
    folder = Path(config.output_dir).resolve() / name
    results = {"format": FORMAT, "status": "starting", "mode": mode, "job": job_id(), "parts": []}
    try:
        with new_folder(folder) as temporary:
            write_text(temporary / "config.yaml", dump_config(config, name))
            write_json(temporary / "results.json", results)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise UserError(
            f"{folder} exists: a run does not write into the folder of another run. Choose another "
            "run_name, remove the folder, or continue its run with --resume."
        ) from None
    return folder


def default_name():
    """UTC time, number of the job or process, and a random part: '20260601T093000Z-4711-a1b2'.

    The runs of one job start in the same second; in containers the process is always number 1.
    """
    time = datetime.now(timezone.utc)
    return f"{time:%Y%m%dT%H%M%SZ}-{job_id() or os.getpid()}-{secrets.token_hex(2)}"


def package_versions():
    """Versions of the project, of Python and of the packages that determine the results."""
    return {
        "cloudmask": VERSION,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def git_commit():
    """The commit of this code, with '-dirty' if it was changed; None outside its own repository.

    Git looks for a repository in all parent folders, and where variables such as GIT_DIR say:
    the one that it finds may be another project's.
    """
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(REPOSITORY.parent)
    git = ["git", "-C", str(REPOSITORY), "-c", "core.fsmonitor=false"]  # which may be any program
    describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        for arguments in (["ls-files", "--error-unmatch", "harness"], describe):
            answer = subprocess.run(
                [*git, *arguments], env=environment, capture_output=True, text=True, timeout=30,
                check=True,
            )  # fmt: skip
        return answer.stdout.strip()
    return None


def now():
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
