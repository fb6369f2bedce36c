"""The mask files of a run, and which device makes which."""

import json
import logging
import shutil
import threading
import time
from contextlib import suppress

import h5py

from harness.data.hdf5 import open_hdf5
from harness.files import replacing

log = logging.getLogger(__name__)


class MaskFolder:
    """The folder of a run's masks: one file a scene, which carries its row of scenes.csv.

    All devices of all ranks write here. Which device masks which scene is settled by an empty file
    for each scene taken, so that who is faster masks more.

    Args:
        folder: Path; made if absent.
        check: Called before each scene is dealt; raises where no more should be.
        made_by: Attributes of each mask: how it was made. Masks made otherwise are made again.
    """

    def __init__(self, folder, check, made_by):
        self._folder, self._claims, self._made_by = folder, folder / ".claims", made_by
        self._check, self._stopped = check, threading.Event()
        self._claims.mkdir(parents=True, exist_ok=True)

    def forget_claims(self):
        """Let all scenes be dealt; before any rank begins. Ranks that were killed left claims."""
        for claim in self._claims.iterdir():
            claim.unlink()

    def deal(self, paths):
        """Yield the scenes that no other device has taken, and that have no mask yet."""
        for path in paths:
            if self._stopped.is_set():
                return
            self._check()
            with suppress(FileExistsError):
                (self._claims / path.stem).touch(exist_ok=False)
                if self._row(path) is None:
                    yield path

    def stop(self):
        """Deal no more scenes to the devices of this process."""
        self._stopped.set()

    def write(self, path, mask, probability, row, **attributes):
        """Write the mask of a scene, whole or not at all.

        Args:
            path: Scene file.
            mask: uint8 (H, W), 1 is cloud.
            probability: float32 (H, W), or None to leave it out.
            row: Dictionary of scenes.csv; the seconds of writing, not of flushing, are added.
            attributes: More to say of the mask.
        """
        with replacing(self._file(path)) as temporary:
            begin = time.perf_counter()
            with h5py.File(temporary, "w") as file:
                file.create_dataset("mask", data=mask, compression="gzip", compression_opts=1)
                if probability is not None:
                    file.create_dataset("probability", data=probability)
                file.attrs.update(scene=path.name, **self._made_from(path), **attributes)
                seconds = time.perf_counter() - begin
                row = {**row, "write_seconds": seconds, "seconds": row["seconds"] + seconds}
                file.attrs["row"] = json.dumps(row)

    def collect(self, paths):
        """Return the rows of all scenes, sorted by scene, once all are masked; end the dealing."""
        rows = [self._row(path) for path in paths]
        if lost := [path.stem for path, row in zip(paths, rows, strict=True) if row is None]:
            raise OSError(f"The masks of {len(lost)} scene(s) are damaged, {lost[0]} for one.")
        shutil.rmtree(self._claims)
        return sorted(rows, key=lambda row: row["scene"])

    def _row(self, path):
        """The row of a scene's mask; None if there is no mask, or one that is not whole."""
        try:
            if not self._file(path).exists():
                return None
            with open_hdf5(self._file(path)) as file:
                if any(file.attrs[key] != value for key, value in self._made_from(path).items()):
                    return None
                _ = file["mask"][:]
                return json.loads(file.attrs["row"])
        except (OSError, KeyError, ValueError) as error:
            log.warning("Made the mask of %s again: %s", path.stem, error)
            return None

    def _made_from(self, path):
        """Attributes of a mask that another scene, model or threshold would change."""
        info = path.stat()
        return {"scene_bytes": info.st_size, "scene_mtime": info.st_mtime_ns, **self._made_by}

    def _file(self, path):
        return self._folder / f"{path.stem}.h5"
