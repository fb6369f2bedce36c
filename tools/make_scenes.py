"""Make synthetic Sentinel-3 SLSTR scenes in the published file format.

One field of clouds per scene drives all channels: the weather of the scene gives optical depth,
height, temperature and phase of the clouds above a sea and land of smooth temperature. A Bayesian
detector labels the scene from what it measures, so that its label errs where the physics is hard.
tools/lib/scenes has the physics; docs/synthetic_scenes.md compares the scenes with real ones.
"""

import argparse
import functools
import logging
import math
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import h5py
import numpy as np

from harness.console import log_to_screen
from harness.errors import UserError
from harness.files import replacing

log = logging.getLogger("make_scenes")

SUN_S1_TO_S6 = (1837.0, 1526.0, 956.0, 366.0, 248.0, 78.0)  # [mW m-2 nm-1], ESA, rounded
GROSS_CLOUD = 273.15  # [K], `summary` is set where S9 is colder
OVERSAMPLING = {"1km": 1, "500m": 2}  # pixels of refs per pixel of bts, along rows and columns
LABELS = ("bayes", "random", "none")
LABEL_NOISE = (0.07, 0.14)  # shares of cloud and of clear pixels, those of the Bayesian label
COVER_SPREAD = 7.0  # a scene's cover has a beta distribution; 7: standard deviation 0.12
COVER_ODDS = 1.4  # odds of cloud by night over the mean, and of the mean over those by day
GOLDEN_RATIO = 0.6180339887  # its multiples, modulo 1, are evenly spread

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
    "jobs": (1, math.inf),
    "day_share": (0, 1),
    "cloud_cover": (0.01, 0.99),
    "label_noise": (0, 0.5),
}


def make_scene(
    rng,
    height,
    width,
    day=True,
    cloud_cover=0.85,
    label="bayes",
    label_noise=LABEL_NOISE,
    refs_grid="1km",
):
    """Make one synthetic scene.

    Args:
        rng: NumPy Generator.
        height: Rows of the 1 km grid [pixels]; 1200 for SLSTR. A scene of fewer rows shows the same
            swath with larger pixels.
        width: Columns of the 1 km grid [pixels]; 1500 for SLSTR.
        day: Whether the scene is in daylight; at night all reflectances are 0.
        cloud_cover: Share of this scene that is cloud.
        label: "bayes", "random" (the truth with errors at random), or "none".
        label_noise: Shares of cloud labelled clear, and of clear labelled cloud, if it is random.
        refs_grid: "1km", or "500m" for reflectances of twice the rows and columns.

    Returns:
        The arrays by dataset name, in the published dtypes: `refs` (H, W, 6) reflectance of S1-S6,
        `bts` (H, W, 3) brightness temperature of S7-S9 [K], `bayes` (H, W, 1) 0 or 255, `rads`
        (H, W, 6) [mW m-2 sr-1 nm-1] and `summary` (H, W, 1) 0 or 255. Real scenes do not have
        `truth` (H, W, 1), 1 for true cloud, `optical_depth` and `surface_temperature` [K], and
        `surface` and `cloud_regime`, indices of SURFACES and REGIMES.
    """
    from tools.lib.scenes import clouds as cloud_field  # scipy takes longer than --help should
    from tools.lib.scenes import instrument, radiation
    from tools.lib.scenes import surface as ground

    shape = height, width
    latitude, season = ground.draw_latitude(rng), rng.uniform(-1, 1)
    sun = instrument.place_sun(rng, shape, latitude, season, day)
    wind = instrument.draw_wind(rng, shape)
    glint = instrument.glint_reflectance(sun, wind) if day else np.zeros(shape, np.float32)
    surface = ground.make_surface(rng, shape, latitude, season, day, wind, glint)
    clouds = cloud_field.make_clouds(rng, shape, surface, latitude, cloud_cover)
    aerosol = radiation.draw_aerosol(rng, shape, latitude)
    damage = instrument.draw_damage(rng, shape)

    sunlit = np.zeros((7, *shape), np.float32)
    if day:
        sunlit = radiation.reflect_sun(sun, surface, clouds, aerosol)
    bts = radiation.measure_temperatures(rng, sun, surface, clouds, aerosol, sunlit[6], damage)
    lit = damage._replace(inside=damage.inside & day)  # at night no pixel has reflectance
    refs = instrument.measure_reflectances(rng, sunlit, sun, lit, OVERSAMPLING[refs_grid])

    valid = damage.inside & ~damage.lost.any(axis=-1)
    truth = clouds.optical_depth > cloud_field.THINNEST_CLOUD
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
    return arrays


def label_scene(rng, label, label_noise, truth, refs, bts, surface, sun):
    """Label a scene, bool (H, W); see `make_scene`. Pixels without data may have any label."""
    from tools.lib.scenes.bayes_label import bayes_label
    from tools.lib.scenes.surface import ancillary_data

    if label == "random":
        missed, false = label_noise
        rate = np.where(truth, np.float32(missed), np.float32(false))
        return truth ^ (rng.random(truth.shape, dtype=np.float32) < rate)
    factor = len(refs) // len(truth)
    if factor > 1:
        height, width = truth.shape
        refs = refs.reshape(height, factor, width, factor, 6).mean(axis=(1, 3))
    return bayes_label(refs, bts, ancillary_data(rng, surface, sun))


