"""Physical features of pixels, and tests that tell cloud from clear sky.

The surface is warm and smooth; cloud is colder, brighter and rougher. The background is the S9 that
a clear sky would have. Lengths are shares of the height of a scene, which is 1200 km.
"""

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter, maximum_filter, uniform_filter

from data_loader import BT_OFFSET, BT_SCALE, REFLECTANCE_OFFSET

SCENE_KM = 1200.0  # 1200 rows of 1 km
COARSE_ROWS = 150  # at most, of the grid on which the background is found: it is smooth
ENVELOPE_KM = 120.0  # side of the square whose warmest pixel is the first guess of the background
# Blurs of clear pixels [km] and their weights: a wide one counts where narrow ones find no pixel.
BACKGROUND_KM = ((20.0, 1.0), (60.0, 1e-2), (200.0, 1e-4))
GUESS_WEIGHT = 1e-7  # of the first guess, for scenes without clear pixels
# Water vapour cools S9 more than S8 and S7, and grows by a factor e in 15 K (Clausius-Clapeyron).
VAPOUR_S8_S9, VAPOUR_S7_S9 = 1.2, 2.8  # [K], these differences over a tropical sea of 300 K

THERMAL = ("departure", "s8_s9", "s7_s9", "texture")
FEATURES = {
    "day": (*THERMAL, "s1", "s4", "s5", "s3_s1", "s3_s2", "texture_s1"),
    "night": (*THERMAL, "texture_s7"),
}
LOG_OFFSETS = {"texture": 0.05, "texture_s7": 0.1, "texture_s1": 0.003}  # of logarithms: noise
LOG_OFFSETS |= {"s1": 0.01, "s4": 0.003, "s5": 0.01, "s3_s1": 0.01}
COMPRESSED = {"departure": 3.0, "s8_s9": 0.5, "s7_s9": 1.5}  # linear below, logarithmic above [K]


def measure(channels, valid):
    """Compute what needs no background.

    Args:
        channels: float32 (H, W, 9), normalised.
        valid: bool (H, W), False where a brightness temperature is missing; not all False.

    Returns:
        Fields by name, (H, W): `s9` and differences [K], reflectances, their ratios, standard
        deviations in 3 x 3 pixels, and bool `valid` and `is_day`.
    """
    refs = np.maximum(channels[..., :6] + np.float32(REFLECTANCE_OFFSET), 0)
    bts = channels[..., 6:] * np.float32(BT_SCALE) + np.float32(BT_OFFSET)
    mean = bts[valid].mean(axis=0, dtype=np.float64).astype(np.float32)
    bts = np.where(valid[..., None], bts, mean)
    s7, s8, s9 = np.moveaxis(bts, -1, 0)
    s1, s2, s3, s4, s5 = np.moveaxis(np.maximum(refs[..., :5], np.float32(1e-3)), -1, 0)
    fields = {"valid": valid, "is_day": (refs > 0).any(axis=-1)}  # at night all are 0
    fields |= {"s9": s9, "s8_s9": s8 - s9, "s7_s9": s7 - s9, "s1": s1, "s4": s4, "s5": s5}
    fields |= {"s3_s1": s3 / s1, "s3_s2": (s3 - s2) / (s3 + s2)}
    for name, field in {"texture": s9, "texture_s7": s7 - s9, "texture_s1": s1}.items():
        field = field - field.mean()  # float32 keeps few digits of a square
        mean = uniform_filter(field, 3)
        fields[name] = np.sqrt(np.maximum(uniform_filter(field * field, 3) - mean * mean, 0))
    return fields


