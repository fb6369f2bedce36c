import itertools
import subprocess
import sys
import time
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

import data_loader
from data_loader import PatchBatches, SceneError
from harness import REPOSITORY
from harness.data.half_precision import ToFloat16
from tools.make_scenes import make_scene, write_scene

SHAPE = (100, 135, 9)


@pytest.fixture(scope="module")
def arrays():
    scene = make_scene(np.random.default_rng(3), *SHAPE[:2])
    scene["bts"][40:44, 50:60] = np.nan
    scene["bts"][0, 0, 1] = np.inf
    scene["refs"][10:14, 20:30] = np.nan
    return scene


@pytest.fixture
def path(tmp_path, arrays):
    write_scene(tmp_path / "S3A_x.hdf", arrays)
    return tmp_path / "S3A_x.hdf"


def empty_patches(indices=range(12), p=32, dtype=np.float32):
    return {i: (np.empty((p, p, 9), dtype), np.empty((p, p, 1), np.uint8)) for i in indices}


def normalised(arrays):
    """Normalise in the plainest way: missing values become 0 before it."""
    refs = np.nan_to_num(arrays["refs"].astype(np.float64)) - 0.5
    bts = (np.nan_to_num(arrays["bts"].astype(np.float64), posinf=0) - 270) / 22
    return np.concatenate([refs, bts], axis=-1)


def test_import_needs_neither_tensorflow_nor_sklearn():
    code = "import sys, data_loader; print({'tensorflow', 'sklearn', 'scipy'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert run.stdout == "set()\n"


# --- split


@pytest.mark.parametrize(("n", "share"), [(970, 0.8), (7, 0.75), (2, 0.5)])
def test_split_is_that_of_sklearn_with_seed_42(n, share):
    paths = [f"{i:03}" for i in range(n)]
    train, test = data_loader.split_scenes(paths, share)
    assert [train, test] == train_test_split(paths, train_size=share, random_state=42)
    assert len(train) == int(n * share) and sorted(train + test) == paths


@pytest.mark.parametrize(("n", "share"), [(1, 0.8), (3, 0.1), (2, 1.0)])
def test_split_with_an_empty_set_is_an_error(n, share):
    with pytest.raises(SceneError, match=f"of {n} scene"):
        data_loader.split_scenes(list(range(n)), share)


# --- scene file -> normalised channels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (30, 40, 1)},
        {"chunks": True, "compression": "gzip", "shuffle": True},
        {"external": "{}.bin"},
        {"dtype": ">f8"},
    ],
    ids=["contiguous", "chunked", "gzip", "external", "big-endian"],
)
def test_scene_is_read_from_every_kind_of_storage(tmp_path, arrays, options):
    path = tmp_path / "S3A_x.hdf"
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            own = dict(options)
            if "external" in own:
                own["external"] = str(tmp_path / own["external"].format(name))
            file.create_dataset(name, data=array, **own)
    scene = data_loader.read_scene(path, SHAPE)
    np.testing.assert_allclose(scene.channels, normalised(arrays), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scene.cloud, arrays["bayes"] != 0)
    bts = np.nan_to_num(arrays["bts"], posinf=0)
    np.testing.assert_array_equal(scene.valid, (bts != 0).all(axis=-1))
    np.testing.assert_array_equal(scene.bt_12um, bts[..., 2])
    assert scene.channels.dtype == np.float32 and scene.cloud.dtype == np.uint8
    assert scene.out_of_range == 0


def test_500_m_reflectances_are_averaged_without_the_missing(tmp_path, arrays):
    fine = np.random.default_rng(0).random((200, 270, 6))
    fine[0, 0] = np.nan  # one of four
    fine[2:4, 2:4] = np.nan  # all of four
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, {**arrays, "refs": fine})
    refs = data_loader.read_scene(path, SHAPE).channels[..., :6] + 0.5
    for row, col in itertools.product(range(70), range(90)):
        cell = fine[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].reshape(4, 6)
        expected = 0 if np.isnan(cell).all() else np.nanmean(cell, axis=0)
        np.testing.assert_allclose(refs[row, col], expected, atol=1e-6)


