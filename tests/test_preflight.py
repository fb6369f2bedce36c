import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tensorflow as tf
import yaml
from conftest import HEIGHT, PATCH, WIDTH, results, rewrite, rows, spoil, start

import data_loader
import slstr_cloud
from data_loader import SceneError
from harness import REPOSITORY, check
from harness.console import format_bytes, format_duration, table
from harness.data.bad_scenes import BadScenes
from harness.errors import UserError
from harness.networks.names import network_names
from harness.preflight import FoundScenes, Scenes, check_free_space, check_scenes
from model import NETWORKS

SHAPE = (HEIGHT, WIDTH, 9)


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.fixture
def copy(tmp_path, dataset, settings):
    """A data set that a test may damage, and the settings for it."""
    shutil.copytree(dataset, tmp_path / "data")
    return {
        **settings,
        "epochs": 1,
        "train_dir": str(tmp_path / "data/one-day"),
        "inference_dir": str(tmp_path / "data/ssts"),
    }


def shards(folder, n):
    """The names of the scenes in each of n shards of a folder; those without scenes are empty."""
    found = []
    for k in range(n):
        try:
            paths = FoundScenes.find(None, folder, "inference", f"{k}/{n}").inference
        except SceneError:
            paths = []
        found.append({path.name for path in paths})
    return found


def test_each_scene_is_in_one_shard_also_when_the_folder_grows(tmp_path):
    names = [f"S3A_{i:03}.hdf" for i in range(400)]
    for name in names[:200]:
        (tmp_path / name).touch()
    before = shards(tmp_path, 4)
    for name in names[200:]:
        (tmp_path / name).touch()
    after = shards(tmp_path, 4)
    assert sorted(itertools.chain(*after)) == names
    assert all(old <= new for old, new in zip(before, after, strict=True))
    assert min(map(len, after)) > 70  # 100 +- 9 is the standard deviation of a fair draw


@pytest.mark.parametrize(
    ("mode", "shard", "message"),
    [("benchmark", "1/2", "--mode benchmark. Remove shard"), ("inference", "1/999", "None of 1")],
)
def test_shard_without_use_is_an_error(tmp_path, mode, shard, message):
    (tmp_path / "S3A_a.hdf").touch()
    with pytest.raises(UserError, match=message):
        FoundScenes.find(tmp_path, tmp_path, mode, shard)


def train_scenes(copy):
    return data_loader.find_scenes(copy["train_dir"])


# --- synthetic scenes


@pytest.mark.parametrize(
    ("n_real", "synthetic"),
    [((0, 0), {"training", "inference"}), ((7, 1), {"inference"}), ((6, 2), {"training"})],
)
def test_sets_with_synthetic_scenes_are_found(copy, n_real, synthetic):
    first, second = train_scenes(copy), data_loader.find_scenes(copy["inference_dir"])
    for path in first[: n_real[0]] + second[: n_real[1]]:
        rewrite(path)  # without attributes, like a real scene
    truncate(second[0])  # a bad scene is met again where it is read
    found = Scenes(first[:5], first[5:], second).find_synthetic(60)
    assert found.synthetic == synthetic and found.train == first[:5]


# --- the check of one scene


def test_check_scene_returns_how_datasets_are_stored(dataset):
    path = data_loader.find_scenes(dataset)[0]
    assert data_loader.check_scene(path, SHAPE) == {
        "refs": "float64 contiguous", "bts": "float32 contiguous", "bayes": "float64 contiguous",
    }  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"chunks": (16, 27, 1)}, {"compression": "gzip"}])
def test_truncated_scene_is_found_without_reading_it(copy, how, monkeypatch):
    path = train_scenes(copy)[0]
    rewrite(path, **how)
    assert data_loader.check_scene(path, SHAPE)
    truncate(path)
    with pytest.raises(SceneError, match="truncated"):
        data_loader.check_scene(path, SHAPE)


