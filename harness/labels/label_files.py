"""Labels from mask files, one per scene: masks of another run, or those of the mixture model."""

import json
import logging
from pathlib import Path

import h5py
import numpy as np
from threadpoolctl import threadpool_limits

from data_loader import SceneError, patch_corners, read_scene
from harness.clock import active_seconds
from harness.config import LABELS
from harness.console import counted, progress
from harness.data.hdf5 import open_hdf5, open_numbers, read_all
from harness.data.mask_files import mask_file
from harness.data.prefetch import ReaderPool
from harness.errors import UserError
from harness.files import read_text, replacing, write_json

log = logging.getLogger(__name__)

ONE = 255  # the probability 1, in the bytes of a batch
FITTED_SCENES = 64  # at most, to which the mixture model is fitted


def check_labels(labels, paths):
    """Check that `labels` is in LABELS, or a folder with a mask file for each scene.

    Raises:
        UserError: If it is neither.
    """
    if labels in LABELS:
        return
    if missing := [path for path in paths if not mask_file(labels, path).is_file()]:
        names = ", ".join(LABELS)
        if not Path(labels).is_dir():
            raise UserError(f"No directory {labels}. Set labels to {names} or a folder of masks.")
        raise UserError(
            f"labels {labels} should have a mask file for each scene in train_dir, found none for "
            f"{missing[0].stem} ({len(missing)} of {len(paths)} are missing). Make masks with "
            f"--mode inference, or set labels to one of {names}."
        )


def with_labels(read, folder, shape, patch_size, combined=False):
    """Give a function that reads patches the labels of mask files.

    Args:
        read: Function of a path and of arrays for patches, such as `data_loader.read_patches`,
            which fills the cloud arrays if they are to be combined.
        folder: Folder of mask files with `probability`, or `mask` alone.
        shape: (H, W, C) of every scene.
        patch_size: Rows and columns of a patch.
        combined: Whether labels are the means of the mask files and of the Bayesian mask.

    Returns:
        Function of the same arguments and result as `read`; labels are 0 to ONE.
    """
    corners = patch_corners(*shape[:2], patch_size)

    def read_with_labels(path, patches):
        out_of_range = read(path, patches)
        with open_hdf5(mask_file(folder, path), error_class=SceneError) as file:
            name = "probability" if "probability" in file else "mask"
            probability = read_all(open_numbers(file, name, shape[:2]))
        labels = np.rint(ONE * np.clip(np.nan_to_num(probability), 0, 1)).astype(np.uint8)
        for i, (_, cloud) in patches.items():
            row, col = corners[i]
            label = labels[row : row + patch_size, col : col + patch_size]
            if combined:
                label = (label + ONE * cloud[..., 0].astype(np.uint16)) // 2
            cloud[..., 0] = label
        return out_of_range

    return read_with_labels


def make_labels(folder, paths, shape, seed, devices, on_bad_scene):
    """Label scenes by a mixture model that is fitted to them; files that exist stay.

    Args:
        folder: Path, for mask files with `probability` and mixture.json; made if absent.
        paths: Scene files.
        shape: (H, W, C) of every scene.
        seed: Of the run.
        devices: Devices; its ranks share the scenes.
        on_bad_scene: Called with the path and the SceneError of a scene that cannot be read.
    """
    from harness.labels.mixture import PhysicalMixture, fit_mixture

    def read(path):
        devices.check()
        try:
            return read_scene(path, shape, labelled=False)
        except SceneError as error:
            on_bad_scene(path, error)

    def label(path):
        if mask_file(folder, path).exists() or (scene := read(path)) is None:
            return
        probability = mixture.probability(scene.channels, scene.valid)
        with replacing(mask_file(folder, path)) as temporary, h5py.File(temporary, "w") as file:
            file["probability"] = probability.astype(np.float16)

    begin = active_seconds()
    model_file = folder / "mixture.json"
    if devices.is_chief and not model_file.exists():
        folder.mkdir(exist_ok=True)
        chosen = np.random.default_rng(seed).permutation(len(paths))[:FITTED_SCENES]
        log.info("  labels      fitting a mixture model to %s ...", counted(len(chosen), "scene"))
        scenes = (
            scene for i in progress(chosen, "Fitting", len(chosen)) if (scene := read(paths[i]))
        )
        write_json(model_file, fit_mixture(((s.channels, s.valid) for s in scenes), seed).to_dict())
    devices.gather(0)  # the model is there
    mixture = PhysicalMixture.from_dict(json.loads(read_text(model_file)))
    mine = paths[devices.rank :: devices.n_ranks]
    # Several scenes at once, each on one core: the matrices are small.
    with threadpool_limits(1), ReaderPool(devices.n_cores) as pool:
        for _ in progress(pool.prefetch(label, mine, devices.n_cores), "Labelling", len(mine)):
            pass
    devices.gather(0)  # all labels are there
    log.info("  labels      of a mixture model, made in %.0f s", active_seconds() - begin)
