"""The cloud field of a scene: one weather, several regimes of cloud, each with its own geometry.

Every scene has an air-mass coordinate: the distance from a front, positive in the warm air, which
lows wind up. Regimes have a profile along it. Their textures are drawn in coordinates that the same
lows wind up, so that streaks follow the flow. The strongest regime makes the cloud of a pixel.
"""

import math
from typing import NamedTuple

import numpy as np

from tools.lib.scenes.fields import (
    axes_km,
    cell_field,
    coarse_shape,
    coarse_step,
    fractal_field,
    refine,
    sample,
)
from tools.lib.scenes.surface import LAPSE_RATE

TROPOPAUSE = 208.0  # [K], coldest cloud top
THINNEST_CLOUD = 0.03  # optical depth from which a pixel is cloud: Sassen and Cho (1992)
THICKEST_CLOUD = 100.0  # optical depth of a layer


class Regime(NamedTuple):
    """A kind of cloud; the excess of cloudiness over its threshold gives depth and height."""

    layer: int  # 0 low, 1 deep, 2 cirrus
    stretch: float  # length over width of its structures along the flow
    edge_depth: float  # optical depth of its frayed edge
    depth: float  # gained in its middle
    tops: tuple[float, float]  # range of a scene's lowest tops [km]
    rise: float  # [km]
    patchiness: float  # standard deviations of the middle scales, of cells and rolls
    detail: float  # of the small scales
    contrast: float  # of the logarithm of optical depth, by middle and small scales


REGIMES = {
    "fog": Regime(0, 1.6, 0.7, 2.5, (0.15, 0.5), 0.15, 0.25, 0.06, 0.4),
    "closed cells": Regime(0, 1.5, 0.5, 1.8, (0.8, 1.6), 0.7, 0.5, 0.15, 0.7),
    "open cells": Regime(0, 1.6, 0.35, 1.6, (1.2, 2.0), 1.4, 0.75, 0.25, 0.8),
    "cumulus": Regime(0, 2.2, 0.3, 1.4, (0.8, 1.6), 1.2, 0.75, 0.3, 0.8),
    "front": Regime(1, 3.5, 0.4, 4.0, (3.0, 5.0), 2.2, 0.25, 0.08, 0.4),
    "convection": Regime(1, 1.3, 0.6, 6.0, (3.0, 5.0), 3.5, 0.6, 0.2, 0.5),
    "cirrus": Regime(2, 5.0, 0.0, 0.0, (7.5, 10.0), 0.4, 0.3, 0.1, 0.4),
}
# How much of a change of cloud cover falls to each layer: low cloud fills the gaps of the others.
LAYER_SHARES = (1.0, 0.4, 0.4)
EDGE = 0.6  # excess of cloudiness over which an edge frays
CIRRUS_GROWTH = 1.1  # of the logarithm of the optical depth of cirrus, per unit of excess
REGIME_CODES = {name: code for code, name in enumerate(("clear", *REGIMES))}

