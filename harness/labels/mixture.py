"""A mask without labels: a mixture model of physical features, smoothed by a Markov random field.

Cloud and clear sky are mixtures of Gaussians in the features of pixels, by day and by night. Their
parameters come from all scenes by stochastic expectation maximisation (Celeux and Diebolt 1985):
draw the class of each pixel from its probability, fit both mixtures, find new probabilities. The
physical tests start this and remain the prior, so that each component keeps the name that physics
gave it. Neither a label nor the truth is read.
"""

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit, logit
from sklearn.mixture import GaussianMixture

from harness.labels import features

COMPONENTS = (6, 10)  # of clear sky and of cloud
MIN_PIXELS = 100  # of a class, per component
SAMPLE = 250_000  # pixels of all scenes together, of each kind
SCENE_SAMPLE = 2500  # pixels of a scene, at most
FIT_ROUNDS = 4
BACKGROUND_ROUNDS = 3  # by the tests alone, and as many by the mixtures
SURE = 0.02  # the tests are never surer than this of either class
TEMPER = 0.5  # of the mixtures' odds: features repeat each other, which a test does not know
MAX_ODDS = 12.0  # logarithm
# Mean field of a Markov random field: a pixel whose neighbours are all cloud has odds e**COUPLING.
COUPLING, NEIGHBOURS, FIELD_ROUNDS = 2.0, 1.0, 4  # NEIGHBOURS: a Gaussian's deviation [pixels]
BLOCK_ROWS = 64  # of a scene, which are worked on at a time


