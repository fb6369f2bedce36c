"""Tests of the synthetic scenes: the file format, what is in it, and the command line."""

import hashlib
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.ndimage import label as connected_regions
from scipy.stats import triang

from harness.data.scene_files import product_times as product_times
from tools.lib.scenes.clouds import THINNEST_CLOUD
from tools.lib.scenes.fields import axes_km, fractal_field, refine
from tools.lib.scenes.instrument import NADIR_KM, ORBIT_KM, Sun, draw_damage, glint_reflectance
from tools.lib.scenes.radiation import brightness_temperature, planck
from tools.lib.scenes.surface import latitude_at
from tools.make_scenes import (
    cover_at,
    draw_quantiles,
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


def test_scenes_say_that_they_are_synthetic(dataset):
    for path in dataset:
        with h5py.File(path) as file:
            assert file.attrs["synthetic"]


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
            "optical_depth": ((HEIGHT, WIDTH, 1), np.float32),
            "surface_temperature": ((HEIGHT, WIDTH, 1), np.float32),
            "surface": ((HEIGHT, WIDTH, 1), np.uint8),
            "cloud_regime": ((HEIGHT, WIDTH, 1), np.uint8),
        }


def test_codes_have_meanings_and_truth_is_a_depth(dataset):
    for path in dataset:
        with h5py.File(path) as file:
            for name, first in (("surface", "sea glint ice"), ("cloud_regime", "clear fog")):
                meanings = file[name].attrs["flag_meanings"]
                assert meanings.startswith(first)
                assert file[name][...].max() < len(meanings.split())
            truth = file["truth"][...] > 0
            np.testing.assert_array_equal(truth, file["optical_depth"][...] > THINNEST_CLOUD)
            assert (file["cloud_regime"][...][~truth] == 0).all()


def test_values_are_in_published_ranges(dataset):
    for path in dataset:
        with h5py.File(path) as file:
            arrays = {name: data[...] for name, data in file.items()}
        temperatures, reflectances = arrays["bts"], arrays["refs"]
        present = temperatures[np.nan_to_num(temperatures) != 0]
        assert present.size > 0.9 * temperatures.size
        assert 199.9 < present.min() < 285
        assert 250 < present.max() < 320.1
        assert np.nanmin(reflectances) >= 0
        assert np.nanmax(reflectances) < 1.2
        for name, values in (("bayes", {0, 255}), ("summary", {0, 255}), ("truth", {0, 1})):
            assert set(np.unique(arrays[name])) <= values


def test_reflectance_is_zero_by_night_only():
    night, day = scene(day=False), scene(day=True)
    assert not night["refs"].any() and not night["rads"].any()
    lit = np.nan_to_num(day["refs"][has_data(day)])
    assert (lit > 0).all()
    assert lit.max() > 0.3


def test_missing_columns_are_those_of_the_real_swath():
    # From the masks of the 100 published scenes: 33 to 45 of 1500 at the left, 18 to 27 at the
    # right, none above or below.
    for seed in range(20):
        inside = draw_damage(np.random.default_rng(seed), (1200, 1500)).inside
        left, right = (side.argmax(axis=1) for side in (inside, inside[:, ::-1]))
        assert 33 <= left.min() < left.max() <= 45
        assert 18 <= right.min() < right.max() <= 27
        assert (inside.sum(axis=1) == 1500 - left - right).all()


def test_pixels_outside_the_swath_are_zero_in_every_channel():
    for index in range(8):
        arrays = scene(index)
        for name in ("refs", "bts", "rads", "bayes", "summary"):
            assert not arrays[name][:, [0, -1]].any()
        assert has_data(arrays).mean() > 0.85


def test_label_is_clear_where_temperatures_are_missing():
    for index in range(8):
        arrays = scene(index, cloud_cover=0.95)
        assert not arrays["bayes"][~has_data(arrays)].any()


