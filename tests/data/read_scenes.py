"""Read damaged scene files; tests/data/test_fuzz.py runs this in a process of its own.

python tests/data/read_scenes.py LIST HEIGHT WIDTH CHANNELS prints a line before and after each file
that LIST names. The last line names a file that takes too long or ends the process.
"""

import faulthandler
import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data_loader import SceneError, read_scene

SECONDS = 20  # for one file
MEMORY = 256 << 20  # bytes that reading a scene of a few kilobytes may take


def main(listed, *shape):
    paths = json.loads(Path(listed).read_text(encoding="utf-8"))
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    used = 1024 * int(status.partition("VmSize:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for path in paths:
        print(json.dumps({"begin": path}), flush=True)  # noqa: T201
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        print(json.dumps({"end": path, **outcome(path, shape)}), flush=True)  # noqa: T201
        faulthandler.cancel_dump_traceback_later()


def outcome(path, shape):
    try:
        scene = read_scene(Path(path), shape)
    except SceneError as error:
        return {"outcome": "refused", "text": str(error)}
    except Exception as error:
        return {"outcome": "error", "text": f"{type(error).__name__}: {error}"}
    if scene.channels.dtype != np.float32 or not np.isfinite(scene.channels).all():
        return {"outcome": "error", "text": "channels are not finite"}
    return {"outcome": "scene", "text": ""}


if __name__ == "__main__":
    faulthandler.enable()
    main(sys.argv[1], *map(int, sys.argv[2:]))