def coarse_step(n_rows):
    """Every how many rows and columns `coarsen` takes one."""
    return -(-n_rows // COARSE_ROWS)


def coarsen(fields):
    """Take every n-th pixel, so that at most COARSE_ROWS rows remain."""
    step = coarse_step(len(fields["s9"]))
    return {name: field[::step, ::step].copy() for name, field in fields.items()}


def refine(field, shape):
    """Interpolate a field on the pixels that `coarsen` takes linearly to all of `shape`."""
    to_coarse = np.eye(2) / coarse_step(shape[0])  # row and column of a pixel in the field
    return affine_transform(field, to_coarse, output_shape=shape, order=1, mode="nearest")


def envelope(fields):
    """First guess of the background [K]: the warmest S9 around, (H, W)."""
    pixels = ENVELOPE_KM * len(fields["s9"]) / SCENE_KM
    smoothed = uniform_filter(fields["s9"], 3)
    warmest = np.where(fields["valid"], smoothed, smoothed.min())
    return gaussian_filter(maximum_filter(warmest, max(3, round(pixels))), pixels / 2)


def background(fields, probability):
    """Background [K], float32 (H, W): S9 of pixels that are probably clear, continued below cloud.

    `probability` is that of cloud, (H, W).
    """
    clear = np.where(fields["valid"], np.maximum(1 - 2 * probability, 0) ** 2, 0)
    total, weighted = GUESS_WEIGHT, GUESS_WEIGHT * envelope(fields)
    for km, weight in BACKGROUND_KM:
        pixels = km * len(clear) / SCENE_KM
        total = total + weight * gaussian_filter(clear, pixels)
        weighted = weighted + weight * gaussian_filter(clear * fields["s9"], pixels)
    return (weighted / total).astype(np.float32)


def pick(fields, background, where):
    """Values by name, (n,), of the pixels `where`, as departures from a clear sky."""
    values = {name: field[where] for name, field in fields.items()}
    expected = background[where]
    values["vapour"] = np.exp((expected - 300) / np.float32(15))
    values["departure"] = values["s9"] - expected
    values["s8_s9"] = values["s8_s9"] - VAPOUR_S8_S9 * values["vapour"]
    values["s7_s9"] = values["s7_s9"] - VAPOUR_S7_S9 * values["vapour"]
    return values


def feature_matrix(values, kind):
    """FEATURES of a kind, from the result of `pick`: float32 (n, n_features), about normal."""
    columns = []
    for name in FEATURES[kind]:
        column = values[name]
        if name in LOG_OFFSETS:
            column = np.log(column + np.float32(LOG_OFFSETS[name]))
        elif name in COMPRESSED:
            column = np.arcsinh(column / np.float32(COMPRESSED[name]))
        columns.append(column)
    return np.stack(columns, axis=-1)


def ramp(values, low, high):
    """0 below `low`, 1 above `high`, linear between."""
    return np.clip((values - low) / (high - low), 0, 1)


def physical_probability(values, kind):
    """Probability of cloud by tests with fixed limits, from the result of `pick`: float32 (n,).

    A test gives 0 where it finds nothing and 1 where it is sure of cloud; a pixel is clear if no
    test finds cloud. Tests of this kind are those of operational masks (Saunders and Kriebel 1988).
    """
    s7_s9, texture, vapour = values["s7_s9"], values["texture"], values["vapour"]
    cold = ramp(-values["departure"], 2, 6)
    rough = 0.5 * ramp(texture, 0.5, 2.5)  # clear pixels beside cloud are rough too
    thin = ramp(values["s8_s9"], 0.4, 1.5)  # thin cloud absorbs more in S9
    if kind == "night":
        # Droplets emit less in S7 than a surface; through thin cloud S7 sees more of warm ground.
        droplets = ramp(-s7_s9, 0.25 + 0.2 * vapour, 0.8 + 0.2 * vapour)
        semitransparent = ramp(s7_s9, 0.7, 2)
        # Cold land and ice: smooth, and black in all channels. S7 has too much noise below 240 K.
        black = 1 - ramp(np.abs(s7_s9), 0.3 + 0.2 * vapour, 0.6 + 0.2 * vapour)
        surface = black * (1 - ramp(texture, 0.3, 1)) * ramp(values["s9"], 240, 250)
        tests = cold * (1 - 0.8 * surface), rough, thin, droplets, semitransparent
    else:
        s1, s5 = values["s1"], values["s5"]
        sea = (1 - ramp(s5, 0.02, 0.04)) * (s1 < 0.15)  # black in S5
        land = ramp(s5 / s1, 1.1, 1.5)  # soil and plants are brighter in S5 than in S1
        # Snow and ice are dark in S5 and in S7, where all cloud reflects sunlight.
        snow = (1 - ramp(s5 / s1, 0.15, 0.3)) * ramp(s1, 0.12, 0.25) * (1 - ramp(s7_s9, 9, 18))
        # Glint is as bright in S7, which may be saturated, as in S1; droplets absorb in S7.
        warm = 1 - ramp(-values["departure"], 1.5, 3)
        glint = ramp(s7_s9 / np.minimum(s1, 0.3), 40, 80) * warm
        white = ramp(values["s3_s1"], 0.35, 0.7) * ramp(s1, 0.07, 0.13)  # the sea is bluish
        bright = white * (1 - glint) * (1 - np.maximum(land, snow))
        high = ramp(values["s4"], 0.008, 0.02) * (1 - snow)  # above the vapour that darkens S4
        known = 1 - 0.8 * np.maximum(np.maximum(sea, land), snow)
        tests = cold * known, rough * known, thin, bright, high
    return (1 - np.prod([1 - test for test in tests], axis=0)).astype(np.float32)
