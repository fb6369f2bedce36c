"""The mask files of a run, and which device masks which scene."""

import json
import logging
import shutil
import threading

import h5py
import numpy as np

from data_loader import read_scene
from harness.clock import active_seconds
from harness.data.hdf5 import open_hdf5, open_numbers, read_attribute
from harness.data.mask_files import mask_file, read_mask, read_valid
from harness.files import file_sha256, replacing
from harness.inference.scores import COUNTS, SCENE_COLUMNS, SCENE_PARTS, SCORES, THRESHOLD

TIMES = tuple(f"{part}_seconds" for part in SCENE_PARTS)
KINDS = dict.fromkeys((*SCENE_COLUMNS, *TIMES), float)  # of the values in a row
KINDS |= dict.fromkeys((*COUNTS, "out_of_range", "part"), int)
KINDS |= dict.fromkeys(("scene", "day_night", "device"), str)
# Rows as an array: a dictionary of each of 100,000 scenes would take 0.6 GB, this 40 MB.
ROW = np.dtype([(name, object if kind is str else kind) for name, kind in KINDS.items()])
MAX_NUMBER = 1e18  # larger ones do not fit

log = logging.getLogger(__name__)


class MaskFolder:
    """The folder of a run's masks: one file per scene, which contains its row of scenes.csv.

    All devices of all ranks write here. A device takes a scene by creating an empty lock file, so
    that faster devices mask more scenes.

    Args:
        folder: Path; made if absent.
        check: Called before each scene is taken; raises if the run must stop.
        model_file: Path of the model. Masks made by another model are made again.
        no_data: What masks are where a brightness temperature is missing: what the `network` says,
            or `clear`. Masks made by the other rule are made again.
        complete: Whether an earlier part of the run has masked all its scenes and ended in order:
            its masks are not read again, only their headers.
    """

    def __init__(self, folder, check, model_file, no_data, complete=False):
        self._folder, self._locks = folder, folder / ".locks"
        self._model_file = str(model_file)
        self._made_by = {"threshold": THRESHOLD, "model_sha256": file_sha256(model_file)}
        self._made_by["scores"] = " ".join(SCORES)  # of an earlier version, without new columns
        self._made_by["no_data"] = no_data
        self._check, self._stopped, self._complete = check, threading.Event(), complete
        self._locks.mkdir(parents=True, exist_ok=True)

    def remove_locks(self):
        """Make all scenes available, before any rank begins; killed ranks leave lock files."""
        for lock in self._locks.iterdir():
            lock.unlink()

    def take(self, paths):
        """Yield the scenes that no other device has taken and that have no mask yet."""
        for path in paths:
            if self._stopped.is_set():
                return
            try:
                (self._locks / path.stem).touch(exist_ok=False)
            except FileExistsError:
                continue
            self._check()  # not for scenes of others: it reads a file of each rank
            if self._row(path, whole=not self._complete) is None:
                yield path

    def stop(self):
        """Let the devices of this process take no more scenes."""
        self._stopped.set()

    def check_finite(self, path, probability):
        """Raise FloatingPointError if any probability of a scene is not finite."""
        if not np.isfinite(probability).all():
            raise FloatingPointError(
                f"{self._model_file} gives probabilities that are not finite for {path}. Use "
                "another model, or precision: float32."
            )

    def write(self, path, mask, valid, probability, uncertainty, row):
        """Write the mask of a scene, by the rule `no_data`, completely or not at all.

        Args:
            path: Scene file.
            mask: uint8 (H, W), the network's in all pixels; 1 is cloud.
            valid: bool (H, W), False where a brightness temperature is missing.
            probability: float32 (H, W), the network's in all pixels; or None to omit it.
            uncertainty: float32 (H, W), the same of Predictor; or None.
            row: Dictionary of scenes.csv; the seconds of writing, without fsync, are added.

        Returns:
            These seconds.
        """
        if self._made_by["no_data"] == "clear":
            mask = mask * valid
        with replacing(self._file(path)) as temporary:
            begin = active_seconds()
            with h5py.File(temporary, "w") as file:
                for name, values in {"mask": mask, "valid": valid.astype(np.uint8)}.items():
                    file.create_dataset(name, data=values, compression="gzip", compression_opts=1)
                kept = {"probability": probability, "uncertainty": uncertainty}
                for name, values in kept.items():
                    if values is not None:
                        file.create_dataset(name, data=values)
                file.attrs.update(scene=path.name, model=self._model_file, **self._made_from(path))
                seconds = active_seconds() - begin
                row = {**row, "write_seconds": seconds, "seconds": row["seconds"] + seconds}
                file.attrs["row"] = json.dumps(row)
        return seconds

    def collect(self, paths):
        """Return the rows of all scenes, sorted by scene, after all have been masked.

        Only headers are read: `take` has read the masks of earlier parts.

        Returns:
            Array (n,) of ROW.

        Raises:
            OSError: If masks are missing or damaged.
        """
        lost = []

        def found():
            for path in paths:
                if row := self._row(path, whole=False):
                    yield tuple(row[name] for name in KINDS)
                else:
                    lost.append(path.stem)

        rows = np.fromiter(found(), ROW)
        if lost:
            raise OSError(
                f"The masks of {len(lost)} of {len(paths)} scenes are missing or damaged, for "
                f"example that of {lost[0]}. Continue with --resume to make them again."
            )
        shutil.rmtree(self._locks)
        return rows[np.argsort(rows["scene"])]

    def _row(self, path, whole):
        """The row of a scene's mask; None if there is no mask, or a damaged or outdated one.

        Args:
            path: Scene file.
            whole: Whether to read the mask too, and not the headers of its file alone.
        """
        try:
            if not self._file(path).exists():
                return None
            with open_hdf5(self._file(path)) as file:
                made_from = self._made_from(path)
                if any(read_attribute(file, key) != value for key, value in made_from.items()):
                    return None
                shape = open_numbers(file, "mask", (None, None)).shape
                open_numbers(file, "valid", shape)
                if whole:
                    read_valid(file, read_mask(file).shape)
                return _check_row(json.loads(read_attribute(file, "row")))
        except (OSError, KeyError, TypeError, ValueError) as error:
            log.warning("The mask of %s is damaged and is made again: %s", path.stem, error)
            return None

    def _made_from(self, path):
        """Attributes that differ if the scene, the model or the threshold has changed."""
        info = path.stat()
        return {"scene_bytes": info.st_size, "scene_mtime": info.st_mtime_ns, **self._made_by}

    def _file(self, path):
        return mask_file(self._folder, path)


