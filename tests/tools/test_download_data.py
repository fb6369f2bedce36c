"""The download against a real S3 server (moto), with a proxy in between that plays the network."""

import contextlib
import csv
import errno
import fcntl
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
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import boto3
import pytest
from moto.server import ThreadedMotoServer
from test_disk import fill

from data_loader import find_scenes
from harness import console as screen
from tools import download_data

PROGRAM = Path(download_data.__file__)
PREFIX = "es/clouds"
SIZE = 1_500_000  # bytes of a scene, several of the program's blocks
MIB = 1 << 20
DAY = [f"one-day/day/S3A_{i}.hdf" for i in range(3)]
NIGHT = ["one-day/night/S3A_3.hdf"]
SSTS = ["ssts/day/S3A_4.hdf"]


# --- the other side -------------------------------------------------------------------------


class Store:
    """A bucket on the server.

    Attributes:
        objects: Content by key below PREFIX.
    """

    numbers = itertools.count()

    def __init__(self, server):
        self.address = server.get_host_and_port()
        self._client = boto3.client(
            "s3",
            endpoint_url="http://{}:{}".format(*self.address),
            region_name="us-east-1",
            aws_access_key_id="writer",
            aws_secret_access_key="secret",
        )
        self.bucket = f"scenes-{next(self.numbers)}"
        self._client.create_bucket(Bucket=self.bucket)
        self.objects = {}

    def put(self, key, content=None, size=SIZE):
        """Store an object that all may read; by default of random bytes."""
        self.objects[key] = random.randbytes(size) if content is None else content
        self._client.put_object(
            Bucket=self.bucket, Key=f"{PREFIX}/{key}", Body=self.objects[key], ACL="public-read"
        )

    def put_parts(self, key, *sizes):
        """Upload an object in parts."""
        parts = [random.randbytes(size) for size in sizes]
        where = {"Bucket": self.bucket, "Key": f"{PREFIX}/{key}"}
        upload = self._client.create_multipart_upload(**where, ACL="public-read")
        where["UploadId"], done = upload["UploadId"], []
        for number, part in enumerate(parts, 1):
            answer = self._client.upload_part(**where, PartNumber=number, Body=part)
            done.append({"PartNumber": number, "ETag": answer["ETag"]})
        self._client.complete_multipart_upload(**where, MultipartUpload={"Parts": done})
        self.objects[key] = b"".join(parts)

    def delete(self, key):
        del self.objects[key]
        self._client.delete_object(Bucket=self.bucket, Key=f"{PREFIX}/{key}")

    def etag(self, key):
        return self._client.head_object(Bucket=self.bucket, Key=f"{PREFIX}/{key}")["ETag"].strip(
            '"'
        )

    def close(self):
        self._client.close()


@dataclass
class Answer:
    """What the proxy sends: of the body only `sent` bytes, in pieces with pauses in between."""

    status: int
    headers: dict
    body: bytes
    sent: int | None = None
    seconds: float = 0.0


@dataclass
class Request:
    """What the proxy was asked, and how many bytes of a body it gave."""

    method: str
    key: str  # below PREFIX; "" is the list
    headers: dict
    sent: int = 0


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server.

    Attributes:
        faults: Functions of (headers, forward) that give the Answer, by key: one for each GET until
            they are used up. That of `""` is for each list, that of `HEAD` for each HEAD.
        requests: What was asked.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, address):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = address
        self.faults, self.requests = defaultdict(deque), []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def gets(self, key):
        return [r for r in self.requests if (r.method, r.key) == ("GET", key)]

    def handle_error(self, *_):
        """Say nothing of connections that the program closed."""

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        key = "" if "list-type" in query else unquote(path).partition(f"/{PREFIX}/")[2]
        request = Request(self.command, key, dict(self.headers))
        self.server.requests.append(request)
        faults = self.server.faults["HEAD" if self.command == "HEAD" else key]
        fault = plain
        if faults:
            fault = faults[0] if self.command == "HEAD" or not key else faults.popleft()
        answer = fault(request.headers, self.forward)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body[: answer.sent]
        with contextlib.suppress(ConnectionError):
            for begin in range(0, len(body), 1 << 16):
                request.sent += self.wfile.write(body[begin : begin + (1 << 16)])
                self.server.closing.wait(answer.seconds)
            if answer.sent is not None:
                self.close_connection = True
                if answer.seconds:  # the connection stays, and nothing comes
                    self.server.closing.wait(60)

    do_HEAD = do_GET

    def forward(self, headers, more_query=""):
        connection = http.client.HTTPConnection(*self.server.upstream)
        with contextlib.closing(connection):
            connection.request(self.command, self.path + more_query, headers=headers)
            answer = connection.getresponse()
            skipped = ("connection", "transfer-encoding", "server", "date")
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in skipped}
            return Answer(answer.status, kept, answer.read())

    def log_message(self, *_):
        pass


def plain(headers, forward):
    return forward(headers)


def cut(sent):
    """Drop the connection after so many bytes."""
    return lambda headers, forward: replace(forward(headers), sent=sent)


