import json
import math
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
from scipy.interpolate import RegularGridInterpolator

from data_loader import BT_OFFSET, BT_SCALE, REFLECTANCE_OFFSET, read_scene
from harness import REPOSITORY
from harness.data.positions import read_positions
from harness.errors import Failure
from tools import convert_sen3

BUILDER = Path(__file__).with_name("sen3_product.py")
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


def build(folder, **options):
    """Build a product; return its folder and what its pixels are."""
    subprocess.run([sys.executable, BUILDER, folder, json.dumps(options)], check=True, timeout=120)
    (product,) = folder.glob("*.SEN3")
    return product, dict(np.load(product.with_suffix(".npz")))


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    return build(tmp_path_factory.mktemp("day"))


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    return build(tmp_path_factory.mktemp("night"), zenith=120, platform="S3B", bayes=False)


@pytest.fixture
def product(day, tmp_path):
    """The product by day, which may be changed."""
    return Path(shutil.copytree(day[0], tmp_path / day[0].name))


def convert(output, *arguments, status=0):
    """Run the program; return the scenes in the output folder."""
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
    assert "bayes" not in scene and "no Bayesian mask in the product" in capsys.readouterr().err
    np.testing.assert_array_equal(scene["summary"][..., 0], 255 * truth["summary_nadir"])


def test_sun_below_the_horizon_gives_reflectance_0(tmp_path):
    product, truth = build(tmp_path / "product", zenith=89.98)
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


@pytest.mark.parametrize(
    ("by_day", "unfilled", "expected"),
    [
        ([1, 1, 0], [0, 0, 1], True),  # a border has no flags
        ([1, 0, 0], [0, 0, 1], False),
        ([1, 1, 1], [0, 0, 0], True),
        ([1, 1, 1], [1, 1, 1], False),  # nothing was seen
    ],
)
def test_day_is_where_all_measured_pixels_are_by_day(by_day, unfilled, expected):
    flags = (np.array([flag], bool) for flag in (by_day, unfilled))
    assert convert_sen3.is_day(*flags) is expected


def test_missing_tie_points_beside_the_swath_cost_no_pixels(tmp_path):
    product, truth = build(tmp_path / "product", tie_points_missing=True)
    with h5py.File(product / "geometry_tn.nc") as file:
        assert (file["solar_zenith_tn"][:] > 1e30).any(axis=0).sum() == 7  # of 11
    (path,) = convert(tmp_path / "scenes", product)
    expected = mean_of_four(true_reflectance(truth))
    np.testing.assert_allclose(contents(path)["refs"], expected, rtol=1e-5)


@pytest.mark.parametrize("falling", [False, True])
def test_interpolation_is_bilinear(falling):
    rng = np.random.default_rng(0)
    rows, columns = np.cumsum(rng.uniform(1, 3, 6)), np.cumsum(rng.uniform(9, 20, 8))
    values = rng.normal(size=(6, 8))
    y, x = rng.uniform(rows[0], rows[-1], (20, 30)), rng.uniform(columns[0], columns[-1], (20, 30))
    expected = RegularGridInterpolator((rows, columns), values)((y, x))
    y[0, 0], x[0, 1] = np.nan, columns[-1] + 30
    if falling:
        rows, columns, values = rows[::-1], columns[::-1], values[::-1, ::-1]
    found = convert_sen3.bilinear(rows, columns, values, y, x)
    assert np.isnan(found[0, :2]).all()
    np.testing.assert_allclose(found.ravel()[2:], expected.ravel()[2:])


def test_rows_go_on_along_their_first_and_last_two_values():
    columns = np.array([40.0, 30, 10, 5, 0])
    values = np.array([[np.nan, 3, 1, 0.5, np.nan], [np.nan, 7, np.nan, np.nan, np.nan]])
    found = convert_sen3.filled_rows(columns, values)
    np.testing.assert_allclose(found[0], [4, 3, 1, 0.5, 0])
    assert np.isnan(found[1]).all()


def test_flags_are_what_the_file_says_they_are(day, product, tmp_path):
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
def test_packing_is_what_the_file_says_it_is(day, product, tmp_path, fill_value):
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


