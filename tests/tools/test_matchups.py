"""Tests of the match-ups of synthetic scenes with buoys."""

from datetime import datetime, timedelta, timezone

import h5py
import numpy as np
import pytest
from conftest import rows

from tools import validate_sst
from tools.lib.scenes.matchups import draw_matchups, satellite_zenith
from tools.lib.scenes.surface import LAND, SEA
from tools.make_scenes import make_dataset

OPTIONS = {"train": 0, "inference": 4, "height": 96, "width": 120, "seed": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, make_dataset(folder, **OPTIONS, matchups=2000)


def test_validation_of_the_true_mask_finds_the_noise_of_buoys(dataset, tmp_path):
    folder, paths = dataset
    (tmp_path / "masks").mkdir()
    (tmp_path / "config.yaml").write_text(f"inference_dir: {folder / 'ssts'}\n")
    for path in paths:
        with h5py.File(path) as scene, h5py.File(tmp_path / f"masks/{path.stem}.h5", "w") as file:
            file["mask"] = scene["truth"][..., 0]
            file.attrs.update(scene=path.name, threshold=0.5)
    assert validate_sst.main([str(tmp_path), str(folder / "sst_matchups.csv")]) == 0
    statistics = rows(tmp_path / "sst/statistics.csv")
    ours, label, nothing = (
        next(row for row in statistics if (row["day_night"], row["mask"]) == ("all", mask))
        for mask in ("cloudmask", "bayes", "none")
    )
    steps = {row["step"]: int(row["matchups"]) for row in rows(tmp_path / "sst/funnel.csv")}
    assert steps["match-ups read"] == steps["satellite zenith <= 55 deg"] == 2000
    assert steps["in the time of a scene"] == steps["on a pixel with data"] > 300
    # Buoys have an error of 0.2 K, and the retrieval one of 0.4 K
    assert abs(float(ours["median"])) < 0.2 and 0.2 < float(ours["robust_std"]) < 0.5
    # The cloud that the label misses is cold; without a mask there is more of it.
    assert float(nothing["median"]) < float(label["median"]) - 0.2 < float(ours["median"]) - 0.2


def clear_scene(surface, shape=(20, 30)):
    """Arrays of a scene without cloud: a sea of 290 K whose S8 and S9 are equal."""
    return {
        "bts": np.full((*shape, 3), 290.0, np.float32),
        "surface": np.full((*shape, 1), surface, np.uint8),
        "surface_temperature": np.full((*shape, 1), 290.0, np.float32),
        "latitude": np.zeros(shape),
        "longitude": np.zeros(shape),
    }


def draw(arrays, n):
    start = datetime(2019, 10, 1, tzinfo=timezone.utc)
    return draw_matchups(np.random.default_rng(1), arrays, n, start, start + timedelta(minutes=3))


def test_buoys_differ_from_the_sea_by_their_noise():
    buoys = [row["buoy_sst"] for row in draw(clear_scene(SEA), 4000)]
    # Standard error of mean and standard deviation: 0.2 / sqrt(4000) = 0.003
    assert np.mean(buoys) == pytest.approx(290, abs=0.015)
    assert np.std(buoys) == pytest.approx(0.2, abs=0.01)


def test_matchups_are_on_open_sea_with_data():
    assert draw(clear_scene(LAND), 5) == []
    arrays = clear_scene(SEA)
    arrays["bts"][:, 1:] = 0
    arrays["latitude"][:, 0] = 50
    assert all(abs(row["latitude"] - 50) < 0.005 for row in draw(arrays, 20))


def test_satellite_zenith_follows_from_the_height_of_the_orbit():
    zenith = satellite_zenith((1200, 1500))  # the ground track is 60 km west of the middle
    assert zenith.argmin() in (689, 690) and zenith.min() < 0.1
    # The sine rule in the triangle of satellite, pixel and centre of the Earth, 809.5 km away:
    # sin(zenith) / 7185.5 km = sin(809.5 / 6371) / distance of satellite and pixel
    angle = 809.5 / 6371
    distance = np.sqrt(7185.5**2 + 6371**2 - 2 * 7185.5 * 6371 * np.cos(angle))
    expected = np.degrees(np.arcsin(7185.5 * np.sin(angle) / distance))
    assert zenith[-1] == pytest.approx(expected, abs=0.01)
