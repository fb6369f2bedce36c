import math
import multiprocessing.synchronize
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import build_product

from data_loader import BT_OFFSET, BT_SCALE, REFLECTANCE_OFFSET, read_scene
from harness import REPOSITORY
from harness.data.positions import read_positions
from harness.errors import Failure
from tools import convert_sen3

SHAPE = (60, 75)
OBLIQUE = (60, 45)

# Reads a product by satpy; a process of its own, for netCDF4 brings a second HDF5 library.
SATPY = """
import glob, sys
import numpy as np
from satpy import DataQuery, Scene

def scene(*names, **options):
    files = [file for name in names for file in glob.glob(f"{sys.argv[1]}/{name}")]
    return Scene(files, reader="slstr_l1b", reader_kwargs=options)

ones = {f"S{i}_{view}": 1.0 for i in range(1, 10) for view in ("nadir", "oblique")}
# Without these factors S1 to S6 are taken times 0.94 to 1.13. The reader of angles takes none.
channels = scene("S*_radiance_*.nc", "S*_BT_*.nc", user_calibration=ones)
angles = scene("geometry_*.nc")
answers = {}
for view in ("nadir", "oblique"):
    refs = [
        DataQuery(name=f"S{i}", view=view, stripe="a", calibration="reflectance")
        for i in range(1, 7)
    ]
    bts = [DataQuery(name=f"S{i}", view=view, stripe="i") for i in range(7, 10)]
    zenith = DataQuery(name="solar_zenith_angle", view=view, resolution=500)
    channels.load([*refs, *bts])
    angles.load([zenith])
    cosine = np.cos(np.radians(angles[zenith].values))
    answers[f"refs_{view}"] = np.stack(
        [channels[q].values / 100 / cosine for q in refs], axis=-1
    )
    answers[f"bts_{view}"] = np.stack([channels[q].values for q in bts], axis=-1)
np.savez(sys.argv[2], **answers)
"""


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    return build_product(tmp_path_factory.mktemp("day"))


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    return build_product(tmp_path_factory.mktemp("night"), zenith=120, platform="S3B", bayes=False)


@pytest.fixture
def product(day, tmp_path):
    """The product of a day, which a test may change."""
    return Path(shutil.copytree(day[0], tmp_path / day[0].name))


def convert(output, *arguments, status=0):
    """Run the command; return the scenes in the output folder."""
    assert convert_sen3.main([*map(str, arguments), "-o", str(output)]) == status
    assert not list(output.rglob("*.part*"))
    return sorted(output.rglob("*.hdf"))


def contents(path):
    with h5py.File(path) as file:
        return {name: dataset[:] for name, dataset in file.items()}


def true_reflectance(truth, view="nadir"):
    """By the definition, of each 500 m pixel, with the true cosine of the solar zenith."""
    cosine = truth[f"cosine_{view}"][..., None]
    detector = np.nan_to_num(truth[f"detector_{view}"], nan=-1).astype(int)  # -1: the mean
    radiance, irradiance = truth[f"radiance_{view}"], truth[f"irradiance_{view}"].T[detector]
    night = (cosine <= 0) & np.isfinite(radiance)
    return np.where(night, 0, math.pi * radiance / (irradiance * cosine))


def mean_of_four(values):
    """Mean over 2 x 2 of what is not NaN, 0 where all four are; pixel by pixel."""
    height, width, n = values.shape[0] // 2, values.shape[1] // 2, values.shape[2]
    answer = np.zeros((height, width, n))
    for i, j, k in np.ndindex(answer.shape):
        four = values[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, k]
        if np.isfinite(four).any():
            answer[i, j, k] = np.nanmean(four)
    return answer


