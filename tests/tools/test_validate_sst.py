import csv
import sys
from datetime import datetime, timedelta, timezone

import h5py
import numpy as np
import pytest
from conftest import rows
from PIL import Image

from harness.data.scene_files import product_times
from tools import validate_sst
from tools.lib.matchups import nearest_pixels
from tools.make_scenes import product_name

SHAPE = (8, 12)
DAY, NIGHT = (product_name("ssts", index).removesuffix(".hdf") for index in (0, 1))


def grid(north=50.0, west=10.0):
    """Pixels 0.01 degrees of latitude and 0.02 of longitude apart: limits are half a pixel."""
    row, col = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return north - 0.01 * row, (west + 0.02 * col + 180) % 360 - 180


class Run:
    """A run's folder with masks, and its scenes."""

    def __init__(self, folder):
        self.folder, self.scenes = folder / "run", folder / "ssts"
        (self.folder / "masks").mkdir(parents=True)
        (self.folder / "config.yaml").write_text(f"inference_dir: {self.scenes}\n")

    def add(self, name, kind, positions=None, ours=(), bayes=(), missing=()):
        """Add a scene, cloud at these pixels by our and by the Bayesian mask; return its file."""
        mask, label = np.zeros(SHAPE, np.uint8), np.zeros((*SHAPE, 1))
        temperatures = np.full((*SHAPE, 3), 285, np.float32)
        for pixel in ours:
            mask[pixel] = 1
        for pixel in bayes:
            label[pixel] = 255
        for pixel in missing:
            temperatures[pixel] = (285, 0, 285)
        scene = self.scenes / kind / f"{name}.hdf"
        scene.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(scene, "w") as file:
            file["bts"], file["bayes"] = temperatures, label
            if positions:
                file["latitude"], file["longitude"] = positions
        with h5py.File(self.folder / "masks" / f"{name}.h5", "w") as file:
            file["mask"] = mask
            file.attrs.update(scene=scene.name, threshold=0.5)
        return scene

    def validate(self, table, *options):
        return validate_sst.main([str(self.folder), str(table), *map(str, options)])

    def read(self, name):
        return rows(self.folder / "sst" / f"{name}.csv")

    def funnel(self):
        return {row["step"]: int(row["matchups"]) for row in self.read("funnel")}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def matchup(difference=0.0, pixel=(0, 0), scene=DAY, positions=None, **others):
    """A good match-up in the middle of a scene, 0.001 degrees from the pixel."""
    start, end = product_times(scene)
    latitude, longitude = positions or grid()
    return {
        "time": (start + (end - start) / 2).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "latitude": latitude[pixel] + 0.001,
        "longitude": longitude[pixel] + 0.001,
        "buoy_sst": 290.0,
        "satellite_sst": 290.0 + difference,
        "quality_level": 5,
        "satellite_zenith": 30.0,
        **others,
    }


