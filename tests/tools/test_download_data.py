"""The download from an S3 server (moto) behind a proxy that misbehaves as networks do."""

import contextlib
import csv
import gc
import hashlib
import http.client
import itertools
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import boto3
import pytest
from botocore.retries.standard import ExponentialBackoff
from moto.server import ThreadedMotoServer

from data_loader import find_scenes
from harness import console
from harness.files import lock
from tools import download_data

PROGRAM = Path(download_data.__file__)
PREFIX = "es/clouds"
SIZE = 1_500_000  # bytes of a scene: three requests of RANGE
RANGE = 500_000
MIB = 1 << 20
DAY = [f"one-day/day/S3A_{i}.hdf" for i in range(3)]
NIGHT = ["one-day/night/S3A_3.hdf"]
SSTS = ["ssts/day/S3A_4.hdf"]


class Store:
    """A bucket on the server; `objects` has the content by key below PREFIX."""

    numbers = itertools.count()

    def __init__(self, server):
        self.address = server.get_host_and_port()
        self.client = boto3.client(
            "s3",
            endpoint_url="http://{}:{}".format(*self.address),
            region_name="us-east-1",
            aws_access_key_id="writer",
            aws_secret_access_key="secret",
        )
        self.bucket = f"scenes-{next(self.numbers)}"
        self.client.create_bucket(Bucket=self.bucket)
        self.objects = {}

    def where(self, key):
        return {"Bucket": self.bucket, "Key": f"{PREFIX}/{key}"}

    def put(self, key, content=None, size=SIZE):
        """Store a public object, by default of random bytes."""
        self.objects[key] = random.randbytes(size) if content is None else content
        self.client.put_object(**self.where(key), Body=self.objects[key], ACL="public-read")

    def put_parts(self, key, *sizes):
        """Upload a public object in parts."""
        parts, where = [random.randbytes(size) for size in sizes], self.where(key)
        upload = self.client.create_multipart_upload(**where, ACL="public-read")
        where["UploadId"], done = upload["UploadId"], []
        for number, part in enumerate(parts, 1):
            answer = self.client.upload_part(**where, PartNumber=number, Body=part)
            done.append({"PartNumber": number, "ETag": answer["ETag"]})
        self.client.complete_multipart_upload(**where, MultipartUpload={"Parts": done})
        self.objects[key] = b"".join(parts)

    def etag(self, key):
        return self.client.head_object(**self.where(key))["ETag"].strip('"')


@dataclass
class Answer:
    """An answer of the proxy, which sends only `sent` bytes of the body if that is not None."""

    status: int
    headers: dict
    body: bytes
    sent: int | None = None
    stalls: bool = False  # keep the connection open after these bytes


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the server.

    Attributes:
        faults: By key below PREFIX, functions of (headers, forward) that return the Answer, one for
            each GET until they are used up. Those of "" are for listings, those of "HEAD" for HEAD
            requests, and the last of these is used for all further ones.
        requests: [(method, key)] received; the key of a listing is "".
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, address):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.url = address, f"http://127.0.0.1:{self.server_port}"
        self.faults, self.requests, self.headers = defaultdict(deque), [], []
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def downloaded(self):
        """Keys of the files requested."""
        return {key for method, key in self.requests if method == "GET" and key}

    def handle_error(self, *_):
        """Ignore connections that the command closed."""

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        key = "" if "list-type" in query else unquote(path).partition(f"/{PREFIX}/")[2]
        self.server.requests.append((self.command, key))
        self.server.headers.append(dict(self.headers))
        faults = self.server.faults["HEAD" if self.command == "HEAD" else key]
        keeps_last = self.command == "HEAD" and len(faults) == 1
        fault = (faults[0] if keeps_last else faults.popleft()) if faults else plain
        answer = fault(self.headers, self.forward)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.sent])
        self.close_connection = answer.sent is not None
        if answer.stalls:
            self.server.closing.wait()

    do_HEAD = do_GET

    def forward(self, headers, more_query=""):
        with contextlib.closing(http.client.HTTPConnection(*self.server.upstream)) as connection:
            connection.request(self.command, self.path + more_query, headers=headers)
            answer = connection.getresponse()
            skipped = ("connection", "transfer-encoding", "server", "date")
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in skipped}
            return Answer(answer.status, kept, answer.read())

    def log_message(self, *_):
        pass


