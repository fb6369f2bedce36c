"""Make a series of runs, one after the other, here or by a launcher, and continue it later."""

import contextlib
import itertools
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from harness import REPOSITORY
from harness.config import check, load_config, resolved
from harness.console import format_duration
from harness.errors import UserError, one_line
from harness.files import lock, read_text
from harness.parallel.launchers import job_id
from harness.parallel.rendezvous import reserve_port
from harness.records.resume import load_resumed
from harness.records.saved_runs import PLACES
from harness.signals import Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedRun:
    """A run to make.

    Attributes:
        folder: Its folder.
        config: YAML file of its configuration.
        changes: `KEY=VALUE` texts that override the file; not output_dir and run_name.
        mode: 'benchmark' or 'train'.
        launch: Command that starts the program and takes its options; None: started here.
        ranks: Processes to start here.
    """

    folder: Path
    config: str
    changes: list
    mode: str = "benchmark"
    launch: str | None = None
    ranks: int = 1

    @property
    def overrides(self):
        """All `KEY=VALUE` texts, also for the folder."""
        place = [f"output_dir={self.folder.parent.resolve()}", f"run_name={self.folder.name}"]
        return [*self.changes, *place]

    @property
    def has_finished(self):
        """Whether the run ended in success."""
        return _results(self.folder).get("status") == "success"


def add_run_arguments(add):
    """Add the options that say what is run and how, by the add_argument of a parser."""
    add("--config", default="config.yaml", help="configuration of the runs (default config.yaml)")
    add(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="override keys of the configuration",
    )  # fmt: skip
    add("--verbose", action="store_true", help="show tracebacks")


def when_stopped(again, launch):
    """What to do after a signal; a launcher that is stopped leaves its job in the queue."""
    cancel = (
        " If --launch has submitted a job, first cancel it or wait for it: one that is queued has "
        "no folder yet, and would be submitted again."
    )
    return again + cancel if launch else again


def make_runs(runs, resume, summarise, keep_going=False):
    """Make all runs of a series that have not finished; messages say which, and the time left.

    Args:
        runs: PlannedRuns, all in the same folder.
        resume: Whether an aborted run is continued if possible; otherwise it is repeated.
        summarise: Function of the folders of the finished runs, called at the end, also after a
            failure, which is then reported last.
        keep_going: Whether later runs are made although one failed.

    Raises:
        UserError: If a run fails; later ones are not made, unless keep_going. If a run has other
            settings than planned, or may still be running; later ones are not made.
        Interrupted: After a signal, once the run has saved its checkpoint and ended.
    """
    try:
        _make_all(runs, resume, keep_going)
    except (UserError, Interrupted):
        try:
            summarise(_finished(runs))
        except Exception as error:
            log.warning("No summary: %s", one_line(error))
        raise
    summarise(_finished(runs))


def _finished(runs):
    return [run.folder for run in runs if run.has_finished]


def _make_all(runs, resume, keep_going):
    parent = runs[0].folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    seconds, failed = [], []  # of the runs so far
    with lock(parent, f"Another command makes runs in {parent}. Wait for it to finish."):
        for number, run in enumerate(runs, 1):
            title = f"Run {number} of {len(runs)}, {run.folder}"
            action, options = _prepare(run, resume)
            if action == "kept":
                log.info("%s: finished before.", title)
                seconds.append(_results(run.folder).get("seconds") or 0)
                continue
            left = ""
            if seconds:
                total = statistics.mean(seconds) * (len(runs) - number + 1)
                left = f"; about {format_duration(total)} left in all"
            log.info("%s: %s%s", title, action, left)
            if run.launch:
                log.info("  by %s; its progress is in %s", run.launch, run.folder / "rank-0.log")
            begin = time.monotonic()
            try:
                _start(run, options)
            except UserError as error:
                if not keep_going:
                    raise
                log.error("Failed: %s", error)
                failed.append(run.folder.name)
            seconds.append(time.monotonic() - begin)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, see above: {', '.join(failed)}."
        )


