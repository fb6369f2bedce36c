import functools
import json
import shutil

import h5py
import keras
import numpy as np
import pytest
from conftest import HEIGHT, PATCH, WIDTH, rewrite, rows, start

from data_loader import read_patches, read_scene
from harness.data.scene_files import find_scenes
from harness.labels.label_files import ONE, with_labels
from harness.labels.mixture import PhysicalMixture

SHAPE = HEIGHT, WIDTH, 9


def write_labels(folder, paths, labels, name="probability"):
    folder.mkdir()
    for path, values in zip(paths, labels, strict=True):
        with h5py.File(folder / f"{path.stem}.h5", "w") as file:
            file[name] = values


@pytest.fixture(scope="module")
def paths(dataset):
    return find_scenes(dataset / "one-day")


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("name", ["probability", "mask"])
def test_patch_gets_the_labels_of_its_pixels(tmp_path, paths, name, combined):
    labels = np.random.default_rng(0).random((1, HEIGHT, WIDTH)).astype(np.float32)
    labels[0, 60, 70] = np.nan  # without data
    if name == "mask":
        labels = (labels > 0.5).astype(np.uint8)
    write_labels(tmp_path / "masks", paths[:1], labels, name)
    options = {"shape": SHAPE, "patch_size": PATCH}
    read = functools.partial(read_patches, labelled=combined, **options)
    patches, plain = (
        {i: (np.empty((PATCH, PATCH, 9), np.float32), np.empty((PATCH, PATCH, 1), np.uint8))
         for i in (1, 6)} for _ in range(2)
    )  # fmt: skip
    with_labels(read, tmp_path / "masks", combined=combined, **options)(paths[0], patches)
    read_patches(paths[0], plain, **options)
    # 100 rows hold 3 patches of 32 from row 2, 135 columns 4 from column 3: 1 is at (2, 35), 6 at
    # (34, 67).
    for i, (row, col) in {1: (2, 35), 6: (34, 67)}.items():
        wanted = np.nan_to_num(labels[0, row : row + PATCH, col : col + PATCH])
        if combined:
            wanted = (wanted + plain[i][1][..., 0]) / 2
        np.testing.assert_allclose(patches[i][1][..., 0] / ONE, wanted, atol=1 / ONE)
        np.testing.assert_array_equal(patches[i][0], plain[i][0])


def bayes_of(path):
    with h5py.File(path) as file:
        return (file["bayes"][..., 0] > 0).astype(np.uint8)


@pytest.mark.slow
def test_training_on_masks_that_equal_the_labels_gives_the_same_network(tmp_path, quick, paths):
    """Also if the scene files have other labels, which are then not read."""
    write_labels(tmp_path / "masks", paths, map(bayes_of, paths), "mask")
    scenes = tmp_path / "scenes"
    shutil.copytree(paths[0].parents[1], scenes)
    for path in find_scenes(scenes):
        rewrite(path, lambda name, a: 255 - a if name == "bayes" else a)
    runs = []
    for name, changes in {
        "reference": {"train_dir": str(paths[0].parents[1])},
        "masks": {"train_dir": str(scenes), "labels": str(tmp_path / "masks")},
    }.items():
        run = start(tmp_path / name, {**quick, **changes, "epochs": 1}, "--mode", "train")
        assert run.status == 0
        runs.append(
            (
                keras.models.load_model(run.folder / "model.keras").get_weights(),
                rows(run.folder / "history.csv")[0],
            )
        )
    (reference, expected), (ours, found) = runs
    for a, b in zip(reference, ours, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert expected[name] == found[name]


@pytest.mark.slow
def test_training_without_labels_learns_the_mixture_from_scenes_without_a_mask(
    tmp_path, quick, paths, capsys
):
    scenes = tmp_path / "scenes"
    shutil.copytree(paths[0].parents[1], scenes)
    for path in find_scenes(scenes):
        with h5py.File(path, "a") as file:
            del file["bayes"], file["truth"]
    run = start(
        tmp_path, {**quick, "train_dir": str(scenes), "labels": "none", "epochs": 1},
        "--mode", "train",
    )  # fmt: skip
    assert run.status == 0 and len(rows(run.folder / "history.csv")) == 1
    screen = capsys.readouterr().err
    assert "against labels from the mixture model, as in training\n" in screen
    assert "target  " not in screen  # it is an agreement with Bayesian masks
    labels = run.folder / "labels"
    mixture = PhysicalMixture.from_dict(json.loads((labels / "mixture.json").read_text()))
    for path in find_scenes(scenes):
        scene = read_scene(path, SHAPE, labelled=False)
        with h5py.File(labels / f"{path.stem}.h5") as file:
            expected = mixture.probability(scene.channels, scene.valid)
            np.testing.assert_array_equal(file["probability"], expected.astype(np.float16))


def test_folder_without_a_mask_of_each_scene_is_an_error(tmp_path, quick, paths, capsys):
    write_labels(tmp_path / "masks", paths[:-2], map(bayes_of, paths[:-2]))
    run = start(tmp_path, {**quick, "labels": str(tmp_path / "masks")}, "--mode", "train")
    assert run.status == 2 and run.folder is None
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"none for {paths[-2].stem} (2 of 7 are missing)" in line

    changed = {**quick, "labels": str(tmp_path / "non")}
    for mode in ("check", "train"):
        assert start(tmp_path, changed, "--mode", mode).status == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"No directory {tmp_path}/non. Set labels to bayes, none, combined or a" in line
