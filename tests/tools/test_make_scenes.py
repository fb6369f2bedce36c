"""Tests of the synthetic scenes: the file format, what is in it, and the command line."""

import hashlib
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.ndimage import label as connected_regions

from harness.data.scene_files import product_times as product_times
from tools.make_scenes import (
    is_day,
    main,
    make_dataset,
    make_scene,
    product_name,
    write_scene,
)

PROGRAM = Path(__file__).parents[2] / "tools" / "make_scenes.py"
HEIGHT, WIDTH = 48, 60
SMALL = {"train": 2, "inference": 1, "height": HEIGHT, "width": WIDTH, "seed": 7}


def scene(index=0, height=HEIGHT, width=WIDTH, **options):
    """Make the arrays of one scene."""
    return make_scene(np.random.default_rng([99, index]), height, width, **options)


def has_data(arrays):
    """Where no brightness temperature is missing, bool, (H, W)."""
    return (np.nan_to_num(arrays["bts"]) > 0).all(axis=-1)


def wrong_share(arrays):
    """Share of the pixels with data whose label is not the truth."""
    wrong = (arrays["bayes"] > 0) != (arrays["truth"] > 0)
    return wrong[has_data(arrays)].mean()


def digests(paths):
    """The SHA-256 of every file, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The paths of five small scenes in the published format."""
    return make_dataset(tmp_path_factory.mktemp("data"), **{**SMALL, "train": 3, "inference": 2})


def test_scenes_are_in_day_and_night_of_both_sets(dataset):
    places = [path.parts[-3:-1] for path in dataset]
    assert places == [
        ("one-day", "day"),
        ("one-day", "night"),
        ("one-day", "day"),
        ("ssts", "day"),
        ("ssts", "night"),
    ]
    assert sorted(dataset) == sorted(dataset[0].parents[2].rglob("*.*"))


def test_names_are_slstr_products_of_three_minutes(dataset):
    for path in dataset:
        start, end = product_times(path.stem)
        assert end - start == timedelta(minutes=3)


def test_names_of_a_thousand_scenes_differ_and_one_day_is_one_day():
    training = {product_name("one-day", index) for index in range(1000)}
    inference = {product_name("ssts", index) for index in range(1000)}
    assert len(training) == len(inference) == 1000
    assert {name[16:24] for name in training} == {"20191001"}
    assert len({name[16:24] for name in inference}) == 1000


@pytest.mark.parametrize("day_share", [0, 0.3, 0.55, 1])
def test_day_share_holds_for_any_number_of_scenes(day_share):
    days = np.cumsum([is_day(index, day_share) for index in range(100)])
    assert np.abs(days - day_share * np.arange(1, 101)).max() <= 0.5 + 1e-9
    assert days[-1] == round(100 * day_share)


def test_datasets_have_the_published_shapes_and_dtypes(dataset):
    for path in dataset:
        with h5py.File(path) as file:
            found = {name: (data.shape, data.dtype) for name, data in file.items()}
            assert all(data.id.get_offset() is not None for data in file.values())  # contiguous
            assert {h5py.h5g.get_objinfo(data.id).mtime for data in file.values()} == {0}
        assert found == {
            "refs": ((HEIGHT, WIDTH, 6), np.float64),
            "bts": ((HEIGHT, WIDTH, 3), np.float32),
            "bayes": ((HEIGHT, WIDTH, 1), np.float64),
            "rads": ((HEIGHT, WIDTH, 6), np.float32),
            "summary": ((HEIGHT, WIDTH, 1), np.float64),
            "truth": ((HEIGHT, WIDTH, 1), np.uint8),
        }


def test_values_are_in_published_ranges(dataset):
    for path in dataset:
        with h5py.File(path) as file:
            arrays = {name: data[...] for name, data in file.items()}
        temperatures, reflectances = arrays["bts"], arrays["refs"]
        present = temperatures[np.nan_to_num(temperatures) != 0]
        assert present.size > 0.5 * temperatures.size
        assert 199.9 < present.min() < 285
        assert 250 < present.max() < 320.1
        assert np.nanmin(reflectances) >= 0
        assert np.nanmax(reflectances) < 1.1
        assert set(np.unique(arrays["bayes"])) == {0, 255}
        assert set(np.unique(arrays["summary"])) <= {0, 255}
        assert set(np.unique(arrays["truth"])) == {0, 1}