def _prepare(run, resume):
    """What is done with a run, as a word for people, and the options of the program for it."""
    options = ["--config", run.config, "--set", *run.overrides]
    new = ["--mode", run.mode, *options]
    if not run.folder.exists():
        return "starts", new
    _reject_live_job(run)
    with lock(run.folder, f"{run.folder} is in use by another process. Wait for it, or stop it."):
        if run.has_finished and not resume:
            _reject_other_settings(run)
            return "kept", []
        if resume:
            try:
                load_resumed(run.folder)
            except UserError as error:  # damaged, or of another version
                log.warning("%s", error)
            else:
                _, earlier = load_resumed(run.folder, run.config, run.overrides)
                if earlier["status"] == "success":
                    return "kept", []
                return "continues", ["--resume", str(run.folder), *options]
        names = (f"{run.folder.name}-aborted-{n}" for n in itertools.count(1))
        aside = next(p for p in map(run.folder.with_name, names) if not p.exists())
        run.folder.rename(aside)
        log.warning("%s was aborted and is repeated; its files are now in %s", run.folder, aside)
    return "starts", new


def _reject_live_job(run):
    """Raise UserError if another job of the scheduler may still write into the folder of a run."""
    results = _results(run.folder)
    status, job = results.get("status"), results.get("job")
    if run.launch and job not in (None, job_id()) and status in ("starting", "running"):
        raise UserError(
            f"{run.folder} is '{status}': cancel job {job} first, or wait for it. If it no longer "
            f"exists, continue the run with --resume {run.folder}, or remove this folder."
        )


def _reject_other_settings(run):
    """Raise UserError if a finished run had other settings than planned."""
    planned = resolved(load_config(run.config, run.overrides))
    found = resolved(check(_results(run.folder).get("config", {}), run.folder / "results.json"))
    if changed := [key for key in planned if key not in PLACES and found[key] != planned[key]]:
        changes = "; ".join(f"{key} was {found[key]}, now {planned[key]}" for key in changed)
        raise UserError(
            f"{run.folder} was made with other settings: {changes}. Restore them, or choose "
            "another --output."
        )


def _start(run, options):
    """Start a run and wait for its end; its messages are on the screen.

    Raises:
        UserError: If it fails.
        Interrupted: After a signal, which the run receives too.
    """
    if run.launch:
        command, environments = shlex.split(run.launch), [{}]
    else:
        command = [sys.executable, str(REPOSITORY / "slstr_cloud.py")]
        environments = _environments(run.ranks)
    processes = [  # in a session of its own: Ctrl-C reaches it once, from here
        subprocess.Popen([*command, *options], env=os.environ | e, start_new_session=True)
        for e in environments
    ]
    try:
        statuses = [process.wait() for process in processes]
    except Interrupted as error:
        for process in processes:
            process.send_signal(error.signal)
        for process in processes:
            process.wait()  # it saves a checkpoint
        raise
    finally:
        for process in processes:
            if process.poll() is None:  # another signal came
                process.kill()
    if any(statuses):
        ended = ", ".join(str(status) for status in statuses)
        raise UserError(f"{shlex.join(command)} ended with exit status {ended}, see above.")
    if not run.has_finished:
        raise UserError(
            f"{shlex.join(command)} ended, but {run.folder} is not that of a finished run. The "
            "launcher should wait for the run, pass on all options, and see the same folder."
        )


def _environments(ranks):
    """Variables for each of several processes here, which TF_CONFIG connects."""
    if ranks == 1:
        return [{}]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(reserve_port()) for _ in range(ranks)]
        cluster = {"worker": [f"localhost:{s.getsockname()[1]}" for s in sockets]}
    tasks = ({"type": "worker", "index": rank} for rank in range(ranks))
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})} for task in tasks]


def _results(folder):
    """What results.json in a folder holds; empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(read_text(folder / "results.json"))
        return results if isinstance(results, dict) else {}
    return {}