# Weather by name: how strong lows wind up the air [rad], and for each regime its bias, in standard
# deviations of its texture, at distances from the front [100 km]; warm air is positive.
WEATHER = {
    "cyclone": ((2.0, 5.5), {
        "open cells": ((-9, 0.6), (-2, 0.9), (-0.7, -0.6), (0, -2.5)),
        "front": ((-0.6, -3.0), (0, 1.6), (2.0, 1.6), (4.5, -0.8)),
        "closed cells": ((1, -2.5), (3, 0.4), (8, 0.8)),
        "cumulus": ((-4, 0.0), (-1.5, -0.5), (5, -0.2)),
        "cirrus": ((-1.0, -2.9), (0.5, 0.2), (3.0, 0.5), (7.0, -1.4)),
    }),
    "front": ((0.3, 1.5), {
        "open cells": ((-9, 0.4), (-2, 0.5), (-0.8, -0.8), (0, -2.5)),
        "front": ((-0.5, -3.0), (0, 1.4), (2.5, 1.5), (5, -1.0)),
        "cumulus": ((-6, 0.2), (-1, -0.8), (3, -0.8), (6, 0.2)),
        "closed cells": ((2, -2.5), (4, 0.2), (8, 0.4)),
        "cirrus": ((-1.0, -2.9), (0.5, 0.1), (4.0, 0.6), (8.0, -1.4)),
    }),
    "outbreak": ((0.5, 2.5), {
        "open cells": ((-8, 0.2), (0, 0.6), (6, 0.6)),
        "closed cells": ((2, -2.0), (5, 0.8)),
        "front": ((-5, 0.3), (-3, -1.5), (7, -1.5), (9, 1.0)),
        "cirrus": ((-6, 0.1), (-3, -2.2), (6, -1.9)),
    }),
    "stratus": ((0.3, 2.0), {
        "fog": ((-6, 0.8), (0, 0.6), (4, -0.8)),
        "closed cells": ((-4, -1.0), (1, 0.5), (8, 0.8)),
        "front": ((-8, 0.8), (-6, -1.2), (6, -1.2), (8, 0.4)),
        "cirrus": ((-8, -0.4), (0, -1.9), (8, -0.4)),
    }),
    "mixed": ((1.0, 4.0), {
        "closed cells": ((-8, 0.3), (0, 0.3), (8, 0.0)),
        "front": ((-7, -1.0), (-2, 0.6), (0, -0.5), (5, 0.7), (8, -0.5)),
        "cumulus": ((-8, 0.0), (8, 0.2)),
        "cirrus": ((-8, -1.4), (-3, 0.2), (3, -1.0), (7, 0.2)),
    }),
    "trades": ((0.2, 1.0), {
        "closed cells": ((-8, 1.0), (-3, 0.4), (0, -1.5)),
        "open cells": ((-5, -1.5), (-2, 0.3), (2, 0.0), (4, -2.0)),
        "cumulus": ((-3, -0.5), (3, 0.4), (8, 0.3)),
        "convection": ((4, -2.5), (8, 0.2)),
        "cirrus": ((-8, -1.9), (8, -0.5)),
    }),
    "tropics": ((0.2, 1.2), {
        "cumulus": ((-8, 0.3), (8, 0.3)),
        "convection": ((-8, -1.5), (-2, -0.3), (3, 1.0), (8, -0.3)),
        "cirrus": ((-8, -1.4), (0, -0.1), (8, -0.1)),
    }),
}  # fmt: skip
EXTRATROPICAL = {"cyclone": 0.22, "front": 0.26, "outbreak": 0.16, "stratus": 0.18, "mixed": 0.18}
TROPICAL = {"trades": 0.5, "tropics": 0.3, "stratus": 0.1, "front": 0.1}


class CloudLayer(NamedTuple):
    """A layer of cloud; fields (H, W), float32."""

    optical_depth: np.ndarray  # 0 where there is no cloud
    height: np.ndarray  # of the tops [km]
    temperature: np.ndarray  # of the tops [K]
    ice: np.ndarray  # share of ice


class Clouds(NamedTuple):
    """The clouds of a scene."""

    layers: list  # CloudLayers from low to high
    regime: np.ndarray  # uint8 (H, W), REGIME_CODES of the uppermost cloud
    drops: float  # reflectance in S7 of thick cloud of water, relative to S1: small drops have more

    @property
    def optical_depth(self):
        """Optical depth of all layers, float32 (H, W)."""
        return sum(layer.optical_depth for layer in self.layers)


