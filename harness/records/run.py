"""A run: its folder, its logs, its checkpoints and its results."""

import contextlib
import logging
import math
import os
import resource
import sys
import time

from harness import REPOSITORY
from harness.clock import active_seconds
from harness.config import dump_config, recorded
from harness.console import log_to_file
from harness.data.bad_scenes import BadScenes
from harness.data.mask_files import stamps_sha256
from harness.errors import UserError, one_line
from harness.files import (
    file_sha256,
    remove_unfinished,
    replacing,
    write_csv,
    write_json,
    write_text,
)
from harness.inference.scores import SCENE_COLUMNS
from harness.parallel.launchers import job_id
from harness.records import mlperf_log, results
from harness.records.machine import describe_machine
from harness.records.mlperf_log import keys, open_mlperf_log
from harness.records.run_folder import FORMAT, git_commit, now, package_versions
from harness.records.run_warnings import mask_warnings, training_warnings
from harness.records.tensorboard import NoBoard, TensorBoard
from harness.signals import Interrupted, deferred
from harness.training.checkpoints import Checkpoints
from harness.training.state import TrainingState

log = logging.getLogger(__name__)


class Run:
    """One run, or one part of it if it is resumed.

    As a context manager it finishes what it has begun: whatever happens inside, the event
    `run_stop` and results.json say how the run ended. Ranks other than the chief only write a log.

    Args:
        config: Config.
        devices: Devices.
        mode: 'benchmark', 'train' or 'inference'.
        folder: The run's folder.
        earlier: Content of results.json if the run is resumed, otherwise None.
        scenes_sha256: Digest of the names of all scenes.
        synthetic: Which scenes are synthetic, see preflight.Scenes.

    Attributes:
        folder: The run's folder.
        mode: 'benchmark', 'train' or 'inference'.
        results: The future content of results.json.
        mllog: MLLogger of the MLPerf log.
        model_file: Path of the best model.
        bad_scenes: BadScenes of the run.
        board: TensorBoard of the run; it shows nothing until `open_tensorboard`.
        part: How often the run has been resumed.
        was_complete: Whether it had finished before it was resumed.
        continues: Whether this part continues from a checkpoint, inside the timed run.

    Raises:
        UserError: If a run is resumed with different scenes.
    """

    def __init__(
        self, config, devices, mode, folder, earlier=None, scenes_sha256=None, synthetic=()
    ):
        self._config, self._devices, self.is_chief = config, devices, devices.is_chief
        self.folder, self.mode, self.board = folder, mode, NoBoard()
        self.was_complete = earlier is not None and earlier["status"] in ("success", "extended")
        self._synthetic = synthetic
        parts = earlier["parts"] if earlier else []
        has_changed = earlier and earlier.get("scenes_sha256", scenes_sha256) != scenes_sha256
        if has_changed and mode != "inference":  # whose scenes may become more
            raise UserError(
                f"{folder} cannot be resumed: the scenes have changed. Restore the files in "
                "train_dir and inference_dir, or start a new run."
            )
        if parts and self.is_chief:
            remove_unfinished(folder)
        self.bad_scenes = BadScenes(folder, config.on_bad_scene)
        self.part, self._checkpoints = len(parts), Checkpoints(self.path("checkpoints"))
        self._found = self._checkpoints.newest() if parts else None  # path and state
        self._saved = None  # epochs and steps of the last checkpoint
        self._sampler = None
        self.continues = self._is_timed = self._found is not None
        self.model_file = self.path(config.model_file)  # absolute if it is an input
        self._log_file = self.path(config.log_file)
        self._opened = time.perf_counter()
        self._rank_log_file = self.folder / f"rank-{devices.rank}.log"
        self._rank_log = log_to_file(self._rank_log_file)
        self.mllog = None
        try:
            self._begin_part(parts, earlier, scenes_sha256)
        except BaseException:  # then nobody calls __exit__
            self._close_logs()
            raise

    def _begin_part(self, parts, earlier, scenes_sha256):
        """Open the MLPerf log, and write the configuration and the results of a new part."""
        config, devices, mode = self._config, self._devices, self.mode
        self._mlperf_file = self.path(config.mlperf_logfile) if self.is_chief else None
        n_kept = self._found[1].mlperf_bytes if self._found else 0
        self.mllog = open_mlperf_log(self._mlperf_file, REPOSITORY, n_kept)
        if self.is_chief:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log_file.touch()  # an unwritable file fails now and not after hours
            if parts:
                self._remove_lines(sum(part["status"] == keys.SUCCESS for part in parts))
            write_text(self.folder / "config.yaml", dump_config(config, self.folder.name))
        made_by = {  # of the last part; each part has its own copy
            "devices": devices.summary(),
            "versions": package_versions(),
            "git_commit": git_commit(),
        }
        part = {"start": now(), "status": "running", "seconds": 0.0, "checkpoint_seconds": 0.0}
        parts = [*parts, {**part, **made_by}]
        self.results = {
            "format": FORMAT,
            "status": "running",
            "run": self.folder.name,
            "mode": mode,
            "job": job_id(),
            "start": parts[0]["start"],
            "seconds": 0.0,
            "resumed": self.part,
            "parts": parts,
            **made_by,
            "machine": describe_machine(devices.kind) if self.is_chief else None,
            "scenes_sha256": scenes_sha256,
            "stamps_sha256": None,
            "config": recorded(config),
            "network": earlier["network"] if parts[:-1] else None,
            "training": None,
            "inference": None,
            "warnings": [],
        }
        self.save_results("running")

    def path(self, name):
        """A file of the run: in its folder unless absolute."""
        return self.folder / name

    def begin(self, file_cache):
        """Log who runs what and that the set-up begins; or that the run continues.

        Args:
            file_cache: How far the file cache was cleared, see build.clear_file_cache; or None.
        """
        self.results["parts"][-1]["file_cache"] = file_cache
        if self.continues:
            state = self._found[1]
            log.info("Continuing in epoch %d, step %d.", state.epoch, state.step + 1)
            self.mllog.event(mlperf_log.RESUMED, self.part, metadata={"epoch_num": state.epoch})
            return
        mlperf_log.log_submission(self.mllog, self._config, self.results["git_commit"])
        self.mllog.event(keys.CACHE_CLEAR, file_cache is not None and file_cache["cleared"])
        if self.part:
            self.mllog.event(mlperf_log.RESUMED, self.part, metadata={"epoch_num": 1})
        self.mllog.start(keys.INIT_START)

    def _start(self, network, n_train, n_eval):
        """Log the end of the set-up and the start of the timed run."""
        mlperf_log.log_hyperparameters(
            self._config, self._devices, self.mllog, n_train, n_eval, network
        )
        self._is_timed = True
        self.mllog.end(keys.INIT_STOP)
        self.mllog.start(keys.RUN_START)

    # --- training

    def start_training(self, trainer, facts):
        """Start the timed run with a new training, or continue from the newest checkpoint.

        Args:
            trainer: Trainer; gets the values of the checkpoint.
            facts: What results.json says about the training besides its history.

        Returns:
            TrainingState, of the checkpoint or a new one.

        Raises:
            UserError: If the run began with another network.
        """
        from harness.networks.model_files import describe

        network = describe(self._config.network, trainer.model)
        log.info("  %s", results.network_line(network, self._config.loss))
        if self._found is None:
            self.results["network"] = network
            self._start(network, facts["patches_train"], facts["patches_test"])
            return TrainingState()
        if (earlier := self.results["network"]) != network:
            raise UserError(
                f"{self.folder} cannot be resumed: its network was {earlier}, now it is {network}. "
                "Restore the file that `network` names, or start a new run."
            )
        path, state = self._found
        if self._devices.n_ranks > 1 and len(set(self._devices.gather(state.epoch))) > 1:
            raise UserError(
                f"The ranks see different checkpoints in {path.parent}. All ranks must see the "
                "same output_dir; start again."
            )
        self._checkpoints.restore(path, trainer, self.model_file if self.is_chief else None)
        self._saved = len(state.history), state.step
        if state.history:
            self._save_training(state, facts)
        return state

    def open_tensorboard(self, channels, cloud):
        """Let the chief show the masks of these patches after every epoch, and the scalars."""
        self.board = TensorBoard(
            self.path("tensorboard"), channels, cloud, self._config.profile_steps
        )

    def begin_epoch(self, trainer, state):
        """Prepare the trainer, and log the start of an epoch if the run does not continue in it."""
        trainer.begin_epoch(state.history)
        if not state.step:
            self.mllog.start(keys.EPOCH_START, metadata={"epoch_num": state.epoch})
        state.mlperf_bytes = self._mlperf_bytes()

    def begin_evaluation(self, state):
        """Log the end of the training steps of an epoch, and the start of its validation."""
        numbered = {"epoch_num": state.epoch}
        self.mllog.end(keys.EPOCH_STOP, metadata=numbered)
        self.mllog.start(keys.EVAL_START, metadata=numbered)

    def end_epoch(self, trainer, state, row, facts):
        """Log an epoch, and keep its history, the best model, a checkpoint and the results.

        Args:
            trainer: Trainer.
            state: TrainingState of the epoch; moves to the next one.
            row: The epoch's dictionary, see `results.epoch_row`.
            facts: What results.json says about the training besides its history.
        """
        numbered = {"epoch_num": row["epoch"]}
        self.mllog.event(keys.EVAL_ACCURACY, row["val_accuracy"], metadata=numbered)
        self.mllog.end(keys.EVAL_STOP, metadata=numbered)
        if self._config.training_seconds:  # all ranks stop after the same epoch
            row["seconds"] = max(self._devices.gather(row["seconds"]))
        state.end_epoch(row)
        state.mlperf_bytes = self._mlperf_bytes()
        config = self._config
        log.info("%s", results.epoch_line(state.history, config.epochs, config.training_seconds))
        if share := row.get("labels_replaced"):
            log.info("  %.1f %% of the labels were replaced", 100 * share)
        if self.is_chief:
            write_csv(self.path("history.csv"), results.HISTORY_COLUMNS, state.history)
            self.board.write_epoch(row, trainer.model)
        if not math.isfinite(row["val_loss"]):
            raise FloatingPointError(
                f"The validation loss became {row['val_loss']} in epoch {row['epoch']}. Lower "
                f"learning_rate ({self._config.learning_rate}), or set precision: float32."
            )
        if row is state.best and self.is_chief:
            from harness.networks.model_files import save_model

            with replacing(self.model_file) as temporary:
                save_model(trainer.model, temporary)
        if row["epoch"] % self._config.checkpoint_every == 0 or self.stop_reason(state):
            self._save_checkpoint(trainer, state)
        self._save_training(state, facts)

    def _save_training(self, state, facts):
        facts = facts | {"synthetic": "training" in self._synthetic}
        self.results["training"] = results.training_results(
            state, facts, self._config.target_accuracy
        )
        self.results["warnings"] = training_warnings(
            state.history, facts["patches_train"], self._config.batch_size
        )
        self.save_results("running")

    def stop_reason(self, state):
        """Why training stops now, as text; None if it continues."""
        config = self._config
        return state.stop_reason(
            config.epochs, config.target_accuracy, config.patience, config.training_seconds
        )

    def _save_checkpoint(self, trainer, state):
        totals = trainer.train_totals  # added up over all ranks, so all of them have to ask
        if self.is_chief:
            begin = time.perf_counter()
            self._checkpoints.save(state, totals, trainer, self.model_file)
            self.results["parts"][-1]["checkpoint_seconds"] += time.perf_counter() - begin
        self._saved = len(state.history), state.step

    @contextlib.contextmanager
    def checkpoint_on_interrupt(self, trainer, state):
        """Save a checkpoint before Interrupted leaves the block.

        Several ranks may have been interrupted at different steps: they continue from the last
        checkpoint of an epoch.
        """
        try:
            yield
        except Interrupted:
            is_new = (len(state.history), state.step) not in (self._saved, (0, 0))
            if is_new and self._devices.n_ranks == 1:
                self._save_checkpoint(trainer, state)
                log.info("Saved a checkpoint in epoch %d, step %d.", state.epoch, state.step)
            raise

    # --- inference

    def start_inference(self, model, paths):
        """Start the timed run if it has no training."""
        from harness.networks.model_files import describe

        self.results["network"] = describe(self.model_file, model)
        self._start(self.results["network"], 0, len(paths))

    def end_inference(self, masks, paths, seconds, facts):
        """Keep the scores of the masked scenes.

        Args:
            masks: MaskFolder with the masks of all scenes that were not skipped.
            paths: All scenes.
            seconds: Time of this part's inference [s].
            facts: What results.json says about the inference besides.
        """
        # Before `collect` compares each mask with its scene: later changes are recognised.
        self.results["stamps_sha256"] = stamps_sha256(self.folder, paths, self.model_file)
        skipped = set(self.bad_scenes.paths("inference"))
        rows = masks.collect([path for path in paths if str(path) not in skipped])
        dictionaries = (dict(zip(rows.dtype.names, row.item(), strict=True)) for row in rows)
        write_csv(self.path("scenes.csv"), SCENE_COLUMNS, dictionaries)
        # The devices needed this long for the scenes of earlier parts, if they were equally busy.
        earlier = sum(row["seconds"] for row in rows if row["part"] != self.part)
        seconds += earlier / self._devices.n_replicas
        facts = facts | {"synthetic": "inference" in self._synthetic}
        self.results["inference"] = inference = facts | results.inference_results(rows, seconds)
        self.results["warnings"] += mask_warnings(
            [row["cloud_fraction"] for row in rows], inference, self.mode != "inference"
        )
        self.write_line(results.inference_line(self._config, self._devices, inference))

    # --- records

    def log_summary(self):
        """Print what the finished run has reached, and make its report; nothing here is timed."""
        with contextlib.closing(log_to_file(self._rank_log_file)):
            for line in results.summary(self.results):
                log.info("  %s", line)
            log.info("Results are in %s", self.folder)
            if self._config.report and (path := make_report(self.folder)):
                log.info("Report: %s", path)

    def write_line(self, text):
        """Append a result line to log_file; not again if an earlier part wrote it."""
        if self.is_chief and text not in self._log_file.read_text(encoding="utf-8").splitlines():
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _remove_lines(self, n_kept):
        """Keep this many inference lines in log_file: one of an aborted part does not count."""
        lines = self._log_file.read_text(encoding="utf-8").splitlines(keepends=True)
        of_inference = [line for line in lines if line.startswith("CloudMask inference")]
        if removed := of_inference[n_kept:]:
            write_text(self._log_file, "".join(line for line in lines if line not in removed))

    def _mlperf_bytes(self):
        return self._mlperf_file.stat().st_size if self.is_chief else 0

    def save_results(self, status, error=None):
        """Write results.json; the chief does.

        Once the run has ended it includes the SHA-256 of the MLPerf log, which is complete then.
        """
        if not self.is_chief:
            return
        part = self.results["parts"][-1]
        part |= {
            "status": status,
            "seconds": time.perf_counter() - self._opened,
            "suspended_seconds": active_seconds.suspended,
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

    def _add_up_samples(self):
        """Put what all ranks used of their machines into the results; none of them may fail."""
        mine = self._sampler.totals()
        if self._devices.n_ranks == 1:
            ranks = [mine]
        else:  # only numbers can be gathered
            numbers = [self._devices.gather(-1.0 if n is None else n) for n in mine.values()]
            ranks = [
                dict(zip(mine, (None if n < 0 else n for n in rank), strict=True))
                for rank in zip(*numbers, strict=True)
            ]
        self.results["parts"][-1]["sampling"] = results.sampling_results(ranks)

    def __enter__(self):
        try:
            if self._config.sampling:
                from harness.records.sampling import open_sampler  # which needs psutil

                name = "samples.csv" if self.is_chief else f"samples-rank-{self._devices.rank}.csv"
                self._sampler = open_sampler(self.path(name), self._devices)
        except BaseException:  # then Python does not call __exit__ itself
            self.__exit__(*sys.exc_info())
            raise
        return self

    @deferred(always=True)  # or a signal would leave the status "running"
    def __exit__(self, kind, error, traceback):
        status = keys.SUCCESS if error is None else keys.ABORTED
        text = None if error is None else f"{kind.__name__}: {error}"
        n_bytes = 0
        try:
            self.board.close()
            if self._sampler:
                self._sampler.close()
                if error is None or self._devices.n_ranks == 1:
                    self._add_up_samples()
            n_bytes = self._mlperf_bytes()
            self._log_stop(status)
            self.save_results(status, text)
        except Exception as failure:
            # Only the last file that is written may say success, or none does.
            with contextlib.suppress(OSError):
                if n_bytes:
                    os.truncate(self._mlperf_file, n_bytes)
                self._log_stop(keys.ABORTED)
            with contextlib.suppress(OSError):
                self.save_results(keys.ABORTED, text or f"{type(failure).__name__}: {failure}")
            if error is None:  # otherwise the first error is reported
                raise
        finally:
            if error is not None:
                aborted = f"Aborted: {text}"
                record = log.makeRecord(log.name, logging.ERROR, "", 0, aborted, (), None)
                self._rank_log.handle(record)
            self._close_logs()

    def _close_logs(self):
        for handler in (*(self.mllog.logger.handlers if self.mllog else ()), self._rank_log):
            with contextlib.suppress(OSError):  # a full disk, which has been reported
                handler.close()
        logging.getLogger().removeHandler(self._rank_log)

    def _log_stop(self, status):
        if self._is_timed:
            self.mllog.end(keys.RUN_STOP, metadata={"status": status})


def peak_rss():
    """Peak memory of this process [bytes]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_report(folder):
    """Make report.html of a finished run; a failure is only a warning.

    Returns:
        Its path; None if it could not be made.
    """
    try:
        from harness.records import report  # imports jinja2, and later matplotlib

        return report.make_report(folder)
    except Exception as error:  # not Interrupted, a SystemExit: signals still end the program
        log.warning("No report.html: %s", one_line(error))
        return None
