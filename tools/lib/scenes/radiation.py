"""What the nine channels see: reflected sunlight and emitted radiation, layer by layer."""

import math
from typing import NamedTuple

import numpy as np

from tools.lib.scenes.fields import SCENE_KM, bands, coarse_shape, fractal_field, refine, rows_of
from tools.lib.scenes.instrument import BT_NOISE, BT_RANGE
from tools.lib.scenes.surface import ground_reflectance

BT_WAVELENGTHS = (3.742, 10.854, 12.023)  # S7, S8, S9 [um], SLSTR band centres
SUN_S7 = 11.7  # [W m-2 um-1], a 5770 K black body that fills 6.8e-5 sr
PLANCK_C1 = 1.191043e8  # 2 h c^2 [W m-2 sr-1 um4]
PLANCK_C2 = 14387.77  # h c / k [um K]
VAPOUR_DEPRESSION = (1.0, 2.6, 3.8)  # [K], tropical sea minus S7, S8, S9
VAPOUR_HEIGHT = 2.0  # [km], in which water vapour falls by a factor e
VAPOUR_ABSORPTION = 120.0  # optical depth in S4 of the vapour above a tropical sea, down and up


class Phase(NamedTuple):
    """What a cloud is made of."""

    reflectance: tuple  # S1 to S7, relative to a cloud that absorbs nothing; None: Clouds.drops
    absorption: tuple  # S7 to S9, per optical depth


WATER = Phase((1.00, 1.04, 1.06, 0.97, 0.82, 0.66, None), (0.35, 0.45, 0.58))
ICE = Phase((1.00, 1.04, 1.06, 0.80, 0.34, 0.44, 0.155), (0.40, 0.42, 0.55))
HALF_SPACE = 0.5  # of the S7 that drops reflect from the sun, what they do not emit
ICE_EMITS_S7 = 0.96  # emissivity of thick cloud of ice
DUST = (0.10, 0.20, 0.27, 0.00, 0.25, 0.20, 0.10)  # reflectance in S1 to S7 per optical depth
HAZE = (0.12, 0.08, 0.05, 0.00, 0.02, 0.01, 0.00)
DUST_COOLS = (0.3, 2.0, 1.2)  # [K], S7 to S9, per optical depth: S8 is colder than S9


class Aerosol(NamedTuple):
    """Particles in air without cloud: optical depth of dust and of haze, float32 (H, W)."""

    dust: np.ndarray
    haze: np.ndarray


def draw_aerosol(rng, shape, latitude):
    """Draw the Aerosol of a scene: haze everywhere, plumes of dust near deserts."""
    coarse = coarse_shape(shape)
    haze = np.maximum(rng.uniform(-0.15, 0.4) + 0.2 * fractal_field(rng, coarse, 500, 2.2), 0)
    plumes = fractal_field(rng, coarse, 600, 2.0) - rng.uniform(-0.3, 1.0)
    is_dusty = abs(latitude) < 45 and rng.random() < 0.4
    dust = np.maximum(plumes, 0) * (rng.uniform(0.3, 0.8) * is_dusty)
    return Aerosol(refine(dust.astype(np.float32), shape), refine(haze, shape))


def planck(temperature, wavelength):
    """Black-body radiance [W m-2 sr-1 um-1] of a temperature [K] at a wavelength [um]."""
    return PLANCK_C1 / wavelength**5 / np.expm1(PLANCK_C2 / wavelength / temperature)


def brightness_temperature(radiance, wavelength):
    """Invert `planck`: the temperature [K] of a radiance [W m-2 sr-1 um-1]."""
    return PLANCK_C2 / wavelength / np.log1p(PLANCK_C1 / wavelength**5 / radiance)


def albedo(optical_depth):
    """Reflectance of a cloud that absorbs nothing: two streams, asymmetry 0.85."""
    scaled = np.float32(0.15) * optical_depth
    return scaled / (2 + scaled)


def sunlight_at_ground(sun, layers):
    """Share of the sunlight that is not in the shadow of a cloud, float32 (H, W)."""
    light = 1.0
    for layer in layers:
        is_cloud = layer.optical_depth > 0
        if not is_cloud.any():
            continue
        reflected = albedo(layer.optical_depth)
        height = float(layer.height[is_cloud].mean())  # one for the layer: shadows stay whole
        zenith = math.radians(min(float(sun.zenith.mean()), 80))
        pixels = math.tan(zenith) * height * len(reflected) / SCENE_KM
        away = -math.sin(sun.azimuth) * pixels, math.cos(sun.azimuth) * pixels
        step = round(away[1]), round(-away[0])
        light = light * (1 - 0.9 * np.roll(reflected, step, axis=(0, 1)))
    return light


