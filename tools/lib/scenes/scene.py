"""One scene from its weather to its datasets."""

import math

import numpy as np

from tools.lib.scenes.bayes_label import bayes_label
from tools.lib.scenes.clouds import THINNEST_CLOUD, make_clouds
from tools.lib.scenes.instrument import (
    draw_damage,
    draw_wind,
    glint_reflectance,
    measure_reflectances,
    place_sun,
)
from tools.lib.scenes.matchups import positions as pixel_positions
from tools.lib.scenes.radiation import draw_aerosol, measure_temperatures, reflect_sun
from tools.lib.scenes.surface import ancillary_data, latitude_at, make_surface

SUN_S1_TO_S6 = (1837.0, 1526.0, 956.0, 366.0, 248.0, 78.0)  # [mW m-2 nm-1], ESA, rounded
GROSS_CLOUD = 273.15  # [K], `summary` is set where S9 is colder
OVERSAMPLING = {"1km": 1, "500m": 2}  # pixels of refs per pixel of bts, along rows and columns


def draw_scene(
    rng,
    height,
    width,
    day=True,
    cloud_cover=0.845,
    quantiles=None,
    label="bayes",
    label_noise=(0.07, 0.14),
    refs_grid="1km",
    positions=False,
):
    """Make one synthetic scene.

    Args:
        rng: NumPy Generator.
        height: Rows of the 1 km grid [pixels]; 1200 for SLSTR. A scene of fewer rows shows the same
            swath with larger pixels.
        width: Columns of the 1 km grid [pixels]; 1500 for SLSTR.
        day: Whether the scene is in daylight; at night all reflectances are 0.
        cloud_cover: Share of this scene that is cloud.
        quantiles: Where it is in the distributions of latitude and of weather, 0 to 1; random if
            None.
        label: "bayes", "random" (the truth with errors at random), or "none".
        label_noise: Shares of cloud labelled clear, and of clear labelled cloud, if it is random.
        refs_grid: "1km", or "500m" for reflectances of twice the rows and columns.
        positions: Whether to add `latitude` and `longitude` [degrees], (H, W).

    Returns:
        The arrays by dataset name, in the published dtypes: `refs` (H, W, 6) reflectance of S1-S6,
        `bts` (H, W, 3) brightness temperature of S7-S9 [K], `bayes` (H, W, 1) 0 or 255, `rads`
        (H, W, 6) [mW m-2 sr-1 nm-1] and `summary` (H, W, 1) 0 or 255. Real scenes do not have
        `truth` (H, W, 1), 1 for true cloud, `optical_depth` and `surface_temperature` [K], and
        `surface` and `cloud_regime`, indices of SURFACES and REGIMES.
    """
    shape = height, width
    latitude_quantile, weather_quantile = rng.random(2) if quantiles is None else quantiles
    latitude, season = latitude_at(latitude_quantile), rng.uniform(-1, 1)
    sun = place_sun(rng, shape, latitude, season, day)
    wind = draw_wind(rng, shape)
    glint = glint_reflectance(sun, wind) if day else np.zeros(shape, np.float32)
    surface = make_surface(rng, shape, latitude, season, day, wind, glint)
    clouds = make_clouds(rng, shape, surface, latitude, cloud_cover, weather_quantile)
    aerosol = draw_aerosol(rng, shape, latitude)
    damage = draw_damage(rng, shape)

    sunlit = np.zeros((7, *shape), np.float32)
    if day:
        sunlit = reflect_sun(sun, surface, clouds, aerosol)
    bts = measure_temperatures(rng, sun, surface, clouds, aerosol, sunlit[6], damage)
    lit = damage._replace(inside=damage.inside & day)  # at night no pixel has reflectance
    refs = measure_reflectances(rng, sunlit, sun, lit, OVERSAMPLING[refs_grid])

    valid = damage.inside & ~damage.lost.any(axis=-1)
    truth = clouds.optical_depth > THINNEST_CLOUD
    irradiance = np.array(SUN_S1_TO_S6, dtype=np.float32)
    light = np.where(lit.inside, np.cos(np.radians(sun.zenith)), 0)[..., None] / math.pi
    arrays = {
        "refs": refs,
        "bts": bts,
        "rads": np.moveaxis(sunlit[:6], 0, -1) * light * irradiance,
        "summary": 255.0 * (valid & (bts[..., 2] < GROSS_CLOUD))[..., None],
        "truth": truth.astype(np.uint8)[..., None],
        "optical_depth": clouds.optical_depth[..., None],
        "surface_temperature": surface.temperature[..., None],
        "surface": surface.codes[..., None],
        "cloud_regime": clouds.regime[..., None],
    }
    if label != "none":
        is_cloud = label_scene(rng, label, label_noise, truth, refs, bts, surface, sun)
        arrays["bayes"] = 255.0 * (is_cloud & valid)[..., None]
    if positions:
        where = pixel_positions(shape, latitude, rng.uniform(-180, 180))
        arrays["latitude"], arrays["longitude"] = where
    return arrays


def label_scene(rng, label, label_noise, truth, refs, bts, surface, sun):
    """Label a scene, bool (H, W); see `make_scene`. Pixels without data may have any label."""
    if label == "random":
        missed, false = label_noise
        rate = np.where(truth, np.float32(missed), np.float32(false))
        return truth ^ (rng.random(truth.shape, dtype=np.float32) < rate)
    factor = len(refs) // len(truth)
    if factor > 1:
        height, width = truth.shape
        refs = refs.reshape(height, factor, width, factor, 6).mean(axis=(1, 3))
    return bayes_label(refs, bts, ancillary_data(rng, surface, sun))
