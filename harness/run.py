"""A run's folder, and everything that is written there."""

import contextlib
import csv
import io
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from harness.config import UserError, dump_config
from harness.mlperf_log import keys, open_mlperf_log

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("tensorflow", "keras", "numpy", "h5py", "scikit-learn", "mlperf-logging")
LINE_SECONDS = 60  # [s] between progress lines in a batch log

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path of the same suffix; when all is well, sync it and rename it to `path`.

    Whatever happens, `path` is either as it was or whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, columns, rows):
    """Write dictionaries as CSV, a line each, whole or not at all; a missing number is `nan`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: printable(v) if isinstance(v, str) else v for k, v in row.items()})
    write_text(path, text.getvalue())


def jsonable(value):
    """Copy nested dictionaries and lists for JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


class Run:
    """One run: its folder, its logs and its results.

    As a context it ends what it began: whatever happens inside, `run_stop` and results.json say how
    the run went. Processes other than the chief write nothing but a log of their own.

    Attributes:
        folder: The run's folder.
        results: What results.json will hold.
        mllog: MLLogger of the MLPerf log.
    """

    def __init__(self, config, devices, mode, folder):
        self._devices, self.is_chief = devices, devices.is_chief
        self.folder = folder
        # An input of inference, and named from where one stands; else a result of the run.
        trains = mode != "inference"
        self.model_file = self.path(config.model_file) if trains else config.model_file.absolute()
        self._log_file = self.path(config.log_file)
        self._opened = time.perf_counter()
        self._has_started = False
        self._rank_log = _log_to(self.folder / f"rank-{devices.rank}.log")
        mlperf_file = self.path(config.mlperf_logfile) if self.is_chief else None
        self.mllog = open_mlperf_log(mlperf_file, REPOSITORY)
        if self.is_chief:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log_file.touch()  # now rather than after hours
            write_text(self.folder / "config.yaml", dump_config(config, self.folder.name))
        self.results = {
            "status": "running",
            "run": self.folder.name,
            "mode": mode,
            "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "devices": {
                "kind": devices.kind,
                "replicas": devices.n_replicas,
                "ranks": devices.n_ranks,
                "nodes": devices.n_nodes,
                "accelerators_per_node": devices.accelerators_per_node,
                "description": devices.describe(),
                "deterministic": devices.deterministic,
            },
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in PACKAGES},
            },
            "git_commit": git_commit(),
            "config": config.model_dump(by_alias=True, mode="json"),
            "training": None,
            "inference": None,
        }

    def path(self, name):
        """A file of the run: inside its folder unless absolute."""
        return self.folder / name

    def start(self):
        """Mark the begin of the timed run."""
        self._has_started = True
        self.mllog.start(keys.RUN_START)

    def write_line(self, text):
        """Append a result line to log_file, and show it."""
        log.info("%s", text)
        if self.is_chief:
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        status = keys.SUCCESS if error is None else keys.ABORTED
        try:
            if self.is_chief:
                self._end_results(status, None if error is None else f"{kind.__name__}: {error}")
        except OSError:
            status = keys.ABORTED
            if error is None:  # the first error is the one to tell
                raise
        finally:
            if self._has_started:
                self.mllog.end(keys.RUN_STOP, metadata={"status": status})
            if error is not None:
                text = f"Aborted: {kind.__name__}: {error}"
                record = log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None)
                self._rank_log.handle(record)
            for handler in (*self.mllog.logger.handlers, self._rank_log):
                handler.close()
            logging.getLogger().removeHandler(self._rank_log)

    def _end_results(self, status, error):
        self.results |= {
            "status": status,
            "error": error and error[:2000],
            "seconds": time.perf_counter() - self._opened,
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # [bytes]
            "peak_gpu_memory": self._devices.peak_gpu_memory(),
        }
        text = json.dumps(jsonable(self.results), indent=2)
        write_text(self.folder / "results.json", text + "\n")


def make_folder(config):
    """Make the folder of a new run; the chief does.

    Raises:
        UserError: If there is one of that name.
    """
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID") or os.getpid()
    name = config.run_name or f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{job}"
    folder = Path(config.output_dir) / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{folder} exists: a run never writes into the folder of another. "
            "Choose another run_name or remove the folder."
        ) from None
    return folder.resolve()


def git_commit():
    """The commit of this code, with '-dirty' where it was changed; None outside a repository."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--dirty"]
    with contextlib.suppress(OSError):
        answer = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=30, check=False
        )
        if answer.returncode == 0:
            return answer.stdout.strip()
    return None


class PlainFormatter(logging.Formatter):
    """A message is one line: names of files and scenes can hold whatever steers a terminal.

    Newlines, escapes, marks that turn the direction of writing and bytes that are no text come out
    as Python writes them in its own texts.
    """

    def formatMessage(self, record):
        """Format a record, its message escaped."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def printable(text):
    r"""The text with whatever cannot be printed escaped: a newline becomes \n, two characters."""
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return "".join(escaped)


def log_to_screen(verbose, is_chief=True):
    """Send the project's messages to the terminal, plain; of other ranks only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    handler.setLevel(logging.INFO if is_chief else logging.WARNING)
    root.setLevel(logging.INFO)
    logging.getLogger("tensorflow").setLevel(logging.INFO if verbose else logging.ERROR)
    logging.getLogger("absl").setLevel(logging.INFO if verbose else logging.ERROR)


def _log_to(path):
    handler = logging.FileHandler(path, delay=True, encoding="utf-8")
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def progress(items, what, total):
    """Go through items and tell how far: a bar on a terminal, a line a minute in a batch log."""
    if sys.stderr.isatty() and logging.getLogger().handlers[0].level <= logging.INFO:
        from tqdm import tqdm  # the bar alone needs it

        yield from tqdm(items, what, total, leave=False, dynamic_ncols=True)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            left = (now - started) / done * (total - done)
            log.info("%s: %d of %d, %.0f s left", what, done, total, left)
            last = now
        yield item