def plain(headers, forward):
    return forward(headers)


def cut(sent, stalls=False):
    """Drop the connection after some bytes, or leave it open without sending more."""
    return lambda headers, forward: replace(forward(headers), sent=sent, stalls=stalls)


def with_headers(**changes):
    """Send other headers; None removes one."""
    changes = {name.replace("_", "-").lower(): value for name, value in changes.items()}

    def fault(headers, forward):
        answer = forward(headers)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in changes}
        kept |= {k: v for k, v in changes.items() if v is not None}
        return replace(answer, headers=kept)

    return fault


def with_body(change):
    """Send another body with the right Content-Length."""

    def fault(headers, forward):
        body = change(forward(headers).body)
        return with_headers(Content_Length=len(body))(
            headers, lambda headers: replace(forward(headers), body=body)
        )

    return fault


def relisted(pattern, by):
    """Change the text of a listing."""
    return with_body(lambda body: re.sub(pattern, by, body))


def renamed(key):
    """List the first scene under another key."""
    return with_body(lambda body: body.replace(f"/{DAY[0]}<".encode(), f"/{key}<".encode()))


def refusing(status, code=""):
    def fault(headers, forward):
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode() * bool(code)
        return Answer(status, {"Content-Length": len(body), "Content-Type": "text/xml"}, body)

    return fault


def after(change):
    """Let something happen before the request reaches the server."""

    def fault(headers, forward):
        change()
        return forward(headers)

    return fault


def without_range(headers, forward):
    return forward({k: v for k, v in headers.items() if k != "Range"})


def flipped(body):
    return body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server
    server.stop()
    gc.collect()


@pytest.fixture
def store(server):
    """An empty bucket."""
    store = Store(server)
    yield store
    store.client.close()


@pytest.fixture
def scenes(store):
    """A bucket with five scenes."""
    for key in (*DAY, *NIGHT, *SSTS):
        store.put(key)
    return store


@pytest.fixture
def proxy(store):
    proxy = Proxy(store.address)
    yield proxy
    proxy.stop()