def test_500_m_patches_are_the_rectangles_of_the_scene(tmp_path, arrays):
    fine = np.random.default_rng(0).random((200, 270, 6))
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, {**arrays, "refs": fine})
    scene, patches = data_loader.read_scene(path, SHAPE), empty_patches([5])
    data_loader.read_patches(path, patches, SHAPE, 32)
    # The second patch of the second row: 2 + 32 rows and 3 + 32 columns are before it.
    np.testing.assert_array_equal(patches[5][0], scene.channels[34:66, 35:67])


@pytest.mark.parametrize(
    ("name", "possible", "outside"),
    [("refs", (-0.49, 9.9), (-0.51, 10.1)), ("bts", (150.5, 349.5), (149.5, 350.5))],
)
def test_only_impossible_numbers_are_out_of_range(tmp_path, arrays, name, possible, outside):
    changed = arrays[name].copy()
    changed[50, 60:62, 1] = possible
    write_scene(tmp_path / "S3A_x.hdf", {**arrays, name: changed})
    assert data_loader.read_scene(tmp_path / "S3A_x.hdf", SHAPE).out_of_range == 0
    changed[50, 60:62, 1] = outside
    write_scene(tmp_path / "S3A_x.hdf", {**arrays, name: changed})
    assert data_loader.read_scene(tmp_path / "S3A_x.hdf", SHAPE).out_of_range == 2


def test_numbers_too_large_for_float32_are_missing(tmp_path, arrays):
    refs = np.nan_to_num(arrays["refs"])  # finite, so that only the change is unusual
    refs[50, 60, 1] = 1e39
    write_scene(tmp_path / "S3A_x.hdf", {**arrays, "refs": refs})
    scene = data_loader.read_scene(tmp_path / "S3A_x.hdf", SHAPE)
    assert scene.channels[50, 60, 1] == -0.5 and scene.out_of_range == 0


PACKED = {
    "bts": (0.01, 200.0),
    "refs": (1e-4, 0.5),
    "bayes": (2.0, 0.0),
}  # scale_factor, add_offset


@pytest.mark.parametrize("refs_fold", [1, 2])
def test_packed_numbers_and_fill_values_mean_what_their_attributes_say(tmp_path, arrays, refs_fold):
    plain, packed, fill = {}, {}, -32768
    for name, (scale, offset) in PACKED.items():
        numbers = np.round((arrays[name].astype(np.float64) - offset) / scale)
        missing = ~np.isfinite(numbers)
        if name == "bayes":
            missing[5:9] = True  # without label: clear
        packed[name] = np.where(missing, fill, np.nan_to_num(numbers)).astype(np.int16)
        plain[name] = np.where(missing, np.nan, packed[name] * scale + offset)
        if name == "refs":
            packed[name], plain[name] = (
                np.repeat(np.repeat(each[name], refs_fold, 0), refs_fold, 1)
                for each in (packed, plain)
            )
    write_scene(tmp_path / "plain.hdf", plain)
    write_scene(tmp_path / "packed.hdf", packed)
    with h5py.File(tmp_path / "packed.hdf", "r+") as file:
        for name, (scale, offset) in PACKED.items():
            attributes = {"scale_factor": [scale], "add_offset": offset, "_FillValue": fill}
            file[name].attrs.update(attributes)
    found, expected = (
        data_loader.read_scene(tmp_path / f"{name}.hdf", SHAPE) for name in ("packed", "plain")
    )
    for name in ("channels", "cloud", "valid", "bt_12um"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert not found.cloud[5:9].any() and found.out_of_range == 0


def test_attributes_without_effect_leave_all_bits_as_they_are(path):
    """xarray stores _FillValue NaN with all floating point numbers."""
    before = data_loader.read_scene(path, SHAPE)
    with h5py.File(path, "r+") as file:
        for name in ("refs", "bts", "bayes"):
            file[name].attrs.update({"_FillValue": np.nan, "scale_factor": 1.0, "units": "K"})
    after = data_loader.read_scene(path, SHAPE)
    np.testing.assert_array_equal(after.channels, before.channels)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale_factor", np.nan), ("scale_factor", "fast"), ("_Unsigned", "true"), ("add_offset", [])],
)
def test_attributes_that_cannot_be_used_are_reported_before_a_run(path, name, value):
    with h5py.File(path, "r+") as file:
        file["bts"].attrs[name] = value
    with pytest.raises(SceneError, match="S3A_x.hdf cannot be used: ") as error:
        data_loader.check_scene(path, SHAPE)
    assert "'/bts'" in str(error.value) and name in str(error.value)