def test_planck_gives_published_radiances_and_is_inverted():
    # From 2 h c^2 / w^5 / (exp(h c / w k T) - 1) with CODATA constants, in W m-2 sr-1 um-1
    assert planck(300.0, 10.854) == pytest.approx(9.68, rel=0.01)
    temperatures = np.linspace(200, 320, 7)
    for wavelength in (3.742, 10.854, 12.023):
        radiances = planck(temperatures, wavelength)
        assert brightness_temperature(radiances, wavelength) == pytest.approx(temperatures)


def test_glint_is_brightest_in_the_mirror_image_of_the_sun():
    shape = 120, 150
    columns = axes_km(shape)[1][0]
    for azimuth in (np.pi / 2, -np.pi / 2):  # the sun stands in the east, in the west
        sun = Sun(np.full(shape, 20.0, np.float32), azimuth)
        glint = glint_reflectance(sun, np.full(shape, 4.0, np.float32))
        view = np.degrees(np.arctan((columns[glint[60].argmax()] - NADIR_KM) / ORBIT_KM))
        assert view == pytest.approx(np.sign(azimuth) * 20, abs=2)


def test_solar_and_thermal_channels_see_the_same_clouds():
    # S1 and S8 of the VIIRS granule: -0.92; S4 and S8: -0.90
    correlations = []
    for index in range(9):
        arrays = scene(index, 96, 120)
        valid = has_data(arrays)
        s1, s4, s8 = arrays["refs"][valid, 0], arrays["refs"][valid, 3], arrays["bts"][valid, 1]
        correlations.append(np.corrcoef([s1, s4, s8])[:2, 2])
    assert (np.median(correlations, axis=0) < (-0.7, -0.7)).all()


def test_cloud_is_colder_and_brighter_than_the_clear_sea():
    arrays = [scene(index, 96, 120, cloud_cover=0.5) for index in range(12)]
    for name, channel, sign in (("refs", 0, 1), ("bts", 1, -1)):
        cloud, sea = (
            np.concatenate([a[name][chosen(a) & has_data(a), channel] for a in arrays])
            for chosen in (
                lambda a: a["optical_depth"][..., 0] > 5,
                lambda a: (a["truth"] + a["surface"])[..., 0] == 0,
            )
        )
        assert sign * (np.median(cloud) - np.median(sea)) > {"refs": 0.25, "bts": 10}[name]


def test_threshold_fails_on_warm_cloud_and_on_cold_clear_surface():
    arrays = [scene(index, 96, 120, day=index % 2 == 0) for index in range(16)]
    s9 = np.concatenate([a["bts"][..., 2][has_data(a)] for a in arrays])
    cloud = np.concatenate([a["truth"][..., 0][has_data(a)] for a in arrays]) > 0
    assert (s9[cloud] > 273.15).mean() > 0.1
    assert (s9[~cloud] < 273.15).mean() > 0.02
    assert ((s9 < 273.15) == cloud).mean() > 0.6  # but it does know something


def test_bayesian_label_errs_in_patches_by_day_and_by_night():
    for day in (True, False):
        arrays = [scene(index, 150, 200, day=day) for index in range(3)]
        wrong = [has_data(a) & ((a["bayes"] > 0) != (a["truth"] > 0))[..., 0] for a in arrays]
        assert 0.03 < np.mean(wrong) < 0.2
        # Scattered at random, 10 % of wrong pixels form regions of 1.2 pixels on average.
        assert np.sum(wrong) / sum(connected_regions(w)[1] for w in wrong) > 2


def test_random_label_is_wrong_at_its_rates():
    arrays = scene(0, 240, 300, cloud_cover=0.5, label="random", label_noise=(0.05, 0.2))
    wrong, truth = (arrays["bayes"] > 0) != (arrays["truth"] > 0), arrays["truth"] > 0
    valid = has_data(arrays)[..., None]
    assert wrong[valid & truth].mean() == pytest.approx(0.05, abs=0.01)
    assert wrong[valid & ~truth].mean() == pytest.approx(0.2, abs=0.02)


def test_no_label_is_no_dataset():
    with_label, without = scene(), scene(label="none")
    assert set(with_label) - set(without) == {"bayes"}
    for name, array in without.items():
        np.testing.assert_array_equal(array, with_label[name])