def test_chunk_that_lies_after_the_end_is_found(copy, monkeypatch):
    path = train_scenes(copy)[0]
    rewrite(path, compression="gzip")
    with h5py.File(path) as file:
        info = file["bts"].id.get_chunk_info(0)
    monkeypatch.setattr("os.stat", short_by(path.stat().st_size - info.byte_offset - 1))
    with pytest.raises(SceneError, match="ends after the end of the file"):
        data_loader.check_scene(path, SHAPE)


def short_by(n_bytes):
    """`os.stat` of files that are shorter than they say."""
    stat = data_loader.os.stat

    def shorter(path, **how):
        found = stat(path, **how)
        values = list(found)
        values[6] -= n_bytes
        return data_loader.os.stat_result(values)

    return shorter


def test_missing_filter_is_named(copy, monkeypatch):
    path = train_scenes(copy)[0]
    rewrite(path, compression="gzip")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    with pytest.raises(SceneError, match=r"filter 1 \(deflate\), .*pip install hdf5plugin"):
        data_loader.check_scene(path, SHAPE)


def test_scenes_are_checked_in_their_order(copy):
    paths = train_scenes(copy)
    for path in paths[::3]:
        truncate(path)
    good, bad = check_scenes(paths, SHAPE, labelled=paths)
    assert list(bad) == paths[::3] and all("truncated" in reason for reason in bad.values())
    assert list(good) == [path for path in paths if path not in bad]
    assert good[paths[1]]["bts"] == "float32 contiguous"


# --- numbers out of range


def test_numbers_out_of_range_are_counted_without_missing_ones(copy):
    path = train_scenes(copy)[0]
    rng = np.random.default_rng(0)

    def change(name, values):
        values = values.copy()
        where = rng.random(values.shape)
        if name == "refs":
            values[where < 0.01] = 50.0
            values[where > 0.99] = np.nan
        if name == "bts":
            values[where < 0.02] = 20.0
            values[where > 0.99] = np.inf
            values[(where > 0.9) & (where < 0.91)] = 0
        return values

    rewrite(path, change)
    with h5py.File(path) as file:
        refs, bts = file["refs"][:], file["bts"][:]
    expected = np.sum(refs == 50) + np.sum(bts == 20)
    assert expected > 1000
    assert data_loader.read_scene(path, SHAPE).out_of_range == expected


def test_run_reports_them_for_each_scene(tmp_path, copy):
    celsius = data_loader.find_scenes(copy["inference_dir"])[0]
    rewrite(celsius, lambda name, values: values - 273.15 if name == "bts" else values)
    strange = train_scenes(copy)[0]
    rewrite(strange, lambda name, values: 100 * values if name == "refs" else values)
    run = start(tmp_path / "out", copy)
    assert run.status == 0
    reported = re.findall(
        r"WARNING (.*): \d+ impossible reflectances", (run.folder / "rank-0.log").read_text()
    )
    assert reported == [str(strange), str(celsius)]
    counts = {row["scene"]: int(row["out_of_range"]) for row in rows(run.folder / "scenes.csv")}
    assert counts[celsius.stem] > 10_000 and sum(counts.values()) == counts[celsius.stem]
    assert results(run.folder)["inference"]["out_of_range"] == counts[celsius.stem]


# --- what a run does about bad scenes


def test_all_bad_scenes_are_reported_before_a_run_and_no_folder_remains(tmp_path, copy, capsys):
    first, second, *_ = train_scenes(copy)
    third = data_loader.find_scenes(copy["inference_dir"])[1]
    truncate(first)
    second.write_bytes(b"")
    with h5py.File(third, "a") as file:
        del file["bayes"]
    run = start(tmp_path / "out", copy)
    assert run.status == 2 and run.folder is None
    lines = [line for line in capsys.readouterr().err.splitlines() if "Bad scene" in line]
    assert len(lines) == 3
    for path, line in zip((first, second, third), lines, strict=True):
        assert str(path) in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["input.yaml"]


