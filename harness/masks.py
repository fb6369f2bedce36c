"""The mask files of a run, and which device makes which."""

import json
import shutil
import threading
import time
from contextlib import suppress

import h5py

from harness.run import replacing


class MaskFolder:
    """The folder of a run's masks: one file a scene, which carries its row of scenes.csv.

    All devices of all ranks write here. Which device masks which scene is settled by an empty file
    for each scene taken, so that who is faster masks more.

    Args:
        folder: Path; made if absent.
        check: Called before each scene is dealt; raises where no more should be.
    """

    def __init__(self, folder, check):
        self._folder, self._claims = folder, folder / ".claims"
        self._check, self._stopped = check, threading.Event()
        self._claims.mkdir(parents=True, exist_ok=True)

    def deal(self, paths):
        """Yield the scenes that no other device has taken."""
        for path in paths:
            if self._stopped.is_set():
                return
            self._check()
            with suppress(FileExistsError):
                (self._claims / path.stem).touch(exist_ok=False)
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
                file.attrs.update(scene=path.name, **attributes)
                seconds = time.perf_counter() - begin
                row = {**row, "write_seconds": seconds, "seconds": row["seconds"] + seconds}
                file.attrs["row"] = json.dumps(row)

    def collect(self, paths):
        """Return the rows of all scenes, sorted by scene, once all are masked; end the dealing."""
        rows = []
        for path in paths:
            with h5py.File(self._file(path), "r") as file:
                rows.append(json.loads(file.attrs["row"]))
        shutil.rmtree(self._claims)
        return sorted(rows, key=lambda row: row["scene"])

    def _file(self, path):
        return self._folder / f"{path.stem}.h5"
