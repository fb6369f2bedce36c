"""Files that are either whole or absent, and their digests."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import stat
import threading
from pathlib import Path

from harness.console import printable


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path of the same suffix; when all is well, sync it and rename it to `path`.

    Whatever happens, `path` is either as it was or whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.stem}.{os.getpid()}-{threading.get_ident()}.part{path.suffix}"
    )
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def walk_files(directory):
    """Yield the files below a directory, through linked folders too, each folder once.

    A directory that is missing has none.
    """
    seen = set()

    def fail(error):  # os.walk passes over a folder that it cannot read
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, subfolders, files in os.walk(directory, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(folder))
        subfolders[:] = [
            name for name in subfolders if os.path.realpath(Path(folder, name)) not in seen
        ]
        yield from (Path(folder, name) for name in files)


def remove_unfinished(folder):
    """Remove what `replacing` left below a folder when its process was killed."""
    for path in Path(folder).rglob(".*.part*"):
        if path.is_file():
            path.unlink()


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, columns, rows):
    """Write dictionaries as CSV, a line each, whole or not at all; a missing number is `nan`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: printable(v) if isinstance(v, str) else v for k, v in row.items()})
    write_text(path, text.getvalue())


def write_json(path, value):
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(jsonable(value), indent=2) + "\n")


def jsonable(value):
    """Copy nested dictionaries and lists for JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def json_sha256(value):
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_sha256(path):
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_regular(path):
    """Open a regular file for reading; see `check_regular`."""
    check_regular(path)
    return path.open("rb")


def check_regular(path):
    """Raise an OSError unless the path is a regular file or a link to one.

    A pipe would block the program until somebody writes to it.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")


def sync(path):
    """See that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
