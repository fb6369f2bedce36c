"""Estimate the accuracies of binary masks from each other, without the truth.

Categorical triple collocation (McColl et al. 2016, Remote Sensing of Environment 176, 31-42; the
same idea in Parisi et al. 2014, PNAS 111, 1253-1258). The truth y is 1, cloud, in a share p of the
pixels. Mask i has the sensitivity s_i = P(x_i = 1 | y = 1) and the specificity q_i = P(x_i = 0 |
y = 0), and its errors are independent of those of the other masks given y. Then

    E[x_i | y] = 1 - q_i + d_i y,  with d_i = s_i + q_i - 1,

so that x_i depends on the other masks through d_i y alone. With the moments of y about its mean,
E[(y - p)^2] = p (1 - p) and E[(y - p)^3] = p (1 - p) (1 - 2 p), three different masks have

    mean               m_i = 1 - q_i + d_i p
    covariance         C_ij = d_i d_j p (1 - p)
    third co-moment    T_ijk = d_i d_j d_k p (1 - p) (1 - 2 p)

The covariances give v_i = sqrt(C_ij C_ik / C_jk) = d_i sqrt(p (1 - p)): the order of the balanced
accuracies (1 + d_i) / 2, as in McColl et al. The third co-moment gives the scale (Jaffe et al.
2015, AISTATS): a = T_ijk / (v_i v_j v_k) = (1 - 2 p) / sqrt(p (1 - p)), from which p (1 - p) =
1 / (4 + a^2), p = (1 - a / sqrt(4 + a^2)) / 2, s_i = m_i + d_i (1 - p), q_i = 1 - m_i + d_i p.

Three masks have seven moments for these seven unknowns, so nothing shows whether the errors are
independent, unless an estimate is impossible. With four or more masks the triplets must agree.
Masks are taken to be better than chance, d_i > 0: nothing tells them from their inverses.
"""

import itertools
import warnings

import numpy as np

MAX_MASKS = 10  # the number of patterns doubles with each mask
RATES = ("sensitivity", "specificity", "balanced_accuracy")
DISAGREEMENT = 0.01  # of a mask's balanced accuracy between triplets; more is reported
RESAMPLINGS, SEED = 1000, 0
LIMITS = (0.025, 0.975)


def count_patterns(masks, valid):
    """Count how often each combination of masks occurs.

    Args:
        masks: List of K bool arrays (H, W), True is cloud.
        valid: bool (H, W), the pixels that count.

    Returns:
        int64 (2**K,); bit i of the index says whether mask i is cloud.
    """
    pattern = np.zeros(np.count_nonzero(valid), np.uint16)
    for i, mask in enumerate(masks):
        pattern |= mask[valid].astype(np.uint16) << i
    return np.bincount(pattern, minlength=2 ** len(masks))


def bits(n):
    """The masks of each pattern, float64 (2**n, n)."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)


def agreement(counts):
    """Accuracy and balanced accuracy of each mask if another one were the truth.

    Args:
        counts: Of the patterns of K masks, (2**K,).

    Returns:
        Two float64 (K, K), [mask, taken as truth]; NaN if the latter has one class only.
    """
    shares, x = counts / counts.sum(), bits(len(counts).bit_length() - 1)
    both, neither = (z.T @ (shares[:, None] * z) for z in (x, 1 - x))
    with np.errstate(invalid="ignore"):
        return both + neither, (both / np.diag(both) + neither / np.diag(neither)) / 2


def triplet_rates(counts):
    """Estimate the accuracies of three masks.

    Args:
        counts: Of their patterns, (..., 8).

    Returns:
        float64 (..., 3, RATES); NaN where a covariance is not positive.
    """
    shares = counts / counts.sum(axis=-1, keepdims=True)
    mean = shares @ bits(3)
    off = bits(3) - mean[..., None, :]  # (..., 8, 3)
    covariance = np.einsum("...n,...ni,...nj->...ij", shares, off, off)
    others = covariance[..., [1, 0, 0], [2, 2, 1]]  # of the two other masks: C_jk, C_ik, C_ij
    others = np.where((others > 0).all(axis=-1, keepdims=True), others, np.nan)
    v_ijk = np.sqrt(others.prod(axis=-1, keepdims=True))  # C_ij C_ik C_jk = (v_i v_j v_k)^2
    a = (shares * off.prod(axis=-1)).sum(axis=-1, keepdims=True) / v_ijk
    d = v_ijk / others * np.sqrt(4 + a**2)
    p = (1 - a / np.sqrt(4 + a**2)) / 2
    return np.stack([mean + d * (1 - p), 1 - mean + d * p, (1 + d) / 2], axis=-1)


def all_triplets(counts):
    """Estimate the accuracies of K masks, three or more, by each triplet of them.

    Args:
        counts: Of the patterns of K masks, (..., 2**K).

    Returns:
        float64 (..., triplets, K, RATES) in the order of `itertools.combinations`; NaN for masks
        that are not in the triplet.
    """
    x = bits(counts.shape[-1].bit_length() - 1)
    triplets = list(itertools.combinations(range(x.shape[1]), 3))
    rates = np.full((*counts.shape[:-1], len(triplets), x.shape[1], len(RATES)), np.nan)
    for n, triplet in enumerate(triplets):
        is_pattern = x[:, triplet] @ [1, 2, 4] == np.arange(8)[:, None]  # (8, 2**K)
        rates[..., n, triplet, :] = triplet_rates(counts @ is_pattern.T)
    return rates


def combine(rates):
    """The median over triplets, which few dependent pairs of masks change little, and the extremes.

    Args:
        rates: Result of `all_triplets`.

    Returns:
        Three float64 (..., K, RATES): median, lowest, highest; NaN for a mask whose triplets have
        no solution.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return tuple(f(rates, axis=-3) for f in (np.nanmedian, np.nanmin, np.nanmax))


