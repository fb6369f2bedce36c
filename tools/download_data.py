r"""Download the CloudMask data set, 180 GB, or a sample of it.

    python tools/download_data.py --dest data                       # 970 + 100 scenes
    python tools/download_data.py --dest data --scenes 10           # ten of each set
    python tools/download_data.py --dest data --verify              # offline, by sha256

Files land in DEST/one-day and DEST/ssts, below day/ and night/ as in the bucket; no credentials are
needed. What is to come is listed first, and refused where the disk is too small. A file has its own
name only when it is whole and its ETag is right; until then it is hidden and ends in `.download`.
A download that was stopped goes on from there when the same command is given again.

DEST/manifest.csv holds a line for each whole file: key (the path below DEST), size, etag, sha256. A
file is skipped if its line has the size and ETag of the bucket and the file has that size; its
content is not read again: that is what --verify does. A file without such a line, of another tool
say, is compared with the ETag first and fetched only if it differs.

--scenes N takes N scenes of each set, by day and by night in proportion, at least one of each from
N = 2 on. The order is that of the SHA-256 of their names: the same N gives the same scenes, and a
greater N adds to them.
"""

import argparse
import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import itertools
import logging
import queue
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from _command import exit_status
from harness import console as screen
from harness.console import format_bytes, format_duration, log_to_screen, progress, table
from harness.errors import Failure, UserError, one_line
from harness.files import file_sha256, json_sha256, sync, walk_files, write_csv
from harness.signals import deferred, install_handlers

ENDPOINT = "https://s3.echo.stfc.ac.uk"
BUCKET = "sciml-datasets"
PREFIX = "es/cloud_slstr_ds1"
SETS = ("one-day", "ssts")
MANIFEST = "manifest.csv"
COLUMNS = ("key", "size", "etag", "sha256")
PARTIAL = ".download"

ATTEMPTS = 8  # in a row that bring no byte: with their pauses, two minutes
FRESH_STARTS = 3  # of a file that changes in the bucket or comes damaged
LONGEST_PAUSE = 60  # [s] between attempts; the first is half a second to a second
TIMEOUT = 60  # [s] without a byte
GRACE = 2  # [s] that transfers have to end in when the program is stopped
BLOCK = 1 << 18  # bytes
# Bytes of a part, as the usual programs divide large files when they upload them.
PART_SIZES = [n << 20 for n in (8, 5, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)]
MOST_PARTS = 10_000  # S3's limit
ETAG = re.compile(r"([0-9a-f]{32})(?:-([1-9]\d{0,4}))?")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
SCENE_NAME = "S3[A-D]*.hdf"  # as in harness.data.scene_files, which needs h5py

log = logging.getLogger("download_data")


class Transient(Exception):
    """A fault of network or server that may pass."""


class Refused(Failure):
    """The server will not give what it was asked for."""


class Changed(Exception):
    """The object has no longer the ETag that it was asked for by."""


class Damaged(Exception):
    """What came is not what the ETag says, or cannot be shown to be."""


class Stopped(Exception):
    """The program ends: leave the file as it is."""


@dataclass
class Transfer:
    """A file of the data set, and how far it has come.

    Attributes:
        key: Of the object, below the prefix; the file's path below DEST.
        size: Bytes of the object.
        etag: Of the object, without quotes.
        received: Bytes that are here.
        sha256: Of the file, once it is whole.
        checked: Whether the ETag could be computed from the file.
    """

    key: str
    size: int
    etag: str
    received: int = 0
    sha256: str = ""
    checked: bool = True

    def partial(self, dest):
        """Path of the unfinished file. That of another ETag has another name."""
        path = dest / self.key
        return path.with_name(f".{path.name}.{json_sha256(self.etag)[:12]}{PARTIAL}")


# --- the bucket -----------------------------------------------------------------------------