def _check_row(row):
    """Return a row of scenes.csv; a ValueError or TypeError if it is not such a row."""
    for name, kind in KINDS.items():
        value = row[name]
        is_kind = isinstance(value, int | float if kind is float else kind)
        if not is_kind or (kind is not str and abs(value) > MAX_NUMBER):  # NaN is not
            raise ValueError(f"its row has {name} {str(value)[:40]!r}")
    return row


def compare_masks(predictor, reference, path, n_channels):
    """Count the pixels of a scene on which the masks of two predictors differ.

    Args:
        predictor: ScenePredictor.
        reference: Another ScenePredictor.
        path: Scene file.
        n_channels: Channels of the scene.

    Returns:
        Dictionary with `scene`, `pixels` and `share`.

    Raises:
        SceneError: If the scene cannot be read.
    """
    masks = []
    for each in (predictor, reference):
        scene = read_scene(path, (None, None, n_channels), each.padding, labelled=False)
        masks.append(each(scene)[0] > THRESHOLD)
    n_pixels = int(np.count_nonzero(masks[0] != masks[1]))
    share = n_pixels / masks[0].size
    log.info(
        "inference_mode scene differs from patches (float32) in %d pixels of %s, %.3f %%.",
        *(n_pixels, path.stem, 100 * share),
    )
    return {"scene": path.stem, "pixels": n_pixels, "share": share}
