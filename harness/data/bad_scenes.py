"""What a run does about scenes that cannot be used: stop, or skip them and keep a record."""

import json
import logging
import threading
from pathlib import Path

from harness.data.scene_files import SceneError
from harness.errors import UserError
from harness.files import json_sha256, read_text, write_json

START = "start"  # found before the run; the other phases are training, validation and inference

log = logging.getLogger(__name__)


class BadScenes:
    """The bad scenes of a run, as small files in its folder to which every rank adds.

    Args:
        folder: The run's folder.
        policy: 'stop' or 'skip', the configuration's `on_bad_scene`.
    """

    def __init__(self, folder, policy):
        self._folder, self._policy = Path(folder) / "bad_scenes", policy
        self._lock = threading.Lock()

    def record(self, path, reason, phase):
        """Record a skipped scene and print a warning, once per scene and phase."""
        file = self._folder / f"{phase}-{json_sha256(str(path))[:16]}.json"
        with self._lock:
            if not file.exists():
                log.warning("Skipped: %s", reason)
                write_json(file, {"path": str(path), "reason": str(reason), "during": phase})

    def handler(self, phase, paths):
        """What to call with the path and the SceneError of a scene that turns bad during the run.

        Args:
            phase: 'training', 'validation' or 'inference'.
            paths: All scenes of this phase.

        Returns:
            Function of a path and an error. It raises the error if the policy is 'stop', and a
            SceneError once more than half of the scenes were bad in this part of the run.
        """

        def handle(path, error):
            if self._policy == "stop":
                raise error
            self.record(path, error, phase)
            if 2 * (n := self._count(phase)) > len(paths):
                raise SceneError(
                    f"{n} of {len(paths)} scenes for {phase} could not be read: {error} Check "
                    "that their file system is available, then continue with --resume."
                )

        return handle

    def all(self):
        """Every skipped scene, sorted: {'path', 'reason', 'during'}."""
        files = self._folder.glob("[a-z]*.json")  # not the temporary ones
        found = {(scene["path"], scene["during"]): scene for scene in map(_read, files)}
        return [scene for _, scene in sorted(found.items())]

    def reasons(self, phase):
        """{path as text: reason} of the scenes that were skipped in one phase."""
        return {scene["path"]: scene["reason"] for scene in self.all() if scene["during"] == phase}

    def paths(self, phase):
        """The paths of the scenes that were skipped in one phase, as text."""
        return list(self.reasons(phase))

    def _count(self, phase):
        """How many scenes were skipped in one phase; reads no file, as each bad scene asks."""
        return sum(1 for _ in self._folder.glob(f"{phase}-*.json"))

    def begin_part(self):
        """Let scenes that were bad in training count no more: their file system may be back."""
        for phase in ("training", "validation"):
            for file in self._folder.glob(f"{phase}-*.json"):
                file.replace(file.with_name(f"earlier-{file.name}"))

    def forget(self, phase):
        """Try the scenes of one phase again."""
        for file in self._folder.glob(f"{phase}-*.json"):
            file.unlink()


def _read(file):
    try:
        scene = json.loads(read_text(file))
        return {key: str(scene[key]) for key in ("path", "reason", "during")}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} should describe a skipped scene ({type(error).__name__}: {error}). Remove it."
        ) from None