class Bucket:
    """A public S3 bucket below a prefix.

    Its methods raise Transient, Refused and Changed.
    """

    def __init__(self, endpoint, bucket, prefix, connections):
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        config = Config(
            signature_version=UNSIGNED,
            s3={"addressing_style": "path"},
            connect_timeout=TIMEOUT,
            read_timeout=TIMEOUT,
            retries={"total_max_attempts": 1},  # we retry ourselves, bodies too
            max_pool_connections=connections,
            response_checksum_validation="when_required",  # stores other than AWS lack them
        )
        self.where = f"{bucket} at {endpoint}"
        try:
            self._client = boto3.client(
                "s3", endpoint_url=endpoint, region_name="us-east-1", config=config
            )
        except ValueError as error:
            raise UserError(f"--endpoint should be like {ENDPOINT}, found {endpoint!r}.") from error
        self._bucket, self._prefix = bucket, f"{prefix.strip('/')}/".lstrip("/")

    def close(self):
        """Close the connections."""
        self._client.close()

    def listing(self, name):
        """All objects of a set, each once, as Transfers in the order of their keys.

        Raises:
            UserError: If there is nothing.
        """
        prefix, found = f"{self._prefix}{name}/", {}
        with self._translated():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix
            )
            for page in pages:
                if not page.keys() & {"Name", "IsTruncated"}:
                    raise Transient("no list of files came")
                if page.get("IsTruncated") and not page.get("NextContinuationToken"):
                    raise Transient("the list of files breaks off")
                for entry in page.get("Contents", []):
                    key, size, etag = entry["Key"], entry["Size"], plain_etag(entry["ETag"])
                    if not key.startswith(prefix):
                        raise Refused(f"{key!r} is listed, which does not begin with {prefix}")
                    if size or not key.endswith("/"):  # the mark of a folder
                        key = key[len(self._prefix) :]
                        found[key] = Transfer(key, size, etag)
        if not found:
            raise UserError(
                f"Nothing below {prefix} in the bucket {self.where}: "
                "set --endpoint, --bucket and --prefix."
            )
        return [found[key] for key in sorted(found)]

    def head(self, key, **options):
        """Size and ETag of an object, or of one of its parts."""
        with self._translated():
            answer = self._client.head_object(
                Bucket=self._bucket, Key=self._prefix + key, **options
            )
            return answer["ContentLength"], plain_etag(answer["ETag"])

    def part_sizes(self, transfer, n_parts):
        """Bytes of each part of an object that was uploaded in parts; None if not to be had.

        Older Ceph answers with the whole object's size, others with an error.
        """
        sizes = []
        try:
            for number in range(1, n_parts + 1):
                size, _ = self.head(transfer.key, PartNumber=number)
                sizes.append(size)
                if sum(sizes) > transfer.size:
                    return None
        except Refused:
            return None
        return sizes if sum(sizes) == transfer.size else None

    @contextlib.contextmanager
    def reading(self, transfer):
        """Give the first byte's number, at best that of bytes received, and blocks from there on.

        Raises:
            Changed: If the object has another ETag than the transfer.
        """
        span = {"Range": f"bytes={transfer.received}-"} if transfer.received else {}
        with self._translated():
            answer = self._client.get_object(
                Bucket=self._bucket,
                Key=self._prefix + transfer.key,
                IfMatch=f'"{transfer.etag}"',
                **span,
            )
            with contextlib.closing(answer["Body"]) as body:
                if plain_etag(answer["ETag"]) != transfer.etag:
                    raise Changed
                found = answer.get("ContentRange", "bytes 0-")
                if not (begin := re.match(r"bytes (\d+)-", found)):
                    raise ValueError(f"Content-Range {found!r}")
                yield int(begin[1]), iter(lambda: body.read(BLOCK), b"")

    @contextlib.contextmanager
    def _translated(self):
        from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            code = error.response["Error"].get("Code")
            if status in (412, 416):
                raise Changed from error
            answer = f"the server answers {status}" + f" {code}" * (code != str(status))
            if (status >= 500 and status != 501) or status == 429 or code == "RequestTimeout":
                raise Transient(answer) from error
            raise Refused(answer) from error
        except ParamValidationError as error:
            raise UserError(f"There can be no bucket {self.where}: set --bucket.") from error
        except (BotoCoreError, HTTPError) as error:
            raise Transient(str(error).rstrip(".")) from error
        except (KeyError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:200]
            raise Transient(f"the server's answer makes no sense: {reason}") from error


