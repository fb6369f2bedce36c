"""A run's folder, and everything that is written there."""

import contextlib
import errno
import logging
import os
import platform
import resource
import shutil
import subprocess
import time
import uuid
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from harness import REPOSITORY
from harness.config import FILE_KEYS, dump_config
from harness.console import log_to_file
from harness.errors import UserError, one_line
from harness.files import file_sha256, remove_unfinished, write_json, write_text
from harness.records import mlperf_log, results
from harness.records.machine import describe_machine
from harness.records.mlperf_log import keys, open_mlperf_log
from harness.records.tensorboard import NoBoard
from harness.signals import Interrupted
from harness.training.checkpoints import Checkpoints, TrainingState

PACKAGES = ("tensorflow", "keras", "numpy", "h5py", "scikit-learn", "mlperf-logging")

log = logging.getLogger(__name__)


class Run:
    """One run: its folder, its logs and its results.

    As a context it ends what it began: whatever happens inside, `run_stop` and results.json say how
    the run went. Processes other than the chief write nothing but a log of their own.

    Args:
        config: Config.
        devices: Devices.
        mode: 'benchmark', 'train' or 'inference'.
        folder: The run's folder.
        bad_scenes: BadScenes of the run.
        earlier: What results.json holds, of a run that is resumed; else None.
        scenes: Digest of the scenes' names.

    Attributes:
        folder: The run's folder.
        mode: 'benchmark', 'train' or 'inference'.
        results: What results.json will hold.
        mllog: MLLogger of the MLPerf log.
        bad_scenes: BadScenes of the run.
        board: TensorBoard of the run, or NoBoard.
        part: 0, or how often the run was resumed.
        goes_on: Whether this part begins with a checkpoint, within the timed run.

    Raises:
        UserError: If a run is resumed with other scenes.
    """

    def __init__(self, config, devices, mode, folder, bad_scenes, earlier=None, scenes=None):
        self._config, self._devices, self.is_chief = config, devices, devices.is_chief
        self.mode, self.bad_scenes, self.board = mode, bad_scenes, NoBoard()
        self.folder, parts = folder, earlier["parts"] if earlier else []
        if earlier and earlier.get("scenes_sha256", scenes) != scenes:
            raise UserError(
                f"{folder} cannot go on: its scenes were others. Put back what train_dir and "
                "inference_dir held, or start a new run."
            )
        if parts and self.is_chief:
            remove_unfinished(folder)
        self.part, self._checkpoints = len(parts), Checkpoints(self.path("checkpoints"))
        self._found = self._checkpoints.newest() if parts else None
        self._saved = None  # epochs and steps of the last checkpoint
        self._sampler = None
        self.goes_on = self._has_started = self._found is not None
        self.model_file = self.path(config.model_file)  # absolute where it is an input
        self._log_file = self.path(config.log_file)
        self._opened = time.perf_counter()
        self._rank_log = log_to_file(self.folder / f"rank-{devices.rank}.log")
        self._mlperf_file = self.path(config.mlperf_logfile) if self.is_chief else None
        n_kept = self._found[1].mlperf_bytes if self._found else 0
        self.mllog = open_mlperf_log(self._mlperf_file, REPOSITORY, n_kept)
        if self.is_chief:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log_file.touch()  # now rather than after hours
            if parts:
                self._forget_lines(sum(part["status"] == keys.SUCCESS for part in parts))
            write_text(self.folder / "config.yaml", dump_config(config, self.folder.name))
        made_by = {  # of the last part; each part has its own besides
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
        }
        self.results = {
            "status": "running",
            "run": self.folder.name,
            "mode": mode,
            "job": scheduler_job(),
            "start": (parts or [{"start": now()}])[0]["start"],
            "seconds": 0.0,
            "resumed": self.part,
            "parts": [
                *parts,
                {
                    "start": now(),
                    "status": "running",
                    "seconds": 0.0,
                    "checkpoint_seconds": 0.0,
                    **made_by,
                },
            ],
            **made_by,
            "machine": describe_machine(devices.kind) if self.is_chief else None,
            "scenes_sha256": scenes,
            "config": config.model_dump(by_alias=True, mode="json"),
            "training": None,
            "inference": None,
        }
        self.save_results("running")

    @property
    def needs_labels(self):
        """Whether scenes need a Bayesian mask: masks alone can be made without."""
        return self.mode != "inference"

    def mlperf_bytes(self):
        """Length of the MLPerf log so far; 0 on ranks that write none."""
        return self._mlperf_file.stat().st_size if self.is_chief else 0

    def path(self, name):
        """A file of the run: inside its folder unless absolute."""
        return self.folder / name

    def begin(self):
        """Log who runs what, and that it is set up now; or that it goes on."""
        if self.goes_on:
            epoch = self._found[1].epoch
            log.info("Going on in epoch %d, step %d.", epoch, self._found[1].step + 1)
            self.mllog.event(mlperf_log.RESUMED, self.part, metadata={"epoch_num": epoch})
            return
        mlperf_log.log_submission(self.mllog, self._config, self.results["git_commit"])
        self.mllog.event(keys.CACHE_CLEAR, False)  # the system's file cache is as we found it
        if self.part:
            self.mllog.event(mlperf_log.RESUMED, self.part, metadata={"epoch_num": 1})
        self.mllog.start(keys.INIT_START)

    def start(self):
        """Mark the end of setting up, and the begin of the timed run."""
        self._has_started = True
        self.mllog.end(keys.INIT_STOP)
        self.mllog.start(keys.RUN_START)

    def restore(self, trainer):
        """Give a trainer what the newest checkpoint holds, and return the TrainingState."""
        if self._found is None:
            return TrainingState()
        path, state = self._found
        if self._devices.n_ranks > 1 and len(set(self._devices.gather(state.epoch))) > 1:
            raise UserError(f"The ranks see different checkpoints in {path.parent}. Start again.")
        self._checkpoints.restore(path, trainer, self.model_file if self.is_chief else None)
        self._saved = len(state.history), state.step
        return state

    def save_checkpoint(self, trainer, state):
        """Keep what `restore` needs; the chief does."""
        if self.is_chief:
            begin = time.perf_counter()
            self._checkpoints.save(state, trainer, self.model_file)
            self.results["parts"][-1]["checkpoint_seconds"] += time.perf_counter() - begin
        self._saved = len(state.history), state.step

    @contextlib.contextmanager
    def saving_when_interrupted(self, trainer, state):
        """When Interrupted is raised inside, save a checkpoint first.

        Several ranks may have been stopped at different steps: they go on from an epoch's end.
        """
        try:
            yield
        except Interrupted:
            is_new = (len(state.history), state.step) not in (self._saved, (0, 0))
            if is_new and self._devices.n_ranks == 1:
                state.totals = trainer.totals if state.totals is None else state.totals
                self.save_checkpoint(trainer, state)
                log.info("Saved epoch %d, step %d.", state.epoch, state.step)
            raise

    def _forget_lines(self, n_kept):
        """Leave so many inference lines in log_file: one of a part that did not end counts not."""
        lines = self._log_file.read_text(encoding="utf-8").splitlines(keepends=True)
        of_inference = [line for line in lines if line.startswith("CloudMask inference")]
        if forgotten := of_inference[n_kept:]:
            write_text(self._log_file, "".join(line for line in lines if line not in forgotten))

    def write_line(self, text):
        """Append a result line to log_file; not again where an earlier part did."""
        if self.is_chief and text not in self._log_file.read_text(encoding="utf-8").splitlines():
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _count_samples(self):
        """Put what all ranks took of their machines into the results; of several, none may fail."""
        mine = self._sampler.totals()
        if self._devices.n_ranks == 1:
            ranks = [mine]
        else:  # where numbers alone are gathered
            numbers = [self._devices.gather(-1.0 if n is None else n) for n in mine.values()]
            ranks = [
                dict(zip(mine, (None if n < 0 else n for n in rank), strict=True))
                for rank in zip(*numbers, strict=True)
            ]
        self.results["parts"][-1]["sampling"] = results.sampling_results(ranks)

    def __enter__(self):
        if self._config.sampling:
            from harness.records.sampling import open_sampler  # which needs psutil

            name = "samples.csv" if self.is_chief else f"samples-rank-{self._devices.rank}.csv"
            self._sampler = open_sampler(self.path(name), self._devices)
        return self

    def __exit__(self, kind, error, traceback):
        status = keys.SUCCESS if error is None else keys.ABORTED
        text = None if error is None else f"{kind.__name__}: {error}"
        n_bytes = 0
        try:
            self.board.close()
            if self._sampler:
                self._sampler.close()
                if error is None or self._devices.n_ranks == 1:
                    self._count_samples()
            n_bytes = self.mlperf_bytes()
            self._log_stop(status)
            self.save_results(status, text)
        except Exception as failure:
            # What is written last says success, or nothing does.
            with contextlib.suppress(OSError):
                if n_bytes:
                    os.truncate(self._mlperf_file, n_bytes)
                self._log_stop(keys.ABORTED)
            with contextlib.suppress(OSError):
                self.save_results(keys.ABORTED, text or f"{type(failure).__name__}: {failure}")
            if error is None:  # the first error is the one to tell
                raise
        finally:
            if error is not None:
                aborted = f"Aborted: {text}"
                record = log.makeRecord(log.name, logging.ERROR, "", 0, aborted, (), None)
                self._rank_log.handle(record)
            for handler in (*self.mllog.logger.handlers, self._rank_log):
                handler.close()
            logging.getLogger().removeHandler(self._rank_log)

    def _log_stop(self, status):
        if self._has_started:
            self.mllog.end(keys.RUN_STOP, metadata={"status": status})

    def save_results(self, status, error=None):
        """Write results.json as things stand; the chief does.

        Of a run that has ended it holds the SHA-256 of its MLPerf log, which is whole by then.
        """
        if not self.is_chief:
            return
        part = self.results["parts"][-1]
        part |= {
            "status": status,
            "seconds": time.perf_counter() - self._opened,
            "peak_rss": peak_rss(),
            "peak_gpu_memory": self._devices.peak_gpu_memory(),
        }
        self.results |= {
            "status": status,
            "error": error and error[:2000],
            "seconds": sum(part["seconds"] for part in self.results["parts"]),
            **results.peaks(self.results["parts"]),
            "bad_scenes": self.bad_scenes.all(),
            "sampling": results.sampling_results(
                [part.get("sampling") for part in self.results["parts"]]
            ),
            "mlperf_sha256": None if status == "running" else file_sha256(self._mlperf_file),
        }
        write_json(self.folder / "results.json", self.results)


