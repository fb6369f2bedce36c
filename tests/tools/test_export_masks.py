import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import pytest
import rasterio
import rasterio.warp
import xarray
from conftest import HEIGHT, WIDTH
from PIL import Image

from tools import export_masks

SHAPE = (HEIGHT, WIDTH)


def swath(west=10.0):
    """Latitude and longitude of a swath that is neither north-up nor straight."""
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    latitude = 50 - 0.009 * rows - 0.002 * cols
    longitude = west + 0.014 * cols / np.cos(np.radians(latitude)) - 0.003 * rows
    return latitude, (longitude + 180) % 360 - 180


def place(path, latitude, longitude):
    with h5py.File(path, "a") as file:
        file["latitude"], file["longitude"] = latitude, longitude


def write_geodetic(path, latitude, longitude):
    """A Sentinel-3 geodetic_in.nc: packed integers, the first pixel missing."""
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for name, degrees in (("latitude_in", latitude), ("longitude_in", longitude)):
            values = np.round(degrees * 1e6).astype(np.int32)
            values[0, 0] = -(2**31)
            dataset = file.create_dataset(name, data=values, compression="gzip", shuffle=True)
            dataset.attrs["scale_factor"] = np.array([1e-6])
            dataset.attrs["_FillValue"] = np.array([-(2**31)], np.int32)


@pytest.fixture
def run(finished, tmp_path):
    """The folder of a run that a test may change."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints", "*.keras"))
    for path in (folder / "masks").iterdir():
        with h5py.File(path, "a") as file:  # as a network of two views
            file["uncertainty"] = np.abs(2 * file["probability"][:] - 1)
            file["uncertainty"][:20] = np.nan
    return folder


@pytest.fixture
def scenes(dataset, tmp_path):
    """The scenes of that run, one at day and one at night, which a test may change."""
    shutil.copytree(dataset / "ssts", tmp_path / "ssts")
    return sorted((tmp_path / "ssts").rglob("S3A*.hdf"))


def as_masked(run, scene):
    """Make a changed mask match a changed scene, without a score."""
    with h5py.File(run / "masks" / f"{scene.stem}.h5", "a") as file:
        file.attrs.update(scene_bytes=scene.stat().st_size, row="{}")


def export(run, kind, *options):
    """Export all masks; return the folder."""
    status = export_masks.main([str(run), "--format", kind, *map(str, options)])
    assert status == 0
    return run / "export"


def stored(run, name):
    with h5py.File(run / "masks" / f"{name}.h5") as file:
        return file["mask"][:], file["probability"][:]


def stored_uncertainty(run, name):
    with h5py.File(run / "masks" / f"{name}.h5") as file:
        return file["uncertainty"][:]


def measured(scene):
    with h5py.File(scene) as file:
        return (np.nan_to_num(file["bts"][:]) != 0).all(axis=-1)


def test_netcdf_holds_mask_probability_positions_and_time(run, scenes):
    for scene in scenes:
        place(scene, *swath())
    folder = export(run, "netcdf", "--data", scenes[0].parents[1])
    assert len(list(folder.iterdir())) == len(scenes) == 2
    for scene in scenes:
        mask, probability = stored(run, scene.stem)
        latitude, longitude = swath()
        with xarray.open_dataset(folder / f"{scene.stem}.nc", engine="h5netcdf") as opened:
            valid = measured(scene)
            np.testing.assert_array_equal(opened.cloud_mask, np.where(valid, mask, np.nan))
            assert opened.cloud_mask.encoding["dtype"] == np.uint8
            assert opened.cloud_mask.encoding["_FillValue"] == 255
            expected = np.where(valid, probability, np.float32(np.nan))
            np.testing.assert_array_equal(opened.cloud_probability, expected)
            expected = np.where(valid, stored_uncertainty(run, scene.stem), np.float32(np.nan))
            np.testing.assert_array_equal(opened.cloud_uncertainty, expected)
            np.testing.assert_array_equal(opened.data_available, measured(scene))
            assert 0 < measured(scene).mean() < 1
            np.testing.assert_array_equal(opened.latitude, latitude.astype(np.float32))
            np.testing.assert_array_equal(opened.longitude, longitude.astype(np.float32))
            assert set(opened.cloud_mask.coords) == {"latitude", "longitude", "time"}
            flags = opened.cloud_mask.attrs
            meanings = dict(zip(flags["flag_values"], flags["flag_meanings"].split(), strict=True))
            assert meanings == {0: "clear", 1: "cloud"}
            start, stop = (np.datetime64(opened.attrs[f"time_coverage_{k}"][:-1])
                           for k in ("start", "end"))  # fmt: skip
            assert f"_{start}_{stop}_".replace("-", "").replace(":", "") in scene.name
            assert opened.time.values == start + (stop - start) / 2
            assert opened.attrs["scene"] == scene.name and opened.attrs["platform"] == "Sentinel-3A"
            assert "export_masks.py" in opened.attrs["history"]
            commit = json.loads((run / "results.json").read_text())["git_commit"]
            assert opened.attrs["source"].endswith(f"commit {commit or 'unknown'}")
        with h5py.File(folder / f"{scene.stem}.nc") as file:
            assert all(file[name].compression == "gzip" for name in ("cloud_mask", "latitude"))


@pytest.mark.parametrize("kind", ["netcdf", "geotiff"])
def test_mask_of_the_network_is_kept_on_demand(run, scenes, kind):
    folder = export(run, kind, "--data", scenes[0].parents[1], "--keep-mask")
    mask, probability = stored(run, scenes[0].stem)
    assert not measured(scenes[0]).all()
    if kind == "netcdf":
        with xarray.open_dataset(folder / f"{scenes[0].stem}.nc", engine="h5netcdf") as opened:
            found, likely = opened.cloud_mask.values, opened.cloud_probability.values
    else:
        with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
            files = [rasterio.open(folder / f"{scenes[0].stem}{end}.tif")
                     for end in ("", "_probability", "_uncertainty")]  # fmt: skip
        with files[0], files[1], files[2]:
            np.testing.assert_array_equal(files[2].read(1), stored_uncertainty(run, scenes[0].stem))
            np.testing.assert_array_equal(files[0].dataset_mask() == 255, measured(scenes[0]))
            found, likely, _ = (file.read(1) for file in files)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(likely, probability)


def check_cf(paths):
    """Run the CF checker of IOOS on files, in a process with another HDF5 library than h5py's."""
    checker = Path(sys.executable).with_name("compliance-checker")
    return subprocess.run(
        [checker, "--test=cf:1.10", *paths], capture_output=True, text=True, check=False
    )


