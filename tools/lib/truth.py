"""Compare masks with the truth, which synthetic scenes contain; nothing is ever trained on it."""

import statistics
from collections import defaultdict

import numpy as np

from harness.data.hdf5 import open_hdf5, open_numbers, read_all, read_attribute
from harness.data.mask_files import mask_files, measured_pixels, read_mask
from harness.data.scene_files import day_or_night, walk_scenes
from harness.inference.scores import Pixels, accuracy, balanced_accuracy

GROUPS = {"cloud_regime": "cloud regime", "surface": "surface"}  # datasets of codes: their titles


def score_truth(run_folder, scenes_folder):
    """Score the masks of a run against the truth, among pixels with data.

    Args:
        run_folder: The run's folder.
        scenes_folder: Folder of the scene files.

    Returns:
        {score: value} and {title of a group: {name in it: accuracy among its pixels}}. The scores
        are means over scenes, `accuracy`, `balanced_accuracy` and the accuracy by `day` and
        `night`. Both are empty where no scene has the dataset `truth`.

    Raises:
        UserError: If a scene or mask file cannot be used.
    """
    paths = {path.stem: path for path in walk_scenes(scenes_folder)}
    scores, counts = defaultdict(list), defaultdict(lambda: defaultdict(lambda: np.zeros(2, int)))
    for name, mask_path in mask_files(run_folder).items():
        if name not in paths:
            continue
        with open_hdf5(mask_path) as file:
            mask = read_mask(file).astype(bool)
        with open_hdf5(paths[name]) as file:
            truth = open_numbers(file, "truth", (*mask.shape, 1), optional=True)
            if truth is None:
                continue
            truth, valid = read_all(truth)[..., 0] != 0, measured_pixels(file, mask.shape)
            pixels = Pixels(mask, truth, valid, None, None).with_data
            scores["accuracy"].append(accuracy(pixels))
            scores["balanced_accuracy"].append(balanced_accuracy(pixels))
            scores[day_or_night(paths[name])].append(scores["accuracy"][-1])
            right = (mask == truth)[valid]
            for dataset, title in GROUPS.items():
                for group, where in _groups(file, dataset, mask.shape).items():
                    where = where[valid]
                    counts[title][group] += right[where].sum(), where.sum()
    return (
        {key: statistics.fmean(values) for key, values in scores.items()},
        {
            title: {name: float(n / of) for name, (n, of) in groups.items() if of}
            for title, groups in counts.items()
        },
    )


def _groups(file, dataset, shape):
    """The pixels of each code of a dataset: {its name in `flag_meanings`: bool (H, W)}."""
    codes = open_numbers(file, dataset, (*shape, 1), optional=True)
    if codes is None:
        return {}
    names = str(read_attribute(codes, "flag_meanings", default="")).split()
    codes = read_all(codes)[..., 0].astype(int)
    return {
        names[code].replace("_", " ") if code < len(names) else f"code {code}": codes == code
        for code in np.unique(codes).tolist()
    }
