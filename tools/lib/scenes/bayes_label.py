"""A Bayesian cloud detector, which labels synthetic scenes as processing centres label real ones.

It compares how likely a measurement is below a clear sky and below cloud, pixel by pixel (Merchant
et al. 2005, Mackie et al. 2010). The clear sky is forecast from ancillary data, which are coarse
and a little wrong; cloud is described by broad distributions. The label therefore misses what looks
like the surface (thin cirrus, small cumulus, low cloud by night), and calls cloud what the
ancillary data do not know (fronts of the sea, glint, ice, coasts, dust).
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.ndimage import uniform_filter

from tools.lib.scenes.fields import bands

PRIOR = 0.86  # probability of cloud; a little more than the scenes have
DAY = 85.0  # [deg] of the sun's zenith, below which reflectance is used
NIGHT = 95.0  # [deg], above which S7 is free of sunlight
S1, S3, S5 = 0, 2, 4  # indices of channels
S7, S8, S9 = range(3)
# [K], how much water vapour above a tropical sea cools S7, S8 and S9; a little wrong.
VAPOUR_DEPRESSION = (1.0, 2.5, 3.7)


class Ancillary(NamedTuple):
    """What a processing centre knows before it looks; fields (H, W), float32 unless noted."""

    land: np.ndarray  # bool, a mask of finite resolution
    temperature: np.ndarray  # analysis of the sea, forecast of the land's skin [K]
    vapour: np.ndarray  # water vapour, as in Surface
    reflectance: np.ndarray  # (6, H, W), climatology of S1 to S6 without snow and glint
    sun_zenith: np.ndarray  # [deg]
    glint: np.ndarray  # expected reflectance of the glint, from the mean wind
    ice: np.ndarray  # expected share of snow and sea ice

    def rows(self, rows):
        """The Ancillary of some rows, a slice."""
        return Ancillary(*(field[..., rows, :] for field in self))


class Histogram(NamedTuple):
    """Logarithm of a probability density on a grid; outside it, the value at the end."""

    low: float
    step: float
    log_density: np.ndarray  # float32

    def __call__(self, values):
        """Look up an array of values."""
        index = (values - self.low) * np.float32(1 / self.step)
        return self.log_density[np.clip(index, 0, len(self.log_density) - 1).astype(np.intp)]


def histogram(low, high, *parts):
    """A Histogram of 1000 bins from `low` to `high`: normal parts (weight, mean, deviation)."""
    step = (high - low) / 1000
    middles = low + step * (np.arange(1000) + 0.5)
    density = sum(
        weight * np.exp(-(((middles - mean) / deviation) ** 2) / 2) / deviation
        for weight, mean, deviation in parts
    )
    return Histogram(low, step, np.log(density / math.sqrt(2 * math.pi) + 1e-12).astype(np.float32))


def normal(values, mean, deviation):
    """Logarithm of the normal density."""
    scaled = (values - mean) / deviation
    return np.float32(-0.5) * scaled * scaled - np.log(deviation * np.float32(2.5066))


# What cloud looks like: departures from the forecast for a clear sky [K], log10 of the standard
# deviation of S8 in 3 x 3 pixels [K], and reflectance. Broad, and drawn by hand.
CLOUD_DEPARTURE = histogram(-110, 20, (0.3, -4, 3.5), (0.4, -22, 14), (0.3, -50, 15))  # of S8
CLOUD_SPLIT = histogram(-5, 10, (0.6, -0.4, 0.6), (0.4, 1.0, 1.5))  # of S8 - S9
CLOUD_S7 = histogram(-15, 40, (0.5, -2.5, 1.5), (0.5, 3.0, 5.0))  # of S7 - S8, by night
CLOUD_TEXTURE = histogram(-2.5, 1.5, (0.5, -0.7, 0.35), (0.5, -0.1, 0.4))
CLOUD_S1 = histogram(0, 1.5, (0.35, 0.22, 0.10), (0.65, 0.5, 0.2))
CLOUD_SLOPE = histogram(-0.6, 0.6, (0.8, 0.03, 0.04), (0.2, 0.03, 0.12))  # S3 - S1
CLOUD_S5 = histogram(0, 1.0, (0.6, 0.30, 0.12), (0.4, 0.45, 0.15))


class ClearSky(NamedTuple):
    """How well a clear sky is forecast: standard deviations, and the texture."""

    departure: float  # [K] of S8
    split: float  # [K] of S8 - S9
    s7: float  # [K] of S7 - S8 by night
    texture: Histogram  # log10 of the standard deviation of S8 [K]
    reflectance: float
    slope: float  # of S3 - S1


SEA = ClearSky(
    departure=0.6,
    split=0.3,
    s7=0.5,
    texture=histogram(-2.5, 1.5, (0.7, -1.1, 0.2), (0.3, 0.0, 0.6)),
    reflectance=0.0135,
    slope=0.009,
)
LAND = ClearSky(
    departure=4.0,
    split=0.6,
    s7=1.0,
    texture=histogram(-2.5, 1.5, (0.8, -0.3, 0.4), (0.2, 0.3, 0.4)),
    reflectance=0.04,
    slope=0.06,
)
GLINT_ERROR = 0.3  # standard deviation of reflectance, as a share of the expected glint
GLINT_SLOPE = 0.2  # of S3 - S1, likewise
MOST_SNOW = 0.9  # of the prior probability of snow and ice
# Mean and standard deviation of snow and ice, where a climatology expects them.
SNOW_DEPARTURE = -2.0, 4.0  # [K], of S8 from the forecast of what is below
SNOW_S1 = 0.7, 0.15
SNOW_S5 = 0.10, 0.05


def bayes_label(refs, bts, ancillary):
    """Label a scene: where cloud is more likely than not.

    Args:
        refs: (H, W, 6), reflectance of S1 to S6 on the 1 km grid; 0 by night.
        bts: (H, W, 3), brightness temperature of S7 to S9 [K]; 0 or NaN where missing.
        ancillary: Ancillary.

    Returns:
        bool (H, W), False where a brightness temperature is missing.
    """
    s7, s8, s9 = (np.nan_to_num(bts[..., i]) for i in (S7, S8, S9))
    valid = (s7 > 0) & (s8 > 0) & (s9 > 0)
    forecast = ancillary.temperature - VAPOUR_DEPRESSION[S8] * ancillary.vapour  # of S8 [K]
    departure = np.where(valid, s8 - forecast, 0)
    texture = np.log10(local_deviation(departure, 3) + np.float32(0.01))
    odds = np.empty(valid.shape, np.float32)
    for rows in bands(len(valid)):
        measured = departure[rows], s7[rows] - s8[rows], s8[rows] - s9[rows], texture[rows]
        odds[rows] = log_odds(refs[rows], *measured, ancillary.rows(rows))
    return valid & (odds > 0)


def local_deviation(field, size):
    """Standard deviation in squares of `size` x `size` pixels, (H, W)."""
    mean = uniform_filter(field, size)
    return np.sqrt(np.maximum(uniform_filter(field * field, size) - mean * mean, 0))


def log_odds(refs, departure, s7_s8, s8_s9, texture, ancillary):
    """Logarithm of the posterior probability of cloud over that of clear sky.

    Args:
        refs: (H, W, 6), reflectance of S1 to S6.
        departure: (H, W), S8 minus its forecast for a clear sky [K].
        s7_s8: (H, W), S7 - S8 [K].
        s8_s9: (H, W), S8 - S9 [K].
        texture: (H, W), logarithm of the local standard deviation of `departure`.
        ancillary: Ancillary.

    Returns:
        float32 (H, W).
    """
    land, sun, vapour = ancillary.land, ancillary.sun_zenith, ancillary.vapour
    cools = VAPOUR_DEPRESSION
    split = s8_s9 - (cools[S9] - cools[S8]) * vapour

    def error(name):  # of the forecast at each pixel
        return np.where(land, np.float32(getattr(LAND, name)), np.float32(getattr(SEA, name)))

    cloud = CLOUD_DEPARTURE(departure) + CLOUD_SPLIT(split) + CLOUD_TEXTURE(texture)
    clear = np.where(land, LAND.texture(texture), SEA.texture(texture))
    clear += normal(split, 0, error("split"))
    bare = normal(departure, 0, error("departure"))
    snow = normal(departure, *SNOW_DEPARTURE)
    if (night := sun > NIGHT).any():
        s7 = s7_s8 - (cools[S8] - cools[S7]) * vapour
        cloud += np.where(night, CLOUD_S7(s7), 0)
        clear += np.where(night, normal(s7, 0, error("s7")), 0)
    if (day := sun < DAY).any():
        s1, s3, s5 = (np.nan_to_num(refs[..., i]).astype(np.float32) for i in (S1, S3, S5))
        ground, glint = ancillary.reflectance, ancillary.glint
        dark = normal(s1, ground[S1] + glint, error("reflectance") + GLINT_ERROR * glint)
        dark += normal(s3 - s1, ground[S3] - ground[S1], error("slope") + GLINT_SLOPE * glint)
        dark += normal(s5, ground[S5] + glint, error("reflectance") + GLINT_ERROR * glint)
        white = normal(s1, *SNOW_S1) + normal(s5, *SNOW_S5)
        cloud += np.where(day, CLOUD_S1(s1) + CLOUD_SLOPE(s3 - s1) + CLOUD_S5(s5), 0)
        bare += np.where(day, dark, 0)
        snow += np.where(day, white, 0)
    share = np.minimum(ancillary.ice, MOST_SNOW)
    clear += np.logaddexp(bare + np.log1p(-share), snow + np.log(share + 1e-6))
    return math.log(PRIOR / (1 - PRIOR)) + cloud - clear