@pytest.mark.parametrize(("view", "shape"), [("nadir", SHAPE), ("oblique", OBLIQUE)])
def test_scene_holds_what_the_product_holds(day, tmp_path, view, shape):
    product, truth = day
    (path,) = convert(tmp_path, product, "--view", view)
    assert path == tmp_path / "day" / f"{product.stem}.hdf"
    scene = contents(path)
    assert {name: (v.shape, v.dtype.name) for name, v in scene.items()} == {
        "latitude": (shape, "float32"),
        "longitude": (shape, "float32"),
        "refs": ((*shape, 6), "float64"),
        "bts": ((*shape, 3), "float32"),
        "bayes": ((*shape, 1), "float64"),
        "rads": ((*shape, 6), "float32"),
        "summary": ((*shape, 1), "float64"),
    }
    expected = mean_of_four(true_reflectance(truth, view))
    np.testing.assert_allclose(scene["refs"], expected, rtol=1e-5)  # 8e-7 / cos(40 degrees)
    missing = expected == 0
    assert 0.05 < missing.mean() < 0.25 and (expected < 0).any() and expected.max() > 0.3
    np.testing.assert_allclose(scene["rads"], mean_of_four(truth[f"radiance_{view}"]), rtol=1e-6)
    np.testing.assert_allclose(scene["bts"], np.nan_to_num(truth[f"bts_{view}"]), rtol=1e-7)
    assert (scene["bts"] == 0).any() and scene["bts"].max() > 270
    for name in ("bayes", "summary"):
        np.testing.assert_array_equal(scene[name][..., 0], 255 * truth[f"{name}_{view}"])
        assert 0.1 < truth[f"{name}_{view}"].mean() < 0.9


def test_reflectances_and_temperatures_are_those_of_satpy(day, tmp_path):
    product, truth = day
    subprocess.run(
        [sys.executable, "-c", SATPY, product, tmp_path / "satpy.npz"], check=True, timeout=120
    )
    oracle = np.load(tmp_path / "satpy.npz")
    for view in ("nadir", "oblique"):
        folder = tmp_path / view
        (path,) = convert(folder, product, "--view", view, "--refs-grid", "500m")
        scene = contents(path)
        # satpy leaves the radiance of a pixel without detector as it is, undivided.
        known = np.isfinite(truth[f"detector_{view}"])
        ours, theirs = scene["refs"][known], oracle[f"refs_{view}"][known]
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        assert np.isfinite(ours).mean() > 0.9
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(
            scene["bts"], np.nan_to_num(oracle[f"bts_{view}"]), rtol=0, atol=0.01
        )


@pytest.mark.parametrize("grid", ["1km", "500m"])
def test_benchmark_reads_a_converted_scene(day, tmp_path, grid):
    product, truth = day
    (path,) = convert(tmp_path, product, "--refs-grid", grid)
    with h5py.File(path) as file:
        fold = {"1km": 1, "500m": 2}[grid]
        assert file["refs"].shape == file["rads"].shape == (fold * 60, fold * 75, 6)
        assert np.isnan(file["refs"][:]).any() == (grid == "500m")
    scene = read_scene(path, (*SHAPE, 9))
    refs = mean_of_four(true_reflectance(truth)) - REFLECTANCE_OFFSET
    bts = (np.nan_to_num(truth["bts_nadir"]) - BT_OFFSET) / BT_SCALE
    np.testing.assert_allclose(scene.channels[..., :6], refs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scene.channels[..., 6:], bts, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scene.cloud[..., 0], truth["bayes_nadir"])
    np.testing.assert_array_equal(scene.valid, np.isfinite(truth["bts_nadir"]).all(axis=-1))
    assert scene.out_of_range == 0


def test_night_has_no_reflectance_and_goes_to_night(night, tmp_path, capsys):
    product, truth = night
    (path,) = convert(tmp_path, product)
    assert path == tmp_path / "night" / f"{product.stem}.hdf" and path.name.startswith("S3B")
    scene = contents(path)
    assert not scene["refs"].any() and scene["bts"].any()
    assert "bayes" not in scene and "the product has no Bayesian mask" in capsys.readouterr().err
    np.testing.assert_array_equal(scene["summary"][..., 0], 255 * truth["summary_nadir"])


def test_sun_below_the_horizon_gives_reflectance_0(tmp_path):
    product, truth = build_product(tmp_path / "product", zenith=89.98)
    cosine = truth["cosine_nadir"]
    assert 0.3 < (cosine > 0).mean() < 0.7
    (path,) = convert(tmp_path / "scenes", product, "--refs-grid", "500m")
    assert path.parent.name == "night"  # for not all of its pixels are by day
    refs = contents(path)["refs"]
    night, missing = cosine < -1e-6, np.isnan(truth["radiance_nadir"])
    assert not np.nan_to_num(refs[night]).any()
    np.testing.assert_array_equal(np.isnan(refs), missing)
    assert 0.01 < missing[night].mean() < 0.5
    lit = cosine > 1e-4  # 0.006 degrees above the horizon
    np.testing.assert_allclose(refs[lit], true_reflectance(truth)[lit], rtol=0.01)
    assert np.nanmax(refs[lit]) > 0.1