def test_padding_surrounds_only_the_channels(path):
    plain = data_loader.read_scene(path, SHAPE)
    padded = data_loader.read_scene(path, SHAPE, padding=((3, 4), (5, 6)))
    expected = np.pad(plain.channels, [(3, 4), (5, 6), (0, 0)])
    np.testing.assert_array_equal(padded.channels, expected)
    for name in ("cloud", "valid", "bt_12um"):
        np.testing.assert_array_equal(getattr(padded, name), getattr(plain, name))


def test_scene_without_label_is_read_if_none_is_needed(tmp_path, arrays):
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, {name: array for name, array in arrays.items() if name != "bayes"})
    scene = data_loader.read_scene(path, SHAPE, labelled=False)
    assert scene.cloud is None and scene.channels.shape == SHAPE
    assert [*data_loader.check_scene(path, SHAPE, labelled=False)] == ["refs", "bts"]
    with pytest.raises(SceneError, match="has no dataset 'bayes', .* --mode inference"):
        data_loader.read_scene(path, SHAPE)


def test_check_returns_the_storage_of_each_dataset(tmp_path, arrays, path):
    assert data_loader.check_scene(path, SHAPE) == {
        "refs": "float64 contiguous", "bts": "float32 contiguous", "bayes": "float64 contiguous",
    }  # fmt: skip
    write_scene(path, arrays, compression="gzip", shuffle=True)
    assert data_loader.check_scene(path, SHAPE)["bts"] == "float32 chunked shuffle gzip"


@pytest.mark.parametrize("name", ["S3A_" + "x" * 197, "S3A_\n.hdf"])
def test_check_refuses_names_that_no_mask_can_have(tmp_path, name):
    with pytest.raises(SceneError, match="at most 200 bytes"):
        data_loader.check_scene(tmp_path / name, SHAPE)


@pytest.mark.parametrize("content", [b"", b"not HDF5", 400_000])
@pytest.mark.parametrize("function", [data_loader.check_scene, data_loader.read_scene])
def test_damaged_file_is_named(path, content, function):
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    with pytest.raises(SceneError, match="S3A_x.hdf cannot be used: .* Download it again"):
        function(path, SHAPE)


def test_damage_inside_a_chunk_is_named(path, arrays):
    write_scene(path, arrays, compression="gzip")
    with h5py.File(path, "r+") as file:
        file["bts"].id.write_direct_chunk((0, 0, 0), b"no gzip")
    assert data_loader.check_scene(path, SHAPE)
    with pytest.raises(SceneError, match="S3A_x.hdf cannot be used"):
        data_loader.read_scene(path, SHAPE)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bts", lambda bts: None, "no dataset 'bts'"),
        ("bts", lambda bts: bts[..., 0], "'bts' has shape (100, 135), expected (100, 135, 3)"),
        ("refs", lambda refs: refs[..., :5], "'refs' has shape (100, 135, 5), expected (100, 135, "
         "6) or (200, 270, 6) by IMAGE_H, IMAGE_W and N_CHANNELS"),
        ("bayes", lambda bayes: bayes[:50], "'bayes' has shape (50, 135, 1)"),
        ("bayes", lambda bayes: np.full(bayes.shape, b"x"), "should hold numbers"),
    ],
)  # fmt: skip
def test_dataset_that_is_not_as_expected_is_named(path, arrays, name, change, words):
    changed = {**arrays, name: change(arrays[name])}
    write_scene(path, {key: array for key, array in changed.items() if array is not None})
    with pytest.raises(SceneError) as error:
        data_loader.read_scene(path, SHAPE)
    assert str(path) in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("padding", [((3, 4), (5, 6)), lambda h, w: ((h % 7, w % 7), (0, 1))])
def test_scene_of_any_size_is_read(path, arrays, padding):
    plain, found = (
        data_loader.read_scene(path, shape, padding) for shape in (SHAPE, (None, None, 9))
    )
    np.testing.assert_array_equal(found.channels, plain.channels)
    (above, below), (left, right) = padding(100, 135) if callable(padding) else padding
    assert found.channels.shape == (100 + above + below, 135 + left + right, 9)
    changed = {**arrays, "bayes": arrays["bayes"][:-1]}
    write_scene(path, changed)
    with pytest.raises(SceneError, match=r"'bayes' has shape \(99, 135, 1\), .* the size of 'bts'"):
        data_loader.read_scene(path, (None, None, 9))


# --- patches of training