def write(path, matchups):
    """Write a table as CSV, with an additional column."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["buoy", *matchups[0]])
        writer.writeheader()
        writer.writerows({"buoy": f"no, {i}", **row} for i, row in enumerate(matchups))
    return path


def write_hdf5(path, matchups, since=None):
    """Write a table as HDF5: times as texts, or in seconds since a year."""
    with h5py.File(path, "w") as file:
        for name in matchups[0]:
            values = [row[name] for row in matchups]
            if name != "time":
                values = [np.nan if value == "" else value for value in values]
            elif since:
                epoch = datetime(since, 1, 1, tzinfo=timezone.utc)
                times = [datetime.strptime(t + "+0000", "%Y-%m-%dT%H:%M:%SZ%z") for t in values]
                values = [(time - epoch).total_seconds() for time in times]
            file[name] = values
            if since and name == "time":
                file[name].attrs["units"] = f"seconds since {since}-01-01 00:00:00"
    return path


# Day, (row, col) and difference. A mask that misses a cloud keeps an outlier.
CLEAR = {(1, 1): -0.2, (1, 2): -0.1, (1, 3): 0.0, (1, 4): 0.1, (1, 5): 0.2}
OURS_ALONE = {(2, 1): -5.0}  # cloud by our mask alone
BAYES_ALONE = {(3, 1): -3.0, (3, 2): 4.0}
BOTH = {(4, 1): -8.0}
NIGHT_CLEAR = {(1, 1): 0.3, (1, 2): 0.5, (1, 3): 0.9}
NIGHT_OURS_ALONE = {(2, 1): -4.0}
NO_DATA = (6, 6)


@pytest.fixture
def known(run):
    """A run and match-ups with known statistics; 13 count and 9 do not."""
    cloud = dict(ours=[*OURS_ALONE, *BOTH], bayes=[*BAYES_ALONE, *BOTH])
    run.add(DAY, "day", grid(), **cloud, missing=[NO_DATA])
    run.add(NIGHT, "night", grid(), ours=NIGHT_OURS_ALONE)
    day = CLEAR | OURS_ALONE | BAYES_ALONE | BOTH
    matchups = [
        *(matchup(difference, pixel) for pixel, difference in day.items()),
        *(
            matchup(difference, pixel, NIGHT)
            for pixel, difference in (NIGHT_CLEAR | NIGHT_OURS_ALONE).items()
        ),
        matchup(satellite_sst=""),
        matchup(quality_level=4),
        matchup(satellite_zenith=55.1),
        matchup(satellite_sst=273.15, buoy_sst=274.0),
        matchup(satellite_sst=274.0, buoy_sst=273.15),
        matchup(time="2001-01-01T00:00:00Z"),
        matchup(latitude=51.0),
        matchup(longitude=-170.0),
        matchup(pixel=NO_DATA),
    ]
    return run, matchups


def test_statistics_are_those_computed_by_hand(known, tmp_path, capsys):
    run, matchups = known
    assert run.validate(write(tmp_path / "table.csv", matchups)) == 0
    # Sorted, the median of an even number is the mean of the middle two; x 1.4826 at the end.
    wanted = [
        # -3 -.2 -.1 0 .1 .2 4; distances from 0: 0 .1 .1 .2 .2 3 4
        ("day", "cloudmask", 7, 0.0, 0.2),
        # -5 -.2 -.1 0 .1 .2; distances from -.05: .05 .05 .15 .15 .25 4.95
        ("day", "bayes", 6, -0.05, 0.15),
        # -8 -5 -3 -.2 -.1 0 .1 .2 4; distances from -.1: 0 .1 .1 .2 .3 2.9 4.1 4.9 7.9
        ("day", "none", 9, -0.1, 0.3),
        # .3 .5 .9; distances from .5: 0 .2 .4
        ("night", "cloudmask", 3, 0.5, 0.2),
        # -4 .3 .5 .9; distances from .4: .1 .1 .5 4.4
        ("night", "bayes", 4, 0.4, 0.3),
        ("night", "none", 4, 0.4, 0.3),
        # -3 -.2 -.1 0 .1 .2 .3 .5 .9 4; distances from .15: .05 .05 .15 .15 .25 .35 .35 .75 ...
        ("all", "cloudmask", 10, 0.15, 0.3),
        # -5 -4 -.2 -.1 0 .1 .2 .3 .5 .9; distances from .05: .05 .05 .15 .15 .25 .25 .45 ...
        ("all", "bayes", 10, 0.05, 0.25),
        # -8 -5 -4 -3 -.2 -.1 0 ...; distances from 0: 0 .1 .1 .2 .2 .3 .5 .9 3 4 4 5 8
        ("all", "none", 13, 0.0, 0.5),
    ]
    table = run.read("statistics")
    found = [(row["day_night"], row["mask"], int(row["matchups"])) for row in table]
    assert found == [row[:3] for row in wanted]
    for row, (*_, m, d) in zip(table, wanted, strict=True):
        assert float(row["median"]) == pytest.approx(m, abs=1e-9)
        assert float(row["robust_std"]) == pytest.approx(1.4826 * d, abs=1e-9)
    # -5 -.2 -.1 0 .1 .2 has the mean -5 / 6 and the mean square 25.1 / 6; one of six is below -2.
    for row, (mean, square, share) in zip(
        table, [(1 / 7, 25.1 / 7, 1 / 7), (-5 / 6, 25.1 / 6, 1 / 6)], strict=False
    ):
        assert float(row["mean"]) == pytest.approx(mean)
        assert float(row["std"]) == pytest.approx((square - mean**2) ** 0.5)
        assert float(row["cold_share"]) == pytest.approx(share)
    screen = capsys.readouterr().out.splitlines()
    line = "day, Bayesian mask 6 -0.050 0.222 -0.833 1.868 16.7%"
    assert line.split() in [line.split() for line in screen]
    assert max(map(len, screen)) <= 80


def test_cold_water_counts_with_a_lower_limit(known, tmp_path):
    run, matchups = known
    matchups += [matchup(buoy_sst=272.0, satellite_sst=271.5)]
    table = write(tmp_path / "table.csv", matchups)
    assert run.validate(table, "--min-sst", "271") == 0
    # Of 23, three fail the other tests; the two at 273.15 K count too.
    assert run.funnel()["temperatures > 271 K"] == 20


@pytest.mark.parametrize("limit", ["0", "-1", "nan"])
def test_lowest_temperature_is_above_zero(run, limit, capsys):
    with pytest.raises(SystemExit):
        run.validate("table.csv", "--min-sst", limit)
    assert "--min-sst should be above 0 K" in capsys.readouterr().err


def test_funnel_counts_the_match_ups_left_after_each_step(known, tmp_path, capsys):
    run, matchups = known
    run.validate(write(tmp_path / "table.csv", matchups))
    wanted = {
        "match-ups read": 22,
        "nothing missing": 21,
        "quality level 5": 20,
        "satellite zenith <= 55 deg": 19,
        "temperatures > 273.15 K": 17,
        "in the time of a scene": 16,
        "near a pixel": 14,
        "on a pixel with data": 13,
        "clear by our mask": 10,
        "clear by the Bayesian mask": 10,
        "clear by both": 8,
    }
    assert list(run.funnel().items()) == list(wanted.items())
    screen = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all([*step.split(), str(n)] in screen for step, n in wanted.items())


def test_kept_match_ups_are_written_with_their_pixels(known, tmp_path):
    run, matchups = known
    run.validate(write(tmp_path / "table.csv", matchups))
    kept = run.read("matchups")
    assert len(kept) == 13
    assert kept[5] == {
        **{name: str(value) for name, value in matchups[5].items()},
        "quality_level": "5.0",
        "difference": "-5.0",
        "scene": DAY,
        "day_night": "day",
        "row": "2",
        "col": "1",
        "pixel_latitude": str(grid()[0][2, 1]),
        "pixel_longitude": str(grid()[1][2, 1]),
        "cloudmask": "1",
        "bayes": "0",
    }
    again = run.folder / "again"  # what was written is such a table itself
    assert run.validate(run.folder / "sst/matchups.csv", "-o", again) == 0
    assert rows(again / "statistics.csv") == run.read("statistics")


def test_picture_has_panels_for_day_and_night(known, tmp_path):
    run, matchups = known
    run.validate(write(tmp_path / "table.csv", matchups))
    with Image.open(run.folder / "sst/differences.png") as image:
        grey = np.asarray(image.convert("L"))
    assert grey.shape[1] == 1440  # two panels of 4.8 inches at 150 dots an inch
    panels = grey[:, :720], grey[:, 720:]
    for panel in panels:  # paper, the area of all match-ups, the dashed and the dark line
        assert {255, 217} < set(np.unique(panel)) and panel.min() < 50
    assert (panels[0] != panels[1]).any()


@pytest.mark.parametrize("since", [None, 1970, 1981])
def test_hdf5_gives_what_csv_gives(known, tmp_path, since):
    run, matchups = known
    run.validate(write(tmp_path / "table.csv", matchups))
    of_csv = {name: run.read(name) for name in ("statistics", "funnel", "matchups")}
    assert run.validate(write_hdf5(tmp_path / "table.h5", matchups, since)) == 0
    for name, found in of_csv.items():
        assert run.read(name) == found


def test_packed_numbers_of_hdf5_are_unpacked(known, tmp_path):
    run, matchups = known
    table = write_hdf5(tmp_path / "table.nc", [m for m in matchups if m["satellite_sst"] != ""])
    with h5py.File(table, "a") as file:
        values = np.round((file["satellite_sst"][:] - 273.15) * 100).astype(np.int16)
        values[0] = -32768
        del file["satellite_sst"]
        file["satellite_sst"] = values
        file["satellite_sst"].attrs.update(
            scale_factor=0.01, add_offset=[273.15], _FillValue=np.int16(-32768)
        )
    assert run.validate(table) == 0
    assert run.funnel()["match-ups read"] == 21 and run.funnel()["nothing missing"] == 20
    assert [float(row["difference"]) for row in run.read("matchups")] == pytest.approx(
        [m["satellite_sst"] - 290 for m in matchups[1:13]], abs=1e-9
    )


START, END = product_times(DAY)
SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("counts", "changes"),
    [
        # Row 0 is the northernmost, column 0 the westernmost: at 50 N, 10 E, and nothing beyond.
        (True, {"latitude": 50.00499, "longitude": 10.0}),
        (False, {"latitude": 50.005, "longitude": 10.0}),
        (True, {"latitude": 50.0, "longitude": 9.99001}),
        (False, {"latitude": 50.0, "longitude": 9.99}),
        (True, {"satellite_zenith": 55}),
        (False, {"satellite_zenith": 55.1}),
        (True, {"quality_level": 5}),
        (False, {"quality_level": 4}),
        (True, {"satellite_sst": 273.16}),
        (False, {"satellite_sst": 273.15}),
        (True, {"time": f"{START:%Y-%m-%d %H:%M:%S}"}),
        (False, {"time": f"{START - SECOND:%Y-%m-%dT%H:%M:%S.5Z}"}),
        (True, {"time": f"{END:%Y-%m-%dT%H:%M:%S}+00:00"}),
        (False, {"time": f"{END:%Y-%m-%dT%H:%M:%S.001}"}),
        (False, {"buoy_sst": "inf"}),
    ],
)
def test_limits_include_and_exclude_the_right_values(run, tmp_path, counts, changes):
    run.add(DAY, "day", grid())
    run.validate(write(tmp_path / "table.csv", [matchup(pixel=(5, 5)), matchup(**changes)]))
    assert len(run.read("matchups")) == 1 + counts


@pytest.mark.parametrize("north", [0.0, 10.0, 10.01, 37.03, 50.0, -60.07])
def test_limits_hold_for_decimals_without_exact_binary_form(run, tmp_path, north):
    run.add(DAY, "day", grid(north))
    at = {"longitude": 10.0, "latitude": round(north + 0.005, 3)}
    run.validate(write(tmp_path / "table.csv", [matchup(positions=grid(north)), matchup(**at)]))
    assert run.funnel()["near a pixel"] == 1


def test_minutes_widen_the_time_of_a_scene(run, tmp_path):
    run.add(DAY, "day", grid())
    early, late = (f"{t:%Y-%m-%dT%H:%M:%SZ}" for t in (START - 90 * SECOND, END + 90 * SECOND))
    table = write(tmp_path / "table.csv", [matchup(), matchup(time=early), matchup(time=late)])
    for minutes, n in ((0, 1), (1.4, 1), (1.5, 3)):
        assert run.validate(table, "--minutes", minutes) == 0
        assert run.funnel()["in the time of a scene"] == n


def test_match_ups_are_found_across_the_date_line(run, tmp_path):
    positions = grid(west=179.9)
    run.add(DAY, "day", positions)
    west, east = positions[1][0, 4], positions[1][0, 6]
    assert west > 179 and east < -179
    at = [west + 0.009, east - 0.009, east - 0.009 + 360, 180.001, -179.999]
    run.validate(write(tmp_path / "table.csv", [matchup(longitude=x) for x in at]))
    assert [int(row["col"]) for row in run.read("matchups")] == [4, 6, 6, 5, 5]


def place_on_sphere(latitude, longitude):
    a, b = np.radians(latitude), np.radians(longitude)
    return np.array([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)])


@pytest.mark.parametrize("centre", [(0, 0), (55, 180), (89.97, 40), (-90, 0)])
def test_nearest_pixel_is_the_nearest_on_the_sphere(centre, monkeypatch):
    rng = np.random.default_rng(5)
    # A swath of 40 x 30 pixels around the centre, drawn in its tangent plane.
    up = place_on_sphere(*centre)
    east = place_on_sphere(0, centre[1] + 90)
    row, col = np.mgrid[-20:20, -15:15] * 2e-4 + rng.normal(0, 2e-5, (2, 40, 30))
    x, y, z = np.einsum("i,jk->ijk", up, np.ones_like(row)) + np.multiply.outer(
        np.cross(up, east), row
    ) + np.multiply.outer(east, col)  # fmt: skip
    latitude = np.degrees(np.arctan2(z, np.hypot(x, y)))
    longitude = np.degrees(np.arctan2(y, x))
    longitude[3, 4] = latitude[5, 6] = np.nan
    i, j = rng.integers(10, 30, (2, 200))
    at = latitude[i, j] + rng.normal(0, 1e-3, 200), longitude[i, j] + rng.normal(0, 1e-3, 200)
    at = np.clip(at[0], -90, 90), at[1]
    found = nearest_pixels(*at, latitude, longitude)
    for a, b, pixel in zip(*at, found, strict=True):
        cosines = np.einsum(
            "i,ijk->jk", place_on_sphere(a, b), place_on_sphere(latitude, longitude)
        )
        best = np.unravel_index(np.nanargmax(cosines), cosines.shape)
        assert (pixel["row"], pixel["col"]) == best
        far = abs(a - latitude[best]) >= 0.005 or abs(np.sin(np.radians(b - longitude[best]))) >= (
            np.sin(np.radians(0.01))
        )
        assert np.isinf(pixel["distance"]) == far
    assert np.isfinite(found["distance"]).any()


def test_match_up_in_two_scenes_counts_once_at_the_nearer_pixel(run, tmp_path):
    start, end = product_times(DAY)
    second = DAY.replace(f"{end:%Y%m%dT%H%M%S}", f"{end + SECOND:%Y%m%dT%H%M%S}")
    latitude, longitude = grid()
    run.add(DAY, "day", (latitude - 0.003, longitude), ours=[(0, 0)])
    run.add(second, "day", (latitude + 0.002, longitude))
    table = write(tmp_path / "table.csv", [matchup(), matchup(latitude=49.998)])
    assert run.validate(table) == 0
    assert [row["scene"] for row in run.read("matchups")] == [second, DAY]
    assert run.funnel()["in the time of a scene"] == 2


def test_positions_come_from_the_geodetic_file(run, tmp_path):
    run.add(DAY, "day", grid(north=10))
    product = tmp_path / "products" / f"{DAY}.SEN3"
    product.mkdir(parents=True)
    with h5py.File(product / "geodetic_in.nc", "w") as file:
        for name, degrees in zip(("latitude_in", "longitude_in"), grid(), strict=True):
            file[name] = np.round(degrees * 1e6).astype(np.int32)
            file[name].attrs["scale_factor"] = 1e-6
    table = write(tmp_path / "table.csv", [matchup(pixel=(3, 4))])
    assert run.validate(table, "--geodetic", product.parent) == 0
    (row,) = run.read("matchups")
    assert (row["row"], row["col"]) == ("3", "4")


def test_pixel_with_nan_as_label_is_not_clear(run, tmp_path):
    scene = run.add(DAY, "day", grid())
    with h5py.File(scene, "a") as file:
        file["bayes"][2, 2] = np.nan
    run.validate(write(tmp_path / "table.csv", [matchup(), matchup(pixel=(2, 2))]))
    assert run.funnel()["near a pixel"] == 2 and run.funnel()["on a pixel with data"] == 1


def test_scenes_outside_day_and_night_are_unknown(run, tmp_path):
    run.add(DAY, ".", grid())
    assert run.validate(write(tmp_path / "table.csv", [matchup()])) == 0
    assert [row["day_night"] for row in run.read("statistics")] == ["unknown"] * 3 + ["all"] * 3


def test_mask_without_clear_match_ups_has_no_median(run, tmp_path, capsys):
    run.add(DAY, "day", grid(), ours=[(0, 0)])
    assert run.validate(write(tmp_path / "table.csv", [matchup(0.5)])) == 0
    ours, bayes = run.read("statistics")[:2]
    assert list(ours.values()) == ["day", "cloudmask", "0", *["nan"] * 5]
    assert list(bayes.values()) == ["day", "bayes", "1", "0.5", "0.0", "0.5", "0.0", "0.0"]
    assert "nan" in capsys.readouterr().out


def without_bayes(run):
    with h5py.File(run.scenes / "night" / f"{NIGHT}.hdf", "a") as file:
        del file["bayes"]  # like a scene made from a product without it


def without_valid_positions(run):
    latitude, longitude = grid()
    latitude[1:], longitude[:1] = np.nan, np.nan
    run.add(NIGHT, "night", (latitude, longitude))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_bayes, "no Bayesian mask 'bayes'"),
        (lambda run: run.add(NIGHT, "night"), "neither latitude and longitude nor --geodetic"),
        (without_valid_positions, "no pixel with both latitude and longitude"),
        (lambda run: (run.scenes / "night" / f"{NIGHT}.hdf").unlink(), "no scene file"),
    ],
)
def test_scenes_that_cannot_be_used_are_skipped(known, tmp_path, capsys, change, reason):
    run, matchups = known
    change(run)
    assert run.validate(write(tmp_path / "table.csv", matchups)) == 0
    assert run.funnel()["in the time of a scene"] == 16 and len(run.read("matchups")) == 9
    (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("Skipped"))
    assert line.startswith(f"Skipped scenes: 1, {reason}")
    assert line.endswith(f"The first is {NIGHT} (4 match-ups).")


def test_result_without_match_ups_keeps_the_earlier_files(known, tmp_path, capsys):
    run, matchups = known
    run.validate(write(tmp_path / "table.csv", matchups))
    before = {path: path.read_bytes() for path in (run.folder / "sst").iterdir()}
    capsys.readouterr()
    assert run.validate(write(tmp_path / "table.csv", matchups[-4:-1])) == 2
    screen = capsys.readouterr()
    assert "No match-up is on a pixel" in screen.err
    lines = [line.split() for line in screen.out.splitlines()]
    assert "in the time of a scene 2".split() in lines and "near a pixel 0".split() in lines
    assert {path: path.read_bytes() for path in (run.folder / "sst").iterdir()} == before


def test_celsius_is_rejected_or_converted(known, tmp_path, capsys):
    run, matchups = known
    run.validate(write(tmp_path / "kelvin.csv", matchups))
    wanted = run.read("statistics")
    celsius = [{**row, "buoy_sst": row["buoy_sst"] - 273.15} for row in matchups]
    table = write(tmp_path / "celsius.csv", celsius)
    assert run.validate(table) == 2
    assert "buoy_sst should be in K, found the median 16.85" in capsys.readouterr().err
    assert run.validate(table, "--celsius", "buoy_sst") == 0
    for found, row in zip(run.read("statistics"), wanted, strict=True):
        assert found["matchups"] == row["matchups"]
        assert float(found["median"]) == pytest.approx(float(row["median"]), abs=1e-9)
    assert run.validate(tmp_path / "kelvin.csv", "--celsius", "buoy_sst") == 2
    assert "buoy_sst should be in K, found the median 563.15" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["", "nan", "NaT", "NAT"])
def test_missing_time_counts_as_missing(run, tmp_path, missing):
    run.add(DAY, "day", grid())
    table = write(tmp_path / "table.csv", [matchup(), matchup(time=missing)])
    assert run.validate(table) == 0
    assert run.funnel()["match-ups read"] == 2 and run.funnel()["nothing missing"] == 1


def test_columns_may_have_other_names(known, tmp_path):
    run, matchups = known
    names = {"buoy_sst": "isst", "latitude": "slat"}
    renamed = [{names.get(name, name): value for name, value in m.items()} for m in matchups]
    options = ["--column", "buoy_sst=isst", "latitude=slat"]
    for table in (
        write(tmp_path / "table.csv", renamed),
        write_hdf5(tmp_path / "table.h5", [m for m in renamed if m["satellite_sst"] != ""]),
    ):
        assert run.validate(table, *options) == 0
        assert len(run.read("matchups")) == 13


GOOD = [matchup(), matchup(), matchup()]
TIME = GOOD[0]["time"]
# How the text of a table is changed, and a part of the error.
BAD_CSV = {
    "empty file": (lambda text: "", "no column time"),
    "no rows": (lambda text: text.splitlines()[0] + "\n", "no rows"),
    "no column": (
        lambda text: text.replace("quality_level", "q"),
        "no column quality_level, found",
    ),
    "duplicate column": (lambda text: text.replace("buoy,", "time,"), "duplicate column time"),
    "text for a number": (
        lambda text: text.replace("290.0", "warm\x1b", 1),
        "row 1: buoy_sst should",
    ),
    "short row": (lambda text: text + "1,2\n", "row 4 should have 8 fields"),
    "no date": (lambda text: text.replace("-06-", "-13-"), "be ISO 8601, UTC, found '2018-13-"),
    "number for a time": (lambda text: text.replace(TIME, "1527813667"), "time should be ISO"),
    "another time zone": (lambda text: text.replace("Z", "+02:00"), "time should be ISO 8601"),
    "latitude": (lambda text: text.replace("50.001", "95.001", 1), "latitude should be -90 to 90"),
    "fill value": (lambda text: text.replace("30.0", "-999", 1), "satellite_zenith should be 0 to"),
    "open quotes": (lambda text: text + '"1,2', "unexpected end of data"),
    "not a text": (lambda text: "\udcff" * 9, "cannot be used"),
}


@pytest.mark.parametrize("what", BAD_CSV)
def test_bad_csv_ends_in_one_line(run, tmp_path, capsys, what):
    change, reason = BAD_CSV[what]
    table = write(tmp_path / "table.csv", GOOD)
    table.write_text(change(table.read_text()), errors="surrogateescape")
    check_bad_table(run, table, reason, capsys)


def check_bad_table(run, table, reason, capsys):
    run.add(DAY, "day", grid())
    assert run.validate(table) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and table.name in line and reason in line, line
    assert line.isprintable()
    assert not (run.folder / "sst").exists()


def replaced(column, values):
    """A function that replaces a column of a file, with None by nothing."""

    def change(file):
        del file[column]
        if values is not None:
            file[column] = values

    return change


def with_units(units):
    return lambda file: file["time"].attrs.update(units=units)


def emptied(file):
    for column in GOOD[0]:
        replaced(column, np.zeros(0))(file)
    with_units("seconds since 1981-01-01")(file)


# How an HDF5 file is changed, and a part of the error.
BAD_HDF5 = {
    "no column": (replaced("buoy_sst", None), "no column buoy_sst, found time, latitude"),
    "no rows": (emptied, "should hold 1 to"),
    "text": (replaced("buoy_sst", ["a", "b", "c"]), "should hold numbers"),
    "other length": (replaced("buoy_sst", [290.0] * 4), "same shape (N,)"),
    "matrix": (replaced("buoy_sst", [[290.0] * 3]), "same shape (N,)"),
    "link": (replaced("buoy_sst", h5py.ExternalLink("/etc/passwd", "/x")), "link out of the file"),
    "long times": (replaced("time", np.zeros(3, "S8192")), "at most 1000000 texts of at most 64"),
    "no units": (replaced("time", [1.0, 2.0, 3.0]), "found units ''"),
    "days": (with_units("days since 1981-01-01"), "found units 'days since 1981-01-01'"),
    "no date": (with_units("seconds since yesterday"), "found units 'seconds since yesterday'"),
}


@pytest.mark.parametrize("what", BAD_HDF5)
def test_bad_hdf5_ends_in_one_line(run, tmp_path, capsys, what):
    change, reason = BAD_HDF5[what]
    table = write_hdf5(tmp_path / "table.h5", GOOD, 1981)
    with h5py.File(table, "a") as file:
        change(file)
    check_bad_table(run, table, reason, capsys)


def test_truncated_or_absent_table_ends_in_one_line(run, tmp_path, capsys):
    table = write_hdf5(tmp_path / "table.h5", GOOD)
    table.write_bytes(table.read_bytes()[:1500])
    check_bad_table(run, table, "cannot be used", capsys)
    check_bad_table(run, tmp_path / "absent.csv", "No file", capsys)


def test_scene_without_temperatures_ends_in_one_line(run, tmp_path, capsys):
    scene = run.add(DAY, "day", grid())
    with h5py.File(scene, "a") as file:
        del file["bts"]
    assert run.validate(write(tmp_path / "table.csv", [matchup()])) == 2
    assert f"{scene.name} cannot be used: it should have a dataset" in capsys.readouterr().err


def test_mask_without_times_ends_in_one_line(run, tmp_path, capsys):
    run.add(DAY, "day", grid())
    run.add("S3A_other", "day", grid())
    table = write(tmp_path / "table.csv", [matchup()])
    assert run.validate(table) == 2
    assert "S3A_other should be named after a product" in capsys.readouterr().err
    assert run.validate(table, "--scene", DAY) == 0


@pytest.mark.parametrize(
    "options",
    [["--minutes", "-1"], ["--minutes", "nan"], ["--column", "sst=x"], ["--column", "time"]],
)
def test_wrong_options_are_usage_errors(run, tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        run.validate(tmp_path / "table.csv", *options)
    assert f"error: {options[0]} should be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "file"),
    [("scipy.spatial", "requirements-tools.txt"), ("matplotlib.figure", "requirements.txt")],
)
def test_missing_package_is_reported_before_files_are_written(
    known, tmp_path, monkeypatch, capsys, package, file
):
    run, matchups = known
    monkeypatch.setitem(sys.modules, package, None)
    assert run.validate(write(tmp_path / "table.csv", matchups)) == 2
    error = capsys.readouterr().err
    assert f"the package {package.partition('.')[0]} is missing" in error
    assert f"pip install -r {file}" in error
    assert not (run.folder / "sst").exists()
