import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import rasterio
import xarray
from conftest import build_product
from PIL import Image

from cloudmask import predict_scene
from data_loader import BT_OFFSET, BT_SCALE
from tools import mask_product
from tools.export_masks import COLOURS

COLDEST_CLEAR = 279.0  # [K]


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    return build_product(tmp_path_factory.mktemp("day"), views=["nadir"])


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A product of a night as it is downloaded, without Bayesian mask."""
    folder = tmp_path_factory.mktemp("night")
    product, truth = build_product(folder, zenith=120, platform="S3B", bayes=False, views=["nadir"])
    archive = shutil.make_archive(product, "zip", product.parent, product.name)
    return Path(archive), truth


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network that calls pixels cloud where S9 is colder than COLDEST_CLEAR."""
    inputs = keras.Input((None, None, 9))
    network = keras.Model(inputs, keras.layers.Conv2D(1, 1, activation="sigmoid")(inputs))
    weights = np.zeros((1, 1, 9, 1))
    weights[0, 0, 8] = -100
    network.set_weights([weights, np.array([100 * (COLDEST_CLEAR - BT_OFFSET) / BT_SCALE])])
    path = tmp_path_factory.mktemp("model") / "model.keras"
    network.save(path)
    return path


def run(output, model, *arguments, status=0):
    arguments = [*map(str, arguments), "--model", str(model), "-o", str(output)]
    assert mask_product.main(arguments) == status
    assert not list(output.rglob("*.part*"))


def expected_mask(truth):
    kelvin = truth["bts_nadir"]
    cloud = np.where(kelvin[..., 2] < COLDEST_CLEAR, 1.0, 0.0)
    return np.where(np.isfinite(kelvin).all(axis=-1), cloud, np.nan)


def test_products_get_masks_maps_and_pictures(day, night, model, tmp_path, capsys):
    run(tmp_path, model, day[0], night[0])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("1 of 2, converted: day, 60 x 75, ")
    assert lines[1].startswith("1 of 2, masked: day, 60 x 75, ") and "Bayesian" in lines[1]
    assert lines[3].startswith("2 of 2, masked: night, ") and "Bayesian" not in lines[3]
    for (product, truth), part in ((day, "day"), (night, "night")):
        name, expected = product.name.partition(".")[0], expected_mask(truth)
        with xarray.open_dataset(tmp_path / f"{name}.nc", engine="h5netcdf") as opened:
            np.testing.assert_array_equal(opened.cloud_mask, expected)
            assert 0.1 < np.nanmean(expected) < 0.9 and np.isnan(expected).any()
            np.testing.assert_allclose(opened.latitude, truth["latitude_nadir"], atol=1e-5)
            assert opened.attrs["platform"] == f"Sentinel-{name[1:3]}"
            mask, probability = predict_scene(model, tmp_path / part / f"{name}.hdf")
            np.testing.assert_array_equal(opened.cloud_probability, probability)
            np.testing.assert_array_equal(np.where(np.isnan(probability), np.nan, mask), expected)
        with Image.open(tmp_path / f"{name}.png") as image:
            colours = dict(
                map(reversed, image.convert("RGB").getcolors(image.width * image.height))
            )
        assert min(colours.get(colour, 0) for colour in COLOURS) > 1000  # clear, cloud, no data


def test_scene_that_exists_is_masked_again(night, model, tmp_path, capsys):
    run(tmp_path, model, night[0])
    (scene,) = tmp_path.rglob("*.hdf")
    (exported,) = tmp_path.glob("*.nc")
    made = scene.stat().st_mtime_ns
    exported.unlink()
    capsys.readouterr()
    run(tmp_path, model, night[0])
    first, second = capsys.readouterr().err.splitlines()
    assert "skipped" in first and "masked" in second
    assert scene.stat().st_mtime_ns == made and exported.exists()
    run(tmp_path, model, night[0], "--overwrite")
    assert scene.stat().st_mtime_ns > made


def test_product_that_cannot_be_used_is_reported_and_the_others_masked(
    day, model, tmp_path, capsys
):
    wrong = tmp_path / "S3A_OL_1_EFR____x.SEN3"
    wrong.mkdir()
    output = tmp_path / "out"
    run(output, model, wrong, day[0], "--format", "geotiff", "netcdf", status=1)
    first, _, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"1 of 2, failed: {wrong}: expected an SLSTR Level-1 product")
    assert second.startswith("2 of 2, masked: ")
    assert last == "Error: 1 of 2 failed. The lines above give the reasons."
    expected = expected_mask(day[1])
    with rasterio.open(output / f"{day[0].stem}.tif") as file:
        np.testing.assert_array_equal(file.read(1), np.nan_to_num(expected, nan=255))
        assert len(file.gcps[0]) > 3
    assert {path.suffix for path in output.iterdir()} == {"", ".nc", ".tif", ".png"}


@pytest.mark.parametrize(
    ("product", "network", "reason"),
    [
        ("absent", "model", "No product {}/absent"),
        ("product", "absent", "No model file {}/absent"),
        ("product", "damaged.keras", "{}/damaged.keras cannot be read as a Keras model"),
    ],
)
def test_wrong_file_ends_in_one_line_before_anything_is_made(
    day, model, tmp_path, capsys, product, network, reason
):
    (tmp_path / "damaged.keras").write_bytes(b"damaged")
    paths = {"product": day[0], "model": model}
    product, network = (paths.get(name, tmp_path / name) for name in (product, network))
    run(tmp_path / "out", network, product, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {reason.format(tmp_path)}")
    assert not (tmp_path / "out").exists()


def test_positions_can_be_left_out(day, model, tmp_path):
    product = Path(shutil.copytree(day[0], tmp_path / day[0].name))
    (product / "geodetic_in.nc").unlink()
    run(tmp_path, model, product, "--no-positions")
    with xarray.open_dataset(tmp_path / f"{product.stem}.nc", engine="h5netcdf") as opened:
        assert "latitude" not in opened.variables