def plain_etag(text):
    """An ETag without quotes, and without the mark of a weak one."""
    return text.removeprefix("W/").strip('"')


def patiently(work, what, stop):
    """Do work, again and again where it meets a Transient fault.

    Args:
        work: Function without arguments.
        what: Name of the work, for messages.
        stop: Event that ends the pauses.
    """
    for attempt in itertools.count(1):
        try:
            return work()
        except Transient as fault:
            pause(attempt, what, fault, stop)


def pause(n_failures, what, fault, stop):
    """Wait longer after each failure in a row, and not all transfers equally long.

    Raises:
        Failure: After ATTEMPTS failures.
        Stopped: If `stop` is set.
    """
    if n_failures == ATTEMPTS:
        raise Failure(f"{fault}; tried {ATTEMPTS} times") from fault
    seconds = min(2 ** (n_failures - 1), LONGEST_PAUSE) * random.uniform(0.5, 1)
    log.warning("%s: %s. Again in %.1f s.", what, fault, seconds)
    if stop.wait(seconds):
        raise Stopped


def is_safe(key):
    """Whether a key can be a path below DEST: no '..', nothing absolute or hidden, one line."""
    return key.isprintable() and all(part and part[0] != "." for part in key.split("/"))


def set_of(key):
    """The first folder of a key."""
    return key.partition("/")[0]


def is_scene(key):
    """Whether the benchmark would take the file for a scene."""
    return fnmatchcase(Path(key).name, SCENE_NAME)


def sample(transfers, n):
    """Choose scenes of one set, spread over its folders; see the head of this file."""
    folders = defaultdict(list)
    for transfer in filter(lambda transfer: is_scene(transfer.key), transfers):
        folders[transfer.key.rpartition("/")[0]].append(transfer)
    ranked = []
    for folder, scenes in folders.items():
        scenes.sort(key=lambda scene: hashlib.sha256(scene.key.encode()).digest())
        ranked += [(i / len(scenes), folder, scene) for i, scene in enumerate(scenes)]
    return [scene for *_, scene in sorted(ranked, key=lambda entry: entry[:2])[:n]]


# --- is it whole? ---------------------------------------------------------------------------


def etag_of(path, part_sizes):
    """The ETag that S3 gives a file uploaded in such parts; in one request where it is None."""
    with path.open("rb") as file:
        if part_sizes is None:
            return _md5(file, path.stat().st_size).hexdigest()
        parts = b"".join(_md5(file, size).digest() for size in part_sizes)
    return f"{hashlib.md5(parts, usedforsecurity=False).hexdigest()}-{len(part_sizes)}"


def _md5(file, n_bytes):
    digest = hashlib.md5(usedforsecurity=False)
    while n_bytes and (block := file.read(min(n_bytes, 1 << 20))):
        digest.update(block)
        n_bytes -= len(block)
    return digest


