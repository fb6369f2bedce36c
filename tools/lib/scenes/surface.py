"""The ground below the clouds: sea with fronts, ice and glint, land with coast, relief and snow."""

import math
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

from tools.lib.scenes.bayes_label import Ancillary
from tools.lib.scenes.fields import (
    SCENE_KM,
    axes_km,
    coarse_shape,
    coarse_step,
    fractal_field,
    refine,
)
from tools.lib.scenes.instrument import MEAN_WIND, glint_reflectance

KM_PER_DEGREE = 111.2  # of latitude
TROPICAL_SHARE = 0.15  # of the scenes
FREEZING_SEA = 271.3  # [K], salt water
EQUATOR_SEA = 301.5  # [K], mean of the year
LAPSE_RATE = 6.5  # [K km-1], standard atmosphere
SMOOTH_ROWS = 150  # rows of the grid of what is only known smoothed, or more
GLINT_SEEN = 0.03  # reflectance of the glint from which a pixel counts as glint

# Codes of the dataset `surface`.
SURFACES = ("sea", "glint", "ice", "snow", "coast", "land", "desert")
SEA, GLINT, ICE, SNOW, COAST, LAND, DESERT = range(len(SURFACES))

# Reflectance in S1 to S7, fraction of 1, seen through a clear atmosphere.
OF_SEA = (0.046, 0.022, 0.011, 0.001, 0.005, 0.003, 0.003)
OF_SOIL = (0.180, 0.250, 0.310, 0.006, 0.360, 0.300, 0.120)
OF_VEGETATION = (0.085, 0.060, 0.230, 0.003, 0.170, 0.090, 0.030)
OF_SNOW = (0.820, 0.800, 0.740, 0.015, 0.110, 0.080, 0.020)
OF_ICE = (0.550, 0.520, 0.420, 0.006, 0.060, 0.045, 0.015)
OF_GLINT = (0.75, 0.82, 0.92, 0.02, 1.0, 1.0, 1.0)  # what the air transmits


class Surface(NamedTuple):
    """The ground; fields (H, W), float32 unless noted."""

    codes: np.ndarray  # uint8, index of SURFACES
    land: np.ndarray  # bool
    temperature: np.ndarray  # [K]
    air: np.ndarray  # temperature of the air at sea level [K]
    vapour: np.ndarray  # water vapour, about 1 over a tropical sea
    soil: np.ndarray  # share of bare soil on land; the rest is vegetation
    snow: np.ndarray  # share of snow on land
    ice: np.ndarray  # share of ice on the sea
    glint: np.ndarray  # reflectance that sun glint adds to the sea, in S5


def latitude_at(quantile):
    """Latitude [deg] of a scene; most are in the middle latitudes, as those of ssts.

    Args:
        quantile: Of the distribution, 0 to 1; below 0.5 in the south.
    """
    hemisphere, quantile = (-1, 2 * quantile) if quantile < 0.5 else (1, 2 * quantile - 1)
    if quantile < TROPICAL_SHARE:
        return hemisphere * triangular_quantile(quantile / TROPICAL_SHARE, 0, 20, 35)
    others = (quantile - TROPICAL_SHARE) / (1 - TROPICAL_SHARE)
    return hemisphere * triangular_quantile(others, 25, 52, 72)


def triangular_quantile(quantile, low, mode, high):
    """Value at a quantile of a triangular distribution."""
    rising = (mode - low) / (high - low)  # share of the distribution below its mode
    if quantile < rising:
        return low + math.sqrt(quantile * (high - low) * (mode - low))
    return high - math.sqrt((1 - quantile) * (high - low) * (high - mode))


def sea_level_temperature(latitude, season):
    """Mean temperature of the sea [K] at a latitude [deg]; season: -1 winter to 1 summer."""
    distance = np.abs(latitude) / 46
    middle = np.exp(-((np.abs(latitude) - 45) ** 2) / 800)  # where seasons differ most
    return (
        FREEZING_SEA
        - 1
        + (EQUATOR_SEA - FREEZING_SEA) * np.exp(-(distance**2.2))
        + (4 * season * middle)
    )


