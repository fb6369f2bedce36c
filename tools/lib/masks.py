"""Masks to compare: those of runs, of folders of mask files, and those in the scene files."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config import Config, load_config
from harness.data.hdf5 import open_hdf5, open_numbers, read_all, read_numbers
from harness.data.mask_files import mask_files, measured_pixels, read_label
from harness.data.scene_files import find_scenes
from harness.errors import UserError
from harness.records.saved_masks import read_mask_and_label

DATASETS = ("bayes", "summary")  # masks in scene files, cloud where not 0
NAMED = (*DATASETS, "threshold")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mask:
    """A mask of each of many scenes."""

    name: str
    files: dict | None = None  # mask files by scene name; None if the scene files contain it
    folder: Path | None = None  # of the run or of the mask files
    config: Config | None = None  # of the run

    def read(self, path, file, shape, min_sst):
        """Read the mask of a scene, and numbers that rise with the probability of cloud.

        Args:
            path: Scene file.
            file: The same, open.
            shape: (H, W).
            min_sst: The threshold baseline calls colder pixels cloud [K].

        Returns:
            The mask, bool (H, W), True is cloud; and the numbers, float (H, W), NaN where unknown.

        Raises:
            UserError: If the scene file does not have the mask, or the mask file is that of another
                scene file with the same name.
        """
        unknown = np.full(shape, np.nan, np.float32)
        if self.name == "threshold" and self.files is None:
            bt_12um = read_numbers(open_numbers(file, "bts", (*shape, 3)))[..., 2]
            bt_12um = np.nan_to_num(bt_12um, posinf=0, neginf=0)  # as in the benchmark
            return bt_12um < min_sst, -bt_12um
        if self.files is None:
            dataset = open_numbers(file, self.name, (*shape, 1), optional=True)
            if dataset is None:
                raise UserError(
                    f"{path} has no dataset '{self.name}'. Name masks that all scenes have, for "
                    "example threshold or the folder of a run (contact_sheet.py: --masks)."
                )
            return read_label(dataset), unknown
        mask, _ = read_mask_and_label(self.files[path.stem], path)
        with open_hdf5(self.files[path.stem]) as mask_file:
            probability = open_numbers(mask_file, "probability", shape, optional=True)
            return mask, unknown if probability is None else read_all(probability)


def open_masks(names):
    """Find masks by the names of folders or those of NAMED: list of Mask.

    Raises:
        UserError: If one is given twice, or a folder has no mask files.
    """
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"{twice[0]} is given twice. Name each mask once.")
    folders = {name: Path(name) for name in names if name not in NAMED}
    titles = {name: folder.resolve().name for name, folder in folders.items()}
    masks = []
    for name in names:
        if name in NAMED:
            masks.append(Mask(name))
            continue
        folder, title = folders[name], titles[name]
        files = mask_files(folder) or {path.stem: path for path in sorted(folder.glob("*.h5"))}
        if not files:
            raise UserError(
                f"No masks in {name}: it should be the folder of a run, a folder of mask files, "
                f"or one of {', '.join(NAMED)}."
            )
        is_unique = title not in NAMED and list(titles.values()).count(title) == 1
        config = folder / "config.yaml"
        config = load_config(config) if config.is_file() else None
        masks.append(Mask(title if is_unique else name, files, folder, config))
    return masks


def common_scenes(masks, data, names):
    """The scenes that all masks have: paths of scene files by name.

    Args:
        masks: List of Mask.
        data: Folder of the scene files; None for the inference_dir of the first run.
        names: Of the scenes to take; empty for all.

    Raises:
        UserError: If there is none, or one of `names` is missing.
    """
    if not data:
        configs = [mask.config for mask in masks if mask.config]
        if not configs:
            raise UserError("No mask is that of a run. Give the folder of the scenes with --data.")
        data = configs[0].inference_dir
    found = {path.stem: path for path in find_scenes(data)}
    common = [name for name in found if all(not m.files or name in m.files for m in masks)]
    if missing := [name for name in names if name not in common]:
        raise UserError(f"Not all masks have the scene {missing[0]!r}, found {common}.")
    if not common:
        raise UserError(f"No scene below {data} has all masks. Give others, or use --data.")
    if not names and len(common) < len(found):
        log.info("%d of %d scenes have all masks; the others are ignored.", len(common), len(found))
    return {name: found[name] for name in names or common}


def read_fields(masks, min_sst, path):
    """Read all masks of a scene.

    Args:
        masks: List of Mask.
        min_sst: The threshold baseline calls colder pixels cloud [K].
        path: Scene file.

    Returns:
        {field: (H, W)}: `measured`, bool, where there are all brightness temperatures; `mask 0` and
        `score 0`, as of `Mask.read`, and so on; and `truth`, bool, if the file has it.
    """
    with open_hdf5(path) as file:
        shape = open_numbers(file, "bts", (None, None, 3)).shape[:2]
        fields = {"measured": measured_pixels(file, shape)}
        for i, mask in enumerate(masks):
            fields[f"mask {i}"], fields[f"score {i}"] = mask.read(path, file, shape, min_sst)
        truth = open_numbers(file, "truth", (*shape, 1), optional=True)
        if truth is not None:
            fields["truth"] = read_all(truth)[..., 0] != 0
    return fields
