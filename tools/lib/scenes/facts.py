"""What is known of the real scenes, and the same quantities of any set of scenes.

Label and missing columns: the Bayesian masks of the 100 `ssts` scenes, published as a picture in
mlcommons-cloudmask/mlcommons, benchmarks/cloudmask/target/analysis/images/masks-output.png.
Spectra: a VIIRS granule with the nine equivalent bands, 28 to 33 degrees south, by day. Label
against truth: what is reported of such masks against lidar and experts (ATSR-2: Merchant et al.
2005; SEVIRI: Mackie et al. 2010; SLSTR near the poles: random forests that learn from CALIOP, in
the unpublished repository caliop-slstr-cloud-mask). SLSTR's own mask is worse there, see
docs/science.md.

The ranges are for about 100 scenes; shares of cloud of fewer scenes vary more.
"""

from typing import NamedTuple

import numpy as np

from data_loader import BT_OFFSET, BT_SCALE, REFLECTANCE_OFFSET, read_scene
from harness.data.hdf5 import open_hdf5, open_numbers, read_all, read_attribute
from harness.data.scene_files import day_or_night

FULL_SHAPE = 1200, 1500  # pixels of 1 km; a scene with fewer rows is the same swath, coarser
BLOCK = 9  # [km], side of a block; a pixel of the published picture is 9.1 km
BORDER = 5, 3  # blocks at the left and right that can have missing columns
LAGS = (1, 2, 4, 8, 16, 32)  # [blocks], along rows
PERCENTILES = (0, 10, 25, 50, 75, 90, 100)
LARGE = 20  # pixels; wrong pixels in larger connected groups are errors of a region
STEP = 7  # one pixel of so many along rows and columns enters the spectra

# Whose spectra are compared: bright cold cloud, and dark sea about as warm as in the granule.
CLOUD_S1, CLOUD_S8 = 0.3, 270.0  # [1] lower, [K] upper limit
SEA_S1, SEA_S3, SEA_S8 = 0.1, 0.05, (288.0, 294.0)  # [1] upper limits, [K] range


class Fact(NamedTuple):
    """A published value and the range that synthetic scenes should be in."""

    reference: float
    low: float
    high: float

    def contains(self, value):
        """Whether a value is in the range."""
        return bool(self.low <= value <= self.high)


def _near(reference, tolerance):
    return Fact(reference, reference - tolerance, reference + tolerance)


def _near_reflectance(reference):
    return _near(reference, max(0.15 * reference, 0.03))


FACTS = {
    "missing columns, left, fewest": Fact(33, 33, 45),
    "missing columns, left, most": Fact(45, 33, 45),
    "missing columns, right, fewest": Fact(18, 18, 27),
    "missing columns, right, most": Fact(27, 18, 27),
    "missing rows, above and below": Fact(0, 0, 0),
    "cloud share, mean": _near(0.78, 0.02),
    "cloud share, day": _near(0.75, 0.02),
    "cloud share, night": _near(0.82, 0.02),
    "cloud share, percentile 0": _near(0.44, 0.04),
    "cloud share, percentile 10": _near(0.60, 0.04),
    "cloud share, percentile 25": _near(0.70, 0.04),
    "cloud share, percentile 50": _near(0.81, 0.04),
    "cloud share, percentile 75": _near(0.89, 0.04),
    "cloud share, percentile 90": _near(0.91, 0.04),
    "cloud share, percentile 100": _near(0.96, 0.04),
    "autocorrelation at 1 block": _near(0.72, 0.06),
    "autocorrelation at 2 blocks": _near(0.59, 0.06),
    "autocorrelation at 4 blocks": _near(0.47, 0.06),
    "autocorrelation at 8 blocks": _near(0.35, 0.06),
    "autocorrelation at 16 blocks": _near(0.22, 0.06),
    "autocorrelation at 32 blocks": _near(0.08, 0.06),
    "neighbouring blocks that differ": _near(0.067, 0.015),
    "cloud, S1": _near_reflectance(0.60),
    "cloud, S2": _near_reflectance(0.64),
    "cloud, S3": _near_reflectance(0.66),
    "cloud, S4": _near_reflectance(0.071),
    "cloud, S5": _near_reflectance(0.29),
    "cloud, S6": _near_reflectance(0.32),
    "cloud, S7 - S8 [K]": _near(43, 3),
    "cloud, S8 - S9 [K]": _near(0.8, 3),
    "sea, S1": _near_reflectance(0.054),
    "sea, S3": _near_reflectance(0.012),
    "sea, S4": _near_reflectance(0.001),
    "sea, S7 - S8 [K]": _near(1.3, 3),
    "sea, S8 - S9 [K]": _near(0.68, 3),
    "correlation of S1 and S8": Fact(-0.92, -1, -0.8),
    "correlation of S4 and S8": Fact(-0.90, -1, -0.75),
    "label: accuracy": Fact(0.917, 0.90, 0.93),
    "label: hit rate": Fact(0.88, 0.88, 0.95),
    "label: false alarm rate": Fact(0.14, 0.10, 0.18),
    "label: wrong in groups of > 20": Fact(np.nan, 0.75, 1),
}