def stalling(sent):
    return lambda headers, forward: replace(forward(headers), sent=sent, seconds=0.001)


def trickling(headers, forward):
    return replace(forward(headers), seconds=0.05)


def with_body(change):
    """Send another body, of the length that is declared."""

    def fault(headers, forward):
        answer = forward(headers)
        body = change(answer.body)
        others = {k: v for k, v in answer.headers.items() if k.lower() != "content-length"}
        return replace(answer, body=body, headers={**others, "Content-Length": len(body)})

    return fault


def with_headers(**changes):
    """Send other headers; None leaves one out."""

    def fault(headers, forward):
        answer = forward(headers)
        changed = {name.replace("_", "-").lower(): value for name, value in changes.items()}
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in changed}
        kept |= {k: v for k, v in changed.items() if v is not None}
        return replace(answer, headers=kept)

    return fault


def once(*faults):
    """One fault for each request, then none; for lists and HEAD."""
    left = iter(faults)
    return lambda headers, forward: next(left, plain)(headers, forward)


def relisted(pattern, by):
    """Change the text of a list."""
    return with_body(lambda body: re.sub(pattern, by, body))


def weak(headers, forward):
    """Mark the ETag as a weak one, as proxies that compress do."""
    answer = forward(headers)
    return replace(answer, headers={
        k: f"W/{v}" if k.lower() == "etag" else v for k, v in answer.headers.items()
    })  # fmt: skip


def flipped(body):
    return body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]


def refusing(status, code=""):
    def fault(headers, forward):
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode() * bool(code)
        return Answer(status, {"Content-Length": len(body), "Content-Type": "text/xml"}, body)

    return fault


def without_ranges(headers, forward):
    return forward({k: v for k, v in headers.items() if k != "Range"})


def after(change, fault=plain):
    """Let something happen just before the request reaches the server."""

    def changed(headers, forward):
        change()
        return fault(headers, forward)

    return changed


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def store(server):
    """An empty bucket."""
    with contextlib.closing(Store(server)) as store:
        yield store


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


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(download_data, "LONGEST_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# --- this side ------------------------------------------------------------------------------


@dataclass
class Download:
    """The program on a folder."""

    store: Store
    proxy: Proxy
    dest: Path

    def arguments(self, *more):
        where = ["--endpoint", self.proxy.url, "--bucket", self.store.bucket, "--prefix", PREFIX]
        return [*where, "--dest", str(self.dest), *more]

    def __call__(self, *more):
        return download_data.main(self.arguments(*more))

    def start(self, *more):
        """In a process of its own."""
        command = [sys.executable, PROGRAM, *self.arguments(*more)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def files(self):
        """Content of all files by key; hidden ones and the manifest left out."""
        found = sorted(path for path in self.dest.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.dest)): path.read_bytes()
            for path in found
            if not path.name.startswith(".") and path.name != "manifest.csv"
        }

    def partials(self):
        return sorted(self.dest.rglob("*.download"))

    def manifest(self):
        with (self.dest / "manifest.csv").open(newline="") as file:
            return {line["key"]: line for line in csv.DictReader(file)}

    def assert_whole(self):
        """All objects are here as they are in the bucket, and the manifest says so."""
        assert self.files() == self.store.objects
        assert self.partials() == []
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