def test_netcdf_follows_the_cf_conventions(run, scenes, tmp_path):
    place(scenes[0], *swath(west=175))
    name = scenes[1].stem
    write_geodetic(tmp_path / f"{name}.SEN3/geodetic_in.nc", *swath())
    data = ("--data", scenes[0].parents[1])
    export(run, "netcdf", *data, "--scene", scenes[0].stem)
    export(run, "netcdf", *data, "--scene", name, "--geodetic", tmp_path)
    (run / "masks" / f"{name}.h5").rename(run / "masks/S3A_unnamed.h5")
    with h5py.File(run / "masks/S3A_unnamed.h5", "a") as file:
        file.attrs["scene"] = "S3A_unnamed.hdf"
        del file["probability"], file["uncertainty"], file["valid"]
    export(run, "netcdf", *data, "--scene", "S3A_unnamed")  # nothing is known about it
    paths = sorted((run / "export").iterdir())
    with h5netcdf.File(paths[2]) as file:
        assert list(file.variables) == ["cloud_mask"]
    answer = check_cf(paths)
    assert len(paths) == 3 and answer.stdout.count("All tests passed!") == 3, answer.stdout
    assert answer.returncode == 0

    with h5py.File(paths[0], "a") as file:
        file["latitude"].attrs["units"] = "furlongs"
    assert check_cf(paths).returncode != 0


def test_positions_come_from_the_product_of_the_same_time(run, scenes, tmp_path):
    for scene in scenes:  # processed later than the scene was
        product = scene.stem.replace(scene.stem[48:63], "20250101T000000") + ".SEN3"
        write_geodetic(tmp_path / "products" / product / "geodetic_in.nc", *swath(west=-20))
    folder = export(run, "netcdf", "--geodetic", tmp_path / "products")
    with xarray.open_dataset(folder / f"{scenes[0].stem}.nc", engine="h5netcdf") as opened:
        for name, degrees in zip(("latitude", "longitude"), swath(west=-20), strict=True):
            found = opened[name].values
            assert np.isnan(found[0, 0])
            np.testing.assert_allclose(found.ravel()[1:], degrees.ravel()[1:], atol=5e-6)


