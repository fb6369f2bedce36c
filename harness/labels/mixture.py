"""A mask without labels: a mixture model of physical features, and a Markov random field.

Cloud and clear sky are mixtures of Gaussians in the features of pixels, by day and by night. They
are fitted to many scenes at once by stochastic expectation maximisation (Celeux and Diebolt 1985):
draw the class of each pixel from its probability, fit both mixtures, compute new probabilities.
Physical tests start this and stay as the prior, so that each component keeps the class that physics
gave it.
"""

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit, logit
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from harness.labels import features

COMPONENTS = {"clear": 6, "cloud": 10}
MIN_PIXELS = 100  # of a class, per component; with fewer, the tests alone make the mask
SCENE_SAMPLE, SAMPLE = 2500, 250_000  # pixels of each kind, at most, of a scene and of all
FIT_ROUNDS, BACKGROUND_ROUNDS = 4, 3
SURE = 0.02  # the tests are never surer than this of either class
TEMPER = 0.5  # of the mixtures' odds: neighbouring pixels and correlated features repeat evidence
MAX_ODDS = 12.0  # logarithm
COUPLING = 2.0  # a pixel whose neighbours are all cloud has odds of e**COUPLING for that
NEIGHBOURS, FIELD_ROUNDS = 1.0, 4  # standard deviation of neighbours' weights [pixels]
BLOCK_ROWS = 64  # of a scene, which are in memory as features at a time
STATE = ("weights_", "means_", "covariances_", "precisions_cholesky_")  # of a GaussianMixture


class PhysicalMixture:
    """Probability of cloud from the channels of a scene; made by `fit_mixture`."""

    def __init__(self, values):
        """Take the result of `to_dict`; {} for the physical tests alone."""
        self._values = values
        self._mixtures = {
            (kind, name): _load(part[name]) for kind, part in values.items() for name in COMPONENTS
        }

    @classmethod
    def from_dict(cls, values):
        """Make a model that equals the one whose `to_dict` gave these values."""
        return cls(values)

    def to_dict(self):
        """Return numbers and lists, for JSON."""
        return self._values

    def probability(self, channels, valid):
        """Probability of cloud: float32 (H, W), 0 where not valid.

        Args:
            channels: float32 (H, W, 9), normalised as by `data_loader.read_scene`.
            valid: bool (H, W), False where a brightness temperature is missing.
        """
        if not valid.any():
            return np.zeros(valid.shape, np.float32)
        fields = features.measure(channels, valid)
        coarse = features.coarsen(fields)
        background = self.find_background(coarse, TESTS_ALONE.find_background(coarse))
        odds = self.log_odds(fields, features.refine(background, valid.shape))
        for kind, part in self._values.items():
            odds[select(fields, kind)] += TEMPER * logit(part["cloud_share"])
        return np.where(valid, smooth(odds), 0)

    def find_background(self, fields, background=None):
        """Find the background [K] of a scene, (H, W), by the pixels that look clear with it."""
        if background is None:
            background = features.envelope(fields)
        for _ in range(BACKGROUND_ROUNDS):
            background = features.background(fields, expit(self.log_odds(fields, background)))
        return background

    def log_odds(self, fields, background):
        """Logarithm of the odds of cloud, pixel by pixel: float32 (H, W), 0 where not valid."""
        odds = np.zeros(background.shape, np.float32)
        for start in range(0, len(odds), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            block = {name: field[rows] for name, field in fields.items()}
            for kind in features.FEATURES:
                where = select(block, kind)
                if where.any():
                    values = features.pick(block, background[rows], where)
                    odds[rows][where] = self._odds_of_pixels(values, kind)
        return odds

    def _odds_of_pixels(self, values, kind):
        odds = logit(np.clip(features.physical_probability(values, kind), SURE, 1 - SURE))
        if kind in self._values:
            mean, scale = (np.float32(self._values[kind][name]) for name in ("mean", "scale"))
            x = (features.feature_matrix(values, kind) - mean) / scale
            clear, cloud = (self._mixtures[kind, c].score_samples(x) for c in COMPONENTS)
            odds += TEMPER * (cloud - clear)
        return np.clip(odds, -MAX_ODDS, MAX_ODDS)


TESTS_ALONE = PhysicalMixture({})


@threadpool_limits.wrap(limits=1)  # several threads add up in any order, and are slower
def fit_mixture(scenes, seed):
    """Fit a PhysicalMixture to scenes, by day and by night.

    Args:
        scenes: Iterable of (channels, valid): float32 (H, W, 9), normalised, and bool (H, W). Of
            each, at most 150 x 188 pixels are kept (1.5 MB); a hundred scenes are enough.
        seed: Of the pixels that are drawn, and of the classes drawn for them.
    """
    rng = np.random.default_rng(seed)
    coarse = [features.coarsen(features.measure(*scene)) for scene in scenes if scene[1].any()]
    backgrounds = [TESTS_ALONE.find_background(fields) for fields in coarse]
    model = TESTS_ALONE
    for _ in range(FIT_ROUNDS):
        samples = {kind: [] for kind in features.FEATURES}
        for i, fields in enumerate(coarse):
            probability = expit(model.log_odds(fields, backgrounds[i]))
            backgrounds[i] = features.background(fields, probability)
            for kind, sample in samples.items():
                pixels = np.argwhere(select(fields, kind))
                n = min(len(pixels), SCENE_SAMPLE, -(-SAMPLE // len(coarse)))
                where = tuple(rng.permutation(pixels)[:n].T)
                values = features.pick(fields, backgrounds[i], where)
                is_cloud = rng.random(n) < probability[where]
                sample.append((features.feature_matrix(values, kind), is_cloud))
        fitted = {
            kind: fit_classes(*map(np.concatenate, zip(*sample, strict=True)), rng)
            for kind, sample in samples.items()
            if sample
        }
        model = PhysicalMixture({kind: part for kind, part in fitted.items() if part})
    return model


def smooth(odds):
    """Probability of cloud given a pixel and its neighbours: the mean field of a Markov field."""
    probability = expit(odds)
    for _ in range(FIELD_ROUNDS):
        neighbours = gaussian_filter(probability, NEIGHBOURS, truncate=2)
        probability = expit(odds + np.float32(COUPLING) * (2 * neighbours - 1))
    return probability


def select(fields, kind):
    """Pixels with data by day or by night, bool (H, W)."""
    return fields["valid"] & (fields["is_day"] == (kind == "day"))


def fit_classes(x, is_cloud, rng):
    """Fit a mixture to each class of features (n, n_features); None if there are too few pixels."""
    classes = {"clear": x[~is_cloud], "cloud": x[is_cloud]}
    if any(len(classes[name]) < MIN_PIXELS * n for name, n in COMPONENTS.items()):
        return None
    mean, scale = x.mean(axis=0), x.std(axis=0) + np.float32(1e-6)
    fitted = {"mean": mean.tolist(), "scale": scale.tolist()}
    fitted["cloud_share"] = float(is_cloud.mean())  # not used while fitting, where it would grow
    for name, n in COMPONENTS.items():
        mixture = GaussianMixture(
            n, reg_covar=1e-2, tol=1e-2, max_iter=30, random_state=int(rng.integers(2**31))
        )
        mixture.fit((classes[name] - mean) / scale)
        fitted[name] = {part: getattr(mixture, part).tolist() for part in STATE}
    return fitted


def _load(parameters):
    mixture = GaussianMixture(len(parameters["weights_"]))
    for name, values in parameters.items():
        setattr(mixture, name, np.float32(values))
    return mixture