def equal_parts(size, n_parts):
    """Ways to cut so many bytes into so many parts, of which the last alone may be smaller."""
    for part in (*PART_SIZES, -(-size // n_parts)):
        if -(-size // part) == n_parts:
            yield [part] * (n_parts - 1) + [size - part * (n_parts - 1)]


def has_etag(path, transfer, bucket):
    """Whether a file of the right size has the ETag of the transfer; None if that cannot be told.

    That of an object uploaded in parts depends on their sizes: the usual ones are tried, then the
    server is asked.
    """
    form = ETAG.fullmatch(transfer.etag)
    if not form or int(form[2] or 0) > min(MOST_PARTS, max(transfer.size, 1)):
        return None
    if form[2] is None:
        return etag_of(path, None) == transfer.etag
    n_parts = int(form[2])
    usual = equal_parts(transfer.size, n_parts) if transfer.size else [[0]]
    if any(etag_of(path, sizes) == transfer.etag for sizes in usual):
        return True
    sizes = bucket.part_sizes(transfer, n_parts)
    return None if sizes is None else etag_of(path, sizes) == transfer.etag


# --- one file -------------------------------------------------------------------------------


def fetch(bucket, transfer, dest, stop):
    """Bring a file here, whole and on the disk.

    Faults that may pass are retried, from the bytes that are here. A file that changed in the
    bucket, or whose ETag is wrong, is fetched anew. Where the ETag cannot be computed, two copies
    that agree will do.

    Returns:
        Path of the whole file: the partial one, or that which was there all along.

    Raises:
        Failure: If it cannot be had.
        Stopped: If `stop` is set.
    """
    path, copies, failures, fresh_starts = dest / transfer.key, set(), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        before, partial = transfer.received, transfer.partial(dest)
        try:
            if not copies and is_of_size(path, transfer.size):
                copy = path
            else:
                copy = partial
                receive(bucket, transfer, partial, stop)
            verdict = has_etag(copy, transfer, bucket)
            transfer.sha256 = file_sha256(copy)
            if verdict or (verdict is None and transfer.sha256 in copies):
                sync(copy)
                transfer.received, transfer.checked = transfer.size, verdict is True
                return copy
            copies.add(transfer.sha256)
            if copy == partial:
                unsure = "its ETag cannot be computed, a second copy shall agree"
                raise Damaged("its ETag is wrong" if verdict is False else unsure)
        except Transient as fault:
            failures = 1 if transfer.received > before else failures + 1
            pause(failures, transfer.key, fault, stop)
        except (Changed, Damaged) as fault:
            reason = str(fault) or "it changed in the bucket"
            if fresh_starts == FRESH_STARTS:
                raise Failure(f"{reason}, after {FRESH_STARTS} fresh starts") from fault
            log.warning("%s: %s. Fetched anew.", transfer.key, reason)
            fresh_starts += 1
            partial.unlink(missing_ok=True)
            transfer.received = 0
            if isinstance(fault, Changed):
                copies.clear()
                transfer.size, transfer.etag = patiently(
                    lambda: bucket.head(transfer.key), transfer.key, stop
                )


def receive(bucket, transfer, partial, stop):
    """Add to the partial file what it lacks.

    Raises:
        Transient: If less came.
        Damaged: If more came.
    """
    with partial.open("ab") as file:
        if file.tell() > transfer.size:
            file.truncate(0)
        transfer.received = file.seek(0, io.SEEK_END)
        if transfer.received == transfer.size:
            return
        with bucket.reading(transfer) as (first, blocks):
            if first != transfer.received:  # a server that knows no ranges
                file.truncate(0)
                transfer.received = 0
            for block in blocks:
                file.write(block)
                transfer.received += len(block)
                if stop.is_set():
                    raise Stopped
                if transfer.received > transfer.size:
                    raise Damaged("more came than its size")
    if transfer.received < transfer.size:
        raise Transient(f"only {transfer.received} of {transfer.size} bytes came")


def is_of_size(path, size):
    """Whether a file is there and has so many bytes."""
    return path.is_file() and path.stat().st_size == size


# --- all files ------------------------------------------------------------------------------


def read_manifest(dest):
    """Lines of the manifest by key, sizes as numbers; none where there is no manifest.

    Raises:
        UserError: If it is no such manifest.
    """
    path = dest / MANIFEST
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} should be a file. Remove what is there, or set another --dest.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = {line["key"]: {**line, "size": int(line["size"])} for line in _lines(file)}
    except FileNotFoundError:
        return {}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} should have the columns {','.join(COLUMNS)}, sizes in bytes and paths below "
            "its folder. Remove it and download again: files that are right are not fetched anew."
        ) from error
    return lines


def _lines(file):
    for line in csv.DictReader(file, strict=True):
        if set(line) != set(COLUMNS) or None in line.values() or not is_safe(line["key"]):
            raise ValueError(line)
        yield line