def test_geotiff_holds_mask_palette_and_missing_pixels(run, scenes):
    folder = export(run, "geotiff", "--data", scenes[0].parents[1])
    mask, probability = stored(run, scenes[0].stem)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):  # no positions
        file = rasterio.open(folder / f"{scenes[0].stem}.tif")
    valid = measured(scenes[0])
    with file:
        np.testing.assert_array_equal(file.read(1), np.where(valid, mask, 255))
        np.testing.assert_array_equal(file.dataset_mask() == 255, valid)
        assert file.nodata == 255  # what gdalwarp puts beside the swath: 0 would be clear
        assert file.colormap(1)[1] == (255, 255, 255, 255) and file.colormap(1)[0][2] > 100
        assert file.tags()["scene"] == scenes[0].name and file.gcps == ([], None)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        file = rasterio.open(folder / f"{scenes[0].stem}_probability.tif")
    with file:
        np.testing.assert_array_equal(file.read(1), np.where(valid, probability, np.nan))
        assert np.isnan(file.nodata)
    assert {path.suffix for path in folder.iterdir()} == {".tif"}


@pytest.mark.parametrize("west", [10, 179])  # from 179 degrees east the swath crosses 180
def test_control_points_put_a_geotiff_on_the_map(run, scenes, west):
    latitude, longitude = swath(west)
    latitude[:20, :30] = np.nan
    place(scenes[0], latitude, longitude)
    with h5py.File(run / "masks" / f"{scenes[0].stem}.h5", "a") as file:
        file["mask"][:] = 0
        file["mask"][48:53, 98:103] = 1  # one square cloud
    as_masked(run, scenes[0])
    folder = export(run, "geotiff", "--data", scenes[0].parents[1], "--scene", scenes[0].stem)
    with rasterio.open(folder / f"{scenes[0].stem}.tif") as file:
        points, crs = file.gcps
        assert crs.to_epsg() == 4326 and len(points) == 3 * 4 - 1  # one has no latitude
        for point in points:  # in the middle of its pixel
            assert point.y == pytest.approx(latitude[int(point.row), int(point.col)], abs=1e-5)
            assert point.row % 1 == point.col % 1 == 0.5
        assert np.ptp([point.x for point in points]) < 5  # no jump from 180 to -180
        step, left, top = 0.005, west - 1, 50.5
        on_map, _ = rasterio.warp.reproject(
            file.read(1),
            np.zeros((500, 1000), np.uint8),
            gcps=points,
            src_crs=crs,
            dst_crs=crs,
            dst_transform=rasterio.Affine(step, 0, left, 0, -step, top),
            SRC_METHOD="GCP_TPS",
        )
    rows, cols = np.nonzero(on_map == 1)
    assert top - step * (rows.mean() + 0.5) == pytest.approx(latitude[50, 100], abs=0.005)
    found = left + step * (cols.mean() + 0.5)
    assert found == pytest.approx(longitude[50, 100] % 360, abs=0.01)


def contrast(a, b):
    """Contrast of two colours by WCAG 2, from 1 to 21, whatever their hues."""
    levels = np.array([a, b]) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return (high + 0.05) / (low + 0.05)


def test_png_shows_cloud_clear_and_missing_in_different_brightness(run, scenes):
    folder = export(run, "png", "--data", scenes[0].parents[1])
    mask, _ = stored(run, scenes[0].stem)
    with Image.open(folder / f"{scenes[0].stem}.png") as image:
        assert image.mode == "P" and image.size == (WIDTH, HEIGHT)
        assert image.text["scene"] == scenes[0].name
        index, pixels = np.asarray(image), np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(index, np.where(measured(scenes[0]), mask, 2))
    colours = [pixels[index == i][0] for i in range(3)]  # clear, cloud, no data
    assert colours[1].tolist() == [255, 255, 255]
    for pair in itertools.combinations(colours, 2):
        assert contrast(*pair) >= 3  # what WCAG asks for graphics


def test_scene_without_label_has_positions(run, scenes):
    place(scenes[0], *swath())
    with h5py.File(scenes[0], "a") as file:
        del file["bayes"]
    as_masked(run, scenes[0])
    folder = export(run, "netcdf", "--data", scenes[0].parents[1], "--scene", scenes[0].stem)
    with h5netcdf.File(folder / f"{scenes[0].stem}.nc") as file:
        assert {"latitude", "data_available"} < set(file.variables)


