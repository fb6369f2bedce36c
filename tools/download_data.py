r"""Download the CloudMask data set, 180 GB, or a sample of it. No credentials are needed.

    python tools/download_data.py --dest data                       # 970 + 100 scenes
    python tools/download_data.py --dest data --scenes 10           # ten of each set
    python tools/download_data.py --dest data --verify              # offline, by sha256

Files are stored in DEST/one-day (training) and DEST/ssts (inference), below day/ and night/ as in
the bucket. Folders called training and inference work too, in the bucket and, if they exist, in
DEST. The plan is printed first and rejected if it does not fit on the disk. Until a file is
complete and its size and ETag have been checked, it is hidden and its name ends in `.download`.
After an interruption run the same command again: finished files are kept, unfinished ones are
downloaded again.

DEST/manifest.csv has one row per finished file: key (the path below DEST), size, etag, sha256. A
file is skipped if its row has the bucket's size and ETag and the file has that size; only --verify
reads it again. A file without such a row, for example from `aws s3 sync`, is compared with the
ETag and downloaded only if it differs.

--scenes N selects N scenes of each set, day and night in proportion and at least one of each for
N >= 2. They are ordered by the SHA-256 of their names: the same N gives the same scenes, and a
larger N adds to them.
"""

import contextlib
import csv
import errno
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

from _command import exit_status
from harness.console import counted, format_bytes, log_to_screen, progress, table
from harness.errors import Failure, UserError, one_line
from harness.files import file_sha256, lock, read_text, walk_files, write_csv
from harness.signals import deferred, install_handlers
from tools.lib.options import command_parser, positive

ENDPOINT = "https://s3.echo.stfc.ac.uk"
BUCKET = "sciml-datasets"
PREFIX = "es/cloud_slstr_ds1"
# Folders below DEST, and their names in the bucket (the second ones since April 2026).
SETS = {"one-day": ("one-day", "training"), "ssts": ("ssts", "inference")}
MAX_SHOWN = 20  # names below the prefix in an error
MANIFEST = "manifest.csv"
COLUMNS = ("key", "size", "etag", "sha256")
PARTIAL = ".{}.download"  # name of a file until it is complete; hidden: never read as a scene
SCENE_NAME = "S3[A-D]*.hdf"  # as in harness.data.scene_files, which needs h5py

MAX_PAGES = 1000  # of a listing; S3 sends 1000 keys in each, and a set has two
MAX_PAGE_BYTES = 1 << 24  # a key has at most 1 kB
PAUSES = (1, 4, 16, 60)  # [s] before a listing or file is tried again; boto3 retries requests too
TIMEOUT = 30  # [s] without a byte
MIB = 1 << 20
RANGE_BYTES = 32 * MIB  # per request: what a dropped connection loses
# Part sizes with which common programs upload large files [bytes].
PART_SIZES = [n * MIB for n in (8, 5, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)]
ETAG = re.compile(r"([0-9a-f]{32})(?:-([1-9]\d{0,3}|10000))?")  # MD5; number of parts
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # the next file fails too

log = logging.getLogger("download_data")


class Damaged(Exception):
    """The server sent something wrong; another attempt may succeed."""


@dataclass(frozen=True)
class RemoteFile:
    """An object of the bucket."""

    key: str  # path below DEST, such as one-day/day/S3A_0.hdf
    source: str  # key of the object in the bucket
    size: int  # bytes
    etag: str  # without quotes


