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
from typing import NamedTuple

from _command import exit_status  # isort: skip  (before all packages)

import numpy as np

from harness.console import counted, log_to_screen, progress
from harness.errors import UserError
from harness.files import write_csv
from tools.lib.scenes.scene_file import as_stored, write_scene

log = logging.getLogger("make_scenes")

LABELS = ("bayes", "random", "none")
LABEL_NOISE = (0.07, 0.14)  # shares of cloud and of clear pixels, those of the Bayesian label
COVER_SPREAD = 7.5  # a scene's cover has a beta distribution; 7.5: standard deviation 0.12
COVER_ODDS = 1.4  # odds of cloud by night over the mean, and of the mean over those by day
LEAST_QUANTILE = 0.03  # of that distribution: real scenes with hardly any cloud were not chosen
# The multiples of irrational numbers, modulo 1, are evenly spread: for cover, latitude and weather.
STEPS = (0.6180339887, 0.4142135624, 0.7320508076)

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
    "matchups": (0, math.inf),
    "jobs": (1, math.inf),
    "day_share": (0, 1),
    "cloud_cover": (0.01, 0.99),
    "label_noise": (0, 0.5),
}


def make_scene(*arguments, **options):
    """Make the arrays of one scene, see `tools.lib.scenes.scene.draw_scene`."""
    from tools.lib.scenes.scene import draw_scene  # imports scipy, which --help does not need

    return draw_scene(*arguments, **options)


def start_time(set_name, index):
    """When a scene of "one-day" or "ssts" was measured, by its number in the set."""
    if set_name == "one-day":
        return ONE_DAY + index * ONE_DAY_STEP % timedelta(days=1)
    return SSTS_START + index * SSTS_STEP


def product_name(set_name, index):
    """Name a scene of "one-day" or "ssts" as an SLSTR product, by its number in the set."""
    start = start_time(set_name, index)
    times = "_".join(f"{start + t:%Y%m%dT%H%M%S}" for t in (timedelta(), GRANULE, PROCESSING))
    return f"S3A_SL_1_RBT____{times}_0179_050_023_1980_LN2_O_NT_003.hdf"


def is_day(index, day_share):
    """Whether a scene is a daytime scene: of the first n scenes, round(n * day_share) are."""
    return math.floor((index + 1) * day_share + 0.5) > math.floor(index * day_share + 0.5)


def draw_quantiles(seed, set_index, index, day, day_share):
    """Draw where a scene is in the distributions of cover, latitude and weather, from 0 to 1.

    Any few scenes of a set are spread evenly over them, so that their means are about right.
    """
    days = math.floor(index * day_share + 0.5)
    n_before = days if day else index - days  # scenes of its kind
    start = np.random.default_rng([seed, set_index, day]).random(len(STEPS))
    return (start + n_before * np.array(STEPS)) % 1


def cover_at(quantile, day, cloud_cover):
    """The share of cloud in a scene, more by night than by day; cloud_cover: its mean."""
    from scipy.special import betaincinv

    odds = cloud_cover / (1 - cloud_cover) * (1 / COVER_ODDS if day else COVER_ODDS)
    mean = odds / (1 + odds)
    quantile = LEAST_QUANTILE + (1 - LEAST_QUANTILE) * quantile
    cover = betaincinv(COVER_SPREAD * mean, COVER_SPREAD * (1 - mean), quantile)
    return float(np.clip(cover, 0.01, 0.995))


def check_limits(**options):
    """Raise UserError if an option is outside its LIMITS."""
    for name, value in options.items():
        low, high = LIMITS[name]
        if not low <= value <= high:
            raise UserError(f"{name} must be from {low} to {high}, found {value}")


class Task(NamedTuple):
    """A scene to make."""

    path: Path
    seed: list  # of its random numbers
    day: bool
    cover: float  # share of cloud
    quantiles: tuple  # of latitude and weather
    n_matchups: int
    start: datetime  # of the measurement, UTC