# boto3 leaves the connections of answers that it rejects to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(download_data, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(download_data, "RANGE_BYTES", RANGE)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@dataclass
class Download:
    """The command on a folder."""

    store: Store
    proxy: Proxy
    dest: Path

    def arguments(self, *more):
        where = ["--endpoint", self.proxy.url, "--bucket", self.store.bucket, "--prefix", PREFIX]
        return [*where, "--dest", str(self.dest), *more]

    def __call__(self, *more):
        return download_data.main(self.arguments(*more))

    def files(self):
        """Content of all files by key, without hidden ones and the manifest."""
        return {
            str(path.relative_to(self.dest)): path.read_bytes()
            for path in sorted(self.dest.rglob("*"))
            if path.is_file() and path.name[0] != "." and path.name != "manifest.csv"
        }

    def manifest(self):
        path = self.dest / "manifest.csv"
        lines = path.read_text().splitlines() if path.exists() else []
        return {row["key"]: row for row in csv.DictReader(lines)}

    def assert_complete(self):
        """All objects are present as in the bucket and in the manifest, and nothing unfinished."""
        assert self.files() == self.store.objects
        assert list(self.dest.rglob("*.download")) == []
        assert self.manifest() == {
            key: {
                "key": key,
                "size": str(len(content)),
                "etag": self.store.etag(key),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            for key, content in self.store.objects.items()
        }


@pytest.fixture
def download(store, proxy, tmp_path):
    return Download(store, proxy, tmp_path / "data")


@pytest.fixture
def complete(scenes, download, capsys):
    """A folder with all files, and no requests yet."""
    assert download() == 0
    download.proxy.requests.clear()
    capsys.readouterr()
    return download


def error_line(capsys):
    """The line that begins with 'Error: ', without a traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("Error: "))
    return line


# --- what is downloaded, and where to ---------------------------------------------------------


@pytest.mark.parametrize("names", [("one-day", "ssts"), ("training", "inference")])
def test_scenes_are_stored_where_the_benchmark_reads_them(store, download, dataset, names):
    for path in dataset.rglob("S3A*.hdf"):
        key = str(path.relative_to(dataset))
        store.put(key.replace("one-day", names[0]).replace("ssts", names[1]), path.read_bytes())
    store.put("one-day/README", b"moved")  # left behind by a rename
    assert download() == 0
    for name in ("one-day", "ssts"):
        found, expected = find_scenes(download.dest / name), find_scenes(dataset / name)
        assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]
        assert [str(path.relative_to(download.dest)) for path in found] == [
            str(path.relative_to(dataset)) for path in expected
        ]


def test_no_credentials_are_sent(scenes, download, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert download() == 0
    sent = {name.lower() for headers in download.proxy.headers for name in headers}
    assert "range" in sent and "authorization" not in sent


def test_defaults_are_the_published_bucket_and_the_folders_of_config_yaml(monkeypatch):
    asked = []
    monkeypatch.setattr(download_data, "download", asked.append)
    assert download_data.main([]) == 0
    (arguments,) = asked
    assert arguments.endpoint == "https://s3.echo.stfc.ac.uk"
    assert f"s3://{arguments.bucket}/{arguments.prefix}" == "s3://sciml-datasets/es/cloud_slstr_ds1"
    config = (PROGRAM.parents[1] / "config.yaml").read_text()
    for key, name in zip(("train_dir", "inference_dir"), arguments.sets, strict=True):
        assert re.search(rf"^{key}: {arguments.dest / name} ", config, re.MULTILINE)


def test_set_option_selects_one_set(scenes, download):
    assert download("--set", "ssts") == 0
    assert list(download.files()) == SSTS
    assert download("--set", "one-day") == 0
    download.assert_complete()  # the manifest keeps the other set


def test_placeholders_of_folders_are_skipped_and_empty_objects_are_files(scenes, download):
    scenes.put("one-day/", b"")
    scenes.put("one-day/README", b"")
    assert download() == 0
    del scenes.objects["one-day/"]
    download.assert_complete()


def test_samples_are_repeatable_nested_and_spread_over_day_and_night():
    def files(**folders):
        names = [f"{name}/S3A_{i}.hdf" for name, n in folders.items() for i in range(n)]
        keys = [f"ssts/{name}" for name in (*names, "day/notes.txt")]
        return [download_data.RemoteFile(key, key, 1, "") for key in keys]

    scenes = files(day=55, night=45)
    chosen = {n: [f.key for f in download_data.sample(scenes, n)] for n in range(1, 130)}
    for n in range(2, 101):
        assert len(set(chosen[n])) == n and set(chosen[n - 1]) < set(chosen[n])
        by = Counter(key.split("/")[1] for key in chosen[n])
        assert min(by["day"], by["night"]) >= 1 and abs(by["day"] - 0.55 * n) <= 1
    assert chosen[129] == chosen[100]  # all there are, without the notes
    random.shuffle(scenes)
    assert [f.key for f in download_data.sample(scenes, 10)] == chosen[10]
    assert set(chosen[20]) != set(sorted(chosen[100])[:20])  # not the first by name
    rare = Counter(f.key.split("/")[1] for f in download_data.sample(files(day=99, night=1), 2))
    assert rare == {"day": 1, "night": 1}


def test_scenes_option_takes_a_sample_of_each_set(scenes, download):
    scenes.put("ssts/night/S3A_5.hdf")
    assert download("--scenes", "2") == 0
    assert {key.rpartition("/")[0] for key in download.files()} == {
        "one-day/day", "one-day/night", "ssts/day", "ssts/night",
    }  # fmt: skip
    assert len(download.files()) == 4
    assert download() == 0
    download.assert_complete()


def test_files_are_flushed_to_the_disk_before_they_get_their_names(scenes, download, monkeypatch):
    synced, fsync = set(), os.fsync

    def record(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.add((name, os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    assert download() == 0
    assert synced >= {(f".{Path(key).name}.download", SIZE) for key in scenes.objects}


# --- faults of the network and of listings ------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "reason"),  # reason "": boto3 retries the request by itself
    [
        ([refusing(503, "SlowDown")] * 3, ""),
        ([refusing(500), refusing(429, "SlowDown"), refusing(400, "RequestTimeout")], ""),
        ([cut(0), cut(300_000), plain, cut(400_000)], ""),
        ([with_body(lambda body: body[:400_000])], "1400000 of 1500000 bytes|does not match"),
        ([plain, with_body(flipped)], "the content does not match the listed ETag"),
        ([plain, with_body(lambda body: body + bytes(10_000_000))], "more than the expected"),
        ([with_body(lambda body: b"")] * 2, "does not match the listed ETag"),
        ([plain, without_range], "more than the expected 1500000 bytes"),
        ([with_headers(Content_Length="abc")], "."),
        ([plain, with_headers(Content_Range="all")], "."),
        ([plain, with_headers(Content_Range=f"bytes 0-{RANGE - 1}/{SIZE}")], "."),
        ([with_body(lambda body: b"<html>Sign in</html>")], "does not match the listed ETag"),
    ],
    ids=[
        "503", "500-429-400", "dropped", "truncated", "flipped", "endless", "empty", "whole-file",
        "bad-length", "bad-range", "other-range", "sign-in",
    ],
)  # fmt: skip
def test_network_faults_are_retried(scenes, download, capsys, faults, reason):
    download.proxy.faults[DAY[1]] += faults
    assert download() == 0
    assert not download.proxy.faults[DAY[1]]
    download.assert_complete()
    retries = re.findall(rf"^{DAY[1]}: (.*)\. Retrying in", capsys.readouterr().err, re.MULTILINE)
    assert bool(retries) == bool(reason) and all(re.search(reason, text) for text in retries)
    assert len(download.proxy.requests) > 2 + 5 * SIZE // RANGE


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (with_body(lambda body: b"<html><p>Sign in</p></html>"), "is not a listing"),
        (relisted(b"<IsTruncated>false", b"<IsTruncated>true"), "the listing is truncated"),
        (relisted(b"<Size>[0-9]+</Size>", b""), "the listing of es/clouds/one-day/ contains"),
        (relisted(b"<Size>", b"<Size>many"), "invalid literal"),
        (relisted(b"<Size>", b"<Size>-"), "the listing of es/clouds/one-day/ contains"),
        (renamed("manifest.csv"), "contains"),
        (renamed("one-day-2/S3A_0.hdf"), "contains"),
    ],
)
def test_malformed_listing_is_requested_again_and_never_used(
    scenes, download, capsys, fault, reason
):
    download.proxy.faults[""] += [fault, fault]
    assert download() == 0
    download.assert_complete()
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("Listing one-day: ")]
    assert len(lines) == 2 and all(reason in line for line in lines)
    download.proxy.faults[""] += [fault] * 4
    assert download() == 1
    assert f"Cannot list s3://{scenes.bucket}/" in error_line(capsys)


def test_listing_without_end_is_an_error(scenes, download, monkeypatch, capsys):
    pages = []

    def endless(headers, forward):
        pages.append(pages[0] if pages else forward(headers))
        token = b"<NextContinuationToken>%d</NextContinuationToken>" % len(pages)
        body = pages[0].body.replace(b"<IsTruncated>false", token + b"<IsTruncated>true")
        return with_body(lambda _: body)(headers, lambda _: pages[0])

    monkeypatch.setattr(download_data, "MAX_PAGES", 20)
    download.proxy.faults[""] += [endless] * 200
    assert download() == 2
    assert "the listing of es/clouds/one-day/ has more than 20 pages" in error_line(capsys)
    assert len(pages) < 30  # it is not requested again


def test_page_without_end_is_an_error(scenes, download, monkeypatch, capsys):
    def endless(headers, forward):
        page = forward(headers)
        body = page.body + b" " * 200_000
        return replace(page, body=body, headers={"Content-Length": 10**12}, sent=None, stalls=True)

    monkeypatch.setattr(download_data, "MAX_PAGE_BYTES", 100_000)
    download.proxy.faults[""].append(endless)
    assert download() == 2
    assert "a page of the listing has more than 100.0 kB" in error_line(capsys)


@pytest.mark.parametrize(
    "fault",
    [
        relisted(b"(?s)<Contents>.*</Contents>", rb"\g<0>\g<0>"),  # repeated keys
        relisted(b"<ETag>", b"<ETag>W/"),  # weak ETags, of proxies that compress
        lambda headers, forward: forward(headers, "&max-keys=1"),
        cut(100),
        refusing(503, "SlowDown"),
    ],
    ids=["repeated", "weak", "pages", "dropped", "503"],
)
def test_unusual_listing_gives_each_file_once(scenes, download, fault):
    download.proxy.faults[""] += [fault] * 4
    assert download() == 0
    download.assert_complete()
    assert Counter(download.proxy.requests)["GET", DAY[0]] == SIZE // RANGE


@pytest.mark.parametrize(
    "key",
    [
        "one-day/../../outside/S3A_0.hdf", "one-day//S3A_0.hdf", "one-day/./S3A_0.hdf",
        "one-day//etc/S3A_0.hdf", "one-day/day/.S3A_0.hdf", "one-day/day/S3A&#10;Error: 0.hdf",
        "one-day/..", "one-day/day/" + 300 * "x",
    ],
)  # fmt: skip
def test_key_that_is_not_a_path_below_the_folder_is_reported(
    scenes, download, tmp_path, capsys, key
):
    download.proxy.faults[""].append(renamed(key))
    assert download("--transfers", "1") == 1
    assert f"Failed: {key.replace('&#10;', chr(92) + 'n')}: " in capsys.readouterr().err
    assert list(download.files()) == [*DAY[1:], *NIGHT, *SSTS] == sorted(download.manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_object_in_the_place_of_a_folder_is_reported(scenes, download, capsys):
    scenes.put("one-day/day", b"x")  # either this file or the folder comes first
    assert download() == 1
    text = capsys.readouterr().err
    assert re.search(r"^Failed: one-day/day\S*: (File exists|Is a dir|Not a dir)", text, re.M)
    assert {*NIGHT, *SSTS} < set(download.files()) == set(download.manifest())


def test_failed_files_are_reported_and_the_others_kept(scenes, download, capsys):
    def change():
        scenes.put(DAY[1], size=SIZE)

    download.proxy.faults[DAY[0]] += [refusing(503, "SlowDown")] * 20  # 4 attempts x 5 of boto3
    download.proxy.faults[DAY[1]].append(after(change))
    download.proxy.faults[SSTS[0]] += [plain, plain, with_body(flipped)] * 4
    download.proxy.faults[NIGHT[0]].append(refusing(403, "AccessDenied"))
    assert download() == 1
    text = capsys.readouterr().err
    failed = dict(re.findall(r"^Failed: (\S+): (.*)$", text, re.MULTILINE))
    assert set(failed) == {DAY[0], DAY[1], SSTS[0], NIGHT[0]}
    assert "SlowDown" in failed[DAY[0]] and "AccessDenied" in failed[NIGHT[0]]
    assert all("does not match the listed ETag" in failed[key] for key in (DAY[1], SSTS[0]))
    last = text.splitlines()[-1]
    assert last.startswith("Error: 4 files failed; 1 file, 1.5 MB, complete in ")
    assert list(download.files()) == list(download.manifest()) == [DAY[2]]
    assert list(download.dest.rglob("*.download")) == []
    assert download() == 0
    download.assert_complete()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--bucket", "no-such-bucket"], 2, "NoSuchBucket"),
        (["--bucket", "no bucket"], 2, 'Invalid bucket name "no bucket"'),
        (["--prefix", "elsewhere"], 2, "No scenes matching 'S3[A-D]*.hdf' in one-day or training"),
        (["--prefix", "elsewhere"], 2, "/elsewhere/ at {}, which contains nothing. Check"),
        (["--prefix", "es"], 2, "which contains 'clouds/'. Check --endpoint, --bucket and --pref"),
        (["--prefix", f"{PREFIX}/ssts"], 2, "which contains 'day/'. Check"),
        (["--endpoint", "s3.echo"], 2, "--endpoint should be like https://"),
        (["--endpoint", "http://127.0.0.1:9"], 1, "Could not connect"),
    ],
)
def test_wrong_address_is_one_line(scenes, download, capsys, options, status, reason):
    assert download(*options) == status
    assert reason.format(download.proxy.url) in error_line(capsys)
    assert not download.dest.exists()


# --- what is present already --------------------------------------------------------------------


def test_second_download_requests_only_the_listings(complete, capsys):
    assert complete() == 0
    assert complete.proxy.requests == [("GET", ""), ("GET", "")]
    table = capsys.readouterr().err
    for row in ("files +4 +1", "present +6.0 MB +1.5 MB", "to download +0 B +0 B"):
        assert re.search(rf"^{row}$", table, re.MULTILINE)


@pytest.mark.parametrize("change", ["bucket", "bucket of another size", "file", "no file"])
def test_plan_is_printed_and_only_what_differs_is_downloaded(complete, capsys, change):
    path = complete.dest / DAY[0]
    if change == "file":
        os.truncate(path, 1000)
    elif change == "no file":
        path.unlink()
    else:
        complete.store.put(DAY[0], size=SIZE + ("size" in change))
    assert complete() == 0
    complete.assert_complete()
    assert complete.proxy.downloaded() == {DAY[0]}
    row = "to check" if change == "bucket" else "to download"
    assert re.search(rf"^{row} +1.5 MB +0 B$", capsys.readouterr().err, re.MULTILINE)


def test_files_of_another_tool_are_checked_and_kept(complete, capsys):
    (complete.dest / "manifest.csv").unlink()
    path = complete.dest / DAY[1]
    path.write_bytes(flipped(path.read_bytes()))
    assert complete() == 0
    complete.assert_complete()
    assert complete.proxy.downloaded() == {DAY[1]}
    assert re.search(r"^to check +6.0 MB +1.5 MB$", capsys.readouterr().err, re.MULTILINE)


def test_folders_of_the_newer_names_are_kept_and_verified(complete, capsys):
    for old, new in (("one-day", "training"), ("ssts", "inference")):
        (complete.dest / old).rename(complete.dest / new)
    (complete.dest / "manifest.csv").unlink()
    (complete.dest / "training/day/S3A_0.hdf").unlink()
    assert complete() == 0 and complete("--verify") == 0
    assert complete.proxy.downloaded() == {DAY[0]}
    assert sorted(path.name for path in complete.dest.iterdir() if path.is_dir()) == [
        "inference", "training",
    ]  # fmt: skip
    assert len(complete.manifest()) == len(complete.files()) == 5
    assert "All of 5 files" in capsys.readouterr().err


def test_leftovers_of_a_killed_download_are_removed_unless_it_still_runs(
    complete, tmp_path, capsys
):
    (tmp_path / "elsewhere").mkdir()
    (complete.dest / "one-day/dusk").symlink_to(tmp_path / "elsewhere")
    leftovers = [complete.dest / ".manifest.12-345.part.csv", tmp_path / "elsewhere/.x.download"]
    for path in leftovers:
        path.write_text("x")
    with lock(complete.dest / ".download.lock", "in use"):
        assert complete() == 2
    assert "Another download is using" in error_line(capsys)
    assert all(path.exists() for path in leftovers)
    assert complete() == 0
    assert not any(path.exists() for path in leftovers)


# --- ETags of uploads in parts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "n_heads"),
    [((5 * MIB, 5 * MIB, 99), 0), ((8 * MIB, 1), 0), ((77,), 0), ((6 * MIB, 99), 1)],
    ids=["5-MiB", "8-MiB", "one-part", "6-MiB"],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_etag_of_parts_is_verified(store, download, sizes, n_heads, damaged, capsys):
    store.put("one-day/day/S3A_0.hdf", b"x")
    store.put_parts(SSTS[0], *sizes)
    assert store.etag(SSTS[0]).endswith(f"-{len(sizes)}")
    if damaged:
        download.proxy.faults[SSTS[0]].append(with_body(flipped))
    assert download("--set", "ssts") == 0
    text = capsys.readouterr().err
    assert "cannot be verified" not in text
    assert ("does not match the listed ETag" in text) == damaged
    assert download.files()[SSTS[0]] == store.objects[SSTS[0]]
    assert Counter(method for method, _ in download.proxy.requests)["HEAD"] == n_heads + damaged


@pytest.mark.parametrize(
    "head", [with_headers(Content_Length=12 * MIB), refusing(501), refusing(400)]
)
def test_etag_of_unknown_parts_is_reported(store, download, capsys, head):
    store.put_parts(SSTS[0], 6 * MIB, 6 * MIB)
    download.proxy.faults["HEAD"].append(head)
    assert download("--set", "ssts") == 0
    download.assert_complete()
    assert f"{SSTS[0]}: its ETag cannot be verified, only its size" in capsys.readouterr().err


# --- signals, locks and disks -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_stopped_download_keeps_finished_files(scenes, download, number, status):
    for key in (DAY[2], NIGHT[0]):  # a server that stops answering does not delay the exit
        download.proxy.faults[key] += [cut(700_000, stalls=True)] * 50
    command = [sys.executable, PROGRAM, *download.arguments("--transfers", "3")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        expected = {*DAY[:2], *SSTS}
        while (
            len(list(download.dest.rglob("*.download"))) < 2 or set(download.manifest()) != expected
        ):
            assert process.poll() is None
            download.proxy.closing.wait(0.02)
        process.send_signal(number)
        assert process.wait(60) == status
        lines = process.stderr.read().splitlines()
    if number != signal.SIGKILL:
        assert lines[-1].startswith(f"Stopped: received {signal.Signals(number).name}.")
        assert list(download.dest.rglob("*.download")) == []
    seen = [str(path.relative_to(download.dest)) for path in find_scenes(download.dest)]
    assert seen == [*DAY[:2], *SSTS] == sorted(download.manifest())
    download.proxy.requests.clear()
    download.proxy.faults.clear()
    assert download() == 0
    download.assert_complete()
    assert download.proxy.downloaded() == {DAY[2], NIGHT[0]}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 9 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9000000", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("linked", [False, True])
def test_plan_that_does_not_fit_is_rejected(scenes, download, small_disk, capsys, linked):
    scenes.put(SSTS[0], size=10_000_000 if linked else 4_000_000)
    if linked:  # ssts alone is on the small disk
        download.dest.mkdir()
        (download.dest / "ssts").symlink_to(small_disk)
    else:
        download.dest = small_disk / "data"
    assert download() == 2
    line = error_line(capsys)
    assert "10.0 MB are needed" in line and "9.0 MB free" in line
    assert download.files() == {} and download.proxy.downloaded() == set()
    assert download("--set", "one-day") == 0
    assert len(download.files()) == 4


def test_full_disk_ends_the_download_with_one_line(scenes, download, small_disk, capsys):
    download.dest = small_disk / "data"
    filler = small_disk / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 16))

    download.proxy.faults[DAY[1]].append(after(fill))
    assert download("--transfers", "1") == 2
    # The file before it may still be on its way to the disk.
    assert re.search(r"S3A_[01]\.hdf: No space left on device", error_line(capsys))
    assert list(download.files()) == list(download.manifest())
    assert set(download.files()) <= {DAY[0]}
    filler.unlink()
    assert download() == 0
    download.assert_complete()


def test_unfinished_file_may_be_removed_by_its_own_transfer(tmp_path, monkeypatch):
    gone = tmp_path / ".S3A_0.hdf.download"
    monkeypatch.setattr(download_data, "unfinished", lambda *_: [gone])
    download_data.remove_unfinished(tmp_path)
    assert not gone.exists()


# --- the command line and the screen ------------------------------------------------------------


def test_missing_boto3_is_one_line_with_the_command_that_installs_it(download, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert download() == 2
    line = error_line(capsys)
    assert "boto3" in line and "pip install -r requirements-tools.txt" in line


def test_batch_log_has_progress_with_the_time_left(scenes, download, monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    assert download() == 0
    lines = re.findall(r"^Downloading: (\d) of 5, \S+ .*left$", capsys.readouterr().err, re.M)
    assert lines == ["1", "2", "3", "4"]


# --- verification -------------------------------------------------------------------------------


def test_verification_reports_what_is_wrong_without_the_network(complete, capsys):
    assert complete("--verify") == 0
    assert "5 files" in capsys.readouterr().err
    path = complete.dest / DAY[0]
    path.write_bytes(flipped(path.read_bytes()))
    os.truncate(complete.dest / DAY[1], 1000)
    (complete.dest / NIGHT[0]).unlink()
    (complete.dest / "ssts/day/.S3A_9.hdf.download").write_bytes(b"x")
    (complete.dest / "ssts/day/S3A_8.hdf").write_bytes(b"x")
    with (complete.dest / "manifest.csv").open("a") as file:
        file.write(f"one-day/{300 * 'x'},1,a,b\n")
    digests = [complete.manifest()[DAY[0]]["sha256"], hashlib.sha256(path.read_bytes()).hexdigest()]
    assert complete("--verify") == 1
    text = capsys.readouterr().err
    wrong = dict(re.findall(r"^Wrong: (\S+): (.*)$", text, re.MULTILINE))
    assert "File name too long" in wrong.pop(f"one-day/{300 * 'x'}")
    assert wrong == {
        DAY[0]: "expected sha256 {}, found {}".format(*digests),
        DAY[1]: f"expected {SIZE} bytes, found 1000",
        NIGHT[0]: "missing",
        "ssts/day/.S3A_9.hdf.download": "unfinished",
    }
    assert "S3A_8.hdf is not in the manifest" in text
    assert text.splitlines()[-1].startswith("Error: 5 wrong files")
    assert complete("--verify", "--set", "ssts") == 1
    (complete.dest / "ssts/day/.S3A_9.hdf.download").unlink()
    assert complete("--verify", "--set", "ssts") == 0
    assert complete.proxy.requests == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "lists no file"),
        ("", "lists no file"),
        ("pipe", "should be a file"),
        ("key,size\na,1\n", "should be a file with the columns"),
        ("key,size,etag,sha256\none-day/../x,1,a,b\n", "paths below"),
        ("key,size,etag,sha256\none-day//x,1,a,b\n", "paths below"),
        ("key,size,etag,sha256\nx,much,a,b\n", "sizes in bytes"),
        ("key,size,etag,sha256\nx,1\n", "columns"),
        ('key,size,etag,sha256\n"x,1,a,b\n', "columns"),
        ("\x00\nx\n", "columns"),
    ],
)
def test_malformed_manifest_is_one_line(scenes, download, capsys, text, reason):
    download.dest.mkdir()
    path = download.dest / "manifest.csv"
    if text == "pipe":
        os.mkfifo(path)
    elif text is not None:
        path.write_text(text)
    assert download("--verify") == 2
    line = error_line(capsys)
    assert "manifest.csv " in line and reason in line
    if text:
        assert download() == 2
        assert download.files() == {}


def test_etag_is_computed_a_mebibyte_at_a_time(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8 << 20))
    tracemalloc.start()
    try:
        etag = download_data.compute_etag(tmp_path / "file", 8 << 20, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert etag == hashlib.md5(bytes(8 << 20)).hexdigest() and peak < 4 << 20
