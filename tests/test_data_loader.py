import itertools
import os
import re
import time
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_loader
from data_loader import PatchBatches, SceneError
from tools.make_scenes import make_scene, write_scene

SHAPE = (100, 135, 9)


@pytest.fixture(scope="module")
def arrays():
    scene = make_scene(np.random.default_rng(3), *SHAPE[:2])
    scene["bts"][40:44, 50:60] = np.nan
    scene["refs"][10:14, 20:30] = np.nan
    return scene


def places(n_patches, p, n_channels=9):
    """Where patches are read to."""
    return {
        i: (np.empty((p, p, n_channels), np.float32), np.empty((p, p, 1), np.uint8))
        for i in range(n_patches)
    }


def expected(arrays):
    """Normalise in the plainest way."""
    refs = np.nan_to_num(arrays["refs"].astype(np.float64)) - 0.5
    bts = (np.nan_to_num(arrays["bts"].astype(np.float64)) - 270) / 22
    return np.concatenate([refs, bts], axis=-1)


# --- which scenes


def test_scenes_are_found_in_one_order_below_day_and_night(tmp_path):
    for name in ("night/S3A_b.hdf", "day/S3A_c.hdf", "day/deep/S3A_a.hdf", "day/other.hdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in data_loader.find_scenes(tmp_path)]
    assert found == ["day/S3A_c.hdf", "day/deep/S3A_a.hdf", "night/S3A_b.hdf"]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_missing_data_names_the_directory(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        data_loader.find_scenes(tmp_path / name)


def test_linked_folders_are_searched_and_circles_end(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "S3A_a.hdf").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "night").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    found = data_loader.find_scenes(tmp_path / "data")
    assert found == [tmp_path / "data" / "night" / "S3A_a.hdf"]


def test_two_scenes_of_one_name_are_refused(tmp_path):
    for name in ("night", "day"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "S3A_a.hdf").touch()
    with pytest.raises(SceneError, match="S3A_a.hdf"):
        data_loader.find_scenes(tmp_path)


def test_split_shares_no_scene_and_takes_the_share():
    paths = [f"{i:03}" for i in range(970)]
    train, test = data_loader.split_scenes(paths, 0.8)
    assert len(train) == 776 and sorted(train + test) == paths


@pytest.mark.parametrize(("n", "share"), [(1, 0.8), (3, 0.1)])
def test_split_refuses_an_empty_side(n, share):
    with pytest.raises(ValueError, match=f"of {n} scenes"):
        data_loader.split_scenes(list(range(n)), share)


def test_day_and_night_come_from_the_folder(tmp_path):
    assert data_loader.day_or_night(tmp_path / "day" / "S3A.hdf") == "day"
    assert data_loader.day_or_night(tmp_path / "S3A.hdf") == "unknown"


# --- reading


@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"chunks": (30, 40, 3)},
        {"chunks": True, "compression": "gzip", "shuffle": True},
        {"byteorder": ">"},
        {"compact": True},
        {"userblock": True},
        {"external": True},
    ],
    ids=lambda storage: next(iter(storage), "contiguous"),
)
def test_scene_is_read_from_every_kind_of_storage(tmp_path, arrays, storage):
    path = tmp_path / "S3A_x.hdf"
    with h5py.File(path, "w", userblock_size=512 * ("userblock" in storage)) as file:
        for name, array in arrays.items():
            if "byteorder" in storage:
                array = array.astype(array.dtype.newbyteorder(">"))
            options = {
                k: v for k, v in storage.items() if k in ("chunks", "compression", "shuffle")
            }
            if "chunks" in storage and storage["chunks"] is not True:
                options["chunks"] = (30, 40, 1)
            if "external" in storage:
                options["external"] = str(tmp_path / f"{name}.bin")
            if "compact" in storage and name == "bayes":  # 64 KiB at most
                space = h5py.h5s.create_simple((*SHAPE[:2], 1))
                plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                plan.set_layout(h5py.h5d.COMPACT)
                array = array.astype(np.uint8)
                h5py.h5d.create(file.id, b"bayes", h5py.h5t.NATIVE_UINT8, space, plan)
                file["bayes"][...] = array
                continue
            file.create_dataset(name, data=array, **options)
    scene = data_loader.read_scene(path, SHAPE)
    np.testing.assert_allclose(scene.channels, expected(arrays), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scene.cloud, arrays["bayes"] != 0)
    bts = np.nan_to_num(arrays["bts"])
    np.testing.assert_array_equal(scene.valid, (bts != 0).all(axis=-1))
    np.testing.assert_array_equal(scene.bt_12um, bts[..., 2])
    assert scene.channels.dtype == np.float32 and scene.cloud.dtype == np.uint8


