"""Find scene files, and read what their names and folders say."""

import fnmatch
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from harness.console import counted
from harness.errors import UserError
from harness.files import walk_files

SCENE_NAME = "S3[A-D]*.hdf"  # all published scenes are of Sentinel-3A
PRODUCT_NAME = re.compile(r"(S3[A-D])_SL_1_RBT_+(\d{8}T\d{6})_(\d{8}T\d{6})_\d{8}T\d{6}_\w*")


class SceneError(UserError):
    """Scenes that cannot be used; the message names the file, or the number, and what is wrong."""


def find_scenes(directory):
    """List the scene files below a directory, in the same order on every file system.

    Raises:
        FileNotFoundError: If the directory is missing or contains no scene.
        SceneError: If two scenes have the same name.
    """
    directory = Path(directory)
    is_folder = directory.is_dir()
    found = walk_scenes(directory) if is_folder else ()
    paths = sorted(found, key=lambda path: path.relative_to(directory).parts)
    if not paths:
        missing = f"scenes matching '{SCENE_NAME}' under" if is_folder else "directory"
        raise FileNotFoundError(
            f"No {missing} {directory}. Set train_dir and inference_dir in the configuration; see "
            "docs/data.md."
        )
    names = Counter(path.name for path in paths)
    if duplicates := [name for name, n in names.items() if n > 1]:
        raise SceneError(
            f"{counted(len(duplicates), 'duplicate scene name')} under {directory}, for example "
            f"{duplicates[0]}. Masks are named after their scenes: remove the duplicates."
        )
    return paths


def walk_scenes(directory):
    """Yield the scene files below a directory, through linked folders too, each folder once."""
    return (path for path in walk_files(directory) if fnmatch.fnmatch(path.name, SCENE_NAME))


def day_or_night(path):
    """`day` or `night` if the scene's folder, or one above it, is named so; else `unknown`."""
    return next((part for part in reversed(path.parts[:-1]) if part in ("day", "night")), "unknown")


def product_times(name):
    """Start and end of a product from its name, as datetimes in UTC; None if it has no times."""
    if not (product := PRODUCT_NAME.match(name)):
        return None
    try:
        return tuple(
            datetime.strptime(text, "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
            for text in product.groups()[1:]
        )
    except ValueError:  # no such date
        return None
