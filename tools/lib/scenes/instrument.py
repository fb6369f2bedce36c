"""The instrument: where sun and satellite stand, noise, and where a scene has no data."""

import math
from typing import NamedTuple

import numpy as np

from tools.lib.scenes.fields import (
    SCENE_KM,
    axes_km,
    bands,
    coarse_shape,
    coarse_step,
    fractal_field,
    refine,
)

ORBIT_KM = 814.5  # height of Sentinel-3
NADIR_KM = -60.0  # of the ground track, from the middle of the swath: it looks further to the west
BT_RANGE = (200.0, 320.0)  # [K], S7 to S9 in the SLSTR user guide
BT_NOISE = 0.05  # [K] at 270 K, typical of SLSTR
REFLECTANCE_NOISE = 0.002  # fraction of 1, in a 1 km pixel with the sun 50 degrees from the zenith
WATER_REFLECTS = 0.022  # Fresnel reflectance of a sea surface near normal incidence
MEAN_WIND = 7.0  # [m s-1]
GLINT_ROWS = 300  # rows of the grid of sun glint, or more: it is smooth


class Sun(NamedTuple):
    """Where the sun stands; `zenith` is float32 (H, W) [deg]."""

    zenith: np.ndarray
    azimuth: float  # clockwise from the direction of falling rows [rad]


class Damage(NamedTuple):
    """Where a scene has no data."""

    inside: np.ndarray  # bool, (H, W), False in the columns that the swath does not reach
    lost: np.ndarray  # bool, (H, W, 3), by thermal channel; reflectance is lost where all are
    gap_value: float  # what the file holds where data are lost: 0 or NaN


def place_sun(rng, shape, latitude, season, day):
    """Draw the Sun of a scene; the overpass is at 10 h or 22 h of local solar time."""
    rows, cols = axes_km(shape)
    declination = 23.4 * season * (1 if latitude >= 0 else -1)
    hour = 30 - 2 * abs(latitude) / 10 + rng.normal(0, 4)  # [deg], from noon
    sin_height = math.sin(math.radians(latitude)) * math.sin(math.radians(declination))
    sin_height += (
        math.cos(math.radians(latitude))
        * math.cos(math.radians(declination))
        * math.cos(math.radians(hour))
    )
    zenith = math.degrees(math.acos(sin_height))
    # South-east in the north, north-east in the south; the satellite moves to the south by day.
    azimuth = math.radians(rng.uniform(110, 150) if latitude >= declination else 60)
    if not day:
        zenith = rng.uniform(98, 150)
    toward = math.cos(azimuth) * -rows + math.sin(azimuth) * cols  # [km], to the sun
    zenith = zenith - toward / 111.2
    return Sun(np.clip(zenith, 0, 86 if day else 180).astype(np.float32), azimuth)


def glint_reflectance(sun, wind):
    """Reflectance of sun glint on a rough sea, float32 (H, W): Cox and Munk (1954).

    Args:
        sun: A Sun.
        wind: Speed of the wind [m s-1], (H, W).
    """
    step = coarse_step(wind.shape, GLINT_ROWS)
    zenith, wind = (np.radians(sun.zenith[::step, ::step]), wind[::step, ::step])
    _, cols = axes_km(sun.zenith.shape)
    view = np.arctan((cols[:, ::step] - NADIR_KM) / ORBIT_KM)  # to the satellite, from the zenith
    east = np.sin(zenith) * math.sin(sun.azimuth) - np.sin(view)
    north = np.sin(zenith) * math.cos(sun.azimuth)
    up = np.cos(zenith) + np.cos(view)
    tilt_squared = (east**2 + north**2) / up**2  # of the facets that reflect the sun
    variance = 0.003 + 0.00512 * wind
    facets = np.exp(-tilt_squared / variance) / (math.pi * variance)
    cosines = np.maximum(np.cos(zenith) * np.cos(view), 0.05)
    glint = WATER_REFLECTS * math.pi * facets * (1 + tilt_squared) ** 2 / (4 * cosines)
    return refine(np.minimum(glint, 0.6).astype(np.float32), sun.zenith.shape)


def draw_wind(rng, shape):
    """Draw the speed of the wind [m s-1] on the sea, (H, W)."""
    wind = refine(fractal_field(rng, coarse_shape(shape), 500, 1.9), shape)
    return np.maximum(rng.uniform(3, 11) + 2.5 * wind, 1)


def draw_damage(rng, shape):
    """Draw the Damage of a scene: slanted edges of the swath at its sides, and lost scan lines.

    Of 1500 columns, 33 to 45 are missing at the left and 18 to 27 at the right, as in real scenes.
    """
    height, width = shape
    slant = np.linspace(-0.5, 0.5, height)[:, None] * rng.choice([-1, 1])
    left = rng.uniform(36, 42) + 5 * slant
    right = rng.uniform(20, 25) + 4 * slant
    left, right = (np.maximum(1, np.round(edge * width / 1500)) for edge in (left, right))
    cols = np.arange(width)[None]
    inside = (cols >= left) & (cols < width - right)
    lost = np.zeros((height, width, 3), dtype=bool)
    for _ in range(rng.poisson(0.3)):
        row, n_rows = rng.integers(height), rng.integers(1, max(2, round(4 * height / SCENE_KM)))
        start, stop = np.sort(rng.integers(0, width, 2))
        channel = rng.integers(-3, 3)  # half of the losses are in all channels
        lost[row : row + n_rows, start:stop, slice(None) if channel < 0 else channel] = True
    return Damage(inside, lost, gap_value=np.nan if rng.random() < 0.3 else 0.0)


def repeat_pixels(field, factor):
    """Repeat every pixel of a field (H, W) `factor` times along rows and columns."""
    return field if factor == 1 else field.repeat(factor, axis=0).repeat(factor, axis=1)


def measure_reflectances(rng, sunlit, sun, damage, oversampling):
    """Measure S1 to S6 on the 1 km grid or a finer one.

    Args:
        rng: NumPy Generator.
        sunlit: (7, H, W), reflectance of S1 to S7.
        sun: A Sun; the lower it stands, the larger is the noise.
        damage: A Damage.
        oversampling: 1 for the 1 km grid, 2 for the 500 m grid.

    Returns:
        float64, (H * oversampling, W * oversampling, 6). Averaged to 1 km, the noise is the same.
    """
    light = np.cos(np.radians(50)) / np.cos(np.radians(sun.zenith))
    deviation = REFLECTANCE_NOISE * oversampling * np.clip(light, 0, 20)
    refs = np.empty((*(oversampling * n for n in damage.inside.shape), 6))
    for rows in bands(len(light)):
        fine_rows = slice(oversampling * rows.start, oversampling * rows.stop)
        for channel in range(6):
            signal, noise = (
                repeat_pixels(field[rows], oversampling) for field in (sunlit[channel], deviation)
            )
            signal = signal + noise * rng.standard_normal(noise.shape, dtype=np.float32)
            refs[fine_rows, :, channel] = np.maximum(signal, 1e-4)  # 0 would mean missing
    refs[repeat_pixels(damage.lost.all(axis=-1), oversampling)] = damage.gap_value
    refs[~repeat_pixels(damage.inside, oversampling)] = 0
    return refs