def flag_meanings():
    """What the codes of a dataset mean, by its name: a word for each code from 0, as in CF."""
    from tools.lib.scenes.clouds import REGIME_CODES
    from tools.lib.scenes.surface import SURFACES

    words = {"surface": SURFACES, "cloud_regime": REGIME_CODES}
    return {name: " ".join(w.replace(" ", "_") for w in codes) for name, codes in words.items()}


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
    meanings = flag_meanings() if {"surface", "cloud_regime"} & set(arrays) else {}
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["synthetic"] = True
        for name, array in arrays.items():
            fitted = chunks and (chunks == "auto" or tuple(map(min, chunks, array.shape)))
            options = {"chunks": fitted, "compression": compression, "shuffle": shuffle}
            # Without timestamps, the same scene gives the same bytes.
            dataset = file.create_dataset(name, data=array, track_times=False, **options)
            if name in meanings:
                dataset.attrs["flag_meanings"] = meanings[name]


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


def draw_cover(seed, set_index, index, day, cloud_cover, day_share):
    """Draw the share of cloud in a scene, more by night than by day.

    Any few scenes of a set are spread evenly over the distribution, so that their mean is right.
    """
    from scipy.special import betaincinv

    days = math.floor(index * day_share + 0.5)
    n_before = days if day else index - days  # scenes of its kind
    start = np.random.default_rng([seed, set_index, day]).random()
    odds = cloud_cover / (1 - cloud_cover) * (1 / COVER_ODDS if day else COVER_ODDS)
    mean = odds / (1 + odds)
    quantile = (start + n_before * GOLDEN_RATIO) % 1
    cover = betaincinv(COVER_SPREAD * mean, COVER_SPREAD * (1 - mean), quantile)
    return float(np.clip(cover, 0.01, 0.995))


def check_limits(**options):
    """Raise UserError if an option is outside its LIMITS."""
    for name, value in options.items():
        low, high = LIMITS[name]
        if not low <= value <= high:
            raise UserError(f"{name} must be from {low} to {high}, found {value}")


def write_one(plan, output, seed, height, width, kind, dtype, byteorder, storage):
    """Make and write one scene of a set; return its path and cover.

    Args:
        plan: Number of the set, its name, number of the scene in it, whether it is by day, and the
            share of cloud.
        output: Folder for `one-day` and `ssts`.
        seed: Of all scenes.
        height: Rows of the 1 km grid [pixels].
        width: Columns of the 1 km grid [pixels].
        kind: `label`, `label_noise` and `refs_grid` of `make_scene`.
        dtype: Of `refs` and `bts`: "published", "float32" or "float64".
        byteorder: "little" or "big".
        storage: Options of `write_scene`.
    """
    set_index, set_name, index, day, cover = plan
    rng = np.random.default_rng([seed, set_index, index])
    arrays = make_scene(rng, height, width, day, cover, **kind)
    for name, array in arrays.items():
        kept = dtype == "published" or name not in ("refs", "bts")
        stored = np.dtype(array.dtype if kept else dtype).newbyteorder(byteorder)
        arrays[name] = array.astype(stored, copy=False)
    path = Path(output, set_name, "day" if day else "night", product_name(set_name, index))
    write_scene(path, arrays, **storage)
    return path, cover


def make_dataset(
    output,
    train=10,
    inference=3,
    height=1200,
    width=1500,
    seed=1234,
    day_share=0.55,
    cloud_cover=0.85,
    label="bayes",
    label_noise=LABEL_NOISE,
    refs_grid="1km",
    dtype="published",
    byteorder="little",
    jobs=1,
    **storage,
):
    """Write scenes to `output/{one-day,ssts}/{day,night}/S3A*.hdf`.

    Args:
        output: Folder for `one-day` and `ssts`.
        train: Number of scenes in `one-day`.
        inference: Number of scenes in `ssts`.
        height: Rows of the 1 km grid [pixels].
        width: Columns of the 1 km grid [pixels].
        seed: The same seed gives the same bytes, whatever the number of scenes and processes.
        day_share: Share of daytime scenes.
        cloud_cover: Mean share of cloud; it varies between scenes.
        label: One of LABELS, see `make_scene`.
        label_noise: Shares of cloud labelled clear, and of clear labelled cloud, if it is random.
        refs_grid: "1km" or "500m".
        dtype: Of `refs` and `bts`: "published", "float32" or "float64".
        byteorder: "little" or "big".
        jobs: Number of processes.
        **storage: `chunks`, `compression` and `shuffle` of `write_scene`.

    Returns:
        The paths of the scenes.

    Raises:
        UserError: If a number is outside its limits.
    """
    check_limits(train=train, inference=inference, height=height, width=width, seed=seed)
    check_limits(day_share=day_share, cloud_cover=cloud_cover, jobs=jobs)
    for share in label_noise:
        check_limits(label_noise=share)
    plans = []
    for set_index, (set_name, n_scenes) in enumerate([("one-day", train), ("ssts", inference)]):
        for index in range(n_scenes):
            day = is_day(index, day_share)
            cover = draw_cover(seed, set_index, index, day, cloud_cover, day_share)
            plans.append((set_index, set_name, index, day, cover))
    write = functools.partial(
        write_one,
        output=output,
        seed=seed,
        height=height,
        width=width,
        kind={"label": label, "label_noise": label_noise, "refs_grid": refs_grid},
        dtype=dtype,
        byteorder=byteorder,
        storage=storage,
    )
    paths = []
    with nullcontext() if jobs == 1 else ProcessPoolExecutor(jobs) as pool:
        for path, cover in (pool.map if pool else map)(write, plans):
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
    add("--cloud-cover", type=float, default=0.85, metavar="SHARE", help="mean cloud cover")
    add("--label", choices=LABELS, default="bayes", help="a Bayesian mask, random errors, or none")
    add("--label-noise", type=float, nargs=2, default=LABEL_NOISE, metavar=("MISSED", "FALSE"),
        help="shares of wrong labels of cloud and of clear, with --label random")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N", help="number of processes")
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