def test_skipped_scenes_are_used_nowhere(tmp_path, copy):
    bad = train_scenes(copy)[2]
    truncate(bad)
    bad_too, good = data_loader.find_scenes(copy["inference_dir"])
    bad_too.write_bytes(b"no HDF5")
    run = start(tmp_path / "out", {**copy, "on_bad_scene": "skip"})
    assert run.status == 0
    said = results(run.folder)
    assert [(b["path"], b["during"]) for b in said["bad_scenes"]] == [
        (str(bad), "start"), (str(bad_too), "start"),
    ]  # fmt: skip
    assert "truncated" in said["bad_scenes"][0]["reason"]
    # int(0.75 x 6 good scenes) = 4, 12 patches each
    assert (said["training"]["scenes_train"], said["training"]["scenes_test"]) == (4, 2)
    assert said["training"]["patches_train"] == 48
    assert [row["scene"] for row in rows(run.folder / "scenes.csv")] == [good.stem]
    assert "Skipped: " in (run.folder / "rank-0.log").read_text()


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_resumed_run_keeps_its_scenes(tmp_path, copy, policy):
    bad = train_scenes(copy)[2]
    whole = bad.read_bytes()
    truncate(bad)
    run = start(tmp_path / "out", {**copy, "on_bad_scene": "skip"})
    before = results(run.folder)["training"]
    bad.write_bytes(whole)
    assert data_loader.check_scene(bad, SHAPE)
    resumed = ["--resume", str(run.folder), "--set", "epochs=2", f"on_bad_scene={policy}"]
    assert slstr_cloud.main(resumed) == 0
    after = results(run.folder)
    assert after["training"]["epochs_run"] == 2
    assert after["training"]["patches_train"] == before["patches_train"] == 48
    assert [b["path"] for b in after["bad_scenes"]] == [str(bad)]


def test_scene_that_turns_bad_in_training_follows_the_rule(tmp_path, copy):
    train_paths, _ = data_loader.split_scenes(train_scenes(copy), copy["train_split"])
    spoil(train_paths[1])
    stopped = start(tmp_path / "stop", copy)
    assert stopped.status == 2
    assert str(train_paths[1]) in results(stopped.folder)["error"]

    skipped = start(tmp_path / "skip", {**copy, "on_bad_scene": "skip"})
    assert skipped.status == 0
    said = results(skipped.folder)
    assert [(b["path"], b["during"]) for b in said["bad_scenes"]] == [
        (str(train_paths[1]), "training")
    ]
    (row,) = rows(skipped.folder / "history.csv")
    assert np.isfinite(float(row["loss"])) and 0 < float(row["accuracy"]) < 1
    # Of 60 patches 48 were trained on in that time.
    train_seconds = said["training"]["train_seconds_per_epoch"][0]
    assert float(row["patches_per_second"]) == pytest.approx(48 / train_seconds)


def test_scene_that_turns_bad_in_inference_follows_the_rule(tmp_path, copy):
    bad, good = data_loader.find_scenes(copy["inference_dir"])
    spoil(bad)
    run = start(tmp_path / "skip", {**copy, "on_bad_scene": "skip"})
    assert run.status == 0
    assert [row["scene"] for row in rows(run.folder / "scenes.csv")] == [good.stem]
    assert [(b["path"], b["during"]) for b in results(run.folder)["bad_scenes"]] == [
        (str(bad), "inference")
    ]
    assert [path.stem for path in (run.folder / "masks").iterdir()] == [good.stem]
    stopped = start(tmp_path / "stop", copy)
    assert stopped.status == 2 and str(bad) in results(stopped.folder)["error"]


