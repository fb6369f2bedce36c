from collections import Counter

import numpy as np
import pytest

from harness.training.augmentation import AUGMENTATIONS, patch_rng

P = 6
augmentations = pytest.mark.parametrize(
    "augment",
    [f for f in AUGMENTATIONS.values() if f],
    ids=[n for n, f in AUGMENTATIONS.items() if f],
)


def patch():
    """Channels that say which pixel they come from, and a label that follows from them."""
    pixels = np.arange(P * P, dtype=np.float32).reshape(P, P, 1)
    return np.concatenate([pixels, -pixels, pixels**2], axis=2), (pixels % 3 == 0).astype(np.uint8)


def symmetries(image):
    """The 8 symmetries of a square image, by their bytes."""
    found = {}
    for mirrored in (image, image.transpose(1, 0, 2)):
        for turns in range(4):
            found[np.rot90(mirrored, turns).tobytes()] = len(found)
    return found


def test_default_is_no_augmentation():
    assert next(iter(AUGMENTATIONS)) == "none" and AUGMENTATIONS["none"] is None


@augmentations
def test_shape_dtype_and_arguments_stay(augment):
    channels, cloud = patch()
    for i in range(20):
        new_channels, new_cloud = augment(channels, cloud, patch_rng(1, 0, 0, i))
        assert (new_channels.shape, new_channels.dtype) == (channels.shape, channels.dtype)
        assert (new_cloud.shape, new_cloud.dtype) == (cloud.shape, cloud.dtype)
    for array, original in zip((channels, cloud), patch(), strict=True):
        np.testing.assert_array_equal(array, original)


@augmentations
def test_same_key_gives_the_same_patch_and_another_key_another(augment):
    results = [
        augment(*patch(), patch_rng(1, epoch, scene, number))[0].tobytes()
        for epoch in range(4) for scene in range(4) for number in range(4)
    ]  # fmt: skip
    again = [
        augment(*patch(), patch_rng(1, epoch, scene, number))[0].tobytes()
        for epoch in range(4) for scene in range(4) for number in range(4)
    ]  # fmt: skip
    assert results == again and len(set(results)) > 1


def test_every_part_of_the_key_counts():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({patch_rng(*key).integers(2**62) for key in keys}) == len(keys)


def test_flips_move_label_and_channels_together():
    for i in range(50):
        channels, cloud = AUGMENTATIONS["flips"](*patch(), patch_rng(1, 0, 0, i))
        np.testing.assert_array_equal(channels[..., :1] % 3 == 0, cloud == 1)
        np.testing.assert_array_equal(channels[..., 0], -channels[..., 1])
        assert channels.tobytes() in symmetries(patch()[0])


def test_flips_choose_each_of_8_symmetries_equally_often():
    known = symmetries(patch()[0])
    assert len(known) == 8
    counts = Counter(
        known[AUGMENTATIONS["flips"](*patch(), patch_rng(1234, epoch, scene, number))[0].tobytes()]
        for epoch in range(5) for scene in range(16) for number in range(20)
    )  # fmt: skip
    # 1600 patches: 200 of each, standard deviation 13
    assert len(counts) == 8 and all(abs(n - 200) < 4 * 13 for n in counts.values())