@pytest.mark.parametrize("chunks", [None, (33, 50, 1)])
def test_tile_is_a_part_of_the_whole(tmp_path, arrays, chunks):
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, arrays, chunks=chunks)
    whole = data_loader.read_scene(path, SHAPE)
    parts = {
        "channels": np.empty((86, 109, 9), np.float32),
        "cloud": np.empty((86, 109, 1), np.uint8),
        "valid": np.empty((86, 109), bool),
        "bt_12um": np.empty((86, 109), np.float32),
    }
    data_loader.read_tiles(path, SHAPE, [data_loader.Tile(7, 11, **parts)])
    for name, part in parts.items():
        np.testing.assert_array_equal(part, getattr(whole, name)[7:93, 11:120])


def test_500_m_reflectances_are_averaged_without_the_missing(tmp_path, arrays):
    fine = np.random.default_rng(0).random((200, 270, 6))
    fine[0, 0] = np.nan  # one of four
    fine[2:4, 2:4] = np.nan  # all of four
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, {**arrays, "refs": fine})
    refs = data_loader.read_scene(path, SHAPE).channels[..., :6] + 0.5
    for row, col in itertools.product(range(70), range(90)):
        cell = fine[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].reshape(4, 6)
        wanted = 0 if np.isnan(cell).all() else np.nanmean(cell, axis=0)
        np.testing.assert_allclose(refs[row, col], wanted, atol=1e-6)


def test_padding_surrounds_the_channels_alone(tmp_path, arrays):
    write_scene(tmp_path / "S3A_x.hdf", arrays)
    plain = data_loader.read_scene(tmp_path / "S3A_x.hdf", SHAPE)
    padded = data_loader.read_scene(tmp_path / "S3A_x.hdf", SHAPE, padding=((3, 4), (5, 6)))
    wanted = np.pad(plain.channels, [(3, 4), (5, 6), (0, 0)])
    np.testing.assert_array_equal(padded.channels, wanted)
    for name in ("cloud", "valid", "bt_12um"):
        np.testing.assert_array_equal(getattr(padded, name), getattr(plain, name))


def test_infinity_counts_as_missing(tmp_path, arrays):
    bts = arrays["bts"].copy()
    bts[0, 0, 1] = np.inf
    write_scene(tmp_path / "S3A_x.hdf", {**arrays, "bts": bts})
    scene = data_loader.read_scene(tmp_path / "S3A_x.hdf", SHAPE)
    assert not scene.valid[0, 0] and np.isfinite(scene.channels).all()


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_scenes_are_read_without_h5py_where_their_bytes_allow(
    tmp_path, arrays, compression, monkeypatch
):
    def refuse(*arguments):
        raise AssertionError("h5py was asked for numbers")

    write_scene(tmp_path / "S3A_x.hdf", arrays, compression=compression)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    scene = data_loader.read_scene(tmp_path / "S3A_x.hdf", SHAPE)
    np.testing.assert_allclose(scene.channels, expected(arrays), rtol=1e-5, atol=1e-5)


def test_damaged_chunk_names_the_file(tmp_path, arrays):
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, arrays, compression="gzip")
    with h5py.File(path, "r+") as file:
        file["bts"].id.write_direct_chunk((0, 0, 0), b"no zlib")
    with pytest.raises(SceneError, match="S3A_x.hdf cannot be read as a scene.*damaged chunk"):
        data_loader.read_scene(path, SHAPE)