class Bucket:
    """A public S3 bucket, read without credentials."""

    def __init__(self, endpoint, name, prefix, connections):
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore import UNSIGNED
        from botocore.config import Config

        self.name, self.prefix = name, f"{prefix.strip('/')}/".lstrip("/")
        self.url = f"s3://{name}/{self.prefix} at {endpoint}"
        config = Config(
            signature_version=UNSIGNED,
            s3={"addressing_style": "path"},
            connect_timeout=TIMEOUT,
            read_timeout=TIMEOUT,
            retries={"mode": "standard", "total_max_attempts": 5},
            max_pool_connections=connections,
            response_checksum_validation="when_required",  # stores other than AWS have none
        )
        try:
            self.client = boto3.client(
                "s3", endpoint_url=endpoint, region_name="us-east-1", config=config
            )
        except ValueError as error:
            raise UserError(f"--endpoint should be like {ENDPOINT}, found {endpoint!r}.") from error
        self.client.meta.events.register("before-send.s3.ListObjectsV2", self._send_list_request)
        # Many files at once, each in one thread. Python waits for boto3's own threads before it
        # exits: a server that stopped answering would delay SIGTERM for minutes.
        self.transfer = TransferConfig(
            use_threads=False, multipart_chunksize=RANGE_BYTES, preferred_transfer_client="classic"
        )

    def list_set(self, name, local):
        """List the RemoteFiles of a set, from the first of its folders that has scenes.

        Args:
            name: Name of the set.
            local: Its folder below DEST.

        Raises:
            UserError: If there are no scenes.
            Failure: If the network or server fails.
        """
        try:
            for folder in SETS[name]:
                files = retry(lambda folder=folder: self._list(folder, local), f"Listing {folder}")
                if any(is_scene(file.key) for file in files):
                    return files
        except Exception as error:
            raise (UserError if is_permanent(error) else Failure)(
                f"Cannot list {self.url}: {reason(error)}. Check the network, --endpoint and "
                "--bucket."
            ) from error
        raise UserError(
            f"No scenes matching '{SCENE_NAME}' in {' or '.join(SETS[name])} below {self.url}, "
            f"which contains {self._contents()}. Check --endpoint, --bucket and --prefix."
        )

    def _contents(self):
        """The first folders and files directly below the prefix, as text."""
        try:
            page = self.client.list_objects_v2(
                Bucket=self.name, Prefix=self.prefix, Delimiter="/", MaxKeys=MAX_SHOWN
            )
            keys = [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            keys += [entry["Key"] for entry in page.get("Contents", [])]
        except Exception as error:
            return f"what cannot be listed ({reason(error)})"
        names = [key.removeprefix(self.prefix) for key in keys]
        return ", ".join(map(repr, filter(None, names))) or "nothing"

    def _list(self, folder, local):
        prefix, files = f"{self.prefix}{folder}/", {}
        listing = self.client.get_paginator("list_objects_v2")
        for number, page in enumerate(listing.paginate(Bucket=self.name, Prefix=prefix)):
            if number == MAX_PAGES:
                raise UserError(f"the listing of {prefix} has more than {MAX_PAGES} pages")
            if not page.keys() & {"Name", "IsTruncated"}:
                raise Damaged("the server's answer is not a listing")
            if page.get("IsTruncated") and not page.get("NextContinuationToken"):
                raise Damaged("the listing is truncated")
            for entry in page.get("Contents", []):
                source = entry["Key"]
                is_whole = entry.keys() >= {"Size", "ETag"} and entry["Size"] >= 0
                if not (source.startswith(prefix) and is_whole):
                    raise Damaged(f"the listing of {prefix} contains {entry}")
                if not source.endswith("/"):  # the placeholder of a folder
                    key = f"{local}/{source.removeprefix(prefix)}"
                    etag = entry["ETag"].removeprefix("W/").strip('"')
                    files[key] = RemoteFile(key, source, entry["Size"], etag)
        return [files[key] for key in sorted(files)]

    def _send_list_request(self, request, **_):
        """Send a request for a page and read it: boto3 would read one without end."""
        request.stream_output = True  # it is not read yet
        answer = self.client._endpoint.http_session.send(request)
        with contextlib.closing(answer.raw):
            body = answer.raw.read(MAX_PAGE_BYTES + 1)
        if len(body) > MAX_PAGE_BYTES:
            raise UserError(f"a page of the listing has more than {format_bytes(MAX_PAGE_BYTES)}")
        answer.raw = SimpleNamespace(stream=lambda: [body])
        return answer

    def part_size(self, file):
        """Size of the first uploaded part of an object [bytes]; None if the store cannot tell."""
        try:
            answer = self.client.head_object(Bucket=self.name, Key=file.source, PartNumber=1)
            return answer["ContentLength"]
        except Exception as error:
            if is_permanent(error):
                return None
            raise


def retry(work, what):
    """Call work() until it succeeds; raises permanent errors and that of the last attempt."""
    for pause in (*PAUSES, None):
        try:
            return work()
        except Exception as error:
            if pause is None or is_permanent(error):
                raise
            log.warning("%s: %s. Retrying in %d s.", what, reason(error), pause)
            time.sleep(pause)


def is_permanent(error):
    """Whether another attempt would fail too: no access, a wrong name, an error of our disk."""
    from botocore.exceptions import ClientError, ParamValidationError

    if isinstance(error, ClientError):  # boto3 has retried throttling
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return 400 <= status < 500 or status == 501  # not implemented
    if isinstance(error, ConnectionError | TimeoutError):
        return False
    is_local = isinstance(error, OSError) and error.errno is not None
    return is_local or isinstance(error, ParamValidationError | UserError)


def reason(error):
    """An error of boto3 or the disk in one line."""
    error = getattr(error, "last_exception", None) or error  # of s3transfer's RetriesExceededError
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text[:300].rstrip(".") or type(error).__name__


def is_safe(key):
    """Whether a key is a path below DEST: no '..', not absolute, nothing hidden, one line."""
    return key.isprintable() and all(part and part[0] != "." for part in key.split("/"))


def is_scene(key):
    """Whether the benchmark would read the file as a scene."""
    return fnmatchcase(Path(key).name, SCENE_NAME)


def is_of_size(path, size):
    """Whether a file exists and has this size [bytes]."""
    return path.is_file() and path.stat().st_size == size


def sample(files, n_scenes):
    """Select scenes of one set, spread over its folders; see the head of this file."""
    folders = defaultdict(list)
    for file in files:
        if is_scene(file.key):
            folders[file.key.rpartition("/")[0]].append(file)
    ranked = []
    for folder, scenes in folders.items():
        scenes.sort(key=lambda scene: hashlib.sha256(scene.key.encode()).digest())
        ranked += [(i / len(scenes), folder, scene) for i, scene in enumerate(scenes)]
    return [scene for *_, scene in sorted(ranked, key=lambda entry: entry[:2])[:n_scenes]]


def plan(files, dest, manifest):
    """Print what is present and what must be downloaded.

    Returns:
        RemoteFiles that must be checked or downloaded.

    Raises:
        UserError: If they do not fit on the disk; folders below `dest` may link to other disks.
    """
    columns, missing, disks = defaultdict(Counter), [], defaultdict(list)
    for file in files:
        path, row = dest / file.key, manifest.get(file.key, {})
        if not is_of_size(path, file.size):
            kind = "to download"
            folder = next(folder for folder in path.parents if folder.exists())
            disks[folder.stat().st_dev].append((folder, file.size))
        else:
            is_known = (row.get("size"), row.get("etag")) == (file.size, file.etag)
            kind = "present" if is_known else "to check"
        if kind != "present":
            missing.append(file)
        columns[file.key.split("/")[0]].update({"files": 1, "size": file.size, kind: file.size})
    sizes = ("size", "present", "to check", "to download")
    texts = {
        name: {"files": str(counts["files"]), **{row: format_bytes(counts[row]) for row in sizes}}
        for name, counts in columns.items()
    }
    for line in table(texts).splitlines():
        log.info("%s", line)
    for folders in disks.values():
        where, needed = folders[0][0], sum(size for _, size in folders)
        free = shutil.disk_usage(where).free
        text = f"{where} has {format_bytes(free)} free, {format_bytes(needed)} are needed."
        if free < needed:
            raise UserError(f"{text} Free some space, or choose another --dest or --scenes.")
        log.info("%s", text)
    return missing


def compute_etag(path, part_size, n_parts):
    """The ETag that S3 gives to a file uploaded in parts [bytes]; n_parts 0: in one request."""
    parts = []
    with path.open("rb") as file:
        for _ in range(n_parts or 1):
            parts.append(hashlib.md5(usedforsecurity=False))
            left = part_size
            while left and (block := file.read(min(left, MIB))):
                parts[-1].update(block)
                left -= len(block)
    if not n_parts:
        return parts[0].hexdigest()
    joined = hashlib.md5(b"".join(md5.digest() for md5 in parts), usedforsecurity=False)
    return f"{joined.hexdigest()}-{n_parts}"


def has_etag(path, file, bucket):
    """Whether a file of the right size has the object's ETag; None if that cannot be determined.

    The ETag of a multipart upload depends on the part size, which it does not contain: the usual
    sizes are tried, then the store is asked. Older Ceph answers with the size of the whole object.
    """
    form = ETAG.fullmatch(file.etag)
    if not form or not form[2]:
        return compute_etag(path, file.size, 0) == file.etag if form else None
    n_parts = int(form[2])

    def fits(part_size):
        return part_size and max(-(-file.size // part_size), 1) == n_parts

    if any(compute_etag(path, size, n_parts) == file.etag for size in filter(fits, PART_SIZES)):
        return True
    part_size = bucket.part_size(file)
    return compute_etag(path, part_size, n_parts) == file.etag if fits(part_size) else None


def fetch(bucket, file, dest):
    """Check a RemoteFile that is present, or download it.

    Returns:
        (path of the complete file, still hidden if it is new; its sha256; True if its ETag was
        verified, None if it cannot be). Raises the error of the last attempt.
    """
    path = dest / file.key
    partial = path.with_name(PARTIAL.format(path.name))
    path.parent.mkdir(parents=True, exist_ok=True)

    def attempt():
        n_received = 0

        def count(n_bytes):  # negative before boto3 repeats a request
            nonlocal n_received
            n_received += n_bytes
            if n_received > file.size:  # an endless answer must not fill the disk
                raise Damaged(f"more than the expected {file.size} bytes were received")

        partial.unlink(missing_ok=True)  # a link in a folder that others may write to
        with partial.open("xb") as target:
            bucket.client.download_fileobj(
                bucket.name, file.source, target, Callback=count, Config=bucket.transfer
            )
            target.flush()
            os.fsync(target.fileno())
        if (size := partial.stat().st_size) != file.size:
            raise Damaged(f"{size} of {file.size} bytes were received")
        verdict = has_etag(partial, file, bucket)
        if verdict is False:
            raise Damaged(f"the content does not match the listed ETag {file.etag}")
        return partial, file_sha256(partial), verdict

    try:
        if is_of_size(path, file.size) and has_etag(path, file, bucket):
            return path, file_sha256(path), True
        return retry(attempt, file.key)
    except Exception:
        partial.unlink(missing_ok=True)
        raise


def read_manifest(dest):
    """Rows of the manifest by key, sizes as numbers; a UserError if it is not a manifest."""
    path, rows = dest / MANIFEST, {}
    if not path.exists():
        return rows
    try:
        with io.StringIO(read_text(path), newline="") as file:
            for row in csv.DictReader(file, strict=True):
                if set(row) != set(COLUMNS) or None in row.values() or not is_safe(row["key"]):
                    raise ValueError(row)
                rows[row["key"]] = {**row, "size": int(row["size"])}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} should be a file with the columns {','.join(COLUMNS)}, sizes in bytes and "
            "paths below its folder. Remove it and download again: files that are right are kept."
        ) from error
    return rows


def local_folder(dest, name):
    """The folder of a set below DEST: its first name, unless only the folder of another exists."""
    return next((folder for folder in SETS[name] if (dest / folder).is_dir()), name)


def unfinished(dest, folders):
    """Unfinished files in folders below DEST."""
    paths = (path for name in folders for path in walk_files(dest / name))
    return [path for path in paths if fnmatchcase(path.name, PARTIAL.format("*"))]


def remove_unfinished(dest):
    """Remove what an earlier or this download did not finish."""
    for path in (*unfinished(dest, chain(*SETS.values())), *dest.glob(".manifest.*.part.csv")):
        path.unlink(missing_ok=True)  # a transfer that just failed removes its own


def download_all(bucket, files, dest, manifest, n_threads):
    """Download RemoteFiles, several at once, and add the complete ones to the manifest.

    Returns:
        Reasons of the files that failed, by key.

    Raises:
        OSError: If the disk is full or read-only, so that the next file would fail too.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    def work(file):
        try:
            return file, fetch(bucket, file, dest), None
        except Exception as error:
            return file, None, error

    failed = {}
    with logging_redirect_tqdm(), ThreadPool(n_threads) as pool:  # its threads are daemons
        results = pool.imap_unordered(work, files)
        for file, fetched, error in progress(results, "Downloading", len(files)):
            try:
                if error:
                    raise error
                copy, sha256, verdict = fetched
                commit(copy, file, sha256, dest, manifest)
                if verdict is None:
                    log.warning("%s: its ETag cannot be verified, only its size.", file.key)
            except Exception as error:
                if getattr(error, "errno", None) in DISK_ERRORS:
                    error.filename = error.filename or str(dest / file.key)
                    raise
                failed[file.key] = reason(error)
    return failed


def commit(copy, file, sha256, dest, manifest):
    """Give a complete file its name and write its row to the manifest."""
    with deferred():
        copy.replace(dest / file.key)
        values = (file.key, file.size, file.etag, sha256)
        manifest[file.key] = dict(zip(COLUMNS, values, strict=True))
        write_csv(dest / MANIFEST, COLUMNS, [manifest[key] for key in sorted(manifest)])


def download(arguments):
    """Download what the command line selects.

    Raises:
        Failure: If files failed; all others are complete.
    """
    dest, chosen, failed = arguments.dest, [], {}
    bucket = Bucket(arguments.endpoint, arguments.bucket, arguments.prefix, arguments.transfers)
    with contextlib.closing(bucket.client):
        for name in arguments.sets:
            files = bucket.list_set(name, local_folder(dest, name))
            unsafe = [file.key for file in files if not is_safe(file.key)]
            failed |= dict.fromkeys(unsafe, "the key is not a valid path below DEST")
            files = [file for file in files if file.key not in failed]
            chosen += sample(files, arguments.scenes) if arguments.scenes else files
        dest.mkdir(parents=True, exist_ok=True)
        in_use = f"Another download is using {dest}. Wait until it ends, or choose another --dest."
        with lock(dest / ".download.lock", in_use):
            manifest = read_manifest(dest)
            remove_unfinished(dest)
            missing = plan(chosen, dest, manifest)
            try:
                failed |= download_all(bucket, missing, dest, manifest, arguments.transfers)
            finally:
                remove_unfinished(dest)
    for key, why in failed.items():
        log.error("Failed: %s: %s", key, why)
    complete = [file.size for file in chosen if file.key not in failed]
    n_bytes = format_bytes(sum(complete))
    text = f"{counted(len(complete), 'file')}, {n_bytes}, complete in {dest}"
    if failed:
        raise Failure(f"{counted(len(failed), 'file')} failed; {text}. Run the same command again.")
    log.info("%s; %s lists their sha256.", text, dest / MANIFEST)


def verify(arguments):
    """Compare the files of a folder with its manifest.

    Raises:
        UserError: If the manifest is missing or has no row of the set.
        Failure: If a file is missing, unfinished or different.
    """
    dest = arguments.dest
    sets = [local_folder(dest, name) for name in arguments.sets]
    rows = [row for key, row in read_manifest(dest).items() if key.split("/")[0] in sets]
    if not rows:
        raise UserError(f"{dest / MANIFEST} lists no file of {' or '.join(sets)}. Download first.")
    with ThreadPool(arguments.transfers) as pool:
        faults = pool.imap(lambda row: (row["key"], find_fault(dest, row)), rows)
        wrong = {key: fault for key, fault in progress(faults, "Verifying", len(rows)) if fault}
    wrong |= {str(path.relative_to(dest)): "unfinished" for path in unfinished(dest, sets)}
    listed = {dest / row["key"] for row in rows}
    for path in sorted(path for name in sets for path in walk_files(dest / name)):
        if path not in listed and is_scene(path.name):
            log.warning("%s is not in the manifest.", path)
    for key, fault in wrong.items():
        log.error("Wrong: %s: %s", key, fault)
    if wrong:
        raise Failure(
            f"{counted(len(wrong), 'wrong file')} in {dest}, see above. Remove those with other "
            "content than in the manifest and download again."
        )
    n_bytes = format_bytes(sum(row["size"] for row in rows))
    log.info("All of %s in %s, %s, as in the manifest.", counted(len(rows), "file"), dest, n_bytes)


def find_fault(dest, row):
    """How a file differs from its row of the manifest; None if it does not."""
    path = dest / row["key"]
    try:
        if not path.is_file():
            return "missing"
        if (size := path.stat().st_size) != row["size"]:
            return f"expected {row['size']} bytes, found {size}"
        found = file_sha256(path)
    except OSError as error:
        return one_line(error)
    return None if found == row["sha256"] else f"expected sha256 {row['sha256']}, found {found}"


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--set", choices=(*SETS, "all"), default="all", help="which scenes (default all)")
    add("--scenes", type=positive, metavar="N", help="a sample of N scenes of each set")
    add("--dest", type=Path, default=Path("data"), help="folder for the sets (default data)")
    add("--transfers", type=positive, default=8, metavar="N", help="files at once (default 8)")
    add("--verify", action="store_true", help="compare DEST with its manifest; needs no network")
    add("--endpoint", default=ENDPOINT, help=f"default {ENDPOINT}")
    add("--bucket", default=BUCKET, help=f"default {BUCKET}")
    add("--prefix", default=PREFIX, help=f"folder of the sets in the bucket (default {PREFIX})")
    arguments = parser.parse_args(argv)
    if arguments.verify and arguments.scenes:
        parser.error("--verify compares all files of the manifest: omit --scenes")
    arguments.sets = tuple(SETS) if arguments.set == "all" else (arguments.set,)
    log_to_screen(arguments.verbose)
    install_handlers()
    work = verify if arguments.verify else download
    when_stopped = "Finished files are kept. Run the same command again to continue."
    return exit_status(lambda: work(arguments), arguments.verbose, when_stopped)


if __name__ == "__main__":
    sys.exit(main())
