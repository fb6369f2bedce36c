"""Scene files damaged in hundreds of ways: each gives a SceneError or a scene, nothing else."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from harness import REPOSITORY
from tools.make_scenes import make_scene, write_scene

SHAPE = (32, 40, 9)
HEADER = 6000  # bytes that hold nearly all metadata of a file
STORAGE = {
    "contiguous": {},
    "chunked": {"chunks": (10, 16, 2)},
    "gzip": {"chunks": (10, 16, 2), "compression": "gzip", "shuffle": True},
    "fletcher": {"chunks": (16, 20, 1), "compression": "gzip", "fletcher32": True},
}
TYPES = [
    "S3", h5py.string_dtype(), "V5", "?", "c8", h5py.ref_dtype, h5py.regionref_dtype,
    h5py.vlen_dtype("f8"), [("a", "f4"), ("b", "f4")], ("f4", (2,)), np.longdouble, "f2", "u8",
    h5py.enum_dtype({"a": 1}), h5py.opaque_dtype("M8[s]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    return make_scene(np.random.default_rng(3), *SHAPE[:2])


def write(path, arrays, storage="contiguous", **opening):
    with h5py.File(path, "w", **opening) as file:
        for name, array in arrays.items():
            options = dict(STORAGE[storage])
            if "chunks" in options:
                options["chunks"] = tuple(map(min, options["chunks"], array.shape))
            file.create_dataset(name, data=array, **options)


# --- random damage


def damaged_files(folder, arrays):
    """Yield 240 files: truncated, with changed bytes in the metadata, and anywhere."""
    for storage in STORAGE:
        for libver in ("earliest", "latest"):
            whole = folder / "whole.hdf"
            write(whole, arrays, storage, libver=libver)
            content = whole.read_bytes()
            whole.unlink()
            rng = np.random.default_rng([5, len(storage), len(libver)])
            for i in range(30):
                path = folder / f"S3A_{storage}_{libver}_{i}.hdf"
                if i < 6:
                    path.write_bytes(content[: rng.integers(len(content))])
                else:
                    reach = HEADER if i < 24 else len(content)
                    damaged = bytearray(content)
                    for place in rng.integers(reach, size=rng.integers(1, 30)):
                        damaged[place] = rng.integers(256)
                    path.write_bytes(damaged)
                yield path


# --- harmful files: (function of a path and the arrays, part of the error)


def replaced(name, make):
    """A scene file in which make(file) replaces a dataset."""

    def write_it(path, arrays):
        write(path, {key: array for key, array in arrays.items() if key != name})
        with h5py.File(path, "r+") as file:
            make(file)

    return write_it


def content(data):
    return lambda path, arrays: path.write_bytes(data)


def link_to(target):
    return lambda path, arrays: path.symlink_to(target)


def virtual(source, name="bts"):
    def make(file):
        layout = h5py.VirtualLayout((32, 40, 3), "f4")
        layout[:] = h5py.VirtualSource(source, name, (32, 40, 3))
        file.create_virtual_dataset("bts", layout)

    return replaced("bts", make)


def stored_chunk(data, **options):
    """A scene file in which this is the first chunk of `bts`."""

    def make(file):
        options.setdefault("compression", "gzip")
        file.create_dataset("bts", (32, 40, 3), "f4", chunks=(16, 20, 3), **options)
        file["bts"].id.write_direct_chunk((0, 0, 0), data)

    return replaced("bts", make)


def large_attributes(path, arrays):
    with h5py.File(path, "w", libver="latest") as file:
        for name, array in arrays.items():
            file[name] = array
            for i in range(4):
                file[name].attrs[f"a{i}"] = np.zeros(1 << 20, np.uint8)


def dataset_of(**options):
    return replaced("bts", lambda file: file.create_dataset("bts", **options))


def link(target):
    return replaced("bts", lambda file: file.__setitem__("bts", target))


def of_type(kind):
    """A dataset of a type that NumPy does not have."""
    space = h5py.h5s.create_simple((32, 40, 3))
    return replaced("bts", lambda file: h5py.h5d.create(file.id, b"bts", kind, space))


THREE_BYTES = h5py.h5t.STD_I32LE.copy()
THREE_BYTES.set_size(3)
PETABYTE = (1 << 24, 1 << 24, 3)
EXTENDABLE = {"shape": (32, 40, 3), "dtype": "f4", "maxshape": (None,) * 3}
HARMFUL = {
    "empty": (content(b""), "cannot be used"),
    "zeros": (content(bytes(5000)), "cannot be used"),
    "signature": (content(b"\x89HDF\r\n\x1a\n"), "cannot be used"),
    "folder": (lambda path, arrays: path.mkdir(), "not a regular file"),
    "pipe": (lambda path, arrays: os.mkfifo(path), "not a regular file"),
    "device": (link_to("/dev/zero"), "not a regular file"),
    "loop": (lambda path, arrays: path.symlink_to(path.name), "cannot be used"),
    "dangling": (link_to("nowhere"), "cannot be used: it does not exist. Check the path."),
    "no bts": (replaced("bts", lambda file: None), "no dataset 'bts'"),
    "no dataset": (lambda path, arrays: h5py.File(path, "w").close(), "found none"),
    "group": (replaced("bts", lambda file: file.create_group("bts")), "no dataset 'bts'"),
    "type": (link(np.dtype("f8")), "no dataset 'bts'"),
    "external link": (link(h5py.ExternalLink("/etc/passwd", "bts")), "out of the file"),
    "external pipe": (link(h5py.ExternalLink("S3A_pipe.hdf", "bts")), "out of the file"),
    "circle": (link(h5py.SoftLink("bts")), "too many links"),
    "nowhere": (link(h5py.SoftLink("/a/b")), "no dataset 'bts'"),
    "passwords": (
        dataset_of(shape=(32, 40, 3), dtype="f4", external="/etc/passwd"),
        "found '/etc/passwd'",
    ),
    "external storage in a pipe": (
        replaced(
            "bts",
            lambda file: file.create_dataset(
                "bts", (32, 40, 3), "f4", external=f"{os.path.dirname(file.filename)}/S3A_pipe.hdf"
            ),
        ),
        "S3A_pipe.hdf'",
    ),
    "virtual outside": (virtual("../elsewhere.hdf"), "found '"),
    "virtual pipe": (virtual("S3A_pipe.hdf"), "found '"),
    "virtual itself": (virtual("."), "virtual dataset 'bts' as its source"),
    "virtual absent": (virtual(".", "absent"), "no dataset 'absent'"),
    "petabyte": (
        dataset_of(shape=PETABYTE, dtype="f8", chunks=(64, 64, 3)),
        "should hold 1 to 200000000 numbers",
    ),
    "scalar": (dataset_of(data=1.0), "has shape ()"),
    "null": (dataset_of(data=h5py.Empty("f4")), "should hold 1 to"),
    "no rows": (dataset_of(shape=(0, 40, 3), dtype="f4"), "should hold 1 to"),
    "other rank": (dataset_of(shape=(32, 40), dtype="f4"), "has shape (32, 40)"),
    "large chunk": (dataset_of(**EXTENDABLE, chunks=(1 << 29, 1, 1)), "has chunks of"),
    "large chunk, lzf": (
        dataset_of(**EXTENDABLE, chunks=(1 << 29, 1, 1), compression="lzf"),
        "has chunks of",
    ),
    "wide chunk": (dataset_of(**EXTENDABLE, chunks=(1, 1, 1 << 29)), "has chunks of"),
    "bomb": (stored_chunk(zlib.compress(bytes(1 << 30), 9)[:7000]), "inflates to more than"),
    "large bomb": (stored_chunk(zlib.compress(bytes(1 << 30), 9)), "bytes in the file"),
    "bomb with a checksum": (
        stored_chunk(zlib.compress(bytes(1 << 30), 9), fletcher32=True),
        "bytes in the file",
    ),
    "short chunk": (stored_chunk(zlib.compress(b"abc")), "inflates to 3 bytes"),
    "shuffled scraps": (stored_chunk(zlib.compress(b"abc"), shuffle=True), "inflates to 3 bytes"),
    "empty chunk": (stored_chunk(b"\0"), "inflates to 0 bytes"),
    **{
        f"type {i}": (dataset_of(shape=(32, 40, 3), dtype=kind), None)
        for i, kind in enumerate(TYPES)
    },
    "times": (of_type(h5py.h5t.UNIX_D32LE), "cannot be used"),
    "three bytes": (of_type(THREE_BYTES), "cannot be used"),
    "attributes": (large_attributes, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, arrays):
    """The outcome of each file, by its name; one process reads all."""
    folder = tmp_path_factory.mktemp("fuzz") / "scenes"
    folder.mkdir()
    write_scene(folder.parent / "elsewhere.hdf", arrays)
    paths = list(damaged_files(folder, arrays))
    for name, (make, _) in HARMFUL.items():
        path = folder / f"S3A_{name}.hdf"
        make(path, arrays)
        paths.append(path)
    (folder.parent / "list").write_text(json.dumps([str(path) for path in paths]))
    reader = subprocess.run(
        [sys.executable, Path(__file__).with_name("read_scenes.py"), "list", *map(str, SHAPE)],
        cwd=folder.parent, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in reader.stdout.splitlines()]
    assert reader.returncode == 0, (lines[-1:], reader.stderr[-2000:])
    return {Path(line["end"]).stem[4:]: line for line in lines if "end" in line}


def test_every_damaged_file_gives_a_scene_error_or_a_scene(outcomes):
    assert len(outcomes) >= 240 + len(HARMFUL)
    assert [line for line in outcomes.values() if line["outcome"] == "error"] == []
    some = {line["outcome"] for name, line in outcomes.items() if "_" in name}
    assert some == {"scene", "refused"}  # random damage gives both
    assert outcomes["attributes"]["outcome"] == "scene"


@pytest.mark.parametrize("name", [name for name, (_, words) in HARMFUL.items() if words])
def test_harmful_file_gives_one_line_with_its_name_and_the_reason(outcomes, name):
    line = outcomes[name]
    assert line["outcome"] == "refused" and HARMFUL[name][1] in line["text"]
    assert f"S3A_{name}.hdf" in line["text"] and "\n" not in line["text"]


@pytest.mark.parametrize("number", range(len(TYPES)))
def test_only_numbers_are_read(outcomes, number):
    kind = np.dtype(TYPES[number])
    is_number = kind.kind in "fiu" and kind.itemsize <= 8 and not kind.shape
    assert outcomes[f"type {number}"]["outcome"] == ("scene" if is_number else "refused")
