"""Make synthetic Sentinel-3 SLSTR scenes in the published file format.

A scene is drawn in four steps: a surface of sea and land, clouds above it, what the nine channels
see (emitted and reflected light, layer by layer), and defects: noise, gaps, borders and an
imperfect Bayesian label. Structures scale with the scene, so a small scene resembles a large one.
Values are plausible, not calibrated: the scenes are for tests and demonstrations.
"""

import argparse
import logging
import math
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from _command import exit_status  # isort: skip  (before all packages)

import h5py
import numpy as np

from harness.console import log_to_screen
from harness.errors import UserError
from harness.files import replacing

log = logging.getLogger("make_scenes")

BT_WAVELENGTHS = (3.742, 10.854, 12.023)  # S7, S8, S9 [um], SLSTR band centres
BT_RANGE = (200.0, 320.0)  # [K], S7 to S9 in the SLSTR user guide
BT_NOISE = 0.05  # [K] at 270 K, typical of SLSTR
REFLECTANCE_NOISE = 0.002  # fraction of 1, in a 1 km pixel
SUN_S1_TO_S6 = (1837.0, 1526.0, 956.0, 366.0, 248.0, 78.0)  # [mW m-2 nm-1], ESA, rounded
SUN_S7 = 11.7  # [W m-2 um-1], a 5770 K black body that fills 6.8e-5 sr
SUN_ZENITH = math.radians(50)
OVERSAMPLING = {"1km": 1, "500m": 2}  # pixels of refs per pixel of bts, along rows and columns

PLANCK_C1 = 1.191043e8  # 2 h c^2 [W m-2 sr-1 um4]
PLANCK_C2 = 14387.77  # h c / k [um K]
AIR_TEMPERATURES = (272.0, 301.0)  # [K] at sea level, polar to tropical
FREEZING_SEA = 271.3  # [K], salt water
COLD_SEA = 277.0  # [K], colder water is often labelled cloud
GROSS_CLOUD = 273.15  # [K], `summary` is set where S9 is colder
LAPSE_RATE = 6.5  # [K km-1], standard atmosphere
TROPOPAUSE = 208.0  # [K], coldest cloud top
VAPOUR_DEPRESSION = (1.0, 3.0, 5.0)  # [K], tropical sea minus S7, S8, S9
VAPOUR_HEIGHT = 2.0  # [km], in which water vapour falls by a factor e

# Reflectance in S1 to S7, fraction of 1; water vapour leaves little of S4 near the ground.
SEA = (0.035, 0.020, 0.010, 0.001, 0.005, 0.003, 0.020)
SOIL = (0.150, 0.220, 0.300, 0.005, 0.380, 0.320, 0.100)
VEGETATION = (0.080, 0.050, 0.400, 0.002, 0.220, 0.100, 0.030)
SNOW = (0.850, 0.820, 0.780, 0.010, 0.120, 0.080, 0.020)

ONE_DAY = datetime(2019, 10, 1)
ONE_DAY_STEP = timedelta(seconds=89)  # 970 scenes, as published, fill the day
SSTS_START = datetime(2018, 6, 1, 0, 41, 7)
SSTS_STEP = timedelta(days=3, hours=13, minutes=31)
GRANULE = timedelta(minutes=3)
PROCESSING = timedelta(hours=28)

LIMITS = {  # lowest and highest value of an option
    "height": (32, math.inf),
    "width": (40, math.inf),
    "train": (0, 86400),  # names repeat after 86400 steps
    "inference": (0, 86400),
    "seed": (0, math.inf),
    "day_share": (0, 1),
    "cloud_cover": (0.01, 0.99),
    "label_noise": (0, 0.5),
}


class Phase(NamedTuple):
    """What a cloud is made of."""

    reflectance: tuple  # S1 to S7, relative to a cloud that absorbs nothing
    absorption: tuple  # S7 to S9, per optical depth


WATER = Phase((1, 1, 1, 0.04, 0.85, 0.65, 0.20), (0.35, 0.45, 0.60))
ICE = Phase((1, 1, 1, 0.50, 0.35, 0.25, 0.03), (0.40, 0.40, 0.60))


class CloudType(NamedTuple):
    """A kind of cloud; `depth` and `rise` are gained per unit of excess (see `make_clouds`)."""

    scale: float  # of the largest structures, share of the scene's height
    slope: float  # of the amplitude spectrum; smaller is rougher
    stretch: float  # length over width of the structures
    edge_depth: float  # optical depth at the edge
    depth: float  # optical depth
    tops: tuple[float, float]  # range of a scene's lowest tops [km]
    rise: float  # [km]
    phase: Phase