def make_surface(rng, shape, latitude, season, day, wind, glint):
    """Draw a Surface.

    Args:
        rng: NumPy Generator.
        shape: (H, W).
        latitude: Of the middle of the scene [deg].
        season: -1 winter to 1 summer.
        day: Whether the sun warms the land, and the sea where the wind is weak.
        wind: Its speed [m s-1], (H, W).
        glint: Reflectance of the glint, (H, W).
    """
    coarse = coarse_shape(shape)
    rows, _ = axes_km(coarse)
    eddies = fractal_field(rng, coarse, 350, 2.2)
    streams = fractal_field(rng, coarse, 900, 2.4)
    fronts = np.tanh(12 * (streams + 0.25 * eddies - rng.normal(0, 0.7)))
    climate = sea_level_temperature(latitude - rows / KM_PER_DEGREE, season)
    middle = math.exp(-(((abs(latitude) - 45) / 20) ** 2))  # currents are strongest there
    sea = climate + 0.5 * eddies + (0.6 + 1.8 * middle * rng.random()) * (fronts + streams)
    sea = np.maximum(sea, FREEZING_SEA)
    vapour = np.exp((sea - 300) / 15) * (1 + 0.2 * fractal_field(rng, coarse, 800, 2))
    air = climate + 1.5 * fractal_field(rng, coarse, 1000, 2.2)

    sea, air, vapour = (refine(field, shape) for field in (sea, air, vapour))
    ice = np.zeros(shape, dtype=np.float32)
    freezing = float(sea.min()) < FREEZING_SEA + 0.3 and season < 0.6
    if day:
        sea = sea + 1.2 * np.maximum(4 - wind, 0)
    if freezing:
        floes = fractal_field(rng, shape, 120, 1.6)
        ice = np.clip(2 * (FREEZING_SEA + 0.3 - sea) + 0.4 * floes, 0, 1)
        sea = sea - ice * rng.uniform(2, 14)

    soil, snow = np.zeros((2, *shape), dtype=np.float32)
    land, temperature = np.zeros(shape, dtype=bool), sea
    share = 0.0 if rng.random() < 0.5 else rng.beta(0.7, 3)
    if share > 0.01:
        hills = fractal_field(rng, shape, 1200, 2.1)
        hills -= float(np.quantile(hills, 1 - share))
        land = hills > 0
        sea = sea - rng.uniform(-1, 4) * smooth(land.astype(np.float32), 40)  # upwelling at coasts
        cover = refine(fractal_field(rng, coarse, 250, 1.8), shape)
        dryness = 1.5 - abs(abs(latitude) - 23) / 12 + rng.normal(0, 0.5)  # deserts lie near 23
        soil = 1 / (1 + np.exp(-3 * (cover + dryness)))
        height = 1.8 * np.maximum(hills, 0)  # [km]
        change = (4 + 14 * soil) if day else -4 - 4 * soil
        temperature = air + 3 * season + change + 0.8 * cover - LAPSE_RATE * height
        snow = np.clip((273 - temperature) / 4, 0, 1) * land
        temperature = np.where(land, np.where(snow > 0.5, temperature - 4, temperature), sea)
        ice[land] = 0
    codes = surface_codes(land, soil, snow, ice, glint)
    return Surface(codes, land, temperature, air, vapour, soil, snow, ice, glint)


def surface_codes(land, soil, snow, ice, glint):
    """Classify the surface: uint8 (H, W), index of SURFACES; the last that applies counts."""
    codes = np.where(glint > GLINT_SEEN, np.uint8(GLINT), np.uint8(SEA))
    codes[ice > 0.3] = ICE
    if land.any():
        codes[land] = LAND
        codes[land & (soil > 0.8)] = DESERT
        codes[snow > 0.3] = SNOW
        codes[maximum_filter(land, 5) != minimum_filter(land, 5)] = COAST
    return codes


def ground_reflectance(surface, channel, glint):
    """Reflectance (H, W) of the ground in a channel, 0 to 6 for S1 to S7, below a clear sky."""
    ground = OF_SEA[channel] + OF_GLINT[channel] * glint
    ground += surface.ice * (OF_ICE[channel] - ground)
    if surface.land.any():
        bare, green = OF_SOIL[channel], OF_VEGETATION[channel]
        land = green + (bare - green) * surface.soil
        land += surface.snow * (OF_SNOW[channel] - land)
        ground = np.where(surface.land, land, ground)
    return ground


def ancillary_data(rng, surface, sun):
    """Make the Ancillary of a scene: analyses and climatologies, coarser than the scene and biased.

    Args:
        rng: NumPy Generator.
        surface: A Surface.
        sun: A Sun.
    """
    shape = surface.land.shape
    is_day = sun.zenith.min() < 90
    error = 1.35 * fractal_field(rng, coarse_shape(shape), 500, 2.0)  # [K], of a climatology
    open_sea = ~surface.land & (surface.ice < 0.3)
    sea = smooth_within(surface.temperature, open_sea, 40, surface.air)
    land = smooth_within(surface.temperature, surface.land, 60, surface.air)
    land_error = 1.8 * error + rng.normal(0, 1.5)  # a forecast of the skin temperature is poorer
    land_mask = smooth(surface.land.astype(np.float32), 3) > 0.5
    temperature = np.where(land_mask, land + refine(land_error, shape), sea + refine(error, shape))
    soil = smooth(surface.soil, 80)
    reflectance = np.empty((6, *shape), dtype=np.float32)
    for channel in range(6):
        green = OF_VEGETATION[channel]
        climate = green + (OF_SOIL[channel] - green) * soil
        reflectance[channel] = np.where(land_mask, climate, OF_SEA[channel])
    return Ancillary(
        land=land_mask,
        temperature=temperature,
        vapour=smooth(surface.vapour, 100),
        reflectance=reflectance,
        sun_zenith=sun.zenith,
        glint=glint_reflectance(sun, np.full(shape, MEAN_WIND)) if is_day else 0 * sun.zenith,
        ice=smooth(np.maximum(surface.ice, surface.snow), 100),
    )


def smooth(field, km):
    """Blur a field (H, W) over some km, on a coarse grid."""
    step = coarse_step(field.shape, SMOOTH_ROWS)
    pixels = km * field.shape[0] / SCENE_KM / step
    blurred = gaussian_filter(field[::step, ::step], pixels, mode="nearest")
    return refine(blurred, field.shape)


def smooth_within(field, where, km, elsewhere):
    """Blur a field over some km, from the pixels `where` alone; far from them, use another."""
    step = coarse_step(field.shape, SMOOTH_ROWS)
    pixels = km * field.shape[0] / SCENE_KM / step
    weight = where[::step, ::step].astype(np.float32)
    total, blurred = (
        gaussian_filter(part, pixels, mode="nearest")
        for part in (weight, weight * field[::step, ::step])
    )
    few = np.float32(0.001)  # the weight of the other field
    filled = (blurred + few * elsewhere[::step, ::step]) / (total + few)
    return refine(filled, field.shape)