def test_reflectance_is_zero_by_night_only():
    night, day = scene(day=False), scene(day=True)
    assert not night["refs"].any() and not night["rads"].any()
    lit = np.nan_to_num(day["refs"][has_data(day)])
    assert (lit > 0).all()
    assert lit.max() > 0.3


def test_border_is_zero_in_every_channel():
    for index in range(8):
        arrays = scene(index)
        for name in ("refs", "bts", "rads", "bayes", "summary"):
            for edge in (0, -1):
                assert not arrays[name][edge].any() and not arrays[name][:, edge].any()
        middle = has_data(arrays)[HEIGHT // 8 : -HEIGHT // 8, WIDTH // 8 : -WIDTH // 8]
        assert middle.mean() > 0.6


def test_label_is_clear_where_temperatures_are_missing():
    for index in range(8):
        arrays = scene(index, cloud_cover=0.95)
        assert not arrays["bayes"][~has_data(arrays)].any()


def test_land_clear_by_day_is_brighter_than_sea_and_cloud_is_brighter_than_both():
    arrays = [scene(index, 96, 120, cloud_cover=0.5) for index in range(12)]
    red = np.concatenate([a["refs"][..., 1][has_data(a)] for a in arrays])
    infrared = np.concatenate([a["refs"][..., 2][has_data(a)] for a in arrays])
    cloud = np.concatenate([a["truth"][..., 0][has_data(a)] for a in arrays]) > 0
    land = ~cloud & (infrared > red + 0.05)  # the red edge of vegetation, and soil
    assert 0.05 < land.mean() < 0.45
    assert np.median(infrared[land]) > 2 * np.median(infrared[~cloud & ~land])
    assert np.median(red[cloud]) > 2 * np.median(red[land])


def test_threshold_fails_on_warm_cloud_and_on_cold_clear_surface():
    arrays = [scene(index, 96, 120, day=index % 2 == 0) for index in range(16)]
    s9 = np.concatenate([a["bts"][..., 2][has_data(a)] for a in arrays])
    cloud = np.concatenate([a["truth"][..., 0][has_data(a)] for a in arrays]) > 0
    assert (s9[cloud] > 273.15).mean() > 0.1
    assert (s9[~cloud] < 273.15).mean() > 0.02
    assert ((s9 < 273.15) == cloud).mean() > 0.6  # but it does know something


def test_label_without_noise_is_the_truth_where_data_exist():
    for index in range(4):
        assert wrong_share(scene(index, label_noise=0)) == 0


@pytest.mark.parametrize("label_noise", [0.03, 0.2])
def test_label_noise_is_the_share_of_wrong_labels(label_noise):
    assert wrong_share(scene(label_noise=label_noise)) == pytest.approx(label_noise, abs=0.002)


def test_wrong_labels_come_in_patches():
    arrays = scene(0, 240, 300, label_noise=0.05)
    wrong = has_data(arrays) & ((arrays["bayes"] > 0) != (arrays["truth"] > 0))[..., 0]
    # Scattered at random, 5 % of wrong pixels form regions of 1.1 pixels on average.
    assert wrong.sum() / connected_regions(wrong)[1] > 5


def test_cloud_cover_of_a_scene_is_the_one_asked_for():
    for cloud_cover in (0.1, 0.5, 0.9):
        truth = scene(cloud_cover=cloud_cover)["truth"]
        assert truth.mean() == pytest.approx(cloud_cover, abs=0.001)


def test_cloud_cover_varies_about_the_one_asked_for(tmp_path):
    paths = make_dataset(
        tmp_path, train=60, inference=0, height=32, width=40, cloud_cover=0.6, label_noise=0
    )
    covers = []
    for path in paths:
        with h5py.File(path) as file:
            covers.append(file["truth"][...].mean())
    # Beta distribution: standard deviation sqrt(0.6 * 0.4 / 5) = 0.22, of the mean of 60 0.028
    assert np.mean(covers) == pytest.approx(0.6, abs=0.1)
    assert 0.1 < np.std(covers) < 0.35


def test_refs_on_the_500_m_grid_average_to_those_on_the_1_km_grid():
    coarse, fine = scene(3), scene(3, refs_grid="500m")
    assert fine["refs"].shape == (2 * HEIGHT, 2 * WIDTH, 6)
    averaged = fine["refs"].reshape(HEIGHT, 2, WIDTH, 2, 6).mean(axis=(1, 3))  # (H, W, 6)
    # Two samples of noise of 0.002: their difference stays below 6 * sqrt(2) * 0.002
    np.testing.assert_allclose(averaged, coarse["refs"], atol=0.017)
    for name in ("bts", "bayes", "rads", "summary", "truth"):
        np.testing.assert_array_equal(fine[name], coarse[name])


def test_same_seed_gives_the_same_bytes(tmp_path):
    first = digests(make_dataset(tmp_path / "a", **SMALL))
    assert len(first) == len(set(first.values())) == 3
    assert first == digests(make_dataset(tmp_path / "b", **SMALL))
    assert not set(first.values()) & set(
        digests(make_dataset(tmp_path / "c", **{**SMALL, "seed": 8})).values()
    )


def test_scene_does_not_depend_on_the_number_of_scenes(tmp_path):
    few = digests(make_dataset(tmp_path / "few", **SMALL))
    many = digests(make_dataset(tmp_path / "many", **{**SMALL, "train": 5, "inference": 3}))
    assert few.items() < many.items()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_applies_to_refs_and_bts(tmp_path, dtype):
    path = make_dataset(tmp_path, **SMALL, dtype=dtype)[0]
    with h5py.File(path) as file:
        assert file["refs"].dtype == file["bts"].dtype == dtype
        assert file["bayes"].dtype == "float64" and file["rads"].dtype == "float32"


def test_big_endian_files_hold_the_same_values(tmp_path):
    little = make_dataset(tmp_path / "little", **SMALL)[0]
    big = make_dataset(tmp_path / "big", **SMALL, byteorder="big")[0]
    with h5py.File(little) as one, h5py.File(big) as other:
        assert one["bts"].dtype.str == "<f4" and other["bts"].dtype.str == ">f4"
        assert other["refs"].dtype.str == other["bayes"].dtype.str == ">f8"
        for name in one:
            np.testing.assert_array_equal(one[name][...], other[name][...])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"chunks": (16, 20, 4)}, ((16, 20, 3), None, False)),  # 3 channels in bts
        ({"chunks": (64, 64, 1), "compression": "gzip"}, ((HEIGHT, WIDTH, 1), "gzip", False)),
        ({"chunks": "auto", "compression": "lzf", "shuffle": True}, (..., "lzf", True)),
        ({"compression": "gzip"}, (..., "gzip", False)),
        ({"shuffle": True}, (..., None, True)),
    ],
)
def test_chunks_and_compression_are_found_in_the_file(tmp_path, options, expected):
    arrays = scene()
    write_scene(tmp_path / "S3A_one.hdf", arrays, **options)
    with h5py.File(tmp_path / "S3A_one.hdf") as file:
        bts = file["bts"]
        assert bts.chunks is not None
        chunks = ... if expected[0] is ... else bts.chunks
        assert (chunks, bts.compression, bts.shuffle) == expected
        np.testing.assert_array_equal(bts[...], arrays["bts"])


