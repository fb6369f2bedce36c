"""Match-ups of scenes with buoys, for tools/validate_sst.py.

The satellite's sea surface temperature (SST) is retrieved from S8 and S9 as if the sky were clear;
nothing is screened for cloud, and so every match-up has the best quality level. A mask that misses
cloud keeps match-ups that are too cold.
"""

import numpy as np

from tools.lib.scenes.fields import axes_km
from tools.lib.scenes.instrument import NADIR_KM, ORBIT_KM
from tools.lib.scenes.surface import GLINT, KM_PER_DEGREE, SEA

COLUMNS = (
    "time", "latitude", "longitude", "buoy_sst", "satellite_sst", "quality_level",
    "satellite_zenith",
)  # fmt: skip
BUOY_NOISE = 0.2  # [K], drifting buoys (O'Carroll et al. 2008)
DISPLACEMENT = 2.0  # [km], standard deviation along rows and columns of buoy and pixel
OFF_CENTRE = 0.003  # [degrees], most between the given position and the middle of the pixel
BEST_QUALITY = 5
EARTH_RADIUS = 6371.0  # [km]
ZERO_CELSIUS = 273.15  # [K]
# SST = a + b (S8 - 0 C) + c (S8 - S9), least squares over the clear sea of 60 synthetic scenes; the
# rest, 0.4 K, is vapour, haze and dust.
SPLIT_WINDOW = (273.45, 1.067, 0.404)


def positions(shape, latitude, longitude):
    """Positions of the pixels of a scene whose rows run from west to east.

    Args:
        shape: (H, W).
        latitude: Of the middle of the scene [degrees north].
        longitude: Of the middle of the scene [degrees east].

    Returns:
        Latitude and longitude, float64 (H, W), longitude from -180 to 180.
    """
    rows, cols = axes_km(shape)
    latitudes = latitude - rows / KM_PER_DEGREE + 0 * cols
    longitudes = longitude + cols / (KM_PER_DEGREE * np.cos(np.radians(latitudes)))
    return latitudes, (longitudes + 180) % 360 - 180


def satellite_zenith(shape):
    """Zenith angle of the satellite by column, (W,) [degrees], above a round Earth."""
    _, cols = axes_km(shape)
    angle = (cols[0] - NADIR_KM) / EARTH_RADIUS  # at the centre of the Earth
    away = (EARTH_RADIUS + ORBIT_KM) * np.sin(angle)
    up = (EARTH_RADIUS + ORBIT_KM) * np.cos(angle) - EARTH_RADIUS
    return np.degrees(np.abs(np.arctan2(away, up)))


def draw_matchups(rng, arrays, n, start, end):
    """Draw match-ups on pixels of open sea with data, clear or cloudy.

    Args:
        rng: NumPy Generator.
        arrays: Arrays of the scene by dataset name.
        n: Number of match-ups.
        start: Of the measurement, datetime in UTC.
        end: Of the measurement.

    Returns:
        List of n dictionaries by COLUMNS; empty if the scene has no such pixel.
    """
    bts, surface = arrays["bts"], arrays["surface"][..., 0]
    truth = arrays["surface_temperature"][..., 0]
    shape = surface.shape
    sea = (surface == SEA) | (surface == GLINT)
    places = np.argwhere(sea & (np.nan_to_num(bts[..., 1:]) > 0).all(axis=-1))
    if not len(places):
        return []
    rows, cols = rng.choice(places, n).T
    moved = tuple(
        np.clip(i + np.rint(rng.normal(0, DISPLACEMENT * shape[0] / 1200, n)).astype(int), 0, m - 1)
        for i, m in zip((rows, cols), shape, strict=True)
    )
    buoy = np.where(sea[moved], truth[moved], truth[rows, cols]) + rng.normal(0, BUOY_NOISE, n)
    s8, s9 = bts[rows, cols, 1].astype(float), bts[rows, cols, 2].astype(float)
    a, b, c = SPLIT_WINDOW
    matchups = {
        "time": [(start + share * (end - start)).isoformat() for share in rng.random(n)],
        "latitude": arrays["latitude"][rows, cols] + rng.uniform(-OFF_CENTRE, OFF_CENTRE, n),
        "longitude": arrays["longitude"][rows, cols] + rng.uniform(-OFF_CENTRE, OFF_CENTRE, n),
        "buoy_sst": buoy,
        "satellite_sst": a + b * (s8 - ZERO_CELSIUS) + c * (s8 - s9),
        "quality_level": [BEST_QUALITY] * n,
        "satellite_zenith": satellite_zenith(shape)[cols],
    }
    return [dict(zip(matchups, row, strict=True)) for row in zip(*matchups.values(), strict=True)]
