"""Before a run: its model, which scenes it uses, and whether the disk has room for its results."""

import logging
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_loader import SceneError, check_scene, find_scenes, split_scenes
from harness.console import counted, format_bytes, progress
from harness.data.bad_scenes import START, BadScenes
from harness.data.mask_files import mask_files
from harness.data.prefetch import ReaderPool
from harness.data.scene_files import day_or_night
from harness.data.scene_rows import is_synthetic
from harness.errors import UserError
from harness.files import json_sha256
from harness.labels.label_files import check_labels
from harness.networks.names import network_file, network_names

THREADS = 16
MOST_SYNTHETIC = 1000  # scenes of a set whose attribute `synthetic` is read
HEADER_BYTES = 1 << 16  # of a file; contains most of its headers
# Three checkpoints, each with 24 MB of weights and Adam's moments and an 8 MB model file.
CHECKPOINT_BYTES = 100_000_000
MASK_SHARE = 1 / 7  # bytes per pixel of a compressed mask: one bit each, if neighbours are random

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scenes:
    """The scene files of a run, each a list of paths.

    Attributes:
        train: Scenes to train on.
        validation: Scenes to validate with.
        inference: Scenes to mask.
        synthetic: 'training' and 'inference' if any scene there is synthetic.
    """

    train: list
    validation: list
    inference: list
    synthetic: frozenset = frozenset()

    def find_synthetic(self, read_timeout):
        """The same Scenes with `synthetic`; reads an attribute of up to MOST_SYNTHETIC files."""
        sets = {"training": [*self.train, *self.validation], "inference": self.inference}
        with ReaderPool(THREADS, read_timeout) as readers:
            found = frozenset(
                name
                for name, paths in sets.items()
                for step in [-(-len(paths) // MOST_SYNTHETIC) or 1]
                if any(readers.prefetch(is_synthetic, paths[::step], THREADS))
            )
        return replace(self, synthetic=found)


@dataclass(frozen=True)
class FoundScenes:
    """The scene files in the folders of the configuration, before bad ones are excluded.

    Attributes:
        train: Scenes in train_dir, for training and validation; empty if only masks are made.
        inference: Scenes in inference_dir; empty if there is only training.
    """

    train: list
    inference: list

    @classmethod
    def find(cls, train_dir, inference_dir, mode, shard=None):
        """Find the scenes that a mode needs.

        Args:
            train_dir: Directory or list of scenes.
            inference_dir: Another one.
            mode: 'benchmark', 'train' or 'inference'.
            shard: Which part of the scenes to mask, 'K/N'; None for all.

        Raises:
            FileNotFoundError: If a directory is missing or has no scenes.
            SceneError: If two scenes have the same name, or the shard has none.
            UserError: If there is a shard in another mode than 'inference'.
        """
        if shard and mode != "inference":
            raise UserError(
                f"shard: {shard} divides the scenes of --mode inference, found --mode {mode}. "
                "Remove shard."
            )
        train = find_scenes(train_dir) if mode != "inference" else []
        inference = every = find_scenes(inference_dir) if mode != "train" else []
        if shard and not (inference := [path for path in every if is_in_shard(path.name, shard)]):
            raise SceneError(
                f"None of {counted(len(every), 'scene')} in {inference_dir} is in shard {shard}. "
                "Choose a smaller number of shards."
            )
        return cls(train, inference)

    @property
    def sha256(self):
        """Digest of the names of all scenes."""
        return json_sha256([path.name for path in self.all])

    @property
    def all(self):
        """The paths of all scenes."""
        return [*self.train, *self.inference]

    def labelled(self, uses_bayes):
        """The paths of the scenes that must have a Bayesian mask.

        Args:
            uses_bayes: Whether training reads it. The masks of a benchmark are scored in any case.
        """
        return {*(self.train if uses_bayes else ()), *(self.inference if self.train else ())}

    def check(self, shape, read_timeout, on_bad_scene, labelled, known_bad=()):
        """Check the headers of all scenes.

        Args:
            shape: (H, W, C) of every scene.
            read_timeout: Seconds after which reading a file fails.
            on_bad_scene: 'stop' or 'skip'.
            labelled: Paths of the scenes that must have a Bayesian mask.
            known_bad: {path as text: reason} of scenes that need no check.

        Returns:
            {path as text: reason} of the scenes to skip.

        Raises:
            SceneError: If there are bad scenes and none may be skipped.
        """
        paths = [path for path in self.all if str(path) not in known_bad]
        _, bad = check_scenes(paths, shape, labelled, read_timeout)
        reject_bad_scenes(paths, bad, on_bad_scene)
        return {**dict(known_bad), **{str(path): reason for path, reason in bad.items()}}

    def split(self, train_split, skipped):
        """Exclude the skipped scenes and split the others.

        Args:
            train_split: Share of the scenes in train_dir to train on.
            skipped: {path as text: reason} of the scenes to skip.

        Returns:
            Scenes.

        Raises:
            SceneError: If too few scenes remain.
        """
        sets = []
        for paths in (self.train, self.inference):
            good = [path for path in paths if str(path) not in skipped]
            if paths and not good:
                raise SceneError(
                    f"None of {counted(len(paths), 'scene')} can be used: {skipped[str(paths[0])]}"
                )
            sets.append(good)
        good, inference = sets
        train, validation = split_scenes(good, train_split) if good else ([], [])
        return Scenes(train, validation, inference)


def is_in_shard(name, shard):
    """Whether a scene is in a part of all scenes, which depends on nothing but its name.

    So jobs that start at different times agree, also while the folder grows; no job needs to know
    of another.

    Args:
        name: Name of the scene file.
        shard: 'K/N'.
    """
    k, n = map(int, shard.split("/"))
    return int(json_sha256(name), 16) % n == k


def check_model(config, mode):
    """Check the network or the model file of a run, as far as that needs no TensorFlow.

    Raises:
        UserError: If there is no such network or file.
    """
    if mode == "inference":
        if not config.model_file.is_file():
            raise UserError(
                f"No model file {config.model_file}. Name a trained model, for example --model "
                "outputs/RUN/model.keras."
            )
    else:
        network_file(config.network, network_names() or [config.network])


def choose_skipped(config, mode, found, folder=None):
    """Check the scenes and the disk before a run.

    Args:
        config: Config.
        mode: 'benchmark', 'train' or 'inference'.
        found: FoundScenes.
        folder: Folder of the run that is resumed, which keeps its scenes; None for a new run.

    Returns:
        {path as text: reason} of the scenes to skip.

    Raises:
        SceneError: If scenes are bad and must not be skipped, or too few remain.
        UserError: If the disk is too small, or scenes of the resumed run are gone.
    """
    check_labels(config.labels, found.train)
    shape = config.shape_in(mode)
    labelled = found.labelled(config.uses_bayes)
    skipped = BadScenes(folder, config.on_bad_scene).reasons(START) if folder else {}
    if folder and mode == "inference":  # its scenes may become more
        check_nothing_is_gone(folder, found.inference)
        again = [path for path in found.inference if str(path) in skipped]
        bad = check_scenes(again, shape, labelled, config.read_timeout)[1]
        skipped = {str(path): reason for path, reason in bad.items()}
    if folder and config.on_bad_scene == "skip":
        return skipped  # scenes that turned bad later are met, and skipped, where they are read
    skipped = found.check(shape, config.read_timeout, config.on_bad_scene, labelled, skipped)
    found.split(config.train_split, skipped)
    if not folder:
        n_masks = len(found.inference)
        check_free_space(
            config.output_dir, results_bytes(config.scene_shape, n_masks, config.keep_probability)
        )
    return skipped


def check_nothing_is_gone(folder, paths):
    """Raise UserError if a run has a mask of a scene that is not among its scenes any more."""
    names = {path.stem for path in paths}
    if gone := [name for name in mask_files(folder) if name not in names]:
        raise UserError(
            f"{folder} cannot be resumed: {counted(len(gone), 'scene')} that it has masked "
            f"{'is' if len(gone) == 1 else 'are'} not in inference_dir any more, for example "
            f"{gone[0]}. Restore what is missing, or start a new run."
        )


def check_scenes(paths, shape, labelled, read_timeout=None):
    """Check the headers of scene files in parallel, with progress.

    Args:
        paths: Scene files.
        shape: (H, W, C) of every scene.
        labelled: Paths of the scenes that must have a Bayesian mask.
        read_timeout: Seconds after which reading a file fails.

    Returns:
        Two dictionaries by path: how the datasets of good scenes are stored (see `check_scene`),
        and what is wrong with bad ones.

    Raises:
        TimeoutError: If a file cannot be read in time.
    """

    def outcome(path):
        # HDF5 reads one file at a time in a process, but these threads wait for the disk together.
        # Whatever is wrong with the file, `check_scene` explains it better.
        with suppress(OSError):
            if path.is_file():
                with path.open("rb") as file:
                    file.read(HEADER_BYTES)
        try:
            return path, check_scene(path, shape, path in labelled), None
        except SceneError as error:
            return path, None, str(error)

    good, bad = {}, {}
    with ReaderPool(THREADS, read_timeout) as readers:
        outcomes = readers.prefetch(outcome, paths, 4 * THREADS)
        for path, found, reason in progress(outcomes, "Checking", len(paths)):
            if reason is None:
                good[path] = found
            else:
                bad[path] = reason
    return good, bad


def reject_bad_scenes(paths, bad, on_bad_scene):
    """Raise SceneError if bad scenes must not be skipped, after printing one line for each."""
    if bad and len(bad) == len(paths):  # for example because of a wrong IMAGE_H
        raise SceneError(f"None of {counted(len(paths), 'scene')} can be used: {bad[paths[0]]}")
    if bad and on_bad_scene == "stop":
        for reason in bad.values():
            log.error("Bad scene: %s", reason)
        raise SceneError(
            f"{len(bad)} of {len(paths)} scenes cannot be used, see above. Download or make them "
            "again, remove them, or skip them with on_bad_scene: skip."
        )


def results_bytes(scene_shape, n_masks, keep_probability):
    """Upper estimate of the bytes that a run writes while it trains and masks."""
    pixel_bytes = MASK_SHARE + 8 * keep_probability  # two views also have an uncertainty
    return CHECKPOINT_BYTES + n_masks * int(scene_shape[0] * scene_shape[1] * pixel_bytes)


def check_free_space(folder, n_bytes):
    """Compare the free space of a disk with what will be written.

    Args:
        folder: Where; it need not exist yet.
        n_bytes: How much.

    Returns:
        Free bytes.

    Raises:
        UserError: If there is too little.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(
            f"{folder} has {format_bytes(free)} free, but the run needs up to "
            f"{format_bytes(n_bytes)} for masks and checkpoints. Free some space or set another "
            "output_dir."
        )
    return free


def describe_scenes(paths, stored, samples):
    """What `--mode check` prints about one set of scenes: {line of its table: text}.

    Args:
        paths: All scenes of the set.
        stored: How the datasets of each good scene are stored, by path.
        samples: List of (data_loader.Scene, seconds to read it).
    """
    counts = Counter(map(day_or_night, paths))
    lines = {
        "scenes": str(len(paths)),
        **{kind: str(counts[kind]) for kind in ("day", "night", "unknown") if counts[kind]},
        "bad": str(len(paths) - len(stored)),
        "size": format_bytes(sum(path.stat().st_size for path in stored)),
    }
    for name in ("refs", "bts", "bayes"):
        ways = Counter(found.get(name, "none") for found in stored.values())
        lines[name] = ", ".join(
            way if len(ways) == 1 else f"{way} ({n})" for way, n in ways.most_common()
        )
    if samples:
        scenes = [scene for scene, _ in samples]
        cloud = [scene.cloud.mean() for scene in scenes if scene.cloud is not None]
        lines |= {
            "sample": counted(len(samples), "scene"),
            "pixels without data": f"{1 - np.mean([s.valid.mean() for s in scenes]):.1%}",
            "cloud in the label": f"{np.mean(cloud):.1%}" if cloud else "no Bayesian mask",
            "numbers out of range": str(sum(s.out_of_range for s in scenes)),
            "reading": f"{np.median([seconds for _, seconds in samples]):.3f} s per scene",
        }
    return lines