def test_failed_write_leaves_the_old_scene_and_no_other_file(tmp_path):
    path = tmp_path / "S3A_one.hdf"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_scene(path, {"bts": np.zeros((2, 2, 3)), "refs": np.array([object()])})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_command_writes_what_its_options_say(tmp_path):
    options = ["--output", tmp_path, "--train", "1", "--inference", "1", "--size", "32", "40"]
    options += ["--chunks", "16 20 9", "--compression", "lzf", "--refs-grid", "500m"]
    done = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = sorted(tmp_path.rglob("*.*"))
    assert [path.parts[-3] for path in paths] == ["one-day", "ssts"]
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [str(p) for p in paths]
    with h5py.File(paths[0]) as file:
        assert file["refs"].shape == (64, 80, 6)
        assert (file["refs"].chunks, file["refs"].compression) == ((16, 20, 6), "lzf")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--chunks", "0 1 2"], "expected none, auto or 'H W C', found '0 1 2'"),
        (["--size", "32"], "--size"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--tarin", "3"], "--tarin"),
    ],
)
def test_usage_error_exits_with_2(capsys, options, expected):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert expected in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size", "16", "40"], "height must be from 32"),
        (["--cloud-cover", "1.5"], "cloud_cover must be from 0.01 to 0.99, found 1.5"),
        (["--label-noise", "nan"], "label_noise must be from 0 to 0.5"),
        (["--train", "-1"], "train must be from 0"),
        (["--day-share", "2"], "day_share must be from 0 to 1, found 2"),
        (["--output", str(PROGRAM)], str(PROGRAM)),
    ],
)
def test_unusable_value_ends_in_one_line(tmp_path, capsys, options, expected):
    assert main(["--size", "32", "40", "--output", str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and expected in line
    assert not list(tmp_path.iterdir())