def unfill(flags):
    flags["confidence_in"][:] |= UNFILLED


def one_pixel_at_night(flags):
    flags["confidence_in"][30, 30] &= ~DAY


def unfill_pixels_at_night(flags):
    """Only row 0 has data, and it is day there."""
    flags["confidence_in"][1:] |= UNFILLED
    flags["confidence_in"][1:] &= ~DAY


UNFILLED, DAY = np.uint16(1 << 5), np.uint16(1 << 10)  # places in sen3_product.CONFIDENCE


@pytest.mark.parametrize(
    ("change", "part"),
    [(unfill, "night"), (one_pixel_at_night, "night"), (unfill_pixels_at_night, "day")],
)
def test_day_means_that_all_measured_pixels_are_day(product, tmp_path, change, part):
    with h5py.File(product / "flags_in.nc", "a") as file:
        change(file)
    (path,) = convert(tmp_path / "out", product)
    assert path.parent.name == part


def test_missing_tie_points_outside_the_swath_lose_no_pixels(tmp_path):
    product, truth = build_product(tmp_path / "product", tie_points_missing=True)
    with h5py.File(product / "geometry_tn.nc") as file:
        assert (file["solar_zenith_tn"][:] > 1e30).any(axis=0).sum() == 7  # of 11
    (path,) = convert(tmp_path / "scenes", product)
    expected = mean_of_four(true_reflectance(truth))
    np.testing.assert_allclose(contents(path)["refs"], expected, rtol=1e-5)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_tie_points_may_increase_or_decrease(day, product, tmp_path, axis):
    order = np.s_[:, ::-1] if axis == "x" else np.s_[::-1]
    for file, names in (
        ("cartesian_tx.nc", ("x_tx", "y_tx")),
        ("geometry_tn.nc", ("solar_zenith_tn",)),
    ):
        with h5py.File(product / file, "a") as opened:
            for name in names:
                opened[name][:] = opened[name][:][order]
    (path,) = convert(tmp_path / "out", product)
    expected = mean_of_four(true_reflectance(day[1]))
    np.testing.assert_allclose(contents(path)["refs"], expected, rtol=1e-5)


def test_pixels_more_than_a_step_outside_the_tie_points_have_no_reflectance(product, tmp_path):
    with h5py.File(product / "cartesian_tx.nc") as file:
        ties = np.sort(file["x_tx"][0])
    step = np.diff(ties).max()
    places = (ties[0] - 1.1 * step, ties[-1] + 1.1 * step, ties[0] - 0.9 * step, ties[-1] + step)
    with h5py.File(product / "cartesian_an.nc", "a") as file:
        for column, place in zip((40, 50, 60, 70), places, strict=True):
            file["x_an"][:, column] = place
    (path,) = convert(tmp_path / "out", product, "--refs-grid", "500m")
    refs = contents(path)["refs"]
    assert np.isnan(refs[:, [40, 50]]).all()
    assert all(np.isfinite(refs[:, column]).any() for column in (41, 60, 70))


def test_flags_follow_the_masks_and_meanings_of_the_file(day, product, tmp_path):
    with h5py.File(product / "flags_in.nc", "a") as file:
        for name in ("confidence_in", "bayes_in"):
            bits = file[name][:]
            n_bits = 8 * bits.dtype.itemsize
            flipped = sum(((bits >> i) & 1) << (n_bits - 1 - i) for i in range(n_bits))
            file[name][:] = flipped.astype(bits.dtype)
            file[name].attrs["flag_masks"] = file[name].attrs["flag_masks"][::-1]
    (path,) = convert(tmp_path / "flipped", product)
    (same,) = convert(tmp_path / "same", day[0])
    assert path.parent.name == "day" and path.read_bytes() == same.read_bytes()


