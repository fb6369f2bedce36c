"""From keys of the configuration to batches and patches."""

import json
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import HEIGHT, PATCH, WIDTH

import data_loader
from harness import build
from harness.config import load_config
from harness.errors import UserError
from harness.networks.model_files import build_network
from harness.parallel.devices import open_devices
from harness.parallel.rendezvous import SingleRank
from harness.training.augmentation import AUGMENTATIONS
from model import unet

DEVICES = SimpleNamespace(
    n_replicas=1, n_ranks=1, n_cores=3, replicas=range(1), micro_batch=lambda wanted, batch_size: 4
)


@pytest.fixture
def configure(settings, tmp_path):
    """A function from changed keys to a Config."""

    def change(**keys):
        file = tmp_path / "input.yaml"
        file.write_text(json.dumps({**settings, **keys}))
        return load_config(file)

    return change


def first_batch(config, validate=False):
    paths = sorted(Path(config.train_dir).rglob("S3A*.hdf"))
    with build.open_batches(config, DEVICES, paths, validate=validate) as batches:
        return next(batches.batches())


def test_board_shows_patches_of_the_middle_row(configure):
    config = configure()
    path = min(Path(config.train_dir).rglob("S3A*.hdf"))
    channels, cloud = build.board_patches(config, path)
    scene = data_loader.read_scene(path, config.scene_shape)
    # 3 x 4 patches begin at row (100 - 96) // 2 and column (135 - 128) // 2.
    top, left = (HEIGHT - 3 * PATCH) // 2 + PATCH, (WIDTH - 4 * PATCH) // 2
    for i in range(4):
        part = np.s_[top : top + PATCH, left + i * PATCH : left + (i + 1) * PATCH]
        np.testing.assert_array_equal(channels[i], scene.channels[part])
        np.testing.assert_array_equal(cloud[i], scene.cloud[part])


def test_cache_keeps_patches_of_each_size(configure, tmp_path):
    for size in (32, 16):
        cached = first_batch(configure(PATCH_SIZE=size, cache_dir=str(tmp_path / "cache")))
        for ours, plain in zip(cached, first_batch(configure(PATCH_SIZE=size)), strict=True):
            np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("augment", ["none", "flips"])
@pytest.mark.parametrize("cache", ["disk", "memory", "device"])
def test_batches_with_a_cache_are_those_without(configure, tmp_path, monkeypatch, cache, augment):
    devices = open_devices(SingleRank(), cpu_devices=2, seed=5)
    changed = {"augment": augment, "micro_batch": 4, "precision": "float16"}
    reads = []

    def read(path, *arguments, **options):
        reads.append(path)
        return data_loader.read_patches(path, *arguments, **options)

    monkeypatch.setattr(build, "read_patches", read)
    paths = data_loader.find_scenes(Path(configure().train_dir))
    found = []
    for options in ({}, {"cache": cache, "cache_dir": str(tmp_path) if cache == "disk" else None}):
        with build.open_batches(configure(**changed, **options), devices, paths) as batches:
            reads.clear()
            # From the fourth step; then 84 patches in 8 steps of 11. Some change their replica.
            feed = devices.distribute(batches.batches(0, 3))
            found.append([next(feed) for _ in range(5 + 3 * 8)])
            # Epochs of four caches at most: 7 scenes are read for each of the 2 replicas.
            feed.close()
    assert len(reads) < 4 * len(paths)
    for ours, plain in zip(*found, strict=True):
        for part, other in zip(ours, plain, strict=True):
            pairs = map(devices.strategy.experimental_local_results, (part, other))
            for mine, expected in zip(*pairs, strict=True):
                assert mine.dtype == expected.dtype and mine.device == expected.device
                np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize(
    ("keys", "memory", "expected"),
    [
        ({"cache": "device"}, 10**9, ("device", None)),
        # 7 scenes of 12 patches of 32 x 32 with 9 float32 and a byte: 3.2 MB.
        ({"cache": "device"}, 10**6, ("memory", "take 3.2 MB, and 60% of its memory are 600.0 kB")),
        ({"cache": "device", "augment": "flips"}, 10**9, ("memory", "augment: flips changes")),
        ({"cache": "memory"}, 0, ("memory", None)),
        ({}, 0, ("none", None)),
    ],
)
def test_cache_on_devices_needs_room_and_unchanging_patches(configure, keys, memory, expected):
    devices = SimpleNamespace(**vars(DEVICES), memory=lambda: memory, n_ranks_on_node=1)
    cache, reason = build.choose_cache(configure(**keys), devices, 7, 2)
    assert cache == expected[0] and (reason == expected[1] or expected[1] in reason)