def plan_tasks(output, n_scenes, seed, day_share, cloud_cover, n_matchups):
    """List the Tasks of all scenes; n_scenes: {name of the set: number of scenes}."""
    tasks = []
    for set_index, (set_name, n) in enumerate(n_scenes.items()):
        for index in range(n):
            day = is_day(index, day_share)
            path = Path(output, set_name, "day" if day else "night", product_name(set_name, index))
            of_cover, *others = draw_quantiles(seed, set_index, index, day, day_share)
            cover = cover_at(of_cover, day, cloud_cover)
            share = (n_matchups * (index + 1) // n - n_matchups * index // n) * (set_name == "ssts")
            start = start_time(set_name, index)
            numbers = [seed, set_index, index]
            tasks.append(Task(path, numbers, day, cover, tuple(others), share, start))
    return tasks


def do_task(task, shape, kind, stored, storage):
    """Make and write a scene.

    Args:
        task: A Task.
        shape: Rows and columns of the 1 km grid [pixels].
        kind: `label`, `label_noise`, `refs_grid` and `positions` of `make_scene`.
        stored: `dtype` and `byteorder` of `as_stored`.
        storage: Options of `write_scene`.

    Returns:
        The match-ups of the scene, a list of dictionaries.
    """
    rng = np.random.default_rng(task.seed)
    arrays = make_scene(rng, *shape, task.day, task.cover, task.quantiles, **kind)
    write_scene(task.path, as_stored(arrays, **stored), **storage)
    if not task.n_matchups:
        return []
    from tools.lib.scenes.matchups import draw_matchups

    return draw_matchups(rng, arrays, task.n_matchups, task.start, task.start + GRANULE)


def make_dataset(
    output,
    train=10,
    inference=3,
    height=1200,
    width=1500,
    seed=1234,
    day_share=0.55,
    cloud_cover=0.845,
    label="bayes",
    label_noise=LABEL_NOISE,
    matchups=0,
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
        matchups: Number of match-ups with buoys in `ssts`, written to `output/sst_matchups.csv`.
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
    check_limits(day_share=day_share, cloud_cover=cloud_cover, matchups=matchups, jobs=jobs)
    for share in label_noise:
        check_limits(label_noise=share)
    n_scenes = {"one-day": train, "ssts": inference}
    tasks = plan_tasks(output, n_scenes, seed, day_share, cloud_cover, matchups)
    kind = {"label": label, "label_noise": label_noise, "refs_grid": refs_grid}
    work = functools.partial(
        do_task,
        shape=(height, width),
        kind=kind | {"positions": matchups > 0},
        stored={"dtype": dtype, "byteorder": byteorder},
        storage=storage,
    )
    rows = []
    with nullcontext() if jobs == 1 else ProcessPoolExecutor(jobs) as pool:
        done = (pool.map if pool else map)(work, tasks)
        for of_scene in progress(done, "Making scenes", len(tasks)):
            rows += of_scene
    for folder in dict.fromkeys(task.path.parents[1] for task in tasks):
        covers = [task.cover for task in tasks if task.path.parents[1] == folder]
        n_scenes, mean = counted(len(covers), "scene"), 100 * np.mean(covers)
        log.info("%s: %s, true cloud %.0f %%", folder, n_scenes, mean)
    if matchups and not rows:
        log.warning("No match-ups: no scene of ssts has open sea with data.")
    elif matchups:
        write_csv(Path(output, "sst_matchups.csv"), list(rows[0]), rows)
    return [task.path for task in tasks]


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
    add("--cloud-cover", type=float, default=0.845, metavar="SHARE", help="mean cloud cover")
    add("--label", choices=LABELS, default="bayes", help="a Bayesian mask, random errors, or none")
    add("--label-noise", type=float, nargs=2, metavar=("MISSED", "FALSE"),
        default=argparse.SUPPRESS, help="shares of wrong labels of cloud and of clear, with "
        f"--label random (default: {' '.join(map(str, LABEL_NOISE))})")  # fmt: skip
    add("--matchups", type=int, default=0, metavar="N",
        help="match-ups of ssts with buoys, for validate_sst.py")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N", help="number of processes")
    add("--refs-grid", choices=("1km", "500m"), default="1km", help="grid of the reflectances")
    add("--dtype", choices=("published", "float32", "float64"), default="published",
        help="of refs and bts")  # fmt: skip
    add("--byteorder", choices=("little", "big"), default="little", help="of all datasets")
    add("--chunks", type=parse_chunks, default="none", help="none, auto or 'H W C'")
    add("--compression", choices=("none", "gzip", "lzf"), default="none", help="implies chunks")
    add("--shuffle", action="store_true", help="group bytes before compression; implies chunks")
    arguments = parser.parse_args(argv)
    if "label_noise" in arguments and arguments.label != "random":
        parser.error("--label-noise is of random labels: add --label random, or omit it")
    return arguments


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