@pytest.mark.parametrize("content", [b"", b"not HDF5", 400_000])
def test_unreadable_file_is_named(tmp_path, arrays, content):
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, arrays)
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    with pytest.raises(SceneError, match="cannot be read as a scene") as error:
        data_loader.read_scene(path, SHAPE)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bts", lambda bts: None, "no dataset 'bts'"),
        ("bts", lambda bts: bts[..., 0], "'bts' has shape (100, 135)"),
        ("refs", lambda refs: refs[..., :5], "'refs' has shape (100, 135, 5)"),
        ("bayes", lambda bayes: bayes[:50], "'bayes' has shape (50, 135, 1)"),
        ("bayes", lambda bayes: np.full(bayes.shape, b"x"), "should hold numbers"),
    ],
)
def test_bad_dataset_is_named_with_what_is_wrong(tmp_path, arrays, name, change, words):
    path = tmp_path / "S3A_x.hdf"
    changed = {**arrays, name: change(arrays[name])}
    write_scene(path, {key: array for key, array in changed.items() if array is not None})
    with pytest.raises(SceneError) as error:
        data_loader.read_scene(path, SHAPE)
    assert str(path) in str(error.value) and words in str(error.value)


def test_cache_gives_what_was_read_and_drops_what_is_incomplete(tmp_path, arrays):
    path, cache = tmp_path / "S3A_x.hdf", tmp_path / "cache"
    write_scene(path, arrays)
    reads = []

    def read(path, patches):
        reads.append(list(patches))
        data_loader.read_patches(path, patches, SHAPE, 32)

    def read_cached(key="crop", wanted=range(12)):
        patches = places(12, 32)
        patches = {i: patches[i] for i in wanted}
        data_loader.cached(read, cache, key)(path, patches)
        for i, patch in patches.items():
            for array, same in zip(patch, plain[i], strict=True):
                np.testing.assert_array_equal(array, same)

    data_loader.read_patches(path, plain := places(12, 32), SHAPE, 32)
    read_cached(wanted=[3, 11])
    read_cached()
    assert reads == [[3, 11], [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]]
    read_cached()
    assert len(reads) == 2

    copy = next(cache.glob("*-7.raw"))
    copy.write_bytes(copy.read_bytes()[:-5])
    read_cached()
    assert reads[2:] == [[7]]
    read_cached("another crop")
    assert len(reads[3]) == 12 and len(reads) == 4


# --- patches of training


@pytest.mark.parametrize("size", [(1200, 1500, 256), (100, 135, 32), (64, 64, 64), (65, 127, 64)])
def test_training_crop_is_the_middle_of_whole_patches(size):
    height, width, patch = size
    rows, cols = data_loader.training_crop(height, width, patch)
    for cut, length in ((rows, height), (cols, width)):
        assert (cut.stop - cut.start) == length // patch * patch
        assert cut.start == length % patch // 2


def test_training_scene_yields_20_patches():
    rows, cols = data_loader.training_crop(1200, 1500, 256)
    assert (rows, cols) == (slice(88, 1112), slice(110, 1390))  # 4 x 5 patches of 256


def test_patches_are_the_rectangles_of_a_plain_loop(tmp_path, arrays):
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, arrays)
    patches = places(12, 32)
    data_loader.read_patches(path, patches, SHAPE, 32)
    found = iter(patches.values())
    channels, cloud = expected(arrays), arrays["bayes"] != 0
    for row in (2, 34, 66):  # 100 rows: 3 patches of 32 from row 4 // 2
        for col in (3, 35, 67, 99):  # 135 columns: 4 from column 7 // 2
            found_channels, found_cloud = next(found)
            here = np.s_[row : row + 32, col : col + 32]
            np.testing.assert_allclose(found_channels, channels[here], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found_cloud, cloud[here])
    assert next(found, None) is None


def test_wanted_patches_alone_are_read(tmp_path, arrays):
    path = tmp_path / "S3A_x.hdf"
    write_scene(path, {**arrays, "refs": np.random.default_rng(0).random((200, 270, 6))})
    every, some = places(12, 32), places(12, 32)
    data_loader.read_patches(path, every, SHAPE, 32)
    some = {i: some[i] for i in (2, 5, 7)}
    data_loader.read_patches(path, some, SHAPE, 32)
    for i, patch in some.items():
        for array, same in zip(patch, every[i], strict=True):
            np.testing.assert_array_equal(array, same)