def errors(capsys):
    """The lines that begin with 'Error: '; there is never a traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("Error: ")]


# --- what arrives ---------------------------------------------------------------------------


def test_scenes_arrive_where_the_benchmark_looks_for_them(store, download, dataset):
    for path in dataset.rglob("S3A*.hdf"):
        store.put(str(path.relative_to(dataset)), path.read_bytes())
    assert download() == 0
    download.assert_whole()
    for name in ("one-day", "ssts"):
        ours, theirs = find_scenes(download.dest / name), find_scenes(dataset / name)
        assert [p.relative_to(download.dest) for p in ours] == [
            p.relative_to(dataset) for p in theirs
        ]


def test_no_credentials_are_sent(scenes, download, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert download() == 0
    sent = {name.lower() for request in download.proxy.requests for name in request.headers}
    assert "if-match" in sent and "authorization" not in sent


def test_defaults_are_the_published_bucket_and_the_folders_of_the_configuration():
    arguments = download_data.parse_arguments([])
    assert arguments.endpoint == "https://s3.echo.stfc.ac.uk"
    assert f"s3://{arguments.bucket}/{arguments.prefix}" == "s3://sciml-datasets/es/cloud_slstr_ds1"
    config = (PROGRAM.parents[1] / "config.yaml").read_text()
    for key, name in zip(("train_dir", "inference_dir"), download_data.SETS, strict=True):
        assert re.search(rf"^{key}: {arguments.dest / name} ", config, re.MULTILINE)


def test_set_chooses_what_comes(scenes, download):
    assert download("--set", "ssts") == 0
    assert list(download.files()) == SSTS
    assert download("--set", "one-day") == 0
    download.assert_whole()  # the manifest keeps the other set


def test_marks_of_folders_are_no_files(scenes, download):
    scenes.put("one-day/", b"")
    assert download() == 0
    del scenes.objects["one-day/"]
    download.assert_whole()


def test_empty_object_is_an_empty_file(scenes, download):
    scenes.put("one-day/README", b"")
    assert download() == 0
    download.assert_whole()


def test_list_of_many_pages(scenes, download):
    download.proxy.faults[""].append(lambda headers, forward: forward(headers, "&max-keys=1"))
    assert download() == 0
    download.assert_whole()
    assert len(download.proxy.gets("")) == len(scenes.objects)


# --- faults of the network ------------------------------------------------------------------


def test_dropped_transfer_goes_on_from_the_bytes_that_are_here(scenes, download):
    download.proxy.faults[DAY[0]] += [cut(700_000), cut(500_000)]
    assert download() == 0
    download.assert_whole()
    first, second, third = download.proxy.gets(DAY[0])
    etag = f'"{scenes.etag(DAY[0])}"'
    assert [r.headers["If-Match"] for r in (first, second, third)] == [etag] * 3
    assert "Range" not in first.headers
    begins = [int(re.fullmatch(r"bytes=(\d+)-", r.headers["Range"])[1]) for r in (second, third)]
    block = download_data.BLOCK  # at most one of them is lost with a connection
    assert 700_000 - block < begins[0] <= 700_000
    assert begins[0] + 500_000 - block < begins[1] <= begins[0] + 500_000
    assert third.sent == SIZE - begins[1]
    assert first.sent + second.sent + third.sent < SIZE + 2 * block


@pytest.mark.parametrize(
    "faults",
    [
        [refusing(503, "SlowDown")] * 3,
        [refusing(500), refusing(429, "TooManyRequests"), refusing(400, "RequestTimeout")],
        [cut(0), cut(0)],
        [with_body(lambda body: body[:400_000])],
        [with_body(flipped)],
        [with_body(lambda body: body + b"more")],
        [cut(700_000), with_body(flipped)],
        [cut(700_000), without_ranges],
        [cut(700_000), with_body(lambda body: body + b"more")],
        [with_body(lambda body: b"")] * 2,
        [with_headers(Content_Length="abc")],
        [cut(700_000), with_headers(Content_Range="all")],
        [weak],
    ],
    ids=[
        "503", "500-429-400", "dropped", "truncated", "flipped", "longer", "flipped-later",
        "no-ranges", "longer-later", "empty", "no-length", "no-range", "weak-etag",
    ],
)  # fmt: skip
def test_faults_of_the_network_are_overcome(scenes, download, faults):
    download.proxy.faults[DAY[1]] += faults
    assert download() == 0
    assert not download.proxy.faults[DAY[1]]
    download.assert_whole()
    # The server without ranges gave all that was wanted, and so no request is added.
    more = faults[-1] not in (without_ranges, weak)
    assert len(download.proxy.gets(DAY[1])) == len(faults) + more


def test_body_that_ends_early_is_gone_on_with(scenes, download):
    download.proxy.faults[DAY[1]].append(with_body(lambda body: body[:400_000]))
    assert download() == 0
    download.assert_whole()
    assert [r.headers.get("Range") for r in download.proxy.gets(DAY[1])] == [None, "bytes=400000-"]


def test_partial_file_that_is_too_long_begins_anew(scenes, download):
    transfer = download_data.Transfer(DAY[1], SIZE, scenes.etag(DAY[1]))
    partial = transfer.partial(download.dest)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(SIZE + 1))
    assert download() == 0
    download.assert_whole()
    assert [r.headers.get("Range") for r in download.proxy.gets(DAY[1])] == [None]


def test_body_without_end_does_not_fill_the_disk(scenes, download):
    download.proxy.faults[DAY[1]].append(with_body(lambda body: body + bytes(60_000_000)))
    assert download() == 0
    download.assert_whole()
    assert download.proxy.gets(DAY[1])[0].sent < 30_000_000  # what the sockets hold is lost


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (refusing(503, "SlowDown"), "503 SlowDown"),
        (cut(100), ""),
        (with_body(lambda body: b"<html><p>Sign in</p></html>"), "no list of files came"),
        (with_body(lambda body: b"<html><p>Sign in</html>"), "the server answers 500"),
        (relisted(b"<IsTruncated>false", b"<IsTruncated>true"), "the list of files breaks off"),
        (relisted(b"<Size>[0-9]+</Size>", b""), "makes no sense: it lacks 'Size'"),
        (relisted(b"<Size>", b"<Size>many"), "makes no sense: invalid literal"),
    ],
)
def test_list_is_asked_for_again(scenes, download, capsys, fault, reason):
    download.proxy.faults[""].append(once(fault, fault))
    assert download() == 0
    download.assert_whole()
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("The list of files: ")]
    assert len(lines) == 2 and all(reason in line for line in lines)


def test_object_that_is_listed_twice_is_fetched_once(scenes, download):
    twice = relisted(b"(?s)<Contents>.*</Contents>", rb"\g<0>\g<0>")
    download.proxy.faults[""].append(twice)
    assert download() == 0
    download.assert_whole()
    assert len(download.proxy.gets(DAY[0])) == 1


def test_weak_etags_of_a_list_are_compared_as_others(scenes, download):
    download.proxy.faults[""].append(relisted(b"<ETag>", b"<ETag>W/"))
    assert download() == 0
    download.assert_whole()


@pytest.mark.parametrize("key", ["manifest.csv", "other/x", "one-day-2/S3A_0.hdf"])
def test_list_of_other_keys_is_refused(scenes, download, capsys, key):
    download.proxy.faults[""].append(
        relisted(f"/{DAY[0]}<".encode(), f"/{key}<".encode())
    )  # fmt: skip
    assert download() == 2
    (line,) = errors(capsys)
    assert f"'{PREFIX}/{key}' is listed" in line
    assert not download.dest.exists()


@pytest.mark.parametrize(
    "fault",
    [with_headers(ETag=None), lambda *_: Answer(200, {"Content-Length": 2}, b"hi")],
    ids=["no ETag", "page to sign in"],
)
def test_answer_without_etag_costs_no_byte_that_is_here(scenes, download, fault):
    download.proxy.faults[DAY[0]] += [cut(700_000), fault]
    assert download() == 0
    download.assert_whole()
    _, second, third = download.proxy.gets(DAY[0])
    assert third.headers["Range"] == second.headers["Range"]


def test_head_without_etag_is_asked_again(scenes, download, capsys):
    download.proxy.faults[DAY[0]].append(after(lambda: scenes.put(DAY[0])))
    download.proxy.faults["HEAD"].append(once(with_headers(ETag=None)))
    assert download() == 0
    download.assert_whole()
    assert "the server's answer makes no sense: it lacks 'ETag'" in capsys.readouterr().err


def test_bytes_that_move_keep_a_bad_line_going(scenes, download):
    n_faults = download_data.ATTEMPTS + 2
    scenes.put(DAY[0], size=n_faults * 300_000)
    download.proxy.faults[DAY[0]] += [cut(300_000)] * n_faults
    assert download() == 0
    download.assert_whole()


def test_pauses_grow(monkeypatch):
    monkeypatch.setattr(download_data, "LONGEST_PAUSE", 60)
    waits = []

    class Clock:
        def wait(self, seconds):
            waits.append(seconds)

    for n in range(1, download_data.ATTEMPTS):
        download_data.pause(n, "x", download_data.Transient("503"), Clock())
    assert len(waits) == 7
    assert all(longest / 2 <= wait <= longest for longest, wait in zip(
        (1, 2, 4, 8, 16, 32, 60), waits, strict=True))  # fmt: skip
    with pytest.raises(download_data.Failure, match="503"):
        download_data.pause(download_data.ATTEMPTS, "x", download_data.Transient("503"), Clock())


def test_files_that_fail_are_named_and_the_others_kept(scenes, download, capsys):
    download.proxy.faults[DAY[0]] += [refusing(503, "SlowDown")] * download_data.ATTEMPTS
    download.proxy.faults[DAY[1]].append(after(lambda: scenes.delete(DAY[1])))
    download.proxy.faults[SSTS[0]] += [with_body(flipped)] * (download_data.FRESH_STARTS + 1)
    download.proxy.faults[NIGHT[0]].append(refusing(403, "AccessDenied"))
    assert download() == 1
    lines = capsys.readouterr().err.splitlines()
    failed = dict(re.fullmatch(r"Failed: (\S+): (.*)", s).groups() for s in lines[-5:-1])
    assert set(failed) == {DAY[0], DAY[1], SSTS[0], NIGHT[0]}
    assert "503 SlowDown; tried 8 times" in failed[DAY[0]]
    assert "404" in failed[DAY[1]] and "403 AccessDenied" in failed[NIGHT[0]]
    assert "ETag is wrong" in failed[SSTS[0]]
    assert lines[-1].startswith("Error: 4 file(s) could not be had; 1 whole file")
    assert list(download.files()) == list(download.manifest()) == [DAY[2]]
    assert download() == 0
    download.assert_whole()


# --- objects that change --------------------------------------------------------------------


def test_object_that_changes_after_the_list_is_fetched_as_it_is_now(scenes, download, capsys):
    download.proxy.faults[DAY[0]].append(after(lambda: scenes.put(DAY[0], size=SIZE + 7)))
    assert download() == 0
    download.assert_whole()
    assert f"{DAY[0]}: it changed in the bucket" in capsys.readouterr().err


def test_object_that_changes_during_its_transfer_is_fetched_anew(scenes, download):
    download.proxy.faults[DAY[0]] += [cut(700_000), after(lambda: scenes.put(DAY[0]))]
    assert download() == 0
    download.assert_whole()
    *_, resumed, anew = download.proxy.gets(DAY[0])
    assert "Range" in resumed.headers and resumed.sent < 1000  # refused
    assert "Range" not in anew.headers


def test_object_that_changed_is_noticed_where_the_server_knows_no_if_match(scenes, download):
    def careless(headers, forward):
        return forward({k: v for k, v in headers.items() if k != "If-Match"})

    change = after(lambda: scenes.put(DAY[0]), careless)
    download.proxy.faults[DAY[0]] += [cut(700_000), change]
    assert download() == 0
    download.assert_whole()
    assert len(download.proxy.gets(DAY[0])) == 3  # the second was given up at once


def test_partial_file_of_another_version_is_not_gone_on_with(scenes, download):
    download.proxy.faults[DAY[0]] += [cut(700_000)] + [cut(0)] * download_data.ATTEMPTS
    assert download() == 1
    assert len(download.partials()) == 1
    scenes.put(DAY[0])
    download.proxy.faults.clear()
    before = len(download.proxy.gets(DAY[0]))
    assert download() == 0
    download.assert_whole()
    (request,) = download.proxy.gets(DAY[0])[before:]
    assert "Range" not in request.headers and request.sent == SIZE


@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_file_that_is_whole_but_old_is_replaced(scenes, download, capsys, size):
    assert download() == 0
    scenes.put(DAY[0], size=size)
    download.proxy.requests.clear()
    capsys.readouterr()
    assert download() == 0
    download.assert_whole()
    assert re.search(r"^changed in the bucket +1 +0$", capsys.readouterr().err, re.MULTILINE)
    assert [r.key for r in download.proxy.requests if r.method == "GET" and r.key] == [DAY[0]]


# --- what is here already -------------------------------------------------------------------


def test_second_run_fetches_nothing(scenes, download, capsys):
    assert download() == 0
    download.proxy.requests.clear()
    capsys.readouterr()
    assert download() == 0
    assert {r.key for r in download.proxy.requests} == {""}
    table = capsys.readouterr().err
    assert re.search(r"^files +4 +1$", table, re.MULTILINE)
    assert re.search(r"^here +6.0 MB +1.5 MB$", table, re.MULTILINE)
    assert "to come" not in table


def test_what_is_to_come_is_told_before(scenes, download, capsys):
    download.proxy.faults[DAY[0]] += [cut(1_000_000)] + [cut(0)] * download_data.ATTEMPTS
    assert download("--set", "one-day") == 1
    (partial,) = download.partials()
    n_bytes = partial.stat().st_size
    capsys.readouterr()
    assert download() == 0
    table = capsys.readouterr().err
    assert re.search(rf"^partly here +{screen.amount(n_bytes)} +0 B$", table, re.MULTILINE)
    left = screen.amount(SIZE - n_bytes)
    assert re.search(rf"^to come +{left} +1.5 MB$", table, re.MULTILINE)
    assert f"{screen.amount(2 * SIZE - n_bytes)} are to come." in table


def test_file_of_another_size_is_fetched_again(scenes, download):
    assert download() == 0
    os.truncate(download.dest / DAY[0], 1000)
    assert download() == 0
    download.assert_whole()


def test_files_of_another_tool_are_taken_over_if_they_are_right(scenes, download):
    for key, content in scenes.objects.items():
        path = download.dest / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if key != DAY[1] else flipped(content))
    assert download() == 0
    download.assert_whole()
    assert [r.key for r in download.proxy.requests if r.method == "GET" and r.key] == [DAY[1]]


def test_right_file_is_not_replaced_by_its_own_unfinished_download(scenes, download):
    download.proxy.faults[DAY[0]] += [cut(700_000)] + [cut(0)] * download_data.ATTEMPTS
    assert download() == 1
    assert len(download.partials()) == 1
    (download.dest / DAY[0]).write_bytes(scenes.objects[DAY[0]])
    assert download() == 0
    download.assert_whole()


def test_lost_manifest_is_made_again_without_a_transfer(scenes, download):
    assert download() == 0
    (download.dest / "manifest.csv").unlink()
    download.proxy.requests.clear()
    assert download() == 0
    download.assert_whole()
    assert {r.key for r in download.proxy.requests} == {""}


def test_linked_folders_are_searched_for_what_is_unfinished(scenes, download, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (download.dest / "one-day").mkdir(parents=True)
    (download.dest / "one-day/day").symlink_to(tmp_path / "elsewhere")
    assert download() == 0
    stale = tmp_path / "elsewhere/.S3A_9.hdf.0123.download"
    stale.write_bytes(b"x")
    (tmp_path / "elsewhere/S3A_8.hdf").write_bytes(b"x")
    capsys.readouterr()
    assert download("--verify") == 1
    error = capsys.readouterr().err
    assert f"Wrong: one-day/day/{stale.name}: unfinished" in error
    assert "S3A_8.hdf is not in the manifest" in error
    assert download() == 0
    assert not stale.exists()


def test_manifest_that_was_not_finished_is_removed(scenes, download):
    download.dest.mkdir()
    unfinished = download.dest / ".manifest.12-345.part.csv"
    unfinished.write_text("x")
    with (download.dest / ".download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert download() == 2
        assert unfinished.exists()  # that of the other
    assert download() == 0
    assert not unfinished.exists()


# --- ETags of uploads in parts --------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "n_heads"),
    [((5 * MIB, 5 * MIB, 99), 0), ((8 * MIB, 1), 0), ((77,), 0), ((5 * MIB, 6 * MIB, 99), 3)],
    ids=["of 5 MiB", "of 8 MiB", "one", "uneven"],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_etag_of_parts_is_computed(store, download, sizes, n_heads, damaged):
    store.put_parts(SSTS[0], *sizes)
    assert store.etag(SSTS[0]).endswith(f"-{len(sizes)}")
    if damaged:
        download.proxy.faults[SSTS[0]].append(with_body(flipped))
    assert download("--set", "ssts") == 0
    download.assert_whole()
    assert len(download.proxy.gets(SSTS[0])) == 1 + damaged
    heads = [r for r in download.proxy.requests if r.method == "HEAD"]
    assert len(heads) == (n_heads + len(sizes) if damaged else n_heads)


def whole_size(headers, forward):
    """Of an older Ceph: it does not know partNumber."""
    return replace(
        answer := forward(headers), headers={**answer.headers, "Content-Length": 11 * MIB}
    )


@pytest.mark.parametrize("head", [whole_size, refusing(501), refusing(400)])
def test_etag_of_unknown_parts_needs_two_copies_and_is_told(store, download, capsys, head):
    store.put_parts(SSTS[0], 5 * MIB, 6 * MIB)
    download.proxy.faults["HEAD"].append(head)
    download.proxy.faults[SSTS[0]].append(with_body(flipped))
    assert download("--set", "ssts") == 0
    download.assert_whole()
    assert len(download.proxy.gets(SSTS[0])) == 3  # the damaged one agrees with none
    assert f"{SSTS[0]}: its ETag could not be checked" in capsys.readouterr().err


# --- stopping -------------------------------------------------------------------------------


def wait_for(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "fault"),
    [
        (signal.SIGINT, 130, trickling),
        (signal.SIGTERM, 143, stalling(700_000)),  # what does not answer does not hold it up
        (signal.SIGKILL, -9, trickling),
    ],
)
def test_stopped_download_leaves_whole_files_and_goes_on(scenes, download, number, status, fault):
    download.proxy.faults[DAY[2]].append(fault)
    download.proxy.faults[NIGHT[0]].append(fault)
    process = download.start("--transfers", "3")
    with process:
        wait_for(
            lambda: (
                (download.dest / "manifest.csv").exists()
                and set(download.manifest()) == {*DAY[:2], *SSTS}
                and len(download.partials()) == 2
                and all(p.stat().st_size for p in download.partials())
            )
        )
        process.send_signal(number)
        assert process.wait(20) == status
        last = process.stderr.read().splitlines()[-1]
    if number != signal.SIGKILL:
        assert last.startswith(f"Stopped: received {signal.Signals(number).name}.")
    seen = [str(p.relative_to(download.dest)) for p in find_scenes(download.dest)]
    assert seen == [*DAY[:2], *SSTS] == sorted(download.manifest())
    for key in seen:
        assert (download.dest / key).read_bytes() == scenes.objects[key]
    kept = sum(p.stat().st_size for p in download.partials())
    download.proxy.requests.clear()
    assert download() == 0
    download.assert_whole()
    asked = [r for r in download.proxy.requests if r.key]
    assert {r.key for r in asked} == {DAY[2], NIGHT[0]}
    assert all("Range" in r.headers for r in asked)
    assert sum(r.sent for r in asked) == 2 * SIZE - kept


def test_two_downloads_in_one_folder_are_refused(scenes, download, capsys):
    download.dest.mkdir()
    with (download.dest / ".download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert download() == 2
    (line,) = errors(capsys)
    assert "Another download" in line
    assert download() == 0


def test_file_system_without_locks_is_told_of(scenes, download, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert download() == 0
    assert f"{download.dest} has no locks" in capsys.readouterr().err


# --- disks ----------------------------------------------------------------------------------


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


def test_what_does_not_fit_is_refused_before(scenes, download, small_disk, capsys):
    download.dest = small_disk / "data"
    scenes.put(SSTS[0], size=4_000_000)
    assert download() == 2
    (line,) = errors(capsys)
    assert "10.0 MB are to come" in line and "9.0 MB free" in line
    assert {r.key for r in download.proxy.requests} == {""}
    assert download.files() == {}
    assert download("--set", "one-day") == 0
    assert len(download.files()) == 4


def test_each_disk_is_looked_at(scenes, download, small_disk, capsys):
    download.dest.mkdir()
    (download.dest / "ssts").symlink_to(small_disk)
    scenes.put(SSTS[0], size=10_000_000)
    assert download() == 2
    (line,) = errors(capsys)
    assert "10.0 MB are to come" in line and "9.0 MB free" in line
    assert download("--set", "one-day") == 0


def test_full_disk_is_one_line_and_the_download_goes_on_later(scenes, download, small_disk, capsys):
    download.dest = small_disk / "data"

    def fill_after_the_first():
        wait_for(lambda: (download.dest / "manifest.csv").exists())
        fill(download.dest)

    download.proxy.faults[DAY[1]] += [cut(700_000), after(fill_after_the_first)]
    assert download("--transfers", "1") == 2
    (line,) = errors(capsys)
    assert f"{DAY[1]}: No space left on device" in line
    assert list(download.files()) == list(download.manifest()) == [DAY[0]]
    (partial,) = download.partials()
    kept = partial.stat().st_size
    assert kept > 400_000
    (small_disk / "filler").unlink()
    assert download() == 0
    download.assert_whole()
    assert download.proxy.gets(DAY[1])[-1].headers["Range"] == f"bytes={kept}-"


# --- keys, samples, arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "one-day/../../outside/S3A_0.hdf", "one-day//S3A_0.hdf", "one-day/./S3A_0.hdf",
        "one-day/day/.S3A_0.hdf", "one-day/day/S3A&#10;Error: 0.hdf", "one-day/..",
        "one-day/day/" + 300 * "x", "one-day/day",
    ],
)  # fmt: skip
def test_key_that_is_no_path_below_the_folder_is_named_and_left_out(
    scenes, download, tmp_path, capsys, key
):
    rename = (f"/{DAY[0]}<".encode(), f"/{key}<".encode())
    download.proxy.faults[""].append(with_body(lambda body: body.replace(*rename)))
    assert download() == 1
    error = capsys.readouterr().err
    shown = key.replace("&#10;", r"\n")
    assert f"Failed: {shown}: " in error
    assert list(download.files()) == [*DAY[1:], *NIGHT, *SSTS]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_object_in_the_place_of_a_folder_is_named_and_the_others_kept(scenes, download, capsys):
    scenes.put("one-day/day", b"x")
    assert download("--transfers", "1") == 1
    assert re.search(r"^Failed: (one-day/day\S*): .*(File exists|Is a dir|Not a dir)",
                     capsys.readouterr().err, re.MULTILINE)  # fmt: skip
    assert {*NIGHT, *SSTS} < set(download.files())
    assert list(download.files()) == sorted(download.manifest())


def test_manifest_that_cannot_be_written_is_named(scenes, download, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download_data, "write_csv", full)
        assert download() == 2
    (line,) = errors(capsys)
    assert f"{download.dest / 'manifest.csv'}: No space left on device" in line
    assert download() == 0
    download.assert_whole()


def test_samples_are_repeatable_nested_and_spread_over_day_and_night():
    def transfers(**folders):
        return [
            download_data.Transfer(f"ssts/{name}/S3A_{i}.hdf", 1, "")
            for name, n in folders.items()
            for i in range(n)
        ] + [download_data.Transfer("ssts/day/notes.txt", 1, "")]

    scenes = transfers(day=55, night=45)
    chosen = {n: [t.key for t in download_data.sample(scenes, n)] for n in range(1, 130)}
    for n in range(2, 101):
        assert len(set(chosen[n])) == n and set(chosen[n - 1]) < set(chosen[n])
        by = Counter(key.split("/")[1] for key in chosen[n])
        assert min(by["day"], by["night"]) >= 1 and abs(by["day"] - 0.55 * n) <= 1
    assert chosen[129] == chosen[100]  # all there are; no notes
    random.shuffle(scenes)
    assert [t.key for t in download_data.sample(scenes, 10)] == chosen[10]
    assert chosen[10] != sorted(chosen[10])[:10] or chosen[20] != sorted(chosen[20])
    rare = Counter(t.key.split("/")[1] for t in download_data.sample(transfers(day=99, night=1), 2))
    assert rare == {"day": 1, "night": 1}


def test_sample_is_of_each_set(scenes, download):
    scenes.put("ssts/night/S3A_5.hdf")
    assert download("--scenes", "2") == 0
    assert Counter(key.rpartition("/")[0] for key in download.files()) == {
        "one-day/day": 1, "one-day/night": 1, "ssts/day": 1, "ssts/night": 1,
    }  # fmt: skip
    assert download() == 0
    download.assert_whole()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--bucket", "no-such-bucket"], 2, "404 NoSuchBucket"),
        (["--bucket", "no bucket"], 2, "set --bucket"),
        (["--prefix", "elsewhere"], 2, "Nothing below elsewhere/one-day/"),
        (["--endpoint", "s3.echo"], 2, "--endpoint should be like https://"),
        (["--endpoint", "http://127.0.0.1:9"], 1, "Could not connect"),
    ],
)
def test_wrong_address_is_one_line(scenes, download, capsys, options, status, reason):
    assert download(*options) == status
    (line,) = errors(capsys)
    assert reason in line
    assert not download.dest.exists()


@pytest.mark.parametrize(
    "options", [["--scenes", "0"], ["--transfers", "x"], ["--verify", "--scenes", "1"]]
)
def test_bad_options_end_with_status_2(download, capsys, options):
    with pytest.raises(SystemExit) as ended:
        download(*options)
    assert ended.value.code == 2


def test_missing_package_is_told_with_the_line_to_type(download, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert download() == 2
    (line,) = errors(capsys)
    assert "boto3" in line and "pip install -r requirements-tools.txt" in line


def test_program_starts_without_tensorflow_and_boto3():
    code = (
        "import sys; sys.path[:0] = ['.', 'tools']; import tools.download_data\n"
        "print({'tensorflow', 'keras', 'h5py', 'numpy', 'boto3'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROGRAM.parents[1]
    )
    assert answer.stdout == "set()\n", answer.stderr


# --- the screen -----------------------------------------------------------------------------


def test_batch_log_tells_bytes_rate_and_time_left(scenes, download, monkeypatch, capsys):
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.1)
    for key in DAY:
        download.proxy.faults[key].append(trickling)
    assert download() == 0
    lines = re.findall(
        r"^Downloading: (\S+ [kM]?B) of 7.5 MB, (\S+ [kM]?B)/s, (.*) left$",
        capsys.readouterr().err, re.MULTILINE,
    )  # fmt: skip
    assert len(lines) >= 2
    assert any(re.fullmatch(r"\d+\.\d s", left) for *_, left in lines)


def test_terminal_has_a_bar(scenes, download, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download.proxy.faults[DAY[0]] += [cut(700_000), trickling]
    assert download("--transfers", "1") == 0
    download.assert_whole()
    bar = capsys.readouterr().err
    assert re.search(r"Downloading: +\d+%.*/7.50M \[\d+:\d+<\S+, \S+B/s\]", bar)


# --- verification ---------------------------------------------------------------------------


@pytest.fixture
def fetched(scenes, download):
    """A folder with all files, and no network any more."""
    assert download() == 0
    download.proxy.requests.clear()
    yield download
    assert download.proxy.requests == []


def test_verification_of_whole_files_passes(fetched, capsys):
    assert fetched("--verify") == 0
    assert "5 file(s)" in capsys.readouterr().err


def test_verification_names_what_is_wrong(fetched, capsys):
    fault = fetched.dest / DAY[0]
    fault.write_bytes(flipped(fault.read_bytes()))
    os.truncate(fetched.dest / DAY[1], 1000)
    (fetched.dest / NIGHT[0]).unlink()
    (fetched.dest / "ssts/day/.S3A_9.hdf.0123.download").write_bytes(b"x")
    (fetched.dest / "ssts/day/S3A_8.hdf").write_bytes(b"x")
    assert fetched("--verify") == 1
    lines = capsys.readouterr().err.splitlines()
    wrong = dict(re.fullmatch(r"Wrong: (\S+): (.*)", s).groups() for s in lines if "Wrong: " in s)
    digests = [fetched.manifest()[DAY[0]]["sha256"], hashlib.sha256(fault.read_bytes()).hexdigest()]
    assert wrong == {
        DAY[0]: "sha256 {} wanted, {} found".format(*digests),
        DAY[1]: f"{SIZE} bytes wanted, 1000 found",
        NIGHT[0]: "missing",
        "ssts/day/.S3A_9.hdf.0123.download": "unfinished",
    }
    assert any("S3A_8.hdf is not in the manifest" in line for line in lines)
    assert lines[-1].startswith("Error: 4 file(s)")
    assert fetched("--verify", "--set", "ssts") == 1
    (fetched.dest / "ssts/day/.S3A_9.hdf.0123.download").unlink()
    assert fetched("--verify", "--set", "ssts") == 0


def test_name_that_no_file_can_have_is_one_wrong_file(fetched, capsys):
    with (fetched.dest / "manifest.csv").open("a") as file:
        file.write(f"one-day/{300 * 'x'},1,a,b\n")
    assert fetched("--verify") == 1
    error = capsys.readouterr().err
    assert re.search(r"^Wrong: one-day/x{300}: .*File name too long", error, re.MULTILINE)
    assert "Error: 1 file(s)" in error


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_manifest_that_is_a_pipe_is_refused(scenes, download, capsys, options):
    download.dest.mkdir()
    os.mkfifo(download.dest / "manifest.csv")
    assert download(*options) == 2
    (line,) = errors(capsys)
    assert "manifest.csv should be a file" in line


@pytest.mark.parametrize(
    "text",
    [
        None, "", "key,size\na,1\n", "key,size,etag,sha256\none-day/../x,1,a,b\n",
        "key,size,etag,sha256\none-day//x,1,a,b\n", "key,size,etag,sha256\nx,much,a,b\n",
        "key,size,etag,sha256\nx,1\n", 'key,size,etag,sha256\n"x,1,a,b\n', "\x00\nx\n",
    ],
)  # fmt: skip
def test_manifest_that_is_none_is_one_line(download, capsys, text):
    download.dest.mkdir()
    if text is not None:
        (download.dest / "manifest.csv").write_text(text)
    assert download("--verify") == 2
    (line,) = errors(capsys)
    assert "manifest.csv " + ("should have the columns" if text else "tells of no file") in line