def test_training_scene_yields_20_patches():
    rows, cols = data_loader.training_crop(1200, 1500, 256)
    assert (rows, cols) == (slice(88, 1112), slice(110, 1390))  # 4 x 5 patches of 256


@given(st.integers(8, 300), st.integers(8, 300), st.integers(1, 8))
@settings(deadline=None)
def test_training_crop_is_the_middle_of_whole_patches(height, width, patch):
    cuts = data_loader.training_crop(height, width, patch)
    for cut, length in zip(cuts, (height, width), strict=True):
        assert (cut.stop - cut.start) % patch == 0 and length - (cut.stop - cut.start) < patch
        assert cut.start == (length - (cut.stop - cut.start)) // 2


@pytest.mark.parametrize("indices", [range(12), (2, 5, 7), (11,)])
@pytest.mark.parametrize("chunks", [None, (33, 50, 1)])
def test_patches_are_the_rectangles_of_a_plain_loop(path, arrays, chunks, indices):
    write_scene(path, arrays, chunks=chunks)
    patches = empty_patches(indices)
    assert data_loader.read_patches(path, patches, SHAPE, 32) == 0
    channels, cloud = normalised(arrays), arrays["bayes"] != 0
    i = 0
    for row in (2, 34, 66):  # 100 rows: 3 patches of 32 from row 4 // 2
        for col in (3, 35, 67, 99):  # 135 columns: 4 from column 7 // 2
            if i in patches:
                here = np.s_[row : row + 32, col : col + 32]
                np.testing.assert_allclose(patches[i][0], channels[here], rtol=1e-5, atol=1e-5)
                np.testing.assert_array_equal(patches[i][1], cloud[here])
            i += 1


def test_float16_patches_are_rounded_by_at_most_half_a_digit(path, arrays):
    """Also in the worst case, it is less than the radiometer's noise, about 0.05 K."""
    full, half = empty_patches(), empty_patches(dtype=np.float16)
    arrays = {name: array.copy() for name, array in arrays.items()}
    arrays["bts"][50, 60], arrays["bts"][50, 61] = 150.0, 349.9  # the limits of what is possible
    arrays["refs"][50, 60] = 1e6  # beyond float16: the largest number that it has
    write_scene(path, arrays)
    for patches in (full, half):
        data_loader.read_patches(path, patches, SHAPE, 32)
    exact, rounded = (
        np.concatenate([patches[i][0] for i in range(12)]).astype(np.float64)
        for patches in (full, half)
    )
    np.testing.assert_array_equal(
        rounded, np.clip(exact, -65504, 65504).astype(np.float16).astype(np.float64)
    )
    error = np.where(exact > 1e5, 0, np.abs(rounded - exact))
    assert error[..., 6:][exact[..., 6:] > -6].max() * 22 < 0.043  # [K]; missing values are -12.3
    assert error[..., :6][exact[..., :6] < 0.5].max() < 0.00013
    for i in range(12):
        np.testing.assert_array_equal(half[i][1], full[i][1])


def test_float16_is_that_of_numpy_for_numbers_of_every_size():
    bits = np.random.default_rng(0).integers(2**32, size=1_000_000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.abs(numbers) <= 65504]
    ties = np.arange(2**15, dtype=np.uint16).view(np.float16)[:31743].astype(np.float32)
    ties = (ties[1:] + ties[:-1]) / 2  # between two neighbours
    for values in (numbers, ties, -ties):
        found, expected = ToFloat16()(values), values.astype(np.float16)
        normal = np.abs(values) >= 2**-14
        np.testing.assert_array_equal(found[normal].view("u2"), expected[normal].view("u2"))
        # The others are multiples of 2^-24, and may be rounded twice.
        assert np.abs(found[~normal].astype("f8") - values[~normal]).max() < 0.5001 * 2**-24


# --- batches