@given(
    n_scenes=st.integers(1, 12),
    per_scene=st.integers(1, 9),
    batch=st.integers(1, 20),
    lanes=st.integers(1, 20),
    epoch=st.one_of(st.none(), st.integers(0, 3)),
)
@settings(max_examples=200, deadline=None)
def test_every_patch_comes_once_in_an_epoch(n_scenes, per_scene, batch, lanes, epoch):
    steps = data_loader.epoch_steps(n_scenes, per_scene, batch, min(lanes, batch), 5, epoch)
    n_patches = n_scenes * per_scene
    assert steps.shape == (-(-n_patches // batch), batch, 2)
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


def test_batches_mix_as_many_scenes_as_lanes():
    steps = data_loader.epoch_steps(16, 20, 32, 8, seed=1, epoch=0)
    assert all(len(set(step[:, 0])) == 8 for step in steps)


def test_ranks_of_whole_lanes_read_their_own_scenes_in_every_epoch():
    shares = []
    for epoch in range(3):
        steps = data_loader.epoch_steps(16, 20, 32, 8, seed=1, epoch=epoch)
        shares.append([set(steps[:, 8 * r : 8 * r + 8, 0].ravel()) - {-1} for r in range(4)])
    assert shares[0] == shares[1] == shares[2]
    assert sorted(itertools.chain(*shares[0])) == list(range(16))  # 4 each, none twice


@given(batch=st.integers(1, 40), n=st.integers(1, 40))
def test_replicas_share_the_slots_evenly(batch, n):
    slots = [data_loader.replica_slots(batch, n, replica) for replica in range(n)]
    assert [i for cut in slots for i in range(cut.start, cut.stop)] == list(range(batch))
    sizes = [cut.stop - cut.start for cut in slots]
    assert max(sizes) - min(sizes) <= 1


def fake_scene(number, patches):
    """Fill each patch with 100 * scene + patch."""
    for i, (channels, cloud) in patches.items():
        channels[:], cloud[:] = 100 * number + i, (100 * number + i) % 2


def feed(replicas, n_replicas, **options):
    return PatchBatches(
        **{"paths": range(7), "read": fake_scene, "patch_size": 8, "patches_per_scene": 6,
           "n_channels": 1, "batch_size": 11, "replicas": replicas, "n_replicas": n_replicas,
           "seed": 3, **options}
    )  # fmt: skip


def batches_of(n_replicas, n_epochs, per_process):
    """The sets of patches of each global batch, put together from all processes."""
    steps = []
    for first in range(0, n_replicas, per_process):
        source = feed(range(first, first + per_process), n_replicas)
        elements = itertools.islice(source, n_epochs * source.n_steps * per_process)
        for i, (channels, cloud, weight) in enumerate(elements):
            step = i // per_process
            if step == len(steps):
                steps.append([])
            n = int(weight.sum())
            assert (weight[:n] == 1).all() and (weight[n:] == 0).all()
            np.testing.assert_array_equal(cloud[:n] != 0, channels[:n] % 2 != 0)
            assert (channels[:n] == channels[:n, :1, :1]).all()
            steps[step] += channels[:n, 0, 0, 0].tolist()
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("n_replicas", "per_process"), [(2, 2), (2, 1), (3, 1), (6, 2), (11, 1)])
def test_global_batches_are_the_same_for_any_number_of_replicas(n_replicas, per_process):
    assert batches_of(n_replicas, 3, per_process) == batches_of(1, 3, 1)


def test_tf_dataset_gives_the_batches_and_no_end():
    source = feed(range(1), 1, multiple=4)
    tensors = itertools.islice(source.dataset(), 2 * source.n_steps)
    arrays = itertools.islice(feed(range(1), 1, multiple=4), 2 * source.n_steps)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor[0].shape == (12, 8, 8, 1)  # 11, rounded up to a multiple of 4
        for a, b in zip(tensor, array, strict=True):
            np.testing.assert_array_equal(a, b)


def test_no_thread_tunes_the_dataset():
    """To drop an iterator is to wait for that thread, up to a minute."""
    assert feed(range(1), 1).dataset().options().autotune.enabled is False


def test_tf_dataset_begins_anew_when_it_is_iterated_again():
    dataset = feed(range(1), 1).dataset()
    first, again = (next(iter(dataset)) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])


