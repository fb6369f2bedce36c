"""The physical tests know surfaces and clouds by their spectra."""

import numpy as np
import pytest

from harness.labels import features

SEA = (0.054, 0.03, 0.012, 0.001, 0.005, 0.003)  # median of a VIIRS granule, as far as known
CLOUD = (0.60, 0.64, 0.66, 0.071, 0.29, 0.32)  # the same


def scene(refs, bts, shape=(30, 40), noise=0.05):
    """A uniform scene, normalised, with noise in S7 to S9 [K]."""
    channels = np.empty((*shape, 9), np.float32)
    channels[..., :6] = np.array(refs) - 0.5
    noises = np.random.default_rng(1).normal(0, noise, (*shape, 3))
    channels[..., 6:] = (np.array(bts) + noises - 270) / 22
    return channels, np.ones(shape, bool)


@pytest.mark.parametrize(
    ("name", "background", "refs", "bts", "noise", "is_cloud"),
    [
        # Temperatures of S7, S8, S9 [K]; the day adds sunlight to S7.
        ("sea by day", 291, SEA, (294, 291.8, 291.1), 0.05, False),
        ("thick ice cloud by day", 291, CLOUD, (294, 253, 252.2), 1.0, True),
        ("stratus by day", 288, (0.5, 0.52, 0.53, 0.004, 0.42, 0.35), (297, 285, 284.6), 0.3, True),
        ("grass", 291, (0.08, 0.06, 0.3, 0.003, 0.2, 0.1), (296, 290, 289.2), 0.3, False),
        ("grass on a hill", 291, (0.08, 0.06, 0.3, 0.003, 0.2, 0.1), (290, 284, 283.5), 0.3, False),
        ("desert", 305, (0.18, 0.26, 0.33, 0.006, 0.42, 0.35), (313, 306, 304.5), 0.3, False),
        ("snow", 272, (0.8, 0.8, 0.74, 0.01, 0.1, 0.08), (270, 264, 263.8), 0.3, False),
        ("glint", 291, (0.2, 0.22, 0.24, 0.005, 0.24, 0.23), (311, 291.8, 291.1), 0.1, False),
        ("cirrus by day", 291, (0.1, 0.09, 0.07, 0.03, 0.03, 0.03), (291, 287, 285), 0.3, True),
        ("sea by night", 291, (0,) * 6, (292.9, 291.8, 291.1), 0.05, False),
        ("fog", 288, (0,) * 6, (285.6, 287.8, 287.7), 0.1, True),
        ("cold land by night", 288, (0,) * 6, (281.9, 281, 280.6), 0.05, False),
        ("cirrus by night", 291, (0,) * 6, (291.5, 289, 287), 0.3, True),
        ("thick ice cloud by night", 291, (0,) * 6, (219, 220, 220), 0.5, True),
    ],
)
def test_surfaces_and_clouds_are_told_apart(name, background, refs, bts, noise, is_cloud):
    fields = features.measure(*scene(refs, bts, noise=noise))
    assert fields["is_day"].all() == any(refs)
    where = fields["valid"]
    values = features.pick(fields, np.full(where.shape, background, np.float32), where)
    probability = features.physical_probability(values, "day" if any(refs) else "night")
    assert ((probability > 0.5) == is_cloud).mean() > 0.95, name


def test_background_continues_the_sea_below_cloud():
    channels, valid = scene((0,) * 6, (281, 280, 279.5), (120, 150))
    slope = np.linspace(-4, 4, 120)[:, None]  # [K], from north to south
    channels[..., 6:] += slope[..., None] / 22
    cloudy = np.hypot(*np.mgrid[-60:60, -75:75]) < 25  # 500 km wide
    channels[cloudy, 6:] -= 20 / 22
    valid[:, :5] = False
    channels[:, :5] = 0
    fields = features.measure(channels, valid)
    found = features.background(fields, cloudy.astype(np.float32))
    error = found - (279.5 + slope)
    assert np.abs(error[valid & ~cloudy]).max() < 0.6
    assert np.abs(error[cloudy]).max() < 2  # the sea is 3.3 K warmer at one side than at the other


def test_coarse_field_is_refined_to_where_its_pixels_were():
    ramp = np.add.outer(np.arange(400.0), 2 * np.arange(500.0))  # 3 x 3 pixels become one
    refined = features.refine(features.coarsen({"s9": ramp})["s9"], ramp.shape)
    inner = slice(0, 399), slice(0, 498)  # the last pixels that were taken: constant beyond them
    np.testing.assert_allclose(refined[inner], ramp[inner], atol=1e-6)


def test_background_without_clear_pixels_is_the_warmest_around():
    channels, valid = scene((0,) * 6, (250, 250, 250), noise=0)
    fields = features.measure(channels, valid)
    found = features.background(fields, np.ones(valid.shape, np.float32))
    np.testing.assert_allclose(found, 250, atol=1e-3)