@given(
    n_scenes=st.integers(1, 12),
    per_scene=st.integers(1, 9),
    batch=st.integers(1, 20),
    mixed=st.integers(1, 20),
    epoch=st.one_of(st.none(), st.integers(0, 3)),
)
@settings(max_examples=200, deadline=None)
def test_every_patch_comes_once_per_epoch(n_scenes, per_scene, batch, mixed, epoch):
    steps = data_loader.epoch_steps(n_scenes, per_scene, batch, min(mixed, batch), 5, epoch)
    assert steps.shape == (-(-n_scenes * per_scene // batch), batch, 2)
    used = [tuple(pick) for pick in steps.reshape(-1, 2) if pick[0] >= 0]
    assert sorted(used) == list(itertools.product(range(n_scenes), range(per_scene)))
    assert (steps[:-1] >= 0).all()  # only the last batch may be smaller


def test_epochs_differ_and_repeat_with_the_seed():
    first, again, second, other = (
        data_loader.epoch_steps(7, 12, 11, 8, seed, epoch)
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != second).any() and (first != other).any()


def test_scenes_and_patches_have_another_order_in_every_epoch():
    steps = [data_loader.epoch_steps(16, 20, 8, 1, seed=1, epoch=epoch) for epoch in range(2)]
    first, second = (step.reshape(-1, 2) for step in steps)  # one lane: 320 patches
    assert (first[::20, 0] != second[::20, 0]).any()
    patches = [epoch[epoch[:, 0] == 3, 1].tolist() for epoch in (first, second)]
    assert patches[0] != patches[1] != list(range(20))


def test_ranks_read_their_own_scenes_in_every_epoch():
    shares = []
    for epoch in range(3):
        steps = data_loader.epoch_steps(16, 20, 32, 8, seed=1, epoch=epoch)
        assert all(len(set(step[:, 0])) == 8 for step in steps)  # each batch mixes 8 scenes
        shares.append([set(steps[:, 8 * r : 8 * r + 8, 0].ravel()) - {-1} for r in range(4)])
    assert shares[0] == shares[1] == shares[2]
    assert sorted(itertools.chain(*shares[0])) == list(range(16))  # 4 scenes each


def fake_read(number, patches):
    """Fill each patch with 100 * scene + patch, and mark its first pixel."""
    for i, (channels, cloud) in patches.items():
        channels[:], cloud[:] = 100 * number + i, (100 * number + i) % 2
        channels[0, 0], cloud[0, 0] = 1000, 7


def make_batches(replicas=range(1), n_replicas=1, **options):
    return PatchBatches(
        **{"paths": range(7), "read": fake_read, "patch_size": 8, "patches_per_scene": 6,
           "n_channels": 1, "batch_size": 11, "replicas": replicas, "n_replicas": n_replicas,
           "seed": 3, **options}
    )  # fmt: skip


def global_batches(n_replicas, per_process=1, start=(0, 0), n_steps=12, **options):
    """Patches of each global batch in the order of its slots, put together from all processes."""
    steps = [[] for _ in range(n_steps)]
    for first in range(0, n_replicas, per_process):
        replicas = range(first, first + per_process)
        with make_batches(replicas, n_replicas, **options) as source:
            elements = itertools.islice(source.batches(*start), n_steps * per_process)
            for i, (channels, cloud, weight, n_used) in enumerate(elements):
                n = int(weight.sum())
                assert n_used == n and n_used.dtype == np.int32
                assert (weight[:n] == 1).all() and (weight[n:] == 0).all()
                assert not channels[n:].any() and not cloud[n:].any()
                assert channels.shape[0] == source.replica_batch
                steps[i // per_process] += zip(channels[:n].copy(), cloud[:n].copy(), strict=True)
    return steps


def assert_equal(found, expected):
    for step, other in zip(found, expected, strict=True):
        assert len(step) == len(other)
        for patch, same in zip(step, other, strict=True):
            np.testing.assert_array_equal(patch[0], same[0])
            np.testing.assert_array_equal(patch[1], same[1])


def test_batches_hold_the_patches_of_epoch_steps():
    steps = [data_loader.epoch_steps(7, 6, 11, 8, 3, epoch) for epoch in range(3)]  # 4 steps each
    for found, expected in zip(global_batches(1), itertools.chain(*steps), strict=True):
        numbers = [channels[1, 1, 0] for channels, _ in found]
        assert numbers == [100 * scene + patch for scene, patch in expected if scene >= 0]


def augment(channels, cloud, key):
    """Flip and turn a patch, as views of the arguments, and add a random number."""
    rng = np.random.default_rng(key)
    turns = rng.integers(4)
    return np.rot90(channels, turns)[::-1] + rng.random(dtype="f4"), np.rot90(cloud, turns)[::-1]


@pytest.mark.parametrize("augment", [None, augment], ids=["plain", "augmented"])
@pytest.mark.parametrize(("n_replicas", "per_process"), [(2, 2), (2, 1), (3, 1), (6, 2), (11, 1)])
def test_global_batches_are_the_same_for_any_replicas(n_replicas, per_process, augment):
    found = global_batches(n_replicas, per_process, augment=augment, n_threads=per_process)
    assert_equal(found, global_batches(1, augment=augment))


@pytest.mark.parametrize("n_replicas", [1, 2, 3])
@pytest.mark.parametrize("start", [(0, 3), (1, 0), (2, 1)])
def test_batches_resume_at_any_step(n_replicas, start):
    n_skipped = 4 * start[0] + start[1]  # 7 scenes of 6 patches: 4 steps of 11
    found = global_batches(n_replicas, start=start, n_steps=12 - n_skipped, augment=augment)
    assert_equal(found, global_batches(1, augment=augment)[n_skipped:])


def test_augmentation_differs_by_epoch_scene_patch_and_seed():
    keys = []

    def note(channels, cloud, key):
        keys.append(key)
        return channels, cloud

    global_batches(1, n_steps=8, augment=note)
    patches = itertools.product([3], range(2), range(7), range(6))
    assert sorted(keys)[:84] == sorted(patches)


def test_augmentation_is_applied_after_the_read_and_only_to_training():
    plain, augmented = global_batches(1), global_batches(1, augment=augment)
    assert any((a[0] != b[0]).any() for a, b in zip(plain[0], augmented[0], strict=True))
    assert_equal(
        global_batches(1, augment=augment, shuffle=False), global_batches(1, shuffle=False)
    )


@pytest.mark.parametrize("n_local", [1, 2])
def test_patches_kept_on_a_device_are_read_once(n_local):
    with make_batches(range(n_local), n_local, on_device=True) as source:
        elements = itertools.islice(source.batches(0, 1), 12 * n_local)
        n_new = [0] * 12
        for i, element in enumerate(elements):
            n_new[i // n_local] += len(element.new.weight)
    # From the second step of four: 31 patches, then the 11 others of the first step.
    assert sum(n_new[:3]) == 31
    assert sum(n_new) == 42 if n_local == 1 else 42 <= sum(n_new) <= 2 * 42
    assert n_local == 2 or not any(n_new[7:])


def test_patches_of_a_bad_scene_get_weight_0_and_others_stay():
    def read(number, patches):
        fake_read(number, patches)
        if number == 2:
            raise SceneError("scene 2 is bad")

    reported = []
    options = {"augment": augment, "multiple": 4}
    handler = {"on_bad_scene": lambda path, error: reported.append((path, str(error)))}
    with make_batches(**options) as good, make_batches(read=read, **options, **handler) as bad:
        pairs = list(itertools.islice(zip(good.batches(), bad.batches(), strict=True), 4))
    n_zero = 0
    for (channels, cloud, weight, _), (found_channels, found_cloud, found_weight, n_used) in pairs:
        used = found_weight == 1
        assert not used[n_used:].any() and (n_used == 0 or used[n_used - 1])
        n_zero += np.sum(weight) - np.sum(used)
        np.testing.assert_array_equal(found_channels[used], channels[used])
        np.testing.assert_array_equal(found_cloud[used], cloud[used])
        assert not found_channels[~used].any() and not found_cloud[~used].any()
    assert n_zero == 6 and set(reported) == {(2, "scene 2 is bad")}


def test_bad_scene_ends_the_reading_by_default():
    def read(path, patches):
        raise SceneError("scene 3 is bad")

    with make_batches(read=read) as source, pytest.raises(SceneError, match="scene 3 is bad"):
        next(source.batches())


def test_scenes_out_of_range_are_logged_once_each(caplog):
    def read(number, patches):
        fake_read(number, patches)
        return 4 * (number % 2)

    with make_batches(read=read) as source:
        for _ in itertools.islice(source.batches(), 12):
            pass
    told = [record.getMessage() for record in caplog.records]
    text = "{}: 4 impossible reflectances or temperatures [K] are used as they are."
    assert sorted(told) == [text.format(i) for i in (1, 3, 5)]


def test_at_most_10_scenes_out_of_range_are_logged(caplog):
    with make_batches(paths=range(12), read=lambda path, patches: 1) as source:
        for _ in itertools.islice(source.batches(), source.n_steps):
            pass
    assert len(caplog.records) == 10


def test_scenes_of_a_step_are_those_of_its_patches():
    with make_batches(paths=[f"scene {i}" for i in range(7)]) as source:
        found = [source.scenes_of(1, step) for step in range(source.n_steps)]
    steps = data_loader.epoch_steps(7, 6, 11, 8, 3, epoch=1)  # the last has 9 patches for 11 slots
    assert found == [
        [f"scene {i}" for i in sorted({scene for scene in step[:, 0].tolist() if scene >= 0})]
        for step in steps
    ]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_scenes", [20, 80, 82])
def test_memory_does_not_grow_with_the_scenes(n_scenes, shuffle):
    # 4 lanes of 20 scenes each; of 82, some scenes are needed in two lanes, at different times.
    options = {"patch_size": 64, "n_mixed_scenes": 4, "paths": range(n_scenes), "shuffle": shuffle}
    batch_bytes = 11 * 64 * 64 * 5  # 11 batches per epoch of 20 scenes, 44 of 80
    with make_batches(**options) as source:
        tracemalloc.start()
        try:
            for _ in itertools.islice(source.batches(), 2 * source.n_steps):
                pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # 11 slots of 4 scenes: a scene of 6 patches is spread over 4 batches at most; scenes that are
    # read ahead can begin as many batches later; and one is in use.
    assert source.max_bytes == (4 + 4 + 1) * batch_bytes
    assert peak < source.max_bytes + batch_bytes / 2


def test_batches_are_aligned_to_64_bytes():
    for channels, cloud, *_ in itertools.islice(make_batches(batch_size=5).batches(), 3):
        assert channels.ctypes.data % 64 == 0 and cloud.ctypes.data % 64 == 0


def test_closing_waits_for_what_is_read_and_reads_no_more():
    begun, done = [], []

    def read(path, patches):
        begun.append(path)
        time.sleep(0.01)
        fake_read(path, patches)
        done.append(path)

    with make_batches(read=read) as source:
        next(source.batches())
    assert len(begun) == len(done) < 7 * 3


# --- patches of inference, and back

geometry = st.tuples(
    *(st.integers(8, 70), st.integers(8, 70), st.integers(4, 40)),
    *(st.integers(0, 19), st.integers(1, 2)),
)


@given(geometry)
@settings(max_examples=100, deadline=None)
def test_patches_equal_a_plain_loop_and_reconstruct_inverts_them(sizes):
    height, width, patch, half_crop, channels = sizes
    crop = 2 * min(half_crop, (patch - 1) // 2)
    stride, trim = patch - crop, crop // 2
    image = np.random.default_rng(0).random((height, width, channels)).astype(np.float32)
    grid = data_loader.PatchGrid(height, width, patch, crop)
    padded = np.pad(image, [*grid.padding, (0, 0)])
    n_rows, n_cols = -(-height // stride), -(-width // stride)
    patches = np.stack([padded[r : r + patch, c : c + patch] for r, c in grid.corners])
    stitched = grid.stitch(patches[..., 0])
    patches = patches.reshape(n_rows, n_cols, *patches.shape[1:])

    above = ((n_rows - 1) * stride + patch - height) // 2
    left = ((n_cols - 1) * stride + patch - width) // 2
    for i, j, r, c in itertools.product(
        range(n_rows), range(n_cols), (0, patch // 2, patch - 1), (0, patch // 3, patch - 1)
    ):
        row, col = i * stride + r - above, j * stride + c - left
        inside = 0 <= row < height and 0 <= col < width
        expected = image[row, col] if inside else np.zeros(channels)
        np.testing.assert_array_equal(patches[i, j, r, c], expected)

    trimmed = patches[:, :, trim : patch - trim, trim : patch - trim, :1]
    back = data_loader.reconstruct(trimmed, height, width)
    np.testing.assert_array_equal(back, image[..., 0])
    np.testing.assert_array_equal(stitched, image[..., 0])


def test_full_scene_has_63_patches():
    grid = data_loader.PatchGrid(1200, 1500, 256, 80)
    assert grid.padding == ((56, 56), (82, 82)) and grid.window == (256, 256)
    assert grid.corners.reshape(7, 9, 2)[-1, -1].tolist() == [1312 - 256, 1664 - 256]


def test_reconstruct_refuses_a_grid_smaller_than_the_scene():
    with pytest.raises(ValueError, match="less than the scene's 33 x 20"):
        data_loader.reconstruct(np.zeros((2, 2, 16, 16, 1)), 33, 20)
