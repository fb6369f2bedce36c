"""Tests of the comparison of scenes with published facts, on fields whose values are known."""

import h5py
import numpy as np
import pytest

from data_loader import read_scene
from tools.compare_scenes import main
from tools.lib.scenes import facts


def write_scene(folder, kind="day", name="S3A_one", height=80, width=100, **changes):
    """Write a scene of cloud (columns 40 to 89) and sea; return its path."""
    cloud = np.zeros((height, width), bool)
    cloud[:, 40:90] = True
    refs = np.where(cloud[..., None], 0.6, [0.05, 0.03, 0.01, 0.001, 0.01, 0.01])
    bts = np.where(cloud[..., None], [290.0, 250.0, 249.0], [292.0, 291.0, 290.5])
    bts[:, :3] = bts[:, -2:] = refs[:, :3] = refs[:, -2:] = 0
    arrays = {"refs": refs, "bts": bts, "bayes": cloud[..., None] * 255.0}
    arrays |= {"truth": cloud[..., None].astype(np.uint8)}
    path = folder / kind / f"{name}.hdf"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in (arrays | changes).items():
            if array is not None:
                file[name] = array
    return path


def test_texture_of_stripes_is_a_triangle_wave():
    stripes = np.arange(1600) // 4 % 2 == 0  # 4 blocks of cloud, 4 of clear sky
    autocorrelation, differing = facts.texture(np.tile(stripes, (3, 1)))
    # 1 - k/2 up to half the period of 8 blocks
    assert autocorrelation == pytest.approx([0.5, 0, -1, 1, 1, 1], abs=0.01)
    assert differing == pytest.approx(1 / 4, abs=0.001)


@pytest.mark.parametrize("height", [1200, 600, 300])
def test_blocks_are_those_of_9_km_whatever_the_size_of_pixels(height):
    rng = np.random.default_rng(1)
    blocks = rng.random((133, 166)) < 0.6
    middles = ((np.arange(n) + 0.5) * 1200 / height for n in (height, height * 5 // 4))  # [km]
    rows, cols = (
        np.minimum(km // 9, n - 1).astype(int) for km, n in zip(middles, (133, 166), strict=True)
    )
    found = facts.block_majority(blocks[rows[:, None], cols])
    assert found.shape == (133, 158)
    np.testing.assert_array_equal(found, blocks[:, 5:-3])


def test_no_variation_has_no_autocorrelation():
    autocorrelation, differing = facts.texture(np.ones((5, 40), bool))
    assert np.isnan(autocorrelation).all() and differing == 0


def test_missing_border_is_counted_in_columns_of_1500_and_lost_lines_are_not():
    valid = np.ones((300, 375), bool)
    valid[:150, :9] = valid[150:, :11] = valid[:, -5:] = False
    valid[100:102, :200] = False
    assert facts.missing_border(valid) == ((36, 44, 20, 20), 0)
    valid[:2] = valid[-1:] = False
    assert facts.missing_border(valid)[1] == 3


def test_spectra_are_those_of_cloud_and_of_sea(tmp_path):
    cloud, sea, correlations = facts.spectra(read_scene(write_scene(tmp_path), (None, None, 9)))
    np.testing.assert_allclose(cloud, [[*[0.6] * 6, 290, 250, 249]] * len(cloud), rtol=1e-5)
    np.testing.assert_allclose(sea[:, 6:], [[292, 291, 290.5]] * len(sea), rtol=1e-5)
    assert len(cloud) > 50 and len(sea) > 50
    assert correlations == pytest.approx((-1, -1), abs=1e-5)


def test_errors_of_the_label_are_counted_and_grouped(tmp_path):
    truth, surface = np.zeros((2, 80, 100, 1), np.uint8)
    truth[:, 50:] = 1
    label = truth * 255.0
    label[:6, 60:65] = 0  # 30 pixels of cloud missed
    label[70, 10:20] = 255  # 10 pixels of sea, too few for a large group
    label[:, :3] = 255  # without data
    surface[40:] = 1
    path = write_scene(tmp_path, truth=truth, bayes=label, surface=surface)
    with h5py.File(path, "r+") as file:
        file["surface"].attrs["flag_meanings"] = "sea ice"
    statistics = facts.scene_statistics(path)
    assert statistics.pixels == {"cloud": (80 * 48, 30), "clear": (80 * 47, 10)}
    assert statistics.groups == {("clear", "sea"): (40 * 47, 0), ("clear", "ice"): (40 * 47, 10)}
    found = facts.summarise([statistics])
    assert found["label: accuracy"] == pytest.approx(1 - 40 / (80 * 95))
    assert found["label: hit rate"] == pytest.approx(1 - 30 / (80 * 48))
    assert found["label: false alarm rate"] == pytest.approx(10 / (80 * 47))
    assert found["label: wrong in groups of > 20"] == 0.75


def test_shares_are_means_and_percentiles_over_scenes(tmp_path):
    shares = {"day": (0.2, 0.4), "night": (0.5, 0.7, 0.9)}
    for kind, values in shares.items():
        for share in values:
            label = np.zeros((80, 100, 1))
            label[:, : round(100 * share)] = 1
            write_scene(tmp_path, kind, f"S3A_{share}", bayes=label)
    found = facts.summarise([facts.scene_statistics(p) for p in tmp_path.rglob("*.hdf")])
    names = ("mean", "day", "night", "percentile 0", "percentile 50", "percentile 100")
    expected = [0.54, 0.3, 0.7, 0.2, 0.5, 0.9]
    assert [found[f"cloud share, {name}"] for name in names] == pytest.approx(expected)


def test_command_prints_the_quantities_and_fails_outside_the_ranges(tmp_path, capsys):
    write_scene(tmp_path, truth=None)
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    lines = {line[:32].strip(): line[32:].split() for line in out.splitlines()}
    assert lines["cloud share, mean"] == ["0.780", "0.760", "to", "0.800", "0.500", "no"]
    assert lines["cloud, S1"] == ["0.600", "0.510", "to", "0.690", "0.600", "yes"]
    assert "label: accuracy" not in lines and "cloud share, night" not in lines
    n_outside = sum(line[-1:] == ["no"] for line in lines.values())
    n_inside = sum(line[-1:] == ["yes"] for line in lines.values())
    assert f"{n_outside} of {n_outside + n_inside} quantities are outside" in err


def test_command_succeeds_inside_the_ranges(tmp_path, monkeypatch):
    write_scene(tmp_path)
    inside = {name: facts.Fact(0, -1e9, 1e9) for name in facts.FACTS}
    monkeypatch.setattr(facts, "FACTS", inside)
    assert main([str(tmp_path)]) == 0
