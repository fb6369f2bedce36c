"""Runs of --mode inference on many scenes, and on lists that become longer."""

import os
import shutil
import sys
from collections import Counter

import h5py
import pytest
from conftest import results, rows, start

import slstr_cloud
from data_loader import find_scenes
from harness.networks.model_files import build_network, save_model
from tools.make_scenes import make_dataset

EVENTS = ("open", "os.listdir", "os.scandir", "os.rename", "os.mkdir", "os.remove", "os.rmdir")

_counts = []
sys.addaudithook(  # it cannot be removed
    lambda event, arguments: [count.update([event]) for count in _counts if event in EVENTS]
)


@pytest.fixture(scope="module")
def pixel(tmp_path_factory):
    """A small scene, a model of one pixel, and settings to mask with them."""
    folder = tmp_path_factory.mktemp("pixel")
    make_dataset(folder / "made", train=0, inference=1, height=32, width=40, seed=1)
    (scene,) = find_scenes(folder / "made")
    with h5py.File(scene, "a") as file:  # the search for a synthetic scene ends at the first one
        del file.attrs["synthetic"]
    model = folder / "pixel.keras"
    save_model(build_network("pixel", (32, 32, 9)), model)
    settings = {
        "IMAGE_H": 32, "IMAGE_W": 40, "PATCH_SIZE": 32, "CROP_SIZE": 8, "clip_offset": 3,
        "report": False,
        "sampling": False,  # it opens files each second
    }  # fmt: skip
    return scene, model, settings


def test_resumed_run_masks_what_is_new_in_its_list(finished, settings, tmp_path, capfd):
    first, second = (path.name for path in find_scenes(settings["inference_dir"]))
    for path in find_scenes(settings["inference_dir"]):
        shutil.copy(path, tmp_path)
    os.truncate(tmp_path / second, 1000)  # its transfer has not finished
    changed = {**settings, "inference_dir": str(tmp_path / "list.txt"), "on_bad_scene": "skip"}
    changed["shard"] = "0/1"
    (tmp_path / "list.txt").write_text(f"{first}\n{second}\n")
    run = start(tmp_path, changed, "--mode", "inference", "--model", str(finished / "model.keras"))
    assert run.status == 0 and results(run.folder)["inference"]["scenes"] == 1
    mask = (run.folder / "masks" / first).with_suffix(".h5").stat()

    resume = ["--resume", str(run.folder), "--set", "shard=0/1"]
    assert slstr_cloud.main(resume) == 0 and len(results(run.folder)["bad_scenes"]) == 1
    shutil.copy(
        next(p for p in find_scenes(settings["inference_dir"]) if p.name == second), tmp_path
    )
    assert slstr_cloud.main(resume) == 0 and results(run.folder)["inference"]["scenes"] == 2
    capfd.readouterr()
    assert slstr_cloud.main(resume) == 0 and "nothing is left to do" in capfd.readouterr().err
    for path in find_scenes(settings["inference_dir"]):
        shutil.copy2(path, tmp_path / path.name.replace("S3A", "S3B"))
    names = [name.replace("S3A", kind) for kind in ("S3A", "S3B") for name in (first, second)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert slstr_cloud.main(resume) == 0
    found = results(run.folder)
    assert (found["status"], found["bad_scenes"], found["inference"]["scenes"]) == (
        "success",
        [],
        4,
    )
    assert {row["scene"] for row in rows(run.folder / "scenes.csv")} == {n[:-4] for n in names}
    kept = (run.folder / "masks" / first).with_suffix(".h5").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (mask.st_ino, mask.st_mtime_ns)

    (tmp_path / "list.txt").write_text("\n".join(names[1:]))
    capfd.readouterr()
    assert slstr_cloud.main(resume) == 2
    assert "1 scene that it has masked is not in inference_dir" in capfd.readouterr().err
    assert slstr_cloud.main([*resume, "shard=0/2"]) == 2
    assert "other values: shard was 0/1, now 0/2" in capfd.readouterr().err
    changes = {"model_file": "other.keras", "inference_dir": str(tmp_path)}
    for key, value in changes.items():  # as target/archive.sh with other arguments
        assert slstr_cloud.main([*resume, f"{key}={value}"]) == 2
        assert f"other values: {key} was " in capfd.readouterr().err
    assert results(run.folder) == found


def test_finished_run_makes_masks_again_that_are_lost_or_outdated(pixel, tmp_path, capfd):
    scene, model, settings = pixel
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for i in range(4):
        shutil.copy2(scene, scenes / f"S3A_{i}.hdf")
    settings = {**settings, "inference_dir": str(scenes)}
    run = start(tmp_path, settings, "--mode", "inference", "--model", str(model))
    masks = [run.folder / "masks" / f"S3A_{i}.h5" for i in range(4)]
    resume = ["--resume", str(run.folder)]
    masks[0].unlink()
    os.truncate(masks[1], 0)
    os.utime(scenes / "S3A_2.hdf", (1, 1))
    before = [path.exists() and path.stat().st_ino for path in masks]
    capfd.readouterr()
    assert slstr_cloud.main(resume) == 0
    assert "has finished" not in capfd.readouterr().err
    after = [path.stat().st_ino for path in masks]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, False, True]
    assert slstr_cloud.main(resume) == 0
    assert "nothing is left to do" in capfd.readouterr().err
    assert [path.stat().st_ino for path in masks] == after


def test_one_scene_more_costs_the_same_however_many_there_are(pixel, tmp_path, monkeypatch):
    scene, model, settings = pixel
    scenes, count = tmp_path / "scenes", Counter()
    scenes.mkdir()
    settings = {**settings, "inference_dir": str(scenes)}

    def counted(owner, name):
        function = getattr(owner, name)

        def counting(*arguments, **options):
            count[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    counted(os, "stat")
    counted(os, "lstat")
    counted(h5py._hl.files, "make_fid")  # opens and creates HDF5 files
    costs = []
    _counts.append(count)
    try:
        for n in (2, 20, 40, 60):  # the first run imports modules
            for i in range(n):
                (scenes / f"S3A_{i:03}.hdf").unlink(missing_ok=True)
                (scenes / f"S3A_{i:03}.hdf").hardlink_to(scene)
            count.clear()
            folder = tmp_path / str(n)
            assert start(folder, settings, "--mode", "inference", "--model", str(model)).status == 0
            costs.append(Counter(count))
    finally:
        _counts.remove(count)
    _, first, second, third = costs
    assert third - second == second - first
    more = {name: (second - first)[name] / 20 for name in first}
    # The mask gets its name; its temporary name and its lock go. No scene needs a folder's list.
    assert more["os.rename"] == 1 and more["os.remove"] == 2
    assert more["os.listdir"] == more["os.scandir"] == 0
    # Header, whether it is synthetic, the scene, its mask, and the row of the mask.
    assert more["make_fid"] == 5 and more["stat"] < 25, more
