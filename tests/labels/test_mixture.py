"""A mask without labels finds simple clouds of known places."""

import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from harness.labels.mixture import PhysicalMixture, fit_mixture, smooth

SEA = np.array([0.05, 0.03, 0.012, 0.001, 0.005, 0.003])
CLOUD = np.array([0.5, 0.52, 0.53, 0.02, 0.4, 0.35])


def make_scene(seed, day):
    """A sea of 285 to 289 K, a third of it below clouds that are 2 to 30 K colder.

    Returns:
        channels, valid, and where there is cloud, bool (H, W).
    """
    rng = np.random.default_rng(seed)
    shape = 100, 120
    field = gaussian_filter(rng.normal(size=shape), 6)
    excess = np.maximum(field / field.std() - 0.4, 0)[..., None]
    share = 1 - np.exp(-3 * excess)  # of cloud in what the pixel emits and reflects
    sea = 287 + np.linspace(-2, 2, shape[0])[:, None, None] + np.array([1.7, 0.7, 0.0])
    cold = 2 + 14 * excess * (1 + 0.2 * rng.normal(size=(*shape, 1)))
    bts = sea - share * (cold + np.array([1.5, 0.7, 0]))
    bts += rng.normal(0, 0.05, (*shape, 3))
    refs = np.zeros((*shape, 6))
    if day:
        refs = SEA + share * (CLOUD - SEA) + rng.normal(0, 0.002, (*shape, 6))
        bts[..., 0] += 20 * share[..., 0]
    valid = np.ones(shape, bool)
    valid[:, :4] = False
    channels = np.concatenate([refs - 0.5, (bts - 270) / 22], axis=-1).astype(np.float32)
    channels[~valid] = [-0.5] * 6 + [-270 / 22] * 3
    return channels, valid, excess[..., 0] > 0.1


@pytest.fixture(scope="module")
def model():
    return fit_mixture((make_scene(i, day=i % 2 == 0)[:2] for i in range(4)), seed=1)


def balanced_accuracy(mask, truth):
    return (mask[truth].mean() + 1 - mask[~truth].mean()) / 2


@pytest.mark.parametrize("day", [True, False])
def test_clouds_are_found_in_scenes_that_were_not_fitted(model, day):
    channels, valid, truth = make_scene(100, day)
    probability = model.probability(channels, valid)
    assert probability.dtype == np.float32
    assert not probability[~valid].any()
    # Thin cloud is warmer than 273.15 K: the classical test misses it.
    s9 = channels[..., 8] * 22 + 270
    classical = balanced_accuracy(s9[valid] < 273.15, truth[valid])
    assert balanced_accuracy(probability[valid] > 0.5, truth[valid]) > max(0.93, classical + 0.08)


def test_model_survives_json_and_is_repeatable(model):
    channels, valid, _ = make_scene(101, day=True)
    expected = model.probability(channels, valid)
    again = fit_mixture((make_scene(i, day=i % 2 == 0)[:2] for i in range(4)), seed=1)
    for other in (PhysicalMixture.from_dict(json.loads(json.dumps(model.to_dict()))), again):
        np.testing.assert_array_equal(other.probability(channels, valid), expected)


def test_kind_that_was_not_fitted_is_masked_by_the_tests(model):
    night_only = fit_mixture((make_scene(i, day=False)[:2] for i in range(2)), seed=1)
    assert set(model.to_dict()) == {"day", "night"}
    assert set(night_only.to_dict()) == {"night"}
    channels, valid, truth = make_scene(100, day=True)
    mask = night_only.probability(channels, valid) > 0.5
    assert balanced_accuracy(mask[valid], truth[valid]) > 0.9


def test_scene_without_data_has_no_cloud(model):
    channels = np.full((40, 50, 9), -0.5, np.float32)
    assert not model.probability(channels, np.zeros((40, 50), bool)).any()


def test_neighbours_decide_where_a_pixel_does_not():
    odds = np.full((20, 20), 3.0, np.float32)  # cloud
    odds[5, 5] = 0
    odds[15, 15] = -8
    probability = smooth(odds)
    assert probability[5, 5] > 0.8
    assert probability[15, 15] < 0.05