def pack(product, path):
    """Zip a product as it is downloaded."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in product.iterdir():
            archive.write(file, f"{product.name}/{file.name}")
    return path


def test_zip_file_gives_the_same_scene(day, tmp_path):
    folder = tmp_path / "from_zip"
    (zipped,) = convert(folder, pack(day[0], tmp_path / "any name.zip"))
    (plain,) = convert(tmp_path / "from_folder", day[0])
    assert zipped.name == plain.name and zipped.read_bytes() == plain.read_bytes()


def test_positions_are_those_that_export_masks_looks_for(day, tmp_path):
    (path,) = convert(tmp_path, day[0], "--positions")
    positions = read_positions(path, None, path.stem, SHAPE)
    assert set(positions) == {"latitude", "longitude"}
    assert np.isnan(positions["latitude"][0, 0])
    for name, degrees in positions.items():
        np.testing.assert_allclose(degrees, day[1][f"{name}_nadir"], atol=1e-5)


def test_products_at_once_give_the_same_scenes(day, night, tmp_path):
    products = (day[0], night[0])
    one, other = convert(tmp_path / "one", *products), tmp_path / "two"
    two = convert(other, *products, "--jobs", "2")
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert a.relative_to(tmp_path / "one") == b.relative_to(other)
        assert a.read_bytes() == b.read_bytes()


def test_killed_process_is_told_with_what_to_do():
    began, sleep = time.monotonic(), "__import__('time').sleep"
    texts = ["1", f"{sleep}(1) or __import__('os')._exit(1)", f"{sleep}(60)"]
    with pytest.raises(Failure, match="go on with fewer jobs"):
        list(convert_sen3.outcomes(eval, texts, 2))
    assert time.monotonic() - began < 30  # the one that sleeps is ended too


# The program, whose two products are texts that its workers evaluate.
WORKERS = """
import sys
from tools import convert_sen3
texts = sys.argv[1:]
convert_sen3.convert_all = lambda _: list(convert_sen3.outcomes(eval, texts, 2))
sys.exit(convert_sen3.main(["x", "-o", "x"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_workers_end_what_they_write_or_with_their_parent(tmp_path, number, status):
    texts = [
        f"open('{tmp_path}/{i}.pid', 'w').write(str(__import__('os').getpid()))"
        f" and __import__('time').sleep(3) or open('{tmp_path}/{i}.done', 'w').write('x')"
        for i in range(2)
    ]
    command = [sys.executable, "-c", WORKERS, *texts]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: len([p for p in tmp_path.glob("*.pid") if p.read_text()]) == 2)
        if number == signal.SIGKILL:
            process.kill()
        else:
            for _ in range(2):  # as a batch system does
                os.killpg(process.pid, number)
                time.sleep(0.5)
        assert process.wait(20) == status
        workers = [Path("/proc", p.read_text(), "cmdline") for p in tmp_path.glob("*.pid")]
        wait_for(lambda: not any(p.exists() and p.read_bytes() for p in workers))
        error = process.stderr.read()
    if number == signal.SIGKILL:
        assert not list(tmp_path.glob("*.done"))
    else:
        assert error == f"Stopped: received {number.name}. Scenes that are written are whole.\n"
        assert len(list(tmp_path.glob("*.done"))) == 2


def wait_for(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", [(shutil, "copyfileobj"), (h5py.Group, "create_dataset")])
def test_stopped_program_leaves_nothing_behind(day, tmp_path, monkeypatch, number, status, where):
    path = pack(day[0], tmp_path / "x.zip")
    monkeypatch.setattr(*where, lambda *_, **__: os.kill(os.getpid(), number))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert convert(tmp_path / "out", path, status=status) == []
    assert not list((tmp_path / "temporary").iterdir())


def test_existing_scene_is_skipped_unless_it_is_to_be_made_anew(product, tmp_path, capsys):
    output = tmp_path / "out"
    (path,) = convert(output, product)
    path.write_bytes(b"mine")
    assert convert(output, product) == [path] and path.read_bytes() == b"mine"
    error = capsys.readouterr().err
    assert f"{path} exists: skipped" in error and "0 converted, 1 skipped, 0 failed" in error

    with h5py.File(product / "flags_in.nc", "a") as file:  # a later processing says night
        file["confidence_in"][30, 30] &= ~np.uint16(1 << 10)
    (again,) = convert(output, product, "--overwrite")  # one scene, not one in each folder
    assert again == output / "night" / path.name and h5py.is_hdf5(again)


def test_bad_product_is_named_and_the_others_go_on(day, night, product, tmp_path, capsys):
    (product / "geometry_tn.nc").unlink()
    bad = product.rename(tmp_path / day[0].name.replace("1980", "1981"))
    scenes = convert(tmp_path / "out", bad, night[0], day[0], status=1)
    assert [path.stem for path in scenes] == [day[0].stem, night[0].stem]
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if "failed: " in line)
    assert str(bad) in line and "geometry_tn.nc" in line
    assert lines[-1] == "Error: 2 converted, 0 skipped, 1 failed; the lines above say why."


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


def spoil(what, product, tmp_path):
    """Do what should end in one line; return what is converted and a part of that line."""
    if what.endswith(".nc is missing"):
        name = what.split()[0]
        (product / name).unlink()
        return product, f"it has no {name}"
    if what == "zip lacks a file":
        (product / "S3_quality_an.nc").unlink()
        return pack(product, tmp_path / "x.zip"), "it has no S3_quality_an.nc"
    if what == "damaged NetCDF":
        truncate(product / "S5_radiance_an.nc")
        return product, "S5_radiance_an.nc cannot be used"
    if what == "damaged numbers":
        path = product / "S7_BT_in.nc"
        with h5py.File(path) as file:
            chunk = file["S7_BT_in"].id.get_chunk_info(0)
        with path.open("r+b") as file:
            file.seek(chunk.byte_offset + 2)
            file.write(b"\xff" * 8)
        return product, "S7_BT_in.nc cannot be used"
    if what == "no NetCDF":
        (product / "flags_in.nc").write_text("<html>Sign in</html>")
        return product, "flags_in.nc cannot be used"
    if what == "another sensor":
        name = product.name.replace("SL_1_RBT___", "OL_1_EFR___")
        return product.rename(tmp_path / name), "S3A_OL_1_EFR___"
    if what == "another level":
        name = product.name.replace("SL_1_RBT", "SL_2_LST")
        return product.rename(tmp_path / name), "S3A_SL_2_LST"
    if what == "text file":
        (tmp_path / "x.SEN3").write_text("no zip")
        return tmp_path / "x.SEN3", "whole zip file: File is not a zip file"
    if what == "pipe":
        os.mkfifo(tmp_path / "x.SEN3")
        return tmp_path / "x.SEN3", "whole zip file: it is neither"
    if what in ("scale_factor", "add_offset"):
        with h5py.File(product / "S8_BT_in.nc", "a") as file:
            file["S8_BT_in"].attrs[what] = np.nan if what == "scale_factor" else np.inf
        return product, "'/S8_BT_in' should have a finite scale_factor and add_offset"
    if what == "truncated zip":
        truncate(pack(product, tmp_path / "x.zip"))
        return tmp_path / "x.zip", "whole zip file: File is not a zip file"
    if what == "damaged zip":
        path = pack(product, tmp_path / "x.zip")
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{product.name}/S2_radiance_an.nc")
        with path.open("r+b") as file:
            file.seek(info.header_offset + 500)
            file.write(b"\xff" * 100)
        return path, "whole zip file"
    if what == "zip-slip":
        path = pack(product, tmp_path / "x.zip")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("../../outside.nc", "harm")
        return path, "'../../outside.nc', which leads out of its folder"
    if what == "zip of two products":
        path = pack(product, tmp_path / "x.zip")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("other.SEN3/flags_in.nc", "")
        return path, "found 2 such folders"
    if what == "zip that unpacks to terabytes":
        path = pack(product, tmp_path / "x.zip")
        data = bytearray(path.read_bytes())
        for member in ("S1_radiance_an.nc", "S2_radiance_an.nc"):
            entry = data.rindex(f"{product.name}/{member}".encode()) - 46  # its central record
            data[entry + 24 : entry + 28] = b"\xf0\xff\xff\xff"  # size, unpacked
        path.write_bytes(data)
        return path, "it unpacks to 8"
    if what == "link out of the product":
        with h5py.File(product / "S1_quality_an.nc", "a") as file:
            del file["S1_solar_irradiance_an"]
            file["S1_solar_irradiance_an"] = h5py.ExternalLink("/etc/passwd", "/x")
        return product, "link out of the file"
    if what == "no such variable":
        with h5py.File(product / "indices_an.nc", "a") as file:
            del file["detector_an"]
        return product, "it has no dataset 'detector_an'"
    if what == "no flag `day`":
        with h5py.File(product / "flags_in.nc", "a") as file:
            attributes = file["confidence_in"].attrs
            meanings = attributes["flag_meanings"].decode()
            attributes["flag_meanings"] = np.bytes_(meanings.replace("day", "dusk"))
        return product, "day unfilled summary_cloud among them"
    if what == "no meanings of flags":
        with h5py.File(product / "flags_in.nc", "a") as file:
            del file["bayes_in"].attrs["flag_meanings"]
        return product, "flag_meanings"
    if what == "another shape":
        with h5py.File(product / "S9_BT_in.nc", "a") as file:
            values = file["S9_BT_in"][:-1]
            del file["S9_BT_in"]
            file["S9_BT_in"] = values
        return product, "'S9_BT_in' has shape (59, 75), expected (60, 75)"
    if what == "detector of no irradiance":
        with h5py.File(product / "indices_an.nc", "a") as file:
            file["detector_an"][50, 50] = 4
        return product, "S1 cannot be used: detectors from 0 to 4, irradiances of 4"
    if what == "no irradiance":
        with h5py.File(product / "S4_quality_an.nc", "a") as file:
            file["S4_solar_irradiance_an"][:] = -999
        return product, "S4 cannot be used: no irradiance"
    assert what == "tie points in no order"
    with h5py.File(product / "cartesian_tx.nc", "a") as file:
        file["x_tx"][:] = 0
    return product, "cartesian_tx.nc should have its tie points in rows and columns"


@pytest.mark.parametrize(
    "what",
    [
        "geometry_tn.nc is missing", "S6_quality_an.nc is missing", "cartesian_tx.nc is missing",
        "zip lacks a file", "damaged NetCDF", "damaged numbers", "no NetCDF", "another sensor",
        "another level", "text file", "pipe", "scale_factor", "add_offset", "truncated zip",
        "damaged zip", "zip-slip", "zip of two products", "zip that unpacks to terabytes",
        "link out of the product", "no such variable", "no flag `day`", "no meanings of flags",
        "another shape", "detector of no irradiance", "no irradiance", "tie points in no order",
    ],
)  # fmt: skip
def test_what_cannot_be_converted_ends_in_one_line(product, tmp_path, capsys, what):
    path, reason = spoil(what, product, tmp_path)
    assert convert(tmp_path / "out", path, status=1) == []
    line, last = capsys.readouterr().err.splitlines()
    assert line.startswith(f"1 of 1, failed: {path}: ") and reason in line
    assert last == "Error: 0 converted, 0 skipped, 1 failed; the lines above say why."
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere.SEN3"], "No product nowhere.SEN3"),
        ([".", "--jobs", "0"], "--jobs should be 1 or more"),
        ([".", "-o", "/dev/null"], "/dev/null"),
    ],
)
def test_mistake_of_usage_ends_in_one_line(tmp_path, capsys, arguments, reason):
    if "-o" not in arguments:
        arguments = [*arguments, "-o", str(tmp_path)]
    assert convert_sen3.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and reason in line