def flow_coordinates(rng, shape, winding, sense):
    """Draw the flow: coordinates that lows have wound up and eddies have bent.

    Args:
        rng: NumPy Generator.
        shape: (H, W).
        winding: Range of the angle by which the middle of a low has turned [rad].
        sense: 1 or -1, the direction in which lows turn.

    Returns:
        Two float32 (H, W) [km]: across the flow, 0 at the front, and along it.
    """
    y, x = (axis + np.zeros(shape, np.float32) for axis in axes_km(shape))
    direction = rng.uniform(0, 2 * math.pi)
    low_y, low_x = rng.uniform(-700, 700), rng.uniform(-850, 850)
    lows = [(low_y, low_x, rng.uniform(*winding))]
    if rng.random() < 0.3:
        lows.append((rng.uniform(-900, 900), rng.uniform(-900, 900), rng.uniform(*winding) * 0.6))
    for centre_y, centre_x, angle in lows:
        dy, dx = y - centre_y, x - centre_x
        radius = np.hypot(dy, dx)
        turn = sense * angle * np.exp(-radius / rng.uniform(250, 450))
        cos, sin = np.cos(turn), np.sin(turn)
        y, x = centre_y + cos * dy - sin * dx, centre_x + sin * dy + cos * dx
    y = y + 45 * fractal_field(rng, shape, 700, 2.3) + 9 * fractal_field(rng, shape, 100, 2)
    x = x + 45 * fractal_field(rng, shape, 700, 2.3) + 9 * fractal_field(rng, shape, 100, 2)
    y, x = y - low_y, x - low_x
    cos, sin = math.cos(direction), math.sin(direction)
    return cos * y - sin * x, sin * y + cos * x


def regime_textures(rng, shape, across, along):
    """Draw the textures of each regime, stretched along the flow.

    Returns:
        {name of a regime: (large scales, middle scales)}, float32 (H, W), about standard normal.
    """

    def fractal(scale, slope):
        return fractal_field(rng, shape, scale, slope)

    cells = cell_field(rng, shape, rng.uniform(25, 55))
    tiles = {
        "fog": (fractal(500, 2.3), fractal(60, 1.8)),
        "closed cells": (fractal(500, 2.0), 0.4 * fractal(50, 1.6) - 0.9 * cells),
        "open cells": (fractal(400, 1.9), 0.3 * fractal(40, 1.6) + 1.1 * cells),
        "cumulus": (fractal(400, 2.0), fractal(50, 1.6)),
        "front": (fractal(600, 1.9), fractal(120, 1.6)),
        "convection": (fractal(500, 2.0), fractal(150, 2.0)),
        "cirrus": (fractal(500, 1.75), fractal(100, 1.5)),
    }
    return {
        name: tuple(
            sample(tile, across, along / np.float32(REGIMES[name].stretch)) for tile in pair
        )
        for name, pair in tiles.items()
    }