def estimate(counts):
    """Estimate the accuracies of K masks, three or more, from several scenes.

    Args:
        counts: Of their patterns in S scenes, (S, 2**K).

    Returns:
        {suffix: float64 (K, RATES)}: the median over triplets, suffix "", and their extremes,
        "_min" and "_max", from all scenes together; the central 95 % of the median when scenes are
        drawn again, "_low" and "_high", NaN with one scene. And the share of those draws in which
        each mask has the highest balanced accuracy, float64 (K,); equal masks share the place.
    """
    median, low, high = combine(all_triplets(counts.sum(axis=0)))
    n = len(counts)
    drawn = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), RESAMPLINGS)
    again, *_ = combine(all_triplets(drawn @ counts))
    score = np.nan_to_num(again[..., -1], nan=-1)
    is_best = (score == score.max(axis=-1, keepdims=True)) & (score > -1)
    limits = np.quantile(again, LIMITS, axis=0) if n > 1 else np.full((2, *median.shape), np.nan)
    names = "", "_min", "_max", "_low", "_high"
    return dict(zip(names, (median, low, high, *limits), strict=True)), is_best.mean(axis=0)


def true_rates(counts):
    """The accuracies of all masks but the last, which is the truth.

    Args:
        counts: Of the patterns of K masks and the truth, (2 * 2**K,).

    Returns:
        float64 (K, RATES); NaN where the truth has one class only.
    """
    clear, cloud = counts.reshape(2, -1)
    x = bits(len(clear).bit_length() - 1)
    with np.errstate(invalid="ignore"):
        found, rejected = cloud @ x / cloud.sum(), clear @ (1 - x) / clear.sum()
    return np.stack([found, rejected, (found + rejected) / 2], axis=-1)


def error_correlations(counts):
    """Correlations between the errors of masks, which the estimates take to be 0.

    Args:
        counts: Of the patterns of K masks and the truth, (2 * 2**K,).

    Returns:
        float64 (K, K), mean of those in true clear and true cloud; NaN if one of them never occurs
        or a mask makes no error there.
    """
    x = bits(len(counts).bit_length() - 2)
    total = 0
    with np.errstate(invalid="ignore"):
        for shares in counts.reshape(2, -1):
            off = x - shares @ x / shares.sum()
            covariance = off.T @ (shares[:, None] * off)
            scale = np.sqrt(np.diag(covariance))
            total += covariance / np.outer(scale, scale) / 2
    return total


def signs_of_dependence(names, rates):
    """What contradicts that the errors of the masks are independent, as texts for people.

    Args:
        names: Names of the K masks.
        rates: Result of `all_triplets`, (triplets, K, RATES).
    """
    texts = []
    unsolved = np.isnan(rates).all(axis=(1, 2))
    if unsolved.any():
        example = [*itertools.combinations(names, 3)][unsolved.argmax()]
        texts.append(
            f"{unsolved.sum()} of {len(unsolved)} triplets have no solution, for example that of "
            f"{', '.join(example)}: two of them have no positive covariance."
        )
    _, low, high = combine(rates)
    if (bad := high[:, -1] - low[:, -1] > DISAGREEMENT).any():
        listed = ", ".join(name for name, is_bad in zip(names, bad, strict=True) if is_bad)
        texts.append(f"The triplets disagree on the balanced accuracy of {listed}.")
    gaps = rates[:, :, None, -1] - rates[:, None, :, -1]
    swapped = np.argwhere(np.triu((gaps > 0).any(axis=0) & (gaps < 0).any(axis=0)))
    if pairs := [f"{names[i]} or {names[j]}" for i, j in swapped]:
        texts.append(f"The triplets disagree on which is better: {', '.join(pairs)}.")
    return texts