def test_patches_of_a_skipped_scene_have_weight_0_and_others_are_unchanged(copy):
    paths = train_scenes(copy)

    def batches(**how):
        return data_loader.PatchBatches(
            paths,
            read=lambda path, patches: data_loader.read_patches(path, patches, SHAPE, PATCH),
            patch_size=PATCH, patches_per_scene=12, n_channels=9, batch_size=11, **how,
        )  # fmt: skip

    def epoch(source):
        with source as opened:
            feed = opened.batches()
            return [next(feed) for _ in range(opened.n_steps)]

    whole = epoch(batches())
    spoil(paths[3])
    left_out = []
    holed = epoch(batches(on_bad_scene=lambda path, error: left_out.append(path)))
    assert set(left_out) == {paths[3]}
    n_zero = 0
    for (channels, cloud, weight, _), expected in zip(holed, whole, strict=True):
        used = weight == 1
        n_zero += np.sum(expected[2] == 1) - np.sum(used)
        np.testing.assert_array_equal(channels[used], expected[0][used])
        np.testing.assert_array_equal(cloud[used], expected[1][used])
        assert not channels[~used].any() and not cloud[~used].any()
    assert n_zero == 12


def test_more_than_half_of_the_scenes_turning_bad_is_an_error(tmp_path):
    bad = BadScenes(tmp_path, "skip")
    for phase in ("start", "validation"):
        bad.record(tmp_path / "a", "a scene of another phase", phase)
    handle = bad.handler("training", ["a", "b", "c", "d"])
    for name in ("a", "a", "b"):
        handle(tmp_path / name, SceneError(f"{name} is bad."))
    with pytest.raises(SceneError, match="3 of 4 scenes for training could not be read"):
        handle(tmp_path / "c", SceneError("c is bad."))
    assert BadScenes(tmp_path, "skip").paths("training") == [str(tmp_path / name) for name in "abc"]
    # The file system is back, and one scene is really damaged: the resumed run continues.
    bad.begin_part()
    handle(tmp_path / "a", SceneError("a is bad."))
    assert bad.paths("training") == [str(tmp_path / name) for name in "abc"]  # all are reported


def test_no_good_scene_is_an_error_also_with_skip(tmp_path, copy, capsys):
    for path in data_loader.find_scenes(copy["inference_dir"]):
        truncate(path)
    run = start(tmp_path / "out", {**copy, "on_bad_scene": "skip"})
    assert run.status == 2 and run.folder is None
    assert "None of 2 scenes can be used" in capsys.readouterr().err


# --- disk space