class PhysicalMixture:
    """Probability of cloud from the channels of a scene.

    Args:
        mixtures: {"day" or "night": (mean, scale, clear, cloud)}: mean and scale of the features,
            float32 (n_features,), and two GaussianMixtures of what they normalise. A kind that is
            missing is masked by the physical tests alone.
    """

    def __init__(self, mixtures):
        self._mixtures = mixtures

    def probability(self, channels, valid):
        """Probability of cloud of each pixel of a scene: float32 (H, W), 0 where not valid.

        Args:
            channels: float32 (H, W, 9), normalised as by `data_loader.read_scene`.
            valid: bool (H, W), False where a brightness temperature is missing.
        """
        if not valid.any():
            return np.zeros(valid.shape, np.float32)
        fields = features.measure(channels, valid)
        coarse = features.coarsen(fields)
        background = find_background(coarse)
        for _ in range(BACKGROUND_ROUNDS):
            odds = self.log_odds(coarse, background)
            background = features.background(coarse, expit(odds), features.envelope(coarse))
        odds = self.log_odds(fields, features.refine(background, valid.shape))
        return np.where(valid, smooth(odds), 0)

    def log_odds(self, fields, background):
        """Logarithm of the odds of cloud, float32 (H, W), pixel by pixel; 0 where not valid.

        Args:
            fields: From `features.measure`.
            background: float32 (H, W) [K].
        """
        odds = np.zeros(background.shape, np.float32)
        for start in range(0, len(odds), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            block = {name: field[rows] for name, field in fields.items()}
            for kind in features.FEATURES:
                where = block["valid"] & (block["is_day"] == (kind == "day"))
                if where.any():
                    odds[rows][where] = self._odds_of(block, background[rows], kind, where)
        return odds

    def _odds_of(self, fields, background, kind, where):
        values = features.pick(fields, background, where)
        odds = logit(np.clip(features.physical_probability(values, kind), SURE, 1 - SURE))
        if kind in self._mixtures:
            mean, scale, clear, cloud = self._mixtures[kind]
            x = (features.feature_matrix(values, kind) - mean) / scale
            odds += TEMPER * (cloud.score_samples(x) - clear.score_samples(x))
        return np.clip(odds, -MAX_ODDS, MAX_ODDS)

    def to_dict(self):
        """Return numbers and lists, from which `from_dict` makes an equal model."""
        return {
            kind: {
                "mean": mean.tolist(),
                "scale": scale.tolist(),
                "clear": _parameters(clear),
                "cloud": _parameters(cloud),
            }
            for kind, (mean, scale, clear, cloud) in self._mixtures.items()
        }

    @classmethod
    def from_dict(cls, values):
        """Make a model from the result of `to_dict`."""
        return cls(
            {
                kind: (
                    np.float32(part["mean"]),
                    np.float32(part["scale"]),
                    _gaussian_mixture(part["clear"]),
                    _gaussian_mixture(part["cloud"]),
                )
                for kind, part in values.items()
            }
        )


def fit_mixture(scenes, seed):
    """Fit a PhysicalMixture to scenes, by day and by night.

    Args:
        scenes: Iterable of (channels, valid): float32 (H, W, 9), normalised, and bool (H, W). Of
            each, up to 150 x 188 pixels are kept (1.5 MB); a hundred scenes are enough.
        seed: Of the pixels that are drawn, and of the classes drawn for them.
    """
    rng = np.random.default_rng(seed)
    coarse = [features.coarsen(features.measure(*scene)) for scene in scenes if scene[1].any()]
    backgrounds = [find_background(fields) for fields in coarse]
    model = PhysicalMixture({})
    for _ in range(FIT_ROUNDS):
        probabilities = [
            expit(model.log_odds(*pair)) for pair in zip(coarse, backgrounds, strict=True)
        ]
        backgrounds = [
            features.background(fields, probability, features.envelope(fields))
            for fields, probability in zip(coarse, probabilities, strict=True)
        ]
        mixtures = {}
        for kind in features.FEATURES:
            x, is_cloud = draw_pixels(coarse, backgrounds, probabilities, kind, rng)
            if min(np.sum(is_cloud == c) / n for c, n in enumerate(COMPONENTS)) >= MIN_PIXELS:
                mixtures[kind] = fit_classes(x, is_cloud, rng)
        model = PhysicalMixture(mixtures)
    return model


def find_background(fields):
    """Background [K] of a scene by the physical tests alone, float32 (H, W)."""
    tests = PhysicalMixture({})
    background = guess = features.envelope(fields)
    for _ in range(BACKGROUND_ROUNDS):
        probability = expit(tests.log_odds(fields, background))
        background = features.background(fields, probability, guess)
    return background


def draw_pixels(scenes, backgrounds, probabilities, kind, rng):
    """Draw pixels of a kind, and a class for each.

    Returns:
        Features, float32 (n, n_features), and whether the class is cloud, bool (n,).
    """
    x = [np.empty((0, len(features.FEATURES[kind])), np.float32)]
    is_cloud = [np.empty(0, bool)]
    for fields, background, probability in zip(scenes, backgrounds, probabilities, strict=True):
        pixels = np.argwhere(fields["valid"] & (fields["is_day"] == (kind == "day")))
        n = min(len(pixels), SCENE_SAMPLE, -(-SAMPLE // len(scenes)))
        where = tuple(rng.permutation(pixels)[:n].T)
        x.append(features.feature_matrix(features.pick(fields, background, where), kind))
        is_cloud.append(rng.random(n) < probability[where])
    return np.concatenate(x), np.concatenate(is_cloud)


def fit_classes(x, is_cloud, rng):
    """Fit a mixture to each class; see PhysicalMixture."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + np.float32(1e-6)
    fitted = [
        GaussianMixture(
            n, reg_covar=1e-2, tol=1e-2, max_iter=30, random_state=int(rng.integers(2**31))
        ).fit((x[is_cloud == c] - mean) / scale)
        for c, n in enumerate(COMPONENTS)
    ]
    return mean, scale, *fitted


def smooth(odds):
    """Probability of cloud given the odds of a pixel and its neighbours, float32 (H, W)."""
    probability = expit(odds)
    for _ in range(FIELD_ROUNDS):
        neighbours = gaussian_filter(probability, NEIGHBOURS, truncate=2)
        probability = expit(odds + np.float32(COUPLING) * (2 * neighbours - 1))
    return probability


def _parameters(mixture):
    names = "weights_", "means_", "covariances_", "precisions_cholesky_"
    return {name: getattr(mixture, name).tolist() for name in names}


def _gaussian_mixture(parameters):
    mixture = GaussianMixture(len(parameters["weights_"]))
    for name, values in parameters.items():
        setattr(mixture, name, np.float32(values))
    return mixture
