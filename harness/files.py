"""Write files completely or not at all; check files of others before they are used."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
import uuid
from pathlib import Path

from harness.console import printable
from harness.errors import UserError

MAX_TEXT_BYTES = 1 << 28  # of a file that is read whole; a row of samples.csv a second: weeks


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path with the same suffix; on success, fsync it and rename it to `path`.

    Whatever happens, `path` is unchanged or complete. Nobody can put a link at the temporary path
    before, as its name is random; a link at `path` itself is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def walk_files(directory):
    """Yield the files below a directory; see `walk_folders`."""
    for folder, _, files in walk_folders(directory):
        yield from (folder / name for name in files)


def walk_folders(directory, hidden=True):
    """Yield the folders below a directory; follows links to folders, visits each folder once.

    A missing directory has no folders.

    Args:
        directory: Path, yielded first.
        hidden: Whether to visit folders below it whose name begins with a dot.

    Yields:
        Path of a folder, names of its subfolders that will be visited, names of its files.
    """
    seen = set()

    def fail(error):  # os.walk ignores folders that it cannot read
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, subfolders, files in os.walk(directory, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(folder))
        subfolders[:] = [
            name
            for name in subfolders
            if (hidden or not name.startswith("."))
            and os.path.realpath(Path(folder, name)) not in seen
        ]
        yield Path(folder), subfolders, files


def remove_unfinished(folder):
    """Remove the temporary files of `replacing` below a folder, left by a killed process."""
    for path in Path(folder).rglob(".*.part*"):
        if path.is_file():
            path.unlink()


@contextlib.contextmanager
def new_folder(path):
    """Give a temporary folder next to `path`; on success, rename it to `path`.

    Raises:
        FileExistsError: If `path` exists.
    """
    temporary = path.with_name(f".new-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():  # renaming would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path, text):
    """Write a text file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, columns, rows):
    """Write dictionaries as the rows of a CSV file, completely or not at all.

    Texts cannot forge a line, and no formula: spreadsheets calculate what begins with = + - @.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value):
    if not isinstance(value, str):
        return value
    is_formula = value.startswith(tuple("=+-@"))
    with contextlib.suppress(ValueError):
        is_formula = is_formula and not math.isfinite(float(value))  # -1 is none
    return "'" * is_formula + printable(value)


def write_json(path, value):
    """Write a JSON file, completely or not at all."""
    write_text(path, json.dumps(jsonable(value), indent=2) + "\n")


def jsonable(value):
    """Copy nested dictionaries and lists for JSON; NaN and infinity become null.

    Numbers of numpy become those of Python.
    """
    if isinstance(value, dict):
        return {key: jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def json_sha256(value):
    """SHA-256 of a JSON-compatible value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_sha256(path):
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_regular(path):
    """Open a regular file for reading; see `check_regular`."""
    check_regular(path)
    return path.open("rb")


def read_text(path):
    """Read a text file in UTF-8; see `check_regular`."""
    check_regular(path, MAX_TEXT_BYTES)
    return Path(path).read_bytes().decode("utf-8")


def check_regular(path, max_bytes=None):
    """Raise an OSError unless the path is a regular file or a link to one, and not too large.

    A pipe would block the program until somebody writes to it; a device may have no end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
    if max_bytes and status.st_size > max_bytes:
        raise OSError(f"{path} has {status.st_size} bytes, expected at most {max_bytes}")


def owner_in(folder):
    """The number of this user in a folder: NFS and containers map users, geteuid may differ.

    Raises:
        OSError: If no file can be made there.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def open_own(path, own):
    """Open a file of this user for reading, unbuffered, in a folder where others may write.

    Args:
        path: Path of the file.
        own: The user's number, of `owner_in`.

    Raises:
        OSError: Unless it is a regular file of this user with one hard link, and not a link.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0)
    status = os.fstat(file.fileno())
    if (status.st_uid, status.st_nlink) != (own, 1) or not stat.S_ISREG(status.st_mode):
        file.close()
        raise OSError(f"{path} is not a file of this user alone")
    return file


def check_own(path):
    """Check a file, or a folder and all that it contains, before a run writes there or deletes.

    Others may have made it, with links to files that the user would not have named.

    Args:
        path: Path of a file or folder; one that is missing passes.

    Raises:
        UserError: Unless all of it is folders, and regular files with one hard link, of the user.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    _check_entry(path, None)  # os.walk would follow it
    own = owner_in(path if path.is_dir() else path.parent)
    _check_entry(path, own)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # a temporary file of another rank
                _check_entry(Path(folder, name), own)


def _check_entry(path, own):
    status = os.lstat(path)
    is_file = stat.S_ISREG(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        found = "is a link"
    elif not is_file and not stat.S_ISDIR(status.st_mode):
        found = "is not a regular file"
    elif is_file and status.st_nlink > 1:
        found = f"has {status.st_nlink} hard links"
    elif own not in (None, status.st_uid):
        found = f"belongs to the user {status.st_uid}"
    else:
        return
    raise UserError(
        f"{path} {found}; a run writes only to its own files. Remove it, or copy the folder with "
        "'cp -rL' and use the copy."
    )


def sync(path):
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path, in_use):
    """Hold an exclusive lock on a folder or file, on file systems that support locks.

    Args:
        path: Path of a folder, or of a file, which is created if it is missing. NFS locks only
            files that are open for writing, so it has no locks for folders.
        in_use: Message of the error if another process holds the lock.

    Raises:
        UserError: If another process holds the lock.
    """
    is_folder = Path(path).is_dir()
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(in_use) from None
        except OSError:
            pass  # this file system has no locks
        yield
    finally:
        os.close(descriptor)