def test_small_disk_is_reported_before_the_run(tmp_path, copy, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run = start(tmp_path / "out", copy)
    assert run.status == 2 and run.folder is None
    error = capsys.readouterr().err.splitlines()[-1]
    assert "5.0 MB free" in error and "needs up to 100.0 MB" in error


def test_free_space_of_a_missing_folder_is_that_of_its_parent(tmp_path):
    assert check_free_space(tmp_path / "a/b/c", 1) == pytest.approx(
        shutil.disk_usage(tmp_path).free, 0.1
    )


# --- --mode check


def test_mode_check_prints_what_it_finds_and_makes_no_run(tmp_path, copy, capsys, monkeypatch):
    # Every step, the evaluation, and the reading and masking of a scene take a second each.
    monkeypatch.setattr(check, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(check, "why_no_gpu", lambda build: f"No GPU: {sorted(build)}")
    strange = train_scenes(copy)[0]
    rewrite(strange, lambda name, values: 100 * values if name == "refs" else values,
            compression="gzip")  # fmt: skip
    checked = start(tmp_path / "out", {**copy, "epochs": 400}, "--mode", "check")
    assert checked.status == 0 and checked.folder is None
    output = capsys.readouterr()
    assert f"No GPU: {sorted(tf.sysconfig.get_build_info())}\n" in output.err
    assert f"{strange}: " in output.err
    lines = output.out.splitlines()
    found = {line[:22].strip(): line[22:].strip() for line in lines}
    assert found["scenes"].split() == ["7", "2"]
    assert found["refs"].startswith("float64 contiguous (6), float64 chunked gzip (1)")
    scenes = [data_loader.read_scene(path, SHAPE) for path in train_scenes(copy)]
    cloud = f"{np.mean([scene.cloud.mean() for scene in scenes]):.1%}"
    assert found["cloud in the label"].split()[0] == cloud
    assert any("free" in line for line in lines)
    assert found["reading"].count("1.000 s per scene") == 2
    text = "\n".join(lines)
    n_steps = -(-5 * 12 // copy["batch_size"])  # 5 of 7 scenes of 12 patches; 2 validate
    epoch = n_steps * (1 + 2 / 5)
    durations = map(format_duration, (epoch, 400 * epoch))
    assert "  {} per epoch, {} for 400 epochs (from 3 steps)".format(*durations) in text
    assert "  2.0 s for 2 scenes (from one)" in text


def test_mode_check_needs_no_labels_to_train_without_them(tmp_path, copy, capsys):
    for path in train_scenes(copy)[1:]:
        with h5py.File(path, "a") as file:
            del file["bayes"]
    config = tmp_path / "input.yaml"
    settings = {**copy, "labels": "none", "output_dir": str(tmp_path)}
    config.write_text(yaml.safe_dump(settings))
    assert slstr_cloud.main(["--mode", "check", "--config", str(config)]) == 0
    assert re.search(r"bayes +none \(\d\), float64 contiguous \(1\) ", capsys.readouterr().out)


def test_mode_check_reports_bad_scenes(tmp_path, copy, capsys):
    truncate(train_scenes(copy)[0])
    spoil(train_scenes(copy)[1])  # one of the sample
    checked = start(tmp_path / "out", copy, "--mode", "check")
    assert checked.status == 2 and checked.folder is None
    output = capsys.readouterr()
    assert output.err.count("Bad scene: ") == 2 and "bad" in output.out


def test_table_and_numbers_are_readable():
    assert table({"x": {"a": "1", "b": "22"}, "y": {"b": "3"}}) == "   x   y\na  1\nb  22  3"
    assert [format_bytes(n) for n in (0, 999, 1000, 163e9, 2.5e12)] == [
        "0 B", "999 B", "1.0 kB", "163.0 GB", "2.5 TB",
    ]  # fmt: skip
    assert [format_duration(s) for s in (2.04, 250, 12000)] == ["2.0 s", "4 min 10 s", "3 h 20 min"]


def test_bad_scenes_are_recorded_and_can_be_tried_again(tmp_path):
    bad = BadScenes(tmp_path, "skip")
    assert bad.all() == []
    bad.record(tmp_path / "s\n\udcff", "odd", "inference")
    bad.record(tmp_path / "t", "worse", "start")
    assert [json.dumps(scene["path"]) for scene in bad.all()] == [
        json.dumps(str(tmp_path / name)) for name in ("s\n\udcff", "t")
    ]
    bad.forget("inference")
    assert bad.paths("inference") == [] and bad.paths("start") == [str(tmp_path / "t")]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--set", "network=nonet"], f"Set network to {' or '.join(NETWORKS)}"),
        (["--set", "network=no.keras"], "no.keras"),
        (["--mode", "inference"], "--model outputs/RUN/model.keras"),
        (["--mode", "inference", "--model", "no.keras"], "no.keras"),
    ],
)
def test_missing_models_are_reported_before_tensorflow_is_imported(tmp_path, arguments, reason):
    (tmp_path / "config.yaml").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import slstr_cloud\n"
        "status = slstr_cloud.main(sys.argv[1:]); print(status, 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ") and reason in line


def test_names_of_networks_are_those_of_the_table(tmp_path, monkeypatch):
    assert network_names() == list(NETWORKS)
    monkeypatch.setattr("harness.networks.names.REPOSITORY", tmp_path)
    (tmp_path / "model.py").write_text("NETWORKS = dict(mine=None)")
    assert network_names() == []  # then the table is asked once TensorFlow is imported