def test_name_of_a_product_cannot_steer_a_terminal(tmp_path, capsys):
    path = tmp_path / "S3A\x1b[2J.SEN3"
    path.mkdir()
    convert(tmp_path / "out", path, status=1)
    assert "\x1b" not in capsys.readouterr().err


def test_scene_is_whole_or_absent(day, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "Can't write data (file write failed: time = now\n, filename = x")

    (path,) = convert(tmp_path, day[0])
    before = path.read_bytes()
    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    assert convert(tmp_path, day[0], "--overwrite", status=1) == [path]
    assert path.read_bytes() == before
    reason = f"{path}: No space left on device. Mend it, or set another path.\n"
    assert reason in capsys.readouterr().err


@pytest.fixture(scope="module")
def full_size():
    with tempfile.TemporaryDirectory() as folder:
        yield build(Path(folder), height=1200, width=1500, views=["nadir"])


# Runs the program and tells its highest memory (getrusage would tell that of the tests, if higher)
# and its seconds on the processor, which do not count what else the machine does.
MEASURED = """
import re, runpy, sys, time
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
    print(end.code, peak, time.process_time())
"""


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["1km", "500m"])
def test_full_size_stays_within_time_and_memory(full_size, tmp_path, grid):
    product, truth = full_size
    command = [convert_sen3.__file__, product, "-o", tmp_path, "--refs-grid", grid]
    answer = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True
    )
    status, peak, seconds = map(float, answer.stdout.split())
    assert status == 0, answer.stderr
    assert peak < 1.5e6 and seconds < 15  # measured: 0.8 and 1.2 GB, 3 s
    (path,) = tmp_path.rglob("*.hdf")
    scene = read_scene(path, (1200, 1500, 9))
    path.unlink()  # pytest keeps folders
    rows, fine = np.s_[600:630, :300], np.s_[1200:1260, :600]
    names = ("cosine_nadir", "radiance_nadir", "detector_nadir")
    part = {**truth, **{name: truth[name][fine] for name in names}}
    expected = mean_of_four(true_reflectance(part)) - REFLECTANCE_OFFSET
    np.testing.assert_allclose(scene.channels[rows][..., :6], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scene.cloud[..., 0], truth["bayes_nadir"])