def reflect_sun(sun, surface, clouds, aerosol):
    """Reflectance of S1 to S7 that the satellite sees: float32, (7, H, W)."""
    light = sunlight_at_ground(sun, clouds.layers)
    sunlit = np.empty((7, *light.shape), dtype=np.float32)
    for rows in bands(len(light)):
        layers = [rows_of(layer, rows) for layer in clouds.layers]
        below = light[rows], rows_of(surface, rows), rows_of(aerosol, rows)
        sunlit[:, rows] = reflect_band(*below, layers, clouds.drops)
    return sunlit


def reflect_band(light, surface, aerosol, layers, drops):
    """Reflectance of S1 to S7, (7, h, W), of some rows of a scene; arguments as `reflect_sun`."""
    albedos = [albedo(layer.optical_depth) for layer in layers]
    transmittances = [(1 - reflected) ** 2 for reflected in albedos]
    seen_by_channel = []
    for channel in range(7):
        seen = light * ground_reflectance(surface, channel, surface.glint)
        seen += DUST[channel] * aerosol.dust + HAZE[channel] * aerosol.haze
        for layer, reflected, transmitted in zip(layers, albedos, transmittances, strict=True):
            water, ice = WATER.reflectance[channel] or drops, ICE.reflectance[channel]
            own = (water + (ice - water) * layer.ice) * reflected
            if channel == 3:  # vapour above the cloud absorbs, most where the air is warm
                vapour = surface.vapour * np.exp(-layer.height / VAPOUR_HEIGHT)
                own *= np.exp(-VAPOUR_ABSORPTION * vapour)
            seen = own + transmitted / (1 - reflected * seen) * seen
        seen_by_channel.append(seen)
    return seen_by_channel


def measure_temperatures(rng, sun, surface, clouds, aerosol, sunlit, damage):
    """Measure S7 to S9. The noise is added to the radiance, so cold pixels of S7 are the noisiest.

    Args:
        rng: NumPy Generator.
        sun: A Sun.
        surface: A Surface.
        clouds: The Clouds.
        aerosol: An Aerosol.
        sunlit: (H, W), reflectance in S7, which sees the sun too; 0 at night.
        damage: A Damage.

    Returns:
        float32, (H, W, 3), brightness temperature [K].
    """
    bts = np.empty(damage.lost.shape, dtype=np.float32)
    for rows in bands(len(bts)):
        layers = [rows_of(layer, rows) for layer in clouds.layers]
        sunlight = np.cos(np.radians(np.minimum(sun.zenith[rows], 90))) * sunlit[rows]
        for channel, wavelength in enumerate(BT_WAVELENGTHS):
            below = rows_of(surface, rows), rows_of(aerosol, rows)
            radiance = emit(*below, layers, clouds.drops, channel)
            if channel == 0:
                radiance += np.float32(SUN_S7 / math.pi) * sunlight
            noise = float(planck(270 + BT_NOISE, wavelength) - planck(270, wavelength))
            radiance += noise * rng.standard_normal(radiance.shape, dtype=np.float32)
            coldest, warmest = (float(planck(limit, wavelength)) for limit in BT_RANGE)
            measured = brightness_temperature(np.clip(radiance, coldest, warmest), wavelength)
            bts[rows, :, channel] = measured
    bts[damage.lost] = damage.gap_value
    bts[~damage.inside] = 0
    return bts


def emit(surface, aerosol, layers, drops, channel):
    """Thermal radiance (h, W) of some rows in a channel, 0 to 2 for S7 to S9 [W m-2 sr-1 um-1]."""
    wavelength = BT_WAVELENGTHS[channel]
    depression = VAPOUR_DEPRESSION[channel] * surface.vapour
    dust = DUST_COOLS[channel] * aerosol.dust
    radiance = planck(surface.temperature - depression - dust, wavelength)
    for layer in layers:
        water, ice = WATER.absorption[channel], ICE.absorption[channel]
        transmitted = np.exp(-(water + (ice - water) * layer.ice) * layer.optical_depth)
        above = depression * np.exp(-layer.height / VAPOUR_HEIGHT)
        own = (1 - transmitted) * planck(layer.temperature - above, wavelength)
        if channel == 0:  # S7 is scattered too, and what is scattered is not emitted
            water = 1 - HALF_SPACE * drops
            own *= water + (ICE_EMITS_S7 - water) * layer.ice
        radiance = transmitted * radiance + own
    return radiance