def test_cloud_cover_of_a_scene_is_the_one_asked_for():
    for cloud_cover in (0.1, 0.5, 0.9):
        truth = scene(cloud_cover=cloud_cover)["truth"]
        assert truth.mean() == pytest.approx(cloud_cover, abs=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_few_scenes_have_the_cover_asked_for_and_nights_have_more(seed):
    for n, tolerance in ((20, 0.06), (100, 0.015)):
        days = [is_day(index, 0.55) for index in range(n)]
        quantiles = [draw_quantiles(seed, 1, i, day, 0.55) for i, day in enumerate(days)]
        covers = np.array(
            [cover_at(q[0], day, 0.7) for q, day in zip(quantiles, days, strict=True)]
        )
        # Odds 7 : 3 divided and multiplied by 1.4 are 0.625 and 0.766; the clearest are omitted.
        assert covers[days].mean() == pytest.approx(0.635, abs=tolerance)
        assert covers[~np.array(days)].mean() == pytest.approx(0.775, abs=tolerance)
        assert 0.1 < covers.std() < 0.25
        latitudes = np.array([latitude_at(q[1]) for q in quantiles])
        assert np.mean(latitudes < 0) == pytest.approx(0.5, abs=2 * tolerance)
        weather = np.array([q[2] for q in quantiles])
        assert np.mean(weather < 0.22) == pytest.approx(0.22, abs=2 * tolerance)


def test_latitudes_have_the_distribution_of_their_triangles():
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    latitudes = np.sort(np.abs([latitude_at(q) for q in quantiles]))
    parts = (0.15, (0, 20, 35)), (0.85, (25, 52, 72))
    expected = sum(
        share * triang.cdf(latitudes, (mode - low) / (high - low), low, high - low)
        for share, (low, mode, high) in parts
    )
    np.testing.assert_allclose(expected, quantiles, atol=1e-3)


def test_small_scenes_show_the_same_swath_as_large_ones():
    shapes = (96, 120), (192, 240)
    small, large = (axes_km(shape) for shape in shapes)
    for coarse, fine in zip(small, large, strict=True):
        np.testing.assert_allclose(fine.ravel().reshape(-1, 2).mean(axis=1), coarse.ravel())
    field = fractal_field(np.random.default_rng(3), shapes[0], 500, 2)
    averaged = refine(field, shapes[1]).reshape(96, 2, 120, 2).mean(axis=(1, 3))
    assert np.corrcoef(averaged.ravel(), field.ravel())[0, 1] > 0.99


def test_refs_on_the_500_m_grid_average_to_those_on_the_1_km_grid():
    coarse, fine = scene(3), scene(3, refs_grid="500m")
    assert fine["refs"].shape == (2 * HEIGHT, 2 * WIDTH, 6)
    averaged = fine["refs"].reshape(HEIGHT, 2, WIDTH, 2, 6).mean(axis=(1, 3))  # (H, W, 6)
    # The noise is 0.002 if the sun stands 50 degrees from the zenith, more if it is lower.
    assert np.nanstd(averaged - coarse["refs"]) < 0.02
    for name in ("bts", "rads", "summary", "truth"):
        np.testing.assert_array_equal(fine[name], coarse[name])
    assert np.mean(fine["bayes"] == coarse["bayes"]) > 0.9  # they differ in the noise of refs


def test_same_seed_gives_the_same_bytes(tmp_path):
    first = digests(make_dataset(tmp_path / "a", **SMALL))
    assert len(first) == len(set(first.values())) == 3
    assert first == digests(make_dataset(tmp_path / "b", **SMALL, jobs=2))
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
    for line, path in zip(done.stderr.splitlines(), paths, strict=True):
        assert re.fullmatch(rf"{path.parents[1]}: 1 scene, true cloud \d+ %", line)
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
        (["--label-noise", "0", "0"], "--label-noise is of random labels: add --label random"),
        (["--label-noise", "0", "0", "--label", "none"], "add --label random, or omit it"),
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
        (["--label", "random", "--label-noise", "0", "nan"], "label_noise must be from 0 to 0.5"),
        (["--jobs", "0"], "jobs must be from 1"),
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