def plan(listed, chosen, dest, manifest):
    """Sort out what is here and what is to come, remove stale partial files, and tell.

    Args:
        listed: All Transfers of the sets.
        chosen: Those that are wanted; `received` is set.
        dest: Folder.
        manifest: Lines by key.

    Returns:
        Transfers that are to come.

    Raises:
        UserError: If they do not fit on the disk.
    """
    known = {
        t.key for t in listed
        if (line := manifest.get(t.key)) and (line["size"], line["etag"]) == (t.size, t.etag)
    }  # fmt: skip
    whole = {t.key for t in listed if t.key in known and is_of_size(dest / t.key, t.size)}
    resumable = {t.partial(dest) for t in listed if t.key not in whole}
    for name in {set_of(t.key) for t in listed}:
        for path in walk_files(dest / name):
            if fnmatchcase(path.name, f".*{PARTIAL}") and path not in resumable:
                path.unlink()
    columns, to_come, needed = defaultdict(Counter), [], Counter()
    for transfer in chosen:
        path, partial = dest / transfer.key, transfer.partial(dest)
        counts = columns[set_of(transfer.key)]
        counts["files"] += 1
        counts["size"] += transfer.size
        if transfer.key in whole:
            counts["here"] += transfer.size
            continue
        to_come.append(transfer)
        counts["changed in the bucket"] += transfer.key in manifest and transfer.key not in known
        if is_of_size(path, transfer.size):
            counts["to be checked"] += transfer.size
            continue
        if partial.is_file():
            transfer.received = min(partial.stat().st_size, transfer.size)
            counts["partly here"] += transfer.received
        counts["to come"] += transfer.size - transfer.received
        needed[path.parent] += transfer.size - transfer.received
    for line in table(_texts(columns)).splitlines():
        log.info("%s", line)
    check_disks(needed)
    return to_come


def _texts(columns):
    rows = ("files", "changed in the bucket", "size", "here", "to be checked", "partly here")
    shown = [row for row in (*rows, "to come") if any(counts[row] for counts in columns.values())]
    return {
        name: {
            row: str(counts[row]) if row in rows[:2] else format_bytes(counts[row]) for row in shown
        }
        for name, counts in columns.items()
    }  # fmt: skip


def check_disks(needed):
    """Compare free space with the bytes to come into each folder; folders may lie on many disks.

    Raises:
        UserError: If there is too little.
    """
    disks = defaultdict(list)
    for folder in needed:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        disks[existing.stat().st_dev].append((existing, needed[folder]))
    for folders in disks.values():
        where, n_bytes = folders[0][0], sum(n for _, n in folders)
        free = shutil.disk_usage(where).free
        if free < n_bytes:
            raise UserError(
                f"{where} has {format_bytes(free)} free, {format_bytes(n_bytes)} are to come. Make room, set "
                "another --dest, or take a sample with --scenes."
            )
        log.info(
            "%s has %s free, %s are to come.", where, format_bytes(free), format_bytes(n_bytes)
        )


@contextlib.contextmanager
def alone(dest):
    """See that no other download works in a folder, where its file system has locks.

    What one that was killed left of its manifest is removed.

    Raises:
        UserError: If one does.
    """
    dest.mkdir(parents=True, exist_ok=True)
    with (dest / ".download.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another download works in {dest}: wait for it to end.") from error
        except OSError:
            log.warning("%s has no locks: start no second download there.", dest)
        else:
            for unfinished in dest.glob(f".{Path(MANIFEST).stem}.*.part.csv"):
                unfinished.unlink()
        yield


def download_all(bucket, transfers, dest, manifest, n_threads):
    """Download files, several at once; each takes its name when it is whole.

    Args:
        bucket: A Bucket.
        transfers: What to download.
        dest: Folder.
        manifest: Lines by key; it is kept up to date, the file too.
        n_threads: How many at once.

    Returns:
        Reasons why files could not be had, by key.
    """
    waiting, finished, stop, failed = deque(transfers), queue.SimpleQueue(), threading.Event(), {}

    def work():
        while not stop.is_set():
            try:
                transfer = waiting.popleft()
            except IndexError:
                return
            try:
                outcome = fetch(bucket, transfer, dest, stop)
            except Stopped:
                return
            except Exception as error:
                if isinstance(error, OSError) and error.errno:  # that of a write names no file
                    error.filename = error.filename or str(dest / transfer.key)
                if is_of_the_disk(error):
                    stop.set()
                outcome = error
            finished.put((transfer, outcome))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(n_threads)]
    try:
        with byte_progress(transfers) as show:
            for thread in threads:
                thread.start()
            for _ in transfers:
                transfer, outcome = _next(finished, show)
                if isinstance(outcome, Path):
                    outcome = take(transfer, outcome, dest, manifest)
                if is_of_the_disk(outcome):
                    raise outcome
                if outcome:
                    failed[transfer.key] = one_line(outcome)
                    log.error("%s: %s", transfer.key, failed[transfer.key])
    finally:
        stop.set()
        end = time.monotonic() + GRACE
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(max(0, end - time.monotonic()))
    return failed