class SceneStatistics(NamedTuple):
    """Statistics of a scene, from which `summarise` makes those of a set."""

    kind: str  # "day", "night" or "unknown"
    missing_columns: tuple  # of 1500: fewest and most at the left, fewest and most at the right
    missing_rows: int
    share: float  # of cloud in the label
    autocorrelation: tuple  # by LAGS; NaN where all blocks are equal
    differing: float  # share of neighbouring blocks
    cloud: np.ndarray  # (n, 9), reflectance and brightness temperature [K]; empty by night
    sea: np.ndarray  # (m, 9)
    correlations: tuple  # of S1 and S8, S4 and S8; NaN by night
    pixels: dict  # {"cloud" or "clear" in truth: (pixels, of these wrong)}; empty without truth
    wrong_in_groups: int  # pixels in groups of more than LARGE
    groups: dict  # {("cloud", regime) or ("clear", surface): (pixels, of these wrong)}


def scene_statistics(path):
    """Compute the statistics of a scene file.

    Raises:
        SceneError: If it is no scene, or has no label.
    """
    scene = read_scene(path, (None, None, 9))
    label, valid, kind = scene.cloud[..., 0] > 0, scene.valid, day_or_night(path)
    columns, rows = missing_border(valid)
    autocorrelation, differing = texture(block_majority(label))
    cloud, sea, correlations = spectra(scene) if kind == "day" else (*[np.empty((0, 9))] * 2, ())
    pixels, wrong_in_groups, groups = label_errors(path, label, valid)
    return SceneStatistics(
        kind, columns, rows, label.mean(), autocorrelation, differing, cloud, sea, correlations,
        pixels, wrong_in_groups, groups,
    )  # fmt: skip


def missing_border(valid):
    """Count the columns and rows without data at the border of a scene, valid bool (H, W).

    Returns:
        Columns, scaled to a width of 1500: fewest and most at the left, fewest and most at the
        right; and rows, above and below. Lost scan lines are no border: of the rows with data,
        those in the lowest and highest 2 % of the counts are ignored.
    """
    lines = np.flatnonzero(valid.any(axis=1))
    if not lines.size:
        return (FULL_SHAPE[1],) * 4, len(valid)
    first, last = (side[lines].argmax(axis=1) for side in (valid, valid[:, ::-1]))
    counts = np.percentile([first, last], [2, 98], axis=1, method="nearest").T.ravel()
    scaled = counts * FULL_SHAPE[1] / valid.shape[1]
    return tuple(scaled.round().astype(int)), len(valid) - (lines[-1] - lines[0] + 1)


def block_majority(label):
    """Where the larger part of a block of BLOCK km is cloud, label bool (H, W).

    Blocks that can have missing columns are omitted.
    """
    size = BLOCK * len(label) / FULL_SHAPE[0]  # pixels along a side; may be a fraction
    cloudy, counts = label.astype(np.float32), np.ones(label.shape, np.float32)
    for axis, length in enumerate(label.shape):
        # A pixel is part of the block that its middle is in.
        starts = np.ceil(np.arange(int(length / size)) * size - 0.5).astype(int)
        cloudy, counts = (np.add.reduceat(x, starts, axis=axis) for x in (cloudy, counts))
    return (2 * cloudy > counts)[:, BORDER[0] : -BORDER[1]]


def texture(blocks):
    """The texture of blocks, bool (h, w).

    Returns:
        Autocorrelation along rows about the mean of all blocks, by LAGS, NaN where all blocks are
        equal; and the share of neighbours in a row that differ.
    """
    departure = blocks - blocks.mean()
    products = [np.mean(departure[:, lag:] * departure[:, :-lag]) for lag in LAGS]
    variance = departure.var() or np.nan
    return tuple(np.array(products) / variance), np.mean(blocks[:, 1:] != blocks[:, :-1])


def spectra(scene):
    """Select pixels of bright cold cloud and of dark warm sea in a daytime scene.

    Args:
        scene: data_loader.Scene.

    Returns:
        float32 (n, 9) of cloud and (m, 9) of sea, reflectance and brightness temperature [K]; and
        the correlations of S1 and S8, S4 and S8.
    """
    channels = scene.channels[::STEP, ::STEP][scene.valid[::STEP, ::STEP]]  # (pixels, 9)
    s1_to_s6, s7_to_s9 = np.split(channels, [6], axis=1)
    values = np.hstack([s1_to_s6 + REFLECTANCE_OFFSET, s7_to_s9 * BT_SCALE + BT_OFFSET])
    s1, _, s3, s4, _, _, _, s8, _ = values.T
    cloud = (s1 > CLOUD_S1) & (s8 < CLOUD_S8)
    sea = (s1 < SEA_S1) & (s3 < SEA_S3) & (s8 > SEA_S8[0]) & (s8 < SEA_S8[1])
    correlations = tuple(np.corrcoef([s1, s4, s8])[:2, 2]) if len(values) > 1 else ()
    return values[cloud], values[sea], correlations