CLOUD_TYPES = (  # from low to high
    CloudType(0.40, 1.7, 1.5, 0.30, 10.0, (0.4, 1.8), 0.2, WATER),  # stratus
    CloudType(0.05, 1.8, 1.0, 0.30, 10.0, (0.8, 2.5), 0.8, WATER),  # cumulus
    CloudType(0.50, 1.8, 2.0, 0.30, 15.0, (3.0, 7.0), 2.0, ICE),  # frontal
    CloudType(0.25, 1.6, 4.0, 0.05, 0.7, (8.0, 11.0), 0.5, ICE),  # cirrus
)


class Surface(NamedTuple):
    """The ground below the clouds; fields (H, W), float32 unless noted."""

    land: np.ndarray  # bool
    temperature: np.ndarray  # [K]
    vapour: np.ndarray  # water vapour, about 1 over a tropical sea
    soil: np.ndarray  # share of bare soil on land; the rest is vegetation
    snow: np.ndarray  # share of snow on land
    glint: np.ndarray  # reflectance that sun glint adds to the sea


class CloudLayer(NamedTuple):
    """One cloud type in one scene; fields (H, W), float32."""

    phase: Phase
    optical_depth: np.ndarray  # 0 where there is no cloud
    albedo: np.ndarray  # of such a cloud if it absorbs nothing
    temperature: np.ndarray  # of the tops [K]
    height: float  # of the lowest tops [km]


class Damage(NamedTuple):
    """Where a scene has no data."""

    inside: np.ndarray  # bool, (H, W), False in the border
    lost: np.ndarray  # bool, (H, W, 3), by thermal channel; reflectance is lost where all are
    gap_value: float  # what the file holds where data are lost: 0 or NaN


def fractal_field(rng, height, width, scale, slope, stretch=1.0):
    """Draw a Gaussian random field with a power-law spectrum.

    Args:
        rng: NumPy Generator.
        height: Rows [pixels].
        width: Columns [pixels].
        scale: Size of the largest structures, share of `height`.
        slope: The amplitude falls as wavenumber**-slope.
        stretch: Length over width of the structures, which have a random direction.

    Returns:
        float32, (height, width), mean 0, standard deviation 1, continuous across opposite sides.
    """
    import scipy.fft  # takes longer to import than --help should

    rows = (scipy.fft.fftfreq(height) * height).astype(np.float32)[:, None]  # cycles per height
    cols = (scipy.fft.rfftfreq(width) * height).astype(np.float32)
    angle = rng.uniform(0, math.pi)
    along = math.cos(angle) * rows + math.sin(angle) * cols
    across = math.cos(angle) * cols - math.sin(angle) * rows
    wavenumber_squared = along**2 * stretch + across**2 / stretch + scale**-2
    noise = rng.standard_normal((height, width), dtype=np.float32)
    spectrum = scipy.fft.rfft2(noise) * wavenumber_squared ** (-slope / 2)
    spectrum[0, 0] = 0  # the mean
    field = scipy.fft.irfft2(spectrum, s=(height, width))
    return field / field.std()


def planck(temperature, wavelength):
    """Black-body radiance [W m-2 sr-1 um-1] of a temperature [K] at a wavelength [um]."""
    return PLANCK_C1 / wavelength**5 / np.expm1(PLANCK_C2 / wavelength / temperature)


def brightness_temperature(radiance, wavelength):
    """Invert `planck`: the temperature [K] of a radiance [W m-2 sr-1 um-1]."""
    return PLANCK_C2 / wavelength / np.log1p(PLANCK_C1 / wavelength**5 / radiance)