def test_cache_larger_than_the_memory_is_rejected(configure, monkeypatch):
    monkeypatch.setattr(build.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    devices = SimpleNamespace(**vars(DEVICES), n_ranks_on_node=1)
    with pytest.raises(UserError, match="keeps 4.1 MB of patches .* only 1.0 MB are free"):
        build.choose_cache(configure(cache="memory"), devices, 7, 2)


def test_augment_changes_training_patches_alone(configure):
    plain, flipped = (first_batch(configure(augment=name))[0] for name in ("none", "flips"))
    assert (plain != flipped).any()
    np.testing.assert_array_equal(np.sort(plain.ravel()), np.sort(flipped.ravel()))
    plain, flipped = (first_batch(configure(augment=name), True)[0] for name in ("none", "flips"))
    np.testing.assert_array_equal(plain, flipped)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss": "squared"}, "Unknown loss 'squared'. Choose one of cross_entropy"),
        ({"augment": "noise"}, f"Choose one of {', '.join(AUGMENTATIONS)}"),
        ({"batch_size": 2}, "there are 3. Set it to at least 3"),
        ({"batch_size": 3}, None),
    ],
)
def test_unusable_keys_of_training_are_rejected(configure, keys, words):
    devices = SimpleNamespace(n_replicas=3)
    if words is None:
        build.check_training(configure(**keys), devices)
        return
    with pytest.raises(UserError) as error:
        build.check_training(configure(**keys), devices)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"label_correction": "co_teaching", "network": "pixel"}, "Set network: two_views"),
        ({"model_file": "model.h5", "network": "two_views"}, "ends in .keras"),
        ({"label_correction": "co_teaching", "network": "two_views"}, None),
        ({"model_file": "model.h5", "network": "pixel"}, None),
    ],
)
def test_network_that_does_not_suit_other_keys_is_rejected(configure, keys, words):
    if words is None:
        build.check_network(configure(**keys), "train")
        return
    with pytest.raises(UserError, match=words):
        build.check_network(configure(**keys), "train")


def test_reference_predictor_takes_patches_in_float32(configure):
    shares = []

    def micro_batch(wanted, batch_size, replicas):
        shares.append(replicas)
        return 4

    config = configure(inference_mode="scene", precision="bfloat16")
    devices, model = SimpleNamespace(micro_batch=micro_batch), unet(config.patch_shape)
    reference = build.open_reference_predictor(config, devices, model, "/CPU:0")
    plain = build.open_predictor(configure(inference_mode="patches"), devices, model, "/CPU:0")
    assert shares == [1, 1]  # a device masks scenes alone
    shape = (HEIGHT, WIDTH, 9)
    scene = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scene = np.pad(scene, (*plain.grid.padding, (0, 0)))
    read = SimpleNamespace(channels=scene, valid=np.ones(shape[:2]))
    np.testing.assert_array_equal(reference(read)[0], plain(scene)[0])


def test_check_of_the_network_changes_no_initial_weight(configure):
    config = configure()

    def weights():
        return build_network(config.network, config.patch_shape).get_weights()

    keras.utils.set_random_seed(config.seed)
    expected = weights()
    build.check_network(config, "train")
    for found, wanted in zip(weights(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_scene_mode_pools_the_same_pixels_as_patches(configure):
    """Patches of 128 trimmed by 56, more than the U-Net sees: only the scene's edges may differ."""
    # 136 rows at stride 16: 9 patches, 60 rows of padding above, which is 4 more than a multiple
    # of 8; 150 columns: 10 patches, 61 columns on the left, 5 more than a multiple of 8.
    size = {"IMAGE_H": 136, "IMAGE_W": 150, "PATCH_SIZE": 128, "CROP_SIZE": 112}
    devices = SimpleNamespace(micro_batch=lambda *_, **__: 8)
    keras.utils.set_random_seed(0)
    model = unet((128, 128, 9))
    scene = np.random.default_rng(0).normal(size=(136, 150, 9)).astype(np.float32)
    found = []
    for mode in ("patches", "scene"):
        predictor = build.open_predictor(
            configure(inference_mode=mode, **size), devices, model, "/CPU:0"
        )
        found.append(predictor(np.pad(scene, (*predictor.grid.padding, (0, 0))))[0])
    interior = np.s_[51:-51, 51:-51]
    np.testing.assert_allclose(found[1][interior], found[0][interior], atol=1e-5)