def peak_rss():
    """Most memory that this process has taken [bytes]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now():
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def scheduler_job():
    """The scheduler's number of this job; None where there is none."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID")


def make_folder(config, mode):
    """Make the folder of a new run, with what `--resume` needs from its first moment on.

    Returns:
        The folder's absolute path.

    Raises:
        UserError: If there is one of that name, or a file that lies elsewhere exists.
    """
    for key in FILE_KEYS:
        path = getattr(config, key)
        is_input = key == "model_file" and mode == "inference"
        if path.is_absolute() and path.exists() and not is_input:
            raise UserError(
                f"{path} exists: a run never writes over the file of another. Set another {key}, "
                "one in the run's folder say, or move the file."
            )
    name = config.run_name or f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-"
    name += "" if config.run_name else scheduler_job() or str(os.getpid())
    folder = Path(config.output_dir).resolve() / name
    temporary = folder.with_name(f".new-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        if folder.exists():  # renaming would replace an empty one
            raise FileExistsError(errno.EEXIST, "exists")
        write_text(temporary / "config.yaml", dump_config(config, name))
        write_json(
            temporary / "results.json",
            {"status": "starting", "mode": mode, "job": scheduler_job(), "parts": []},
        )
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise UserError(
            f"{folder} exists: a run never writes into the folder of another. Choose another "
            "run_name, remove the folder, or continue its run with --resume."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


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


def make_report(folder):
    """Make report.html of a finished run; a failure is a warning and nothing more.

    Returns:
        Its path; None if it could not be made.
    """
    try:
        from harness.records import report  # imports jinja2, and later matplotlib

        return report.make_report(folder)
    except Exception as error:  # not Interrupted, a SystemExit: signals still end the program
        log.warning("No report.html: %s", one_line(error))
        return None