def make_surface(rng, height, width, air_temperature, day):
    """Draw a Surface (height, width): sea with fronts and glint, land with hills and snow.

    The sea is about as warm as the air [K]; land is warmer by day and colder at night.
    """
    hills = fractal_field(rng, height, width, scale=0.7, slope=2.0)
    eddies = fractal_field(rng, height, width, scale=0.3, slope=2.2)
    cover = fractal_field(rng, height, width, scale=0.2, slope=1.7)
    hills -= float(np.quantile(hills, 1 - rng.beta(0.7, 1.2)))  # mean land share 0.37
    land = hills > 0
    northward = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    front = np.tanh(8 * (eddies - rng.normal(0, 0.5)))
    sea_temperature = air_temperature + rng.normal(0, 3) * northward + 0.7 * eddies + 1.2 * front
    soil = 1 / (1 + np.exp(-3 * (cover - rng.normal(0, 0.7))))
    warming = 3 + 12 * soil if day else 2 * cover - 6
    land_temperature = air_temperature + warming - 0.8 * LAPSE_RATE * hills  # in units of 0.8 km
    temperature = np.where(land, land_temperature, np.maximum(sea_temperature, FREEZING_SEA))
    vapour = math.exp((air_temperature - 300) / 15) * (1 + 0.2 * np.roll(eddies, height // 2, 0))
    snow = np.clip((271 - temperature) / 4, 0, 1) * land
    across = np.linspace(0, 1, width, dtype=np.float32) - rng.uniform(0.1, 0.9)
    glint = rng.uniform(0, 0.2) * np.exp(-((across / 0.12) ** 2)) * (1 + 0.1 * eddies)
    return Surface(land, temperature, vapour, soil, snow, glint)


def make_clouds(rng, height, width, air_temperature, cloud_cover):
    """Draw cloud layers that together cover the share `cloud_cover` of the scene.

    Returns:
        List of CloudLayer from low to high; and the excess, float32 (height, width): cloudiness
        minus the threshold of cloud formation, in standard deviations, positive in cloud.
    """
    cloudiness = [
        fractal_field(rng, height, width, kind.scale, kind.slope, kind.stretch)
        + rng.normal(0, 0.6)  # every scene has its own mixture
        for kind in CLOUD_TYPES
    ]
    highest = np.max(cloudiness, axis=0)
    edge = float(np.quantile(highest, 1 - cloud_cover))
    layers = []
    for kind, field in zip(CLOUD_TYPES, cloudiness, strict=True):
        excess = np.maximum(field - edge, 0)
        optical_depth = np.where(excess > 0, kind.edge_depth + kind.depth * excess, 0)
        # Two-stream reflectance, asymmetry 0.85: (1 - g) depth / (2 + (1 - g) depth)
        albedo = 0.15 * optical_depth / (2 + 0.15 * optical_depth)
        tops = rng.uniform(*kind.tops)
        temperature = air_temperature - LAPSE_RATE * (tops + kind.rise * excess)
        temperature = np.maximum(temperature, TROPOPAUSE)
        layers.append(CloudLayer(kind.phase, optical_depth, albedo, temperature, tops))
    return layers, highest - edge


def cast_shadows(rng, layers):
    """Draw the sun's azimuth; return the share of sunlight that reaches the ground, (H, W)."""
    azimuth = rng.uniform(0, 2 * math.pi)
    light = 1.0
    for layer in layers:
        pixels_per_km = len(layer.albedo) / 1200  # 1 km pixels at full size
        length = math.tan(SUN_ZENITH) * layer.height * pixels_per_km
        shift = round(length * math.cos(azimuth)), round(length * math.sin(azimuth))
        light = light * (1 - 0.9 * np.roll(layer.albedo, shift, axis=(0, 1)))
    return light


def reflect_sun(rng, surface, layers):
    """Compute the reflectance of S1 to S7 that the satellite sees: float32, (7, H, W)."""
    light = cast_shadows(rng, layers)
    sunlit = np.empty((7, *light.shape), dtype=np.float32)
    for channel in range(7):
        land = VEGETATION[channel] + (SOIL[channel] - VEGETATION[channel]) * surface.soil
        ground = np.where(surface.land, land, SEA[channel] + surface.glint)
        seen = light * (ground + surface.snow * (SNOW[channel] - ground))
        for layer in layers:
            through = (1 - layer.albedo) ** 2 / (1 - layer.albedo * seen)
            seen = layer.phase.reflectance[channel] * layer.albedo + through * seen
        sunlit[channel] = seen
    return sunlit


def emit(surface, layers, channel):
    """Thermal radiance seen in a channel, 0 to 2 for S7 to S9: (H, W) [W m-2 sr-1 um-1]."""
    wavelength = BT_WAVELENGTHS[channel]
    depression = VAPOUR_DEPRESSION[channel] * surface.vapour
    radiance = planck(surface.temperature - depression, wavelength)
    for layer in layers:
        transmitted = np.exp(-layer.phase.absorption[channel] * layer.optical_depth)
        scattered = layer.phase.reflectance[6] if channel == 0 else 0  # and so not emitted
        emissivity = (1 - scattered) * (1 - transmitted)
        tops = layer.temperature - depression * math.exp(-layer.height / VAPOUR_HEIGHT)
        radiance = transmitted * radiance + emissivity * planck(tops, wavelength)
    return radiance


def measure_temperatures(rng, surface, layers, sunlit, damage):
    """Measure S7 to S9. The noise is added to the radiance, so cold pixels of S7 are the noisiest.

    Args:
        rng: NumPy Generator.
        surface: A Surface.
        layers: List of CloudLayer from low to high.
        sunlit: (H, W), reflectance in S7, which sees the sun too; 0 at night.
        damage: A Damage.

    Returns:
        float32, (H, W, 3), brightness temperature [K].
    """
    bts = np.empty(damage.lost.shape, dtype=np.float32)
    for channel, wavelength in enumerate(BT_WAVELENGTHS):
        radiance = emit(surface, layers, channel)
        if channel == 0:
            radiance += sunlit * (SUN_S7 * math.cos(SUN_ZENITH) / math.pi)
        noise = float(planck(270 + BT_NOISE, wavelength) - planck(270, wavelength))
        radiance += noise * rng.standard_normal(radiance.shape, dtype=np.float32)
        coldest, warmest = (float(planck(limit, wavelength)) for limit in BT_RANGE)
        measured = brightness_temperature(np.clip(radiance, coldest, warmest), wavelength)
        bts[..., channel] = np.where(damage.lost[..., channel], damage.gap_value, measured)
    bts[~damage.inside] = 0
    return bts


def measure_reflectances(rng, sunlit, damage, oversampling):
    """Measure S1 to S6 on the 1 km grid or a finer one.

    Args:
        rng: NumPy Generator.
        sunlit: (7, H, W), reflectance of S1 to S7.
        damage: A Damage.
        oversampling: 1 for the 1 km grid, 2 for the 500 m grid.

    Returns:
        float64, (H * oversampling, W * oversampling, 6). Averaged to 1 km, the noise is the same.
    """
    inside = refine(damage.inside, oversampling)
    lost = refine(damage.lost.all(axis=-1), oversampling)
    refs = np.empty((*inside.shape, 6))
    for channel in range(6):
        noise = rng.standard_normal(inside.shape, dtype=np.float32)
        fine = refine(sunlit[channel], oversampling) + REFLECTANCE_NOISE * oversampling * noise
        fine = np.maximum(fine, 1e-4)  # 0 would mean missing
        refs[..., channel] = np.where(inside, np.where(lost, damage.gap_value, fine), 0)
    return refs


def refine(field, factor):
    """Repeat every pixel of a field (H, W) `factor` times along rows and columns."""
    return field.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_damage(rng, height, width):
    """Draw the Damage of a scene (height, width): its border and lost pieces of scan lines."""
    inside = np.zeros((height, width), dtype=bool)
    top, bottom = (max(1, round(height * share)) for share in rng.uniform(0.00, 0.04, 2))
    left, right = (max(1, round(width * share)) for share in rng.uniform(0.01, 0.08, 2))
    inside[top : height - bottom, left : width - right] = True
    lost = np.zeros((height, width, 3), dtype=bool)
    for _ in range(1 + rng.poisson(3)):
        row, n_rows = rng.integers(height), rng.integers(1, 3)
        start, stop = np.sort(rng.integers(0, width, 2))
        channel = rng.integers(-3, 3)  # half of the losses are in all channels
        lost[row : row + n_rows, start:stop, slice(None) if channel < 0 else channel] = True
    return Damage(inside, lost, gap_value=np.nan if rng.random() < 0.3 else 0.0)


def bayesian_label(rng, excess, cold_sea, valid, label_noise):
    """Label the scene as the Bayesian mask would: wrong at cloud edges and over cold water.

    Args:
        rng: NumPy Generator.
        excess: (H, W), positive in cloud; see `make_clouds`.
        cold_sea: bool, (H, W).
        valid: bool, (H, W), where data exist; elsewhere the label is clear.
        label_noise: Share of the valid pixels with a wrong label.
    """
    from scipy.ndimage import gaussian_filter

    doubt = fractal_field(rng, *excess.shape, scale=0.08, slope=2.5)
    doubt += 2 * np.exp(-((excess / 0.15) ** 2)) + 1.5 * (cold_sea & (excess <= 0))
    doubt = gaussian_filter(doubt, sigma=1)  # errors of whole patches, not of single pixels
    wrong = doubt > float(np.quantile(doubt[valid], 1 - label_noise))
    return ((excess > 0) ^ wrong) & valid


def make_scene(rng, height, width, day=True, cloud_cover=0.7, label_noise=0.03, refs_grid="1km"):
    """Make one synthetic scene.

    Args:
        rng: NumPy Generator.
        height: Rows of the 1 km grid [pixels]; 1200 for SLSTR.
        width: Columns of the 1 km grid [pixels]; 1500 for SLSTR.
        day: Whether the scene is in daylight; at night all reflectances are 0.
        cloud_cover: Share of this scene that is cloud.
        label_noise: Share of the pixels with data whose label is wrong.
        refs_grid: "1km", or "500m" for reflectances of twice the rows and columns.

    Returns:
        The arrays by dataset name, in the published dtypes: `refs` (H, W, 6) reflectance of S1-S6,
        `bts` (H, W, 3) brightness temperature of S7-S9 [K], `bayes` (H, W, 1) 0 or 255, `rads`
        (H, W, 6) [mW m-2 sr-1 nm-1], `summary` (H, W, 1) 0 or 255, and `truth` (H, W, 1), 1 for
        true cloud, which real scenes do not have.
    """
    air_temperature = rng.uniform(*AIR_TEMPERATURES)
    surface = make_surface(rng, height, width, air_temperature, day)
    layers, excess = make_clouds(rng, height, width, air_temperature, cloud_cover)
    damage = draw_damage(rng, height, width)
    valid = damage.inside & ~damage.lost.any(axis=-1)
    cold_sea = ~surface.land & (surface.temperature < COLD_SEA)
    label = bayesian_label(rng, excess, cold_sea, valid, label_noise)
    sunlit = reflect_sun(rng, surface, layers) if day else np.zeros((7, height, width), np.float32)
    bts = measure_temperatures(rng, surface, layers, sunlit[6], damage)
    lit = damage._replace(inside=damage.inside & day)  # at night the whole scene is border
    irradiance = np.array(SUN_S1_TO_S6, dtype=np.float32) * math.cos(SUN_ZENITH)
    return {
        "refs": measure_reflectances(rng, sunlit, lit, OVERSAMPLING[refs_grid]),
        "bts": bts,
        "bayes": 255.0 * label[..., None],
        "rads": np.moveaxis(sunlit[:6] * lit.inside, 0, -1) * irradiance / math.pi,
        "summary": 255.0 * (valid & (bts[..., 2] < GROSS_CLOUD))[..., None],
        "truth": (excess > 0).astype(np.uint8)[..., None],
    }


def write_scene(path, arrays, chunks=None, compression=None, shuffle=False):
    """Write a scene file, whose attribute `synthetic` says what it is.

    An existing file is replaced only when the new one is complete.

    Args:
        path: The file.
        arrays: Arrays by dataset name.
        chunks: None for contiguous, "auto" for h5py's choice, or (rows, columns, channels), limited
            to the size of each dataset. Compression and shuffle need chunks: None becomes "auto".
        compression: None, "gzip" or "lzf".
        shuffle: Whether to group bytes of equal significance before compression.
    """
    if chunks is None and (compression or shuffle):
        chunks = "auto"
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["synthetic"] = True
        for name, array in arrays.items():
            fitted = chunks and (chunks == "auto" or tuple(map(min, chunks, array.shape)))
            options = {"chunks": fitted, "compression": compression, "shuffle": shuffle}
            # Without timestamps, the same scene gives the same bytes.
            file.create_dataset(name, data=array, track_times=False, **options)


def product_name(set_name, index):
    """Name a scene of "one-day" or "ssts" as an SLSTR product, by its number in the set."""
    if set_name == "one-day":
        start = ONE_DAY + index * ONE_DAY_STEP % timedelta(days=1)
    else:
        start = SSTS_START + index * SSTS_STEP
    times = "_".join(f"{start + t:%Y%m%dT%H%M%S}" for t in (timedelta(), GRANULE, PROCESSING))
    return f"S3A_SL_1_RBT____{times}_0179_050_023_1980_LN2_O_NT_003.hdf"


def is_day(index, day_share):
    """Whether a scene is a daytime scene: of the first n scenes, round(n * day_share) are."""
    return math.floor((index + 1) * day_share + 0.5) > math.floor(index * day_share + 0.5)


def check_limits(**options):
    """Raise UserError if an option is outside its LIMITS."""
    for name, value in options.items():
        low, high = LIMITS[name]
        if not low <= value <= high:
            raise UserError(f"{name} must be from {low} to {high}, found {value}")


def make_dataset(
    output,
    train=10,
    inference=3,
    height=1200,
    width=1500,
    seed=1234,
    day_share=0.55,
    cloud_cover=0.7,
    label_noise=0.03,
    refs_grid="1km",
    dtype="published",
    byteorder="little",
    **storage,
):
    """Write scenes to `output/{one-day,ssts}/{day,night}/S3A*.hdf`.

    Args:
        output: Folder for `one-day` and `ssts`.
        train: Number of scenes in `one-day`.
        inference: Number of scenes in `ssts`.
        height: Rows of the 1 km grid [pixels].
        width: Columns of the 1 km grid [pixels].
        seed: The same seed gives the same bytes, whatever the number of scenes.
        day_share: Share of daytime scenes.
        cloud_cover: Mean share of cloud; it varies between scenes.
        label_noise: Mean share of wrong labels; it varies between scenes by up to a half.
        refs_grid: "1km" or "500m".
        dtype: Of `refs` and `bts`: "published", "float32" or "float64".
        byteorder: "little" or "big".
        **storage: `chunks`, `compression` and `shuffle` of `write_scene`.

    Returns:
        The paths of the scenes.

    Raises:
        UserError: If a number is outside its limits.
    """
    check_limits(train=train, inference=inference, height=height, width=width, seed=seed)
    check_limits(day_share=day_share, cloud_cover=cloud_cover, label_noise=label_noise)
    paths = []
    for set_index, (set_name, n_scenes) in enumerate([("one-day", train), ("ssts", inference)]):
        for index in range(n_scenes):
            rng = np.random.default_rng([seed, set_index, index])
            day = is_day(index, day_share)
            cover = rng.beta(4 * cloud_cover, 4 * (1 - cloud_cover))  # standard deviation 0.2
            noise = label_noise * rng.uniform(0.5, 1.5)
            arrays = make_scene(rng, height, width, day, cover, noise, refs_grid)
            for name, array in arrays.items():
                kept = dtype == "published" or name not in ("refs", "bts")
                stored = np.dtype(array.dtype if kept else dtype).newbyteorder(byteorder)
                arrays[name] = array.astype(stored, copy=False)
            path = Path(output, set_name, "day" if day else "night", product_name(set_name, index))
            write_scene(path, arrays, **storage)
            log.info("%s: %.0f %% cloud", path, 100 * cover)
            paths.append(path)
    return paths


def parse_chunks(text):
    """Parse the value of --chunks into that of `write_scene`."""
    if text in ("none", "auto"):
        return None if text == "none" else text
    if not re.fullmatch(r"[1-9]\d* [1-9]\d* [1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected none, auto or 'H W C', found {text!r}")
    return tuple(map(int, text.split()))


def parse_arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Make synthetic SLSTR scenes in the published file format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="data", metavar="DIR", help="folder for one-day and ssts")
    add("--train", type=int, default=10, metavar="N", help="number of scenes in one-day")
    add("--inference", type=int, default=3, metavar="N", help="number of scenes in ssts")
    add("--size", type=int, nargs=2, default=(1200, 1500), metavar=("H", "W"), help="1 km pixels")
    add("--seed", type=int, default=1234, help="the same seed gives the same bytes")
    add("--day-share", type=float, default=0.55, metavar="SHARE", help="share of daytime scenes")
    add("--cloud-cover", type=float, default=0.7, metavar="SHARE", help="mean cloud cover")
    add("--label-noise", type=float, default=0.03, metavar="SHARE", help="share of wrong labels")
    add("--refs-grid", choices=OVERSAMPLING, default="1km", help="grid of the reflectances")
    add("--dtype", choices=("published", "float32", "float64"), default="published",
        help="of refs and bts")  # fmt: skip
    add("--byteorder", choices=("little", "big"), default="little", help="of all datasets")
    add("--chunks", type=parse_chunks, default="none", help="none, auto or 'H W C'")
    add("--compression", choices=("none", "gzip", "lzf"), default="none", help="implies chunks")
    add("--shuffle", action="store_true", help="group bytes before compression; implies chunks")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command and return its exit status."""
    options = vars(parse_arguments(argv))
    options["height"], options["width"] = options.pop("size")
    if options["compression"] == "none":
        options["compression"] = None
    log_to_screen(verbose=False)
    return exit_status(lambda: make_dataset(**options))


if __name__ == "__main__":
    sys.exit(main())