def is_of_the_disk(outcome):
    """Whether it is an error that the next file would meet too."""
    return isinstance(outcome, OSError) and outcome.errno in DISK_ERRORS


def _next(finished, show):
    """Wait for the next file and show the progress meanwhile."""
    while True:
        show()
        with contextlib.suppress(queue.Empty):
            return finished.get(timeout=0.5)


def take(transfer, copy, dest, manifest):
    """Give a whole file its name and write it into the manifest.

    Returns:
        The OSError that this met, or None.
    """
    try:
        with deferred():
            copy.replace(dest / transfer.key)
            transfer.partial(dest).unlink(missing_ok=True)
            manifest[transfer.key] = {name: getattr(transfer, name) for name in COLUMNS}
            write_csv(dest / MANIFEST, COLUMNS, [manifest[key] for key in sorted(manifest)])
    except OSError as error:
        error.filename = error.filename or str(dest / MANIFEST)
        return error
    return None


@contextlib.contextmanager
def byte_progress(transfers):
    """Give a function that shows how far all are: a bar on a terminal, else a line a minute."""
    started = last = time.monotonic()

    def count():
        return sum(t.received for t in transfers), sum(t.size for t in transfers)

    begin, total = count()
    if sys.stderr.isatty():
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        with (
            logging_redirect_tqdm(),
            tqdm(
                *(None, "Downloading", total), initial=begin,
                unit="B", unit_scale=True, leave=False, dynamic_ncols=True,
            ) as bar,
        ):  # fmt: skip

            def show():
                done, bar.total = count()
                bar.update(done - bar.n)

            yield show
        return

    def show():
        nonlocal last
        now = time.monotonic()
        if now - last < screen.LINE_SECONDS:
            return
        last = now
        done, total = count()
        rate = (done - begin) / (now - started)
        log.info(
            "Downloading: %s of %s, %s/s, %s left",
            *(format_bytes(done), format_bytes(total), format_bytes(max(rate, 0))),
            format_duration((total - done) / rate) if rate > 0 else "unknown time",
        )

    yield show


# --- the program ----------------------------------------------------------------------------


def download(arguments):
    """Download what the command line asks for.

    Raises:
        Failure: If a file could not be had; all others are there.
    """
    dest, stop = arguments.dest, threading.Event()
    bucket = Bucket(
        arguments.endpoint, arguments.bucket, arguments.prefix, connections=arguments.transfers
    )
    with contextlib.closing(bucket):
        try:
            sets = [
                patiently(lambda name=name: bucket.listing(name), "The list of files", stop)
                for name in chosen_sets(arguments)
            ]
        except Refused as error:
            raise UserError(
                f"The bucket {bucket.where} cannot be listed: {error}. Set --endpoint and --bucket."
            ) from error
        except Failure as error:
            raise Failure(f"The bucket {bucket.where} cannot be listed: {error}.") from error
        failed = {
            transfer.key: "no name for a file below DEST"
            for transfers in sets for transfer in transfers if not is_safe(transfer.key)
        }  # fmt: skip
        sets = [[t for t in transfers if t.key not in failed] for transfers in sets]
        n = arguments.scenes
        chosen = [t for transfers in sets for t in (sample(transfers, n) if n else transfers)]
        with alone(dest):
            manifest = read_manifest(dest)
            to_come = plan([t for ts in sets for t in ts], chosen, dest, manifest)
            failed |= download_all(bucket, to_come, dest, manifest, arguments.transfers)
    unchecked = [t.key for t in to_come if t.key not in failed and not t.checked]
    for key in unchecked:
        log.warning("%s: its ETag could not be checked, two copies agree.", key)
    for key, reason in failed.items():
        log.error("Failed: %s: %s", key, reason)
    n_whole = sum(t.key not in failed for t in chosen)
    if failed:
        raise Failure(
            f"{len(failed)} file(s) could not be had; {n_whole} whole files are in {dest}. Give "
            "the same command again."
        )
    log.info(
        "%d file(s) are in %s, %s; %s has their sha256.",
        *(n_whole, dest, format_bytes(sum(t.size for t in chosen)), dest / MANIFEST),
    )