@pytest.mark.parametrize("n_scenes", [20, 80])
def test_batches_in_memory_do_not_grow_with_the_scenes(n_scenes):
    options = {"patch_size": 64, "n_lanes": 4, "paths": range(n_scenes)}
    source = feed(range(1), 1, **options)
    batch_bytes = 11 * 64 * 64 * 5  # 11 batches in an epoch of 20 scenes, 44 in one of 80
    tracemalloc.start()
    try:
        for _ in itertools.islice(source, 2 * source.n_steps):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 11 slots in 4 lanes: a scene of 6 patches is spread over 4 batches at most; four scenes that
    # are read ahead can begin as many batches later; and one is in our hands.
    assert peak < (4 + 4 + 1) * batch_bytes + 1_000_000


def test_batches_are_on_borders_of_64_bytes():
    for channels, cloud, _ in itertools.islice(feed(range(1), 1, batch_size=5), 3):
        assert channels.ctypes.data % 64 == 0 and cloud.ctypes.data % 64 == 0


def test_an_error_of_reading_is_kept():
    def read(path, patches):
        raise SceneError("scene 3 is bad")

    source = feed(range(1), 1, read=read)
    with pytest.raises(Exception, match="scene 3 is bad"):
        next(iter(source.dataset()))
    assert isinstance(source.error, SceneError)


def test_nothing_is_read_once_batches_are_closed():
    begun, done = [], []

    def read(path, patches):
        begun.append(path)
        time.sleep(0.01)
        fake_scene(path, patches)
        done.append(path)

    with feed(range(1), 1, read=read) as source:
        next(iter(source.dataset()))
    n_done = len(done)
    assert len(begun) == n_done  # what was under way is waited for
    time.sleep(0.1)
    assert len(begun) == n_done


# --- patches of inference

geometry = st.tuples(
    st.integers(8, 70),
    st.integers(8, 70),
    st.integers(4, 40),
    st.integers(0, 19),
    st.integers(1, 2),
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
    assert patches.shape == (n_rows, n_cols, patch, patch, channels)
    for i, j, r, c in itertools.product(
        range(n_rows), range(n_cols), (0, patch // 2, patch - 1), (0, patch // 3, patch - 1)
    ):
        row, col = i * stride + r - above, j * stride + c - left
        inside = 0 <= row < height and 0 <= col < width
        wanted = image[row, col] if inside else np.zeros(channels)
        np.testing.assert_array_equal(patches[i, j, r, c], wanted)

    trimmed = patches[:, :, trim : patch - trim, trim : patch - trim, :1]
    back = data_loader.reconstruct(trimmed, height, width)
    np.testing.assert_array_equal(back, image[..., 0])
    np.testing.assert_array_equal(stitched, image[..., 0])


def test_full_scene_has_63_patches():
    grid = data_loader.PatchGrid(1200, 1500, 256, 80)
    assert grid.padding == ((56, 56), (82, 82))
    assert grid.corners.reshape(7, 9, 2)[-1, -1].tolist() == [1312 - 256, 1664 - 256]


def test_reconstruct_refuses_a_grid_smaller_than_the_scene():
    with pytest.raises(ValueError, match="less than the scene's 33 x 20"):
        data_loader.reconstruct(np.zeros((2, 2, 16, 16, 1)), 33, 20)


def test_folder_that_cannot_be_listed_is_an_error(dataset, monkeypatch):
    scandir = os.scandir

    def refuse(folder):
        if os.fspath(folder).endswith("night"):
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read all
    with pytest.raises(PermissionError, match="night"):
        data_loader.find_scenes(dataset / "one-day")