def label_errors(path, label, valid):
    """Compare the label with the truth, if the file has it.

    Args:
        path: Scene file.
        label: bool (H, W), where the label is cloud.
        valid: bool (H, W), where no brightness temperature is missing.

    Returns:
        `pixels`, `wrong_in_groups` and `groups` of SceneStatistics.
    """
    from scipy import ndimage

    with open_hdf5(path) as file:
        shape = (*label.shape, 1)
        datasets = {
            name: open_numbers(file, name, shape, optional=True)
            for name in ("truth", "cloud_regime", "surface")
        }
        if datasets["truth"] is None:
            return {}, 0, {}
        truth = read_all(datasets["truth"])[..., 0] > 0
        wrong = valid & (label != truth)
        pixels, groups = {}, {}
        for kind, name in (("cloud", "cloud_regime"), ("clear", "surface")):
            these = valid & (truth == (kind == "cloud"))
            pixels[kind] = np.count_nonzero(these), np.count_nonzero(these & wrong)
            if datasets[name] is None:
                continue
            codes = read_all(datasets[name])[..., 0]
            n, n_wrong = (np.bincount(codes[x], minlength=256) for x in (these, these & wrong))
            meanings = read_attribute(datasets[name], "flag_meanings", "").split()
            for code, meaning in enumerate(meanings):
                groups[kind, meaning] = n[code], n_wrong[code]
    sizes = np.bincount(ndimage.label(wrong)[0].ravel())[1:]
    return pixels, sizes[sizes > LARGE].sum(), groups


def summarise(scenes):
    """Compute the quantities of FACTS from a list of SceneStatistics.

    Returns:
        {name: value}, without quantities that these scenes do not have.
    """
    columns = np.array([scene.missing_columns for scene in scenes])  # (n, 4)
    shares = np.array([scene.share for scene in scenes])
    autocorrelation = np.array([scene.autocorrelation for scene in scenes])
    found = {
        "missing columns, left, fewest": columns[:, 0].min(),
        "missing columns, left, most": columns[:, 1].max(),
        "missing columns, right, fewest": columns[:, 2].min(),
        "missing columns, right, most": columns[:, 3].max(),
        "missing rows, above and below": max(scene.missing_rows for scene in scenes),
        "cloud share, mean": shares.mean(),
        "neighbouring blocks that differ": np.mean([scene.differing for scene in scenes]),
    }
    for percentile in PERCENTILES:
        found[f"cloud share, percentile {percentile}"] = np.percentile(shares, percentile)
    for lag, values in zip(LAGS, autocorrelation.T, strict=True):
        if np.isfinite(values).any():
            name = f"autocorrelation at {lag} block" + "s" * (lag > 1)
            found[name] = np.nanmean(values)
    for kind in {scene.kind for scene in scenes} & {"day", "night"}:
        found[f"cloud share, {kind}"] = np.mean([s.share for s in scenes if s.kind == kind])
    for name, channels in (("cloud", range(1, 7)), ("sea", (1, 3, 4))):
        pixels = np.concatenate([getattr(scene, name) for scene in scenes])
        if not len(pixels):
            continue
        for channel in channels:
            found[f"{name}, S{channel}"] = np.median(pixels[:, channel - 1])
        for channel in (7, 8):
            difference = pixels[:, channel - 1] - pixels[:, channel]
            found[f"{name}, S{channel} - S{channel + 1} [K]"] = np.median(difference)
    if correlations := [scene.correlations for scene in scenes if scene.correlations]:
        names = "correlation of S1 and S8", "correlation of S4 and S8"
        found |= dict(zip(names, np.nanmedian(correlations, axis=0), strict=True))
    (cloud, missed), (clear, false) = (
        np.sum([scene.pixels.get(kind, (0, 0)) for scene in scenes], axis=0)
        for kind in ("cloud", "clear")
    )
    if cloud and clear:
        found["label: accuracy"] = 1 - (missed + false) / (cloud + clear)
        found["label: hit rate"] = 1 - missed / cloud
        found["label: false alarm rate"] = false / clear
    if missed + false:
        large = sum(scene.wrong_in_groups for scene in scenes)
        found["label: wrong in groups of > 20"] = large / (missed + false)
    return found


def errors_by_group(scenes):
    """Sum up where the label is wrong, from a list of SceneStatistics.

    Returns:
        {("cloud", regime) or ("clear", surface): {kind of scene: (pixels, of these wrong)}}.
    """
    sums = {}
    for scene in scenes:
        for group, counts in scene.groups.items():
            kinds = sums.setdefault(group, {})
            kinds[scene.kind] = np.add(counts, kinds.get(scene.kind, (0, 0)))
    return {group: kinds for group, kinds in sums.items() if np.sum([*kinds.values()])}