def test_cloud_is_any_flag_of_the_bayesian_mask_but_spare_ones(product, tmp_path):
    with h5py.File(product / "flags_in.nc", "a") as file:
        file["bayes_in"][:] = 0
        file["bayes_in"][0, :6] = [1, 2, 4, 8, 16 + 128, 255]
        file["bayes_in"].attrs["_FillValue"] = np.uint8(255)
    (path,) = convert(tmp_path / "out", product)
    bayes = contents(path)["bayes"][..., 0]
    assert bayes[0, :6].tolist() == [255, 255, 255, 255, 0, 0] and bayes.sum() == 4 * 255


@pytest.mark.parametrize("fill_value", ["_FillValue", "missing_value"])
def test_numbers_are_unpacked_by_the_attributes_of_the_file(day, product, tmp_path, fill_value):
    with h5py.File(product / "S8_BT_in.nc", "a") as file:
        packed = file["S8_BT_in"]
        values = packed[:].astype(int)
        fill = values == packed.attrs["_FillValue"]
        packed[:] = np.where(fill, 32767, values // 2)
        del packed.attrs["_FillValue"]
        packed.attrs[fill_value] = np.int16(32767)
        packed.attrs["scale_factor"] = 0.02
    (path,) = convert(tmp_path / "out", product)
    found, expected = contents(path)["bts"][..., 1], np.nan_to_num(day[1]["bts_nadir"][..., 1])
    np.testing.assert_allclose(found, expected, atol=0.011)


def keep_rows(product, grid, first, stop):
    """Keep some rows of the images of a grid, "a" (500 m) or "i" (1 km), as if it began there."""
    n_rows = {"a": 2, "i": 1}[grid] * SHAPE[0]
    for path in product.glob(f"*_{grid}n.nc"):
        with h5py.File(path, "a") as file:
            file.attrs["start_offset"] = np.int16(file.attrs["start_offset"] + first)
            for name, old in list(file.items()):
                if old.shape[0] == n_rows:
                    values, attributes = old[first:stop], dict(old.attrs)
                    del file[name]
                    file[name] = values
                    kept = ("_FillValue", "scale_factor", "add_offset", "flag_masks")
                    for key in (*kept, "flag_meanings"):
                        if key in attributes:
                            file[name].attrs[key] = attributes[key]


# First and last row, of the 120 and 60, that the images of 500 m and 1 km keep.
KEPT = {
    "no surplus": ((0, 120), (0, 60)),
    "500 m begins later": ((1, 120), (0, 60)),
    "500 m ends earlier": ((0, 119), (0, 60)),
    "500 m ends later": ((0, 120), (0, 59)),
    "1 km begins later": ((0, 120), (1, 60)),
    "both": ((3, 118), (1, 60)),
    "two minutes": ((0, 80), (0, 40)),
}


@pytest.mark.parametrize("grid", ["1km", "500m"])
@pytest.mark.parametrize("case", KEPT)
def test_rows_of_both_grids_are_matched_by_their_start_offsets(day, product, tmp_path, case, grid):
    fine, coarse = KEPT[case]
    keep_rows(product, "a", *fine)
    keep_rows(product, "i", *coarse)
    (path,) = convert(tmp_path / "out", product, "--refs-grid", grid)
    truth, rows = day[1], slice(*coarse)
    expected = true_reflectance(truth)
    expected[: fine[0]] = expected[fine[1] :] = np.nan
    expected = expected[2 * coarse[0] : 2 * coarse[1]]
    scene = contents(path)
    if grid == "1km":
        expected = mean_of_four(expected)
    else:
        np.testing.assert_array_equal(np.isnan(scene["rads"]), np.isnan(expected))
    np.testing.assert_allclose(scene["refs"], expected, rtol=1e-5)
    np.testing.assert_allclose(scene["bts"], np.nan_to_num(truth["bts_nadir"][rows]), rtol=1e-6)
    np.testing.assert_array_equal(scene["bayes"][..., 0], 255 * truth["bayes_nadir"][rows])


@pytest.mark.parametrize("grid", ["1km", "500m"])
@pytest.mark.parametrize("n_rows", [58, 63])
def test_rows_are_removed_or_added_at_the_end(day, tmp_path, n_rows, grid):
    whole, cut = (
        contents(convert(tmp_path / str(len(more)), day[0], "--refs-grid", grid, *more)[0])
        for more in ([], ["--rows", n_rows])
    )
    for name, values in cut.items():
        fold = len(whole[name]) // SHAPE[0]
        assert len(values) == fold * n_rows and values.dtype == whole[name].dtype
        n_equal = fold * min(n_rows, SHAPE[0])
        np.testing.assert_array_equal(values[:n_equal], whole[name][:n_equal])
        is_nan = name in ("latitude", "longitude") or fold == 2
        np.testing.assert_array_equal(values[n_equal:], np.nan if is_nan else 0)


def pack(product, path):
    """Zip a product as it is downloaded."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in product.iterdir():
            archive.write(file, f"{product.name}/{file.name}")
    return path


@pytest.mark.parametrize("option", [[], ["--positions"]])
def test_positions_have_the_names_that_export_masks_reads(day, tmp_path, option):
    (path,) = convert(tmp_path, day[0], *option)
    positions = read_positions(path, None, path.stem, SHAPE)
    assert set(positions) == {"latitude", "longitude"}
    assert np.isnan(positions["latitude"][0, 0])
    for name, degrees in positions.items():
        np.testing.assert_allclose(degrees, day[1][f"{name}_nadir"], atol=1e-5)


def test_positions_can_be_left_out(product, tmp_path, capsys):
    (product / "geodetic_in.nc").unlink()
    assert convert(tmp_path / "out", product, status=1) == []
    line = capsys.readouterr().err.splitlines()[0]
    assert line.endswith("geodetic_in.nc. Download it again, or use --no-positions.")
    (path,) = convert(tmp_path / "out", product, "--no-positions")
    assert read_positions(path, None, path.stem, SHAPE) == {}


def test_zip_files_and_parallel_jobs_give_the_same_scenes(day, night, tmp_path):
    one = convert(tmp_path / "one", day[0], night[0])
    zipped = pack(day[0], tmp_path / "any name.zip")
    two = convert(tmp_path / "two", zipped, night[0], "--jobs", "2")
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert a.relative_to(tmp_path / "one") == b.relative_to(tmp_path / "two")
        assert a.read_bytes() == b.read_bytes()


def inside_another_folder(product):
    outer = product.parent / "outer" / product.name
    outer.mkdir(parents=True)
    product.rename(outer / product.name)
    return outer


def mac_zip(product):
    path = pack(product, product.parent / "x.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"__MACOSX/{product.name}/._flags_in.nc", "a Mac's")
    return path


def flat_zip(suffix):
    def make(product):
        path = product.with_name(product.stem + suffix)
        with zipfile.ZipFile(path, "w") as archive:
            for file in product.iterdir():
                archive.write(file, file.name)
        return path

    return make


def windows_zip(product):
    path = product.parent / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in product.iterdir():
            archive.writestr(f"{product.name}\\{file.name}", file.read_bytes())
    return path


FORMS = {
    "manifest": lambda product: product / "xfdumanifest.xml",
    "lower case": lambda product: product.rename(product.with_suffix(".sen3")),
    "no suffix": lambda product: product.rename(product.with_suffix("")),
    "inside another folder": inside_another_folder,
    "manifest inside": lambda p: inside_another_folder(p) / p.name / "xfdumanifest.xml",
    "any folder": lambda product: inside_another_folder(product).parent,
    "zip of a Mac": mac_zip,
    "zip of Windows": windows_zip,
    "flat zip": flat_zip(".zip"),
    "flat zip with suffix": flat_zip(".SEN3.ZIP"),
}


@pytest.mark.parametrize("form", FORMS)
def test_products_are_accepted_as_people_have_them(day, product, tmp_path, form):
    (path,) = convert(tmp_path / "out", FORMS[form](product))
    assert path == tmp_path / "out/day" / f"{day[0].stem}.hdf"
    np.testing.assert_array_equal(contents(path)["bayes"][..., 0], 255 * day[1]["bayes_nadir"])


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (
            [],
            ["--view", "oblique"],
            "exists with view nadir, refs_grid 1km, expected view oblique,",
        ),
        (
            ["--refs-grid", "500m"],
            [],
            "exists with view nadir, refs_grid 500m, expected view nadir",
        ),
        (
            [],
            ["--rows", "63"],
            "refs_grid 1km, rows 60, expected view nadir, refs_grid 1km, rows 63",
        ),
    ],
)
def test_existing_scene_of_another_variant_is_no_success(
    day, tmp_path, capsys, first, second, reason
):
    (path,) = convert(tmp_path, day[0], *first)
    before = path.read_bytes()
    assert convert(tmp_path, day[0], *second, status=1) == [path]
    assert path.read_bytes() == before and reason in capsys.readouterr().err
    convert(tmp_path, day[0], *first)  # skipped
    convert(tmp_path, day[0], *second, "--overwrite")
    assert path.read_bytes() != before


def test_without_shared_memory_one_process_converts(monkeypatch, caplog):
    def fail(*arguments, **options):
        raise FileNotFoundError(2, "No such file or directory")  # as SemLock without /dev/shm

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fail)
    assert list(convert_sen3.parallel_map(abs, [-1, -2], 2)) == [1, 2]
    assert "/dev/shm" in caplog.text


def test_killed_worker_is_reported():
    sleep = "__import__('time').sleep"
    texts = ["1", f"{sleep}(1) or __import__('os')._exit(1)", f"{sleep}(600)"]
    with pytest.raises(Failure, match="run the command again with fewer jobs"):
        list(convert_sen3.parallel_map(eval, texts, 2))  # the sleeping worker is killed


# The command, with two workers in place of products. Each writes its number, waits for the file
# `go`, and writes that it has finished.
WORKERS = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [".", "tools"]
from tools import convert_sen3

def work(name):
    Path(f"{name}.pid").write_text(str(os.getpid()))
    while not Path(f"{name}.go").exists():
        time.sleep(0.05)
    Path(f"{name}.done").touch()

def convert_all(arguments):
    list(convert_sen3.parallel_map(work, arguments.products, 2))

if __name__ == "__main__":
    convert_sen3.convert_all = convert_all
    sys.exit(convert_sen3.main([*sys.argv[1:], "-o", "x"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_workers_finish_their_scene_or_exit_with_their_parent(tmp_path, number, status):
    (tmp_path / "workers.py").write_text(WORKERS)
    names = [tmp_path / name for name in "ab"]
    with subprocess.Popen(
        [sys.executable, tmp_path / "workers.py", *names],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for(lambda: len([p for p in tmp_path.glob("*.pid") if p.read_text()]) == 2)
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)  # all processes, as a batch system does
            for name in names:
                name.with_suffix(".go").touch()
        error = process.communicate()[1]
        assert process.returncode == status
        workers = [Path("/proc", p.read_text(), "cmdline") for p in tmp_path.glob("*.pid")]
        wait_for(lambda: not any(p.exists() and p.read_bytes() for p in workers))
    finished = len(list(tmp_path.glob("*.done")))
    if number == signal.SIGKILL:
        assert finished == 0
    else:
        stopped = f"Stopped: received {number.name}. Scenes that were written are complete.\n"
        assert error == stopped and finished == 2


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", [(shutil, "copyfileobj"), (h5py.Group, "create_dataset")])
def test_stopped_command_leaves_nothing_behind(day, tmp_path, monkeypatch, number, status, where):
    path = pack(day[0], tmp_path / "x.zip")
    monkeypatch.setattr(*where, lambda *_, **__: os.kill(os.getpid(), number))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert convert(tmp_path / "out", path, status=status) == []
    assert not list((tmp_path / "temporary").iterdir())


def test_existing_scene_is_skipped_unless_overwrite(product, tmp_path, capsys):
    output = tmp_path / "out"
    (path,) = convert(output, product)
    path.write_bytes(b"mine")
    assert convert(output, product) == [path] and path.read_bytes() == b"mine"
    error = capsys.readouterr().err
    assert f"skipped: {path} exists" in error and "0 converted, 1 skipped, 0 failed" in error

    with h5py.File(product / "flags_in.nc", "a") as file:  # a later processing says night
        one_pixel_at_night(file)
    (again,) = convert(output, product, "--overwrite")  # one scene, not one in each folder
    assert again == output / "night" / path.name and h5py.is_hdf5(again)


def test_bad_product_is_reported_and_the_others_are_converted(
    day, night, product, tmp_path, capsys
):
    (product / "geometry_tn.nc").unlink()
    bad = product.rename(tmp_path / day[0].name.replace("1980", "1981"))
    scenes = convert(tmp_path / "out", bad, night[0], day[0], status=1)
    assert [path.stem for path in scenes] == [day[0].stem, night[0].stem]
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if "failed: " in line)
    assert str(bad) in line and "geometry_tn.nc" in line
    assert lines[-1] == "Error: 2 converted, 0 skipped, 1 failed. The lines above give the reasons."


def truncate(path):
    os.truncate(path, path.stat().st_size * 2 // 3)
    return path


def damage_bytes(path, start, n=8):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * n)


def damage_chunk(product):
    path = product / "S7_BT_in.nc"
    with h5py.File(path) as file:
        start = file["S7_BT_in"].id.get_chunk_info(0).byte_offset
    damage_bytes(path, start + 2)


def damage_member(product):
    path = pack(product, product.parent / "x.zip")
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"{product.name}/S2_radiance_an.nc").header_offset
    damage_bytes(path, start + 500, 100)
    return path


def claim_terabytes(product):
    path = pack(product, product.parent / "x.zip")
    data = bytearray(path.read_bytes())
    for member in ("S1_radiance_an.nc", "S2_radiance_an.nc"):
        entry = data.rindex(f"{product.name}/{member}".encode()) - 46  # its central record
        data[entry + 24 : entry + 28] = b"\xf0\xff\xff\xff"  # size, unpacked
    path.write_bytes(data)
    return path


def zip_with(name):
    def make(product):
        path = pack(product, product.parent / "x.zip")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "harm")
        return path

    return make


def truncated_zip(product):
    return truncate(pack(product, product.parent / "x.zip"))


def incomplete_zip(product):
    (product / "S3_quality_an.nc").unlink()
    return pack(product, product.parent / "x.zip")


def renamed(old, new):
    return lambda product: product.rename(product.with_name(product.name.replace(old, new)))


def other_file(make):
    return lambda product: make(product.parent / "x.SEN3") or product.parent / "x.SEN3"


def attribute(file, name, key, value):
    """A function that changes an attribute of a variable, in place."""

    def change(product):
        with h5py.File(product / file, "a") as opened:
            opened[name].attrs[key] = value

    return change


def variable(file, name, new):
    """A function that replaces a variable by new(its values); None removes it."""

    def change(product):
        with h5py.File(product / file, "a") as opened:
            values = new(opened[name][:])
            del opened[name]
            if values is not None:
                opened[name] = values

    return change


def detector(number):
    return variable("indices_an.nc", "detector_an", lambda old: np.where(old == 255, 0, number))


# A function that damages a product, and may return another path; and a part of the error.
FAULTS = {
    "no geometry": (lambda p: (p / "geometry_tn.nc").unlink(), "product: geometry_tn.nc"),
    "no quality": (lambda p: (p / "S6_quality_an.nc").unlink(), "product: S6_quality_an.nc"),
    "truncated": (lambda p: truncate(p / "S5_radiance_an.nc") and None, "S5_radiance_an.nc cannot"),
    "damaged chunk": (damage_chunk, "S7_BT_in.nc cannot be used"),
    "web page": (lambda p: (p / "flags_in.nc").write_text("<html>") and None, "flags_in.nc cannot"),
    "other sensor": (renamed("SL_1_RBT___", "OL_1_EFR___"), "S3A_OL_1_EFR___"),
    "other level": (renamed("SL_1_RBT", "SL_2_LST"), "S3A_SL_2_LST"),
    "file of the product": (lambda p: p / "flags_in.nc", "give the folder of a single file"),
    "tar file": (
        lambda p: Path(shutil.make_archive(p, "gztar", p.parent, p.name)),
        "Unpack another kind of archive, give",
    ),
    "flat zip of another name": (
        lambda p: flat_zip(".zip")(p).rename(p.with_name("x.zip")),
        "found 'x'. Remove",
    ),
    "folder of products": (
        lambda p: Path(shutil.copytree(p, p.with_name(p.name.replace("S3A", "S3B")))).parent,
        "expected one product, found 2. Name each",
    ),
    "text file": (other_file(Path.touch), "complete zip file: File is not a zip file"),
    "pipe": (other_file(os.mkfifo), "complete zip file: it is neither"),
    "truncated zip": (truncated_zip, "complete zip file: File is not a zip file"),
    "incomplete zip": (incomplete_zip, "missing in the product: S3_quality_an.nc"),
    "damaged zip": (damage_member, "complete zip file"),
    "zip-slip": (zip_with("../../outside.nc"), "found 2 folders"),
    "two products": (zip_with("other.SEN3/flags_in.nc"), "found 2 folders"),
    "zip bomb": (claim_terabytes, "unpacked it would have 8"),
    "scale": (attribute("S8_BT_in.nc", "S8_BT_in", "scale_factor", np.nan), "finite scale_factor"),
    "offset": (attribute("S8_BT_in.nc", "S8_BT_in", "add_offset", np.inf), "finite scale_factor"),
    "no flag `day`": (
        attribute("flags_in.nc", "confidence_in", "flag_meanings", " ".join("abcdefghijklmnop")),
        "including day unfilled summary_cloud",
    ),
    "8000 flags": (
        attribute("flags_in.nc", "bayes_in", "flag_masks", np.ones(8000, np.uint8)),
        "should have 1 to 64 values in its flag_masks, found 8000",
    ),
    "no flags": (attribute("flags_in.nc", "bayes_in", "flag_meanings", ""), "including any"),
    "no variable": (variable("indices_an.nc", "detector_an", lambda _: None), "'detector_an'"),
    "other shape": (variable("S9_BT_in.nc", "S9_BT_in", lambda bt: bt[:-1]), "(59, 75)"),
    "link": (
        variable("flags_in.nc", "bayes_in", lambda _: h5py.ExternalLink("/etc/passwd", "/x")),
        "link out of the file",
    ),
    "detector 4": (detector(4), "detectors from 0 to 4, expected 0 to 3"),
    "detector -1": (detector(-1), "detectors from -1 to 0, expected 0 to 3"),
    "no irradiance": (
        variable("S4_quality_an.nc", "S4_solar_irradiance_an", lambda old: 0 * old - 999),
        "S4 cannot be used: no solar irradiance",
    ),
    "start offsets": (
        lambda p: keep_rows(p, "i", 5, 60),
        "found start_offset 5 and 0. Download",
    ),
    "end of the grids": (lambda p: keep_rows(p, "a", 0, 111), "found 60 and 111 rows. Download"),
    "tie points": (variable("cartesian_tx.nc", "x_tx", lambda x: 0 * x), "cartesian_tx.nc should"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_unusable_product_ends_in_one_line(product, tmp_path, capsys, what):
    damage, reason = FAULTS[what]
    path = damage(product) or product
    assert convert(tmp_path / "out", path, status=1) == []
    line, last = capsys.readouterr().err.splitlines()
    assert line.startswith(f"1 of 1, failed: {path}: ") and reason in line
    assert last == "Error: 0 converted, 0 skipped, 1 failed. The lines above give the reasons."
    assert not list(tmp_path.rglob("outside*"))


def test_failed_write_leaves_the_existing_scene(day, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "Can't write data (file write failed: time = now\n, filename = x")

    (path,) = convert(tmp_path, day[0])
    before = path.read_bytes()
    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    assert convert(tmp_path, day[0], "--overwrite", status=1) == [path]
    assert path.read_bytes() == before
    assert f"{path}: No space left on device. " in capsys.readouterr().err


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    return build_product(tmp_path_factory.mktemp("full"), height=1200, width=1500, views=["nadir"])


# Runs the command and prints its highest memory (getrusage would include that of the tests).
MEASURED = """
import re, runpy, sys
sys.path.insert(0, "tools")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["1km", "500m"])
def test_full_size_product_needs_less_memory_than_promised(full_size, tmp_path, grid):
    product, truth = full_size
    command = [convert_sen3.__file__, product, "-o", tmp_path, "--refs-grid", grid]
    answer = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, cwd=REPOSITORY
    )
    status, peak = map(int, answer.stdout.split())
    assert status == 0, answer.stderr
    assert peak < 1.3e6  # [kB], as --jobs says; measured: 0.8 and 1.2 GB
    (path,) = tmp_path.rglob("*.hdf")
    scene = read_scene(path, (1200, 1500, 9))
    path.unlink()  # pytest keeps folders
    rows, fine = np.s_[600:630, :300], np.s_[1200:1260, :600]
    names = ("cosine_nadir", "radiance_nadir", "detector_nadir")
    part = {**truth, **{name: truth[name][fine] for name in names}}
    expected = mean_of_four(true_reflectance(part)) - REFLECTANCE_OFFSET
    np.testing.assert_allclose(scene.channels[rows][..., :6], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scene.cloud[..., 0], truth["bayes_nadir"])
