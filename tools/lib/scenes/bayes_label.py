"""A Bayesian cloud detector, which labels synthetic scenes as processing centres label real ones.

It compares how likely a measurement is below a clear sky and below cloud, pixel by pixel (Merchant
et al. 2005, Mackie et al. 2010). The clear sky is forecast from ancillary data, which are coarse and
a little wrong; cloud is described by broad distributions. The label therefore misses what looks
like the surface (thin cirrus, small cumulus, low cloud by night), and calls cloud what the
ancillary data do not know (fronts of the sea, glint, ice, coasts, dust).
"""

import math
from typing import NamedTuple

import numpy as np

PRIOR = 0.85  # of cloud; a little more than the scenes have
THRESHOLD = 0.5  # posterior from which a pixel is labelled cloud
DAY = 85.0  # [deg] of the sun's zenith, below which reflectance is used
NIGHT = 95.0  # [deg], above which S7 is free of sunlight
S1, S3, S5 = 0, 2, 4  # indices of channels
S7, S8, S9 = range(3)


class Ancillary(NamedTuple):
    """What a processing centre knows before it looks; fields (H, W), float32 unless noted."""

    land: np.ndarray  # bool, a mask of finite resolution
    temperature: np.ndarray  # analysis of the sea, forecast of the land's skin [K]
    vapour: np.ndarray  # water vapour, as in Surface
    reflectance: np.ndarray  # (6, H, W), climatology of S1 to S6 without snow and glint
    sun_zenith: np.ndarray  # [deg]
    glint: np.ndarray  # expected reflectance of the glint, from the mean wind
    ice: np.ndarray  # expected share of snow and sea ice


def bayes_label(refs, bts, ancillary):
    """Until the detector is here: a threshold."""
    return bts[..., 1] < ancillary.temperature - 4
