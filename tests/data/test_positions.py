import h5py
import numpy as np
import pytest

from harness.data.positions import check_geodetic, read_positions
from harness.errors import UserError

SCENE = "S3A_SL_1_RBT____20191001T113321_20191001T113621_20191002T040000_0179_LN2"
LATITUDE, LONGITUDE = np.array([[50.0, 51.0]]), np.array([[-179.5, 200.0]])


def write(path, latitude=LATITUDE, longitude=LONGITUDE, pattern="{}_in"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, degrees in (("latitude", latitude), ("longitude", longitude)):
            if degrees is not None:
                file[pattern.format(name)] = degrees
    return path


def test_last_reprocessing_of_a_product_gives_the_positions(tmp_path):
    for i, processed in enumerate(("20191002T040000", "20250101T000000", "20200101T000000")):
        product = f"{SCENE[:48]}{processed}{SCENE[63:]}.SEN3"
        write(tmp_path / product / "geodetic_in.nc", LATITUDE + i)
    write(tmp_path / f"{SCENE.replace('T113321', 'T113322')}.SEN3/geodetic_in.nc", LATITUDE + 9)
    found = read_positions(None, tmp_path, SCENE, (1, 2))
    np.testing.assert_array_equal(found["latitude"], LATITUDE + 1)
    np.testing.assert_array_equal(found["longitude"], LONGITUDE)


@pytest.mark.parametrize("missing", ["latitude", "longitude"])
def test_scene_with_half_a_position_has_none(tmp_path, missing):
    path = write(tmp_path / "S3A_x.hdf", **{missing: None}, pattern="{}")
    assert read_positions(path, None, "S3A_x", (1, 2)) == {}
    write(path, **{missing: None})
    with pytest.raises(UserError, match="should have variables latitude_in and longitude_in"):
        read_positions(None, path, "S3A_x", (1, 2))


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"latitude": LATITUDE + 40}, "'/latitude' should hold degrees from -90 to 90"),
        ({"longitude": 2 * LONGITUDE}, "'/longitude' should hold degrees from -360 to 360"),
        ({"latitude": np.nan * LATITUDE}, "'/latitude' should hold degrees"),
        ({"longitude": LONGITUDE.T}, "expected (1, 2)"),
    ],
)
def test_impossible_positions_are_an_error(tmp_path, degrees, words):
    path = write(tmp_path / "S3A_x.hdf", **degrees, pattern="{}")
    with pytest.raises(UserError) as error:
        read_positions(path, None, "S3A_x", (1, 2))
    assert words in str(error.value)


def test_one_geodetic_file_is_for_one_scene(tmp_path):
    path = write(tmp_path / "geodetic_in.nc")
    check_geodetic(path, ["a"])
    check_geodetic(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match="the file of one scene, but there are 2"):
        check_geodetic(path, ["a", "b"])
