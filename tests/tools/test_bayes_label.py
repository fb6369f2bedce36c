"""Tests of the Bayesian detector on uniform scenes, where right and wrong are plain."""

import numpy as np
import pytest

from tools.lib.scenes.bayes_label import Ancillary, bayes_label

SHAPE = (12, 15)
SEA = (0.05, 0.03, 0.012, 0.001, 0.006, 0.004)  # reflectance of S1 to S6
SNOW = (0.80, 0.78, 0.72, 0.015, 0.10, 0.08)
CLOUD = (0.45, 0.46, 0.47, 0.10, 0.35, 0.30)


def label_of(s8=290.0, s7_s8=0.75, s8_s9=0.6, refs=None, lost=None, **ancillary):
    """The label of a uniform scene.

    Args:
        s8: [K]; 290 K is forecast for a clear sky.
        s7_s8: S7 - S8 [K]; 0.75 K is forecast at night.
        s8_s9: S8 - S9 [K]; 0.6 K is forecast.
        refs: Reflectance of S1 to S6; None by night.
        lost: What three pixels hold in place of one of their temperatures.
        **ancillary: Numbers, other than those of open sea.
    """
    noise = np.random.default_rng(1).normal(0, 0.05, (*SHAPE, 3))
    bts = np.array([s8 + s7_s8, s8, s8 - s8_s9]) + noise
    if lost is not None:
        bts[2, [3, 4, 5], [0, 1, 2]] = lost
    known = {"land": False, "temperature": 291.25, "vapour": 0.5, "reflectance": 0.0}
    known |= {"sun_zenith": 120.0 if refs is None else 40.0, "glint": 0.0, "ice": 0.0} | ancillary
    fields = {name: np.full(SHAPE, value) for name, value in known.items()}
    fields["reflectance"] = np.broadcast_to(np.reshape(SEA, (6, 1, 1)), (6, *SHAPE))
    refs = np.broadcast_to(np.zeros(6) if refs is None else np.array(refs), (*SHAPE, 6))
    return bayes_label(refs, bts.astype(np.float32), Ancillary(**fields))


def brighter(reflectance):
    return tuple(x + reflectance for x in SEA)


@pytest.mark.parametrize(
    ("scene", "cloudy"),
    [
        # What it gets right
        ({"refs": SEA}, False),
        ({}, False),
        ({"refs": CLOUD, "s8": 250.0}, True),
        ({"refs": CLOUD, "s8": 289.0}, True),  # low cloud by day
        ({"s8": 250.0}, True),
        ({"s7_s8": -2.5, "s8": 289.0}, True),  # water cloud by night scatters S7
        ({"refs": brighter(0.15), "glint": 0.15}, False),  # glint that is expected
        ({"refs": SNOW, "s8": 268.0, "ice": 0.9, "land": True, "temperature": 271.0}, False),
        # Cloud that looks like the surface is missed
        ({"s8": 289.3, "s8_s9": 0.9, "refs": brighter(0.005)}, False),  # thin cirrus
        ({"s8": 289.5, "s7_s8": 0.2}, False),  # low cloud of large drops by night
        ({"s8": 289.5, "refs": brighter(0.02)}, False),  # small cumulus
        # Surfaces that the ancillary data do not know are called cloud
        ({"s8": 286.5}, True),  # cold side of a front of the sea
        ({"refs": brighter(0.15)}, True),  # glint
        ({"refs": SNOW, "s8": 268.0}, True),  # ice
        ({"refs": (0.13, 0.19, 0.22, 0.001, 0.24, 0.2), "s8": 288.5}, True),  # dust
    ],
)
def test_label_is_right_where_the_physics_is_plain_and_wrong_where_it_is_hard(scene, cloudy):
    label = label_of(**scene)
    assert label.all() == label.any() == cloudy


@pytest.mark.parametrize("lost", [0.0, np.nan])
def test_pixels_without_data_are_clear(lost):
    label = label_of(s8=250.0, lost=lost)
    assert not label[2, 3:6].any() and label.sum() == label.size - 3