def verify(arguments):
    """Compare the files of a folder with its manifest.

    Raises:
        UserError: If there is no manifest, or none of the set.
        Failure: If a file is missing, unfinished or not as it should be.
    """
    dest, sets = arguments.dest, chosen_sets(arguments)
    lines = [line for key, line in read_manifest(dest).items() if set_of(key) in sets]
    if not lines:
        raise UserError(f"{dest / MANIFEST} tells of no file of {' or '.join(sets)}.")
    wrong = {}
    with ThreadPoolExecutor(arguments.transfers) as pool:
        try:
            answers = pool.map(lambda line: _fault(dest, line), lines)
            for line, fault in zip(lines, progress(answers, "Verifying", len(lines)), strict=True):
                if fault:
                    wrong[line["key"]] = fault
        finally:
            pool.shutdown(cancel_futures=True)
    known = {dest / line["key"] for line in lines}
    for path in sorted(path for name in sets for path in walk_files(dest / name)):
        if path.name.endswith(PARTIAL):
            wrong[str(path.relative_to(dest))] = "unfinished"
        elif path not in known and is_scene(path.name):
            log.warning("%s is not in the manifest.", path)
    for key, fault in wrong.items():
        log.error("Wrong: %s: %s", key, fault)
    if wrong:
        raise Failure(
            f"{len(wrong)} file(s) in {dest} are not as they should be. Remove those of another "
            "content and download again."
        )
    n_bytes = sum(line["size"] for line in lines)
    log.info(
        "%d file(s) in %s, %s, are as the manifest says.", len(lines), dest, format_bytes(n_bytes)
    )


def _fault(dest, line):
    """What is wrong with a file; None if nothing."""
    path = dest / line["key"]
    try:
        if not path.is_file():
            return "missing"
        if (size := path.stat().st_size) != line["size"]:
            return f"{line['size']} bytes wanted, {size} found"
        found = file_sha256(path)
    except OSError as error:
        return one_line(error)
    return None if found == line["sha256"] else f"sha256 {line['sha256']} wanted, {found} found"


def chosen_sets(arguments):
    """Names of the sets that the command line asks for."""
    return SETS if arguments.set == "all" else (arguments.set,)


def positive(text):
    """A number of the command line, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, found {text!r}")
    return int(text)


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", choices=(*SETS, "all"), default="all", help="which scenes (default all)")
    add("--scenes", type=positive, metavar="N", help="a sample of N scenes of each set")
    add("--dest", type=Path, default=Path("data"), help="folder for the sets (default data)")
    add("--transfers", type=positive, default=8, metavar="N", help="files at once (default 8)")
    add("--verify", action="store_true", help="compare DEST with its manifest; needs no network")
    add("--endpoint", default=ENDPOINT, help=f"default {ENDPOINT}")
    add("--bucket", default=BUCKET, help=f"default {BUCKET}")
    add("--prefix", default=PREFIX, help=f"what precedes the sets (default {PREFIX})")
    add("--verbose", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.verify and arguments.scenes:
        parser.error("--verify takes all files of the manifest: leave out --scenes")
    return arguments


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    work = verify if arguments.verify else download
    return exit_status(
        lambda: work(arguments), arguments.verbose, "The same command goes on from here."
    )


if __name__ == "__main__":
    sys.exit(main())