@pytest.mark.parametrize("knows_valid", [True, False])
def test_masks_are_exported_without_scene_files(run, scenes, capsys, knows_valid):
    for path in () if knows_valid else (run / "masks").iterdir():
        with h5py.File(path, "a") as file:
            del file["valid"]  # which masks of an earlier version lack
    config = (run / "config.yaml").read_text().splitlines()
    config = [line for line in config if not line.startswith("inference_dir")]
    (run / "config.yaml").write_text("\n".join([*config, "inference_dir: /nowhere"]))
    folder = export(run, "netcdf")
    assert "No scene files in /nowhere" in capsys.readouterr().err
    with h5netcdf.File(folder / f"{scenes[0].stem}.nc") as file:
        mask = stored(run, scenes[0].stem)[0]
        expected = np.where(measured(scenes[0]), mask, 255) if knows_valid else mask
        np.testing.assert_array_equal(file["cloud_mask"][:], expected)
        assert "latitude" not in file.variables
        assert ("data_available" in file.variables) == knows_valid


def test_failed_write_leaves_the_earlier_export(run, monkeypatch, capsys):
    folder = export(run, "netcdf")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device", "x.nc")

    monkeypatch.setattr(h5netcdf.File, "create_variable", full)
    assert export_masks.main([str(run), "--format", "netcdf"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_export_replaces_an_earlier_one(run, scenes):
    folder = export(run, "geotiff")
    with h5py.File(run / "masks" / f"{scenes[0].stem}.h5", "a") as file:
        file["mask"][:] = 1 - file["mask"][:]
        del file["probability"]
        del file.attrs["row"]  # with the score
    export(run, "geotiff")
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        file = rasterio.open(folder / f"{scenes[0].stem}.tif")
    with file, h5py.File(run / "masks" / f"{scenes[0].stem}.h5") as masks:
        expected = np.where(measured(scenes[0]), masks["mask"], 255)
        np.testing.assert_array_equal(file.read(1), expected)
    assert not (folder / f"{scenes[0].stem}_probability.tif").exists()


def edit(name, value, others=()):
    """A function that replaces a dataset of the scene."""

    def change(run, scene):
        with h5py.File(scene, "a") as file:
            for old in {name, *others} & set(file):
                del file[old]
            file[name] = value

    return change


def place_with(change):
    return lambda run, scene: place(scene, *(change(degrees) for degrees in swath()))


LINK = h5py.ExternalLink("/etc/passwd", "/latitude")
DATA = ["--data", "DATA"]


@pytest.mark.parametrize(
    ("damage", "options", "reason"),
    [
        (lambda run, _: (run / "results.json").unlink(), [], "RUN is not the folder of a run"),
        (lambda run, _: shutil.rmtree(run / "masks"), [], "No masks in"),
        (lambda run, scene: os.truncate(run / "masks" / f"{scene.stem}.h5", 2000), [], "MASK"),
        (None, ["--scene", "S3A_other"], "'S3A_other'"),
        (None, ["--data", "RUN"], "No scenes"),
        (edit("bayes", np.zeros((*SHAPE, 1))), DATA, "is not the file that was masked"),
        (edit("more", np.zeros((9, *SHAPE)), ["bayes"]), DATA, "is not the file that was masked"),
        (place_with(lambda degrees: degrees[:-1]), DATA, f"expected {SHAPE}"),
        (place_with(lambda degrees: degrees + 1000), DATA, "-90 to 90"),
        (edit("latitude", LINK), DATA, "link out of the file"),
        (None, ["--geodetic", "PRODUCTS/one/geodetic_in.nc"], "geodetic_in.nc is"),
        (None, ["--geodetic", "PRODUCTS"], "--geodetic should be"),
    ],
)
def test_unusable_input_ends_in_one_line(run, scenes, tmp_path, capsys, damage, options, reason):
    write_geodetic(tmp_path / "products/one/geodetic_in.nc", *swath())
    if damage:
        damage(run, scenes[0])
    places = {"RUN": run, "DATA": scenes[0].parents[1], "PRODUCTS": tmp_path / "products"}
    places["MASK"] = run / "masks" / f"{scenes[0].stem}.h5"
    for name, path in places.items():
        options = [text.replace(name, str(path)) for text in options]
        reason = reason.replace(name, str(path))
    assert export_masks.main([str(run), "--format", "netcdf", *options]) == 2
    (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("Error: "))
    assert reason in line
    assert not list(run.rglob("*.part*"))
