"""Find scene files, and read what their names and folders say."""

import logging
import re
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

from harness.console import counted
from harness.errors import UserError
from harness.files import read_text, walk_folders

SCENE_NAME = "S3[A-D]*.hdf"  # for messages; all published scenes are of Sentinel-3A
SCENE = re.compile(r"S3[A-D][\w.-]*\.hdf")
COPY = re.compile(r".*([^\w.-].*|[-_.]?copy\d*|[-_]checkpoint)\.hdf", re.IGNORECASE)
PRODUCT = re.compile(r"S3[A-D].*\.SEN3(\.zip|\.tar|\.tar\.gz|\.tgz)?", re.IGNORECASE)
LIKE_A_SCENE = re.compile(r".*S3[A-D].*\.(hdf|hdf5|h5|he5)(\..*)?", re.IGNORECASE)
PRODUCT_NAME = re.compile(r"(S3[A-D])_SL_1_RBT_+(\d{8}T\d{6})_(\d{8}T\d{6})_\d{8}T\d{6}_\w*")

log = logging.getLogger(__name__)


class SceneError(UserError):
    """Scenes that cannot be used; the message names the file, or the number, and what is wrong."""


def find_scenes(directory):
    """List the scene files below a directory or in a list, in the same order on every file system.

    Hidden folders are skipped. What is ignored although it looks like a scene is printed, one line
    for each reason.

    Args:
        directory: Path of a directory, or of a text file with one path per line, see `walk_scenes`.

    Raises:
        FileNotFoundError: If the directory is missing or contains no scene.
        SceneError: If two scenes have the same name, or a list contains something else.
    """
    directory = Path(directory)
    exists = directory.is_dir() or directory.is_file()
    ignored = defaultdict(list)
    found = walk_scenes(directory, ignored) if exists else ()
    paths = sorted(found, key=lambda path: path.parts)
    for reason, names in ignored.items():  # not a warning: each rank would print it
        log.info(
            "Ignored below %s: %s, for example %r: %s",
            *(directory, counted(len(names), "name"), min(names), reason),
        )
    if not paths:
        missing = f"scenes matching '{SCENE_NAME}' under" if exists else "directory"
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
    products = list(map(_product_of, paths))
    versions = Counter(filter(None, products))
    if twice := [
        path.name for path, product in zip(paths, products, strict=True) if versions[product] > 1
    ]:
        log.info(
            "%s below %s are versions of the same products, for example %s and %s. Remove one of "
            "each: validation would use what training has seen.",
            *(counted(len(twice), "scene"), directory, *sorted(twice)[:2]),
        )
    return paths


def walk_scenes(directory, ignored=None):
    """Yield the scene files below a directory, through linked folders too, each folder once.

    Args:
        directory: Path; or that of a text file that lists scene files, one path per line, relative
            to the folder of the list. Empty lines are ignored.
        ignored: Dictionary that receives names that only look like scenes, by the reason.

    Raises:
        SceneError: If a list cannot be read, or contains the path of something else.
    """
    if Path(directory).is_file():
        yield from _listed_scenes(Path(directory))
        return
    for folder, subfolders, files in walk_folders(directory, hidden=False):
        for name in subfolders:
            if ignored is not None and (reason := _near_miss(name, is_folder=True)):
                ignored[reason].append(name)
        for name in files:
            if (reason := _near_miss(name)) is None and SCENE.fullmatch(name):
                yield folder / name
            elif reason and ignored is not None:
                ignored[reason].append(name)


def _listed_scenes(file):
    try:
        lines = read_text(file).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SceneError(f"{file} should be a directory, or a list of scenes: {error}.") from None
    for number, line in enumerate(filter(None, map(str.strip, lines)), 1):
        path = file.parent / line
        if not SCENE.fullmatch(path.name) or _near_miss(path.name):
            raise SceneError(
                f"{file} should list scene files, {SCENE_NAME}, one path per line; entry {number} "
                f"is {line[:200]!r}. Remove it from the list."
            )
        yield path


def _near_miss(name, is_folder=False):
    """Why a file or folder that looks like a scene is none; None if it is one, or does not."""
    if name.startswith("."):  # unfinished downloads, and what a Mac adds
        return None
    if PRODUCT.fullmatch(name):
        return "products are converted by tools/convert_sen3.py."
    if not LIKE_A_SCENE.fullmatch(name):
        return None
    if is_folder:
        return "a folder is no scene; files in it are read if their names are right."
    if COPY.fullmatch(name):
        return "this is the name of a copy. Remove or rename it."
    return None if SCENE.fullmatch(name) else "names of scenes are S3A*.hdf. Rename or remove it."


def _product_of(path):
    """Platform and times of a product from its name; None if it has none."""
    product = PRODUCT_NAME.match(path.name)
    return product and product.groups()


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


def short_name(scene):
    """Satellite and start of a scene named as a product; any other name as it is."""
    times = product_times(scene)
    return f"{PRODUCT_NAME.match(scene)[1]} {times[0]:%Y-%m-%d %H:%M}" if times else scene