def make_clouds(rng, shape, surface, latitude, cloud_cover, weather_quantile):
    """Draw the clouds of a scene.

    Args:
        rng: NumPy Generator.
        shape: (H, W).
        surface: A Surface.
        latitude: Of the scene [deg].
        cloud_cover: Share of this scene that is cloud.
        weather_quantile: Where its weather is in their distribution, 0 to 1.
    """
    coarse = coarse_shape(shape)
    table = TROPICAL if abs(latitude) < 30 else EXTRATROPICAL
    chosen = np.searchsorted(np.cumsum([*table.values()][:-1]), weather_quantile, side="right")
    winding, profiles = WEATHER[[*table][chosen]]
    across, along = flow_coordinates(rng, coarse, winding, sense=1 if latitude >= 0 else -1)
    textures = regime_textures(rng, coarse, across, along)
    distance = (across + 60 * sample(fractal_field(rng, coarse, 400, 2), across, along)) / 100
    humidity = sample(fractal_field(rng, coarse, 1100, 2.0), across, along / 2)
    humidity = 0.95 * humidity - 0.35 * np.minimum(humidity, 0) ** 2  # dry areas are large
    if surface.land.any():  # dry air above land and ice sheets, or convection
        step = coarse_step(shape)
        humidity -= rng.uniform(-0.3, 1.5) * surface.land[::step, ::step]

    detail = fractal_field(rng, shape, 30, 1.2)
    broad = sample(fractal_field(rng, coarse, 300, 2), across, along / 2)
    fields = []
    for layer in range(len(LAYER_SHARES)):
        in_layer = {name: p for name, p in profiles.items() if REGIMES[name].layer == layer}
        cloudiness, codes, middle = strongest_regime(in_layer, textures, distance)
        codes = repeat_pixels(codes, shape)
        field = refine(cloudiness + humidity, shape) + by_regime("detail", codes) * detail
        fields.append((field, codes, refine(middle + broad, shape) + 0.5 * detail))

    step = -(-shape[0] // 300)  # a sample of the pixels is enough
    scaled = [
        field[::step, ::step] / share
        for (field, *_), share in zip(fields, LAYER_SHARES, strict=True)
    ]
    edge = np.quantile(np.max(scaled, axis=0), 1 - cloud_cover)
    layers = [
        make_layer(rng, field - share * edge, codes, patches, surface.air)
        for (field, codes, patches), share in zip(fields, LAYER_SHARES, strict=True)
    ]
    regime = np.zeros(shape, dtype=np.uint8)
    for layer, (_, codes, _) in zip(layers, fields, strict=True):
        regime = np.where(layer.optical_depth > THINNEST_CLOUD, codes, regime)
    clouds = Clouds(layers, regime, drops=rng.uniform(0.08, 0.3))
    several_thin_layers = (regime == 0) & (clouds.optical_depth > THINNEST_CLOUD)
    regime[several_thin_layers] = REGIME_CODES["cirrus"]
    return clouds


def strongest_regime(profiles, textures, distance):
    """Choose the regime of each pixel of a layer.

    Args:
        profiles: Those of a weather's regimes, by name.
        textures: As `regime_textures` returns them.
        distance: From the front [100 km], (H, W).

    Returns:
        Its cloudiness, its REGIME_CODES, and the middle scales of its texture, (H, W).
    """
    cloudiness = []
    for name, profile in profiles.items():
        at, bias = np.array(profile, dtype=np.float32).T
        large, middle = textures[name]
        texture = 0.8 * large + REGIMES[name].patchiness * middle
        cloudiness.append(texture + np.interp(distance, at, bias).astype(np.float32))
    strongest = np.argmax(cloudiness, axis=0)
    codes = np.array([REGIME_CODES[name] for name in profiles], dtype=np.uint8)[strongest]
    patches = np.stack([textures[name][1] for name in profiles])
    middle = np.take_along_axis(patches, strongest[None], axis=0)[0]
    return np.max(cloudiness, axis=0), codes, middle


def repeat_pixels(codes, shape):
    """Repeat the pixels of a coarse field to the grid of a scene."""
    step = coarse_step(shape)
    return codes.repeat(step, axis=0).repeat(step, axis=1)[: shape[0], : shape[1]]


def by_regime(attribute, codes):
    """A number of each pixel's regime, float32; codes (H, W) of REGIME_CODES."""
    numbers = [0.0] + [getattr(regime, attribute) for regime in REGIMES.values()]
    return np.array(numbers, dtype=np.float32)[codes]


def make_layer(rng, excess, codes, patches, air):
    """Make a CloudLayer.

    Args:
        rng: NumPy Generator.
        excess: (H, W), cloudiness above the threshold of cloud, positive in cloud.
        codes: (H, W), REGIME_CODES.
        patches: (H, W), middle and small scales of the texture.
        air: (H, W), temperature at sea level [K].
    """
    lowest = np.array([0.0] + [rng.uniform(*regime.tops) for regime in REGIMES.values()])
    inside = np.maximum(excess, 0)
    rise = by_regime("rise", codes) * (inside + 0.35 * patches)
    height = np.maximum(lowest.astype(np.float32)[codes] + rise, 0.1)
    is_cirrus = (codes == REGIME_CODES["cirrus"]).all()
    if is_cirrus:  # a veil without an edge: around what counts as cloud, it cannot be seen
        depth = THINNEST_CLOUD * np.exp(np.minimum(CIRRUS_GROWTH * excess, 4))
    else:
        depth = by_regime("depth", codes) * inside ** np.float32(1.6)
        depth += by_regime("edge_depth", codes) * np.minimum(inside / EDGE, 1)
        depth *= np.exp(by_regime("contrast", codes) * patches)
        depth = np.minimum(depth, THICKEST_CLOUD)
    temperature = np.maximum(air - LAPSE_RATE * height, TROPOPAUSE)
    ice = np.clip((252 - temperature) / 22, 0, 1)
    return CloudLayer(depth, height, temperature, ice)
