"""Compare masks with the truth, which synthetic scenes contain; nothing is ever trained on it."""

from collections import defaultdict

import numpy as np

from harness.data.hdf5 import open_hdf5, open_numbers, read_all, read_attribute
from harness.data.scene_files import day_or_night, walk_scenes
from harness.inference.scores import Pixels, accuracy, balanced_accuracy
from tools.lib.masks import read_fields

GROUPS = {"cloud_regime": "cloud regime", "surface": "surface"}  # datasets of codes: their titles


def score_truth(mask, scenes_folder, min_sst, scenes=None):
    """Score a mask of many scenes against the truth, among pixels with data.

    Args:
        mask: Mask, see tools/lib/masks.py.
        scenes_folder: Folder of the scene files.
        min_sst: The threshold baseline calls colder pixels cloud [K].
        scenes: Names of the scenes to score; None for all that have a mask.

    Returns:
        {score: value} and {title of a group: {name in it: accuracy among its pixels}}. The scores
        are means over scenes which ignore NaN, `accuracy`, `balanced_accuracy` and the accuracy by
        `day` and `night`; none is NaN. Both are empty where no scene has the dataset `truth`.

    Raises:
        UserError: If a scene or mask file cannot be used.
    """
    scores, counts = defaultdict(list), defaultdict(lambda: defaultdict(lambda: np.zeros(2, int)))
    for path in walk_scenes(scenes_folder):
        if any(names is not None and path.stem not in names for names in (mask.files, scenes)):
            continue
        with open_hdf5(path) as file:  # nothing else is read of scenes without a truth
            truth = open_numbers(file, "truth", (None, None, 1), optional=True)
            if truth is None:
                continue
            groups = {title: _groups(file, name, truth.shape) for name, title in GROUPS.items()}
        fields = read_fields([mask], min_sst, path)
        cloud, truth, valid = fields["mask 0"], fields["truth"], fields["measured"]
        pixels = Pixels(cloud, truth, valid, None, None).with_data
        scores["accuracy"].append(accuracy(pixels))
        scores["balanced_accuracy"].append(balanced_accuracy(pixels))
        scores[day_or_night(path)].append(scores["accuracy"][-1])
        right = (cloud == truth)[valid]
        for title, members in groups.items():
            for group, where in members.items():
                where = where[valid]
                counts[title][group] += right[where].sum(), where.sum()
    return (
        {
            key: float(np.nanmean(values))
            for key, values in scores.items()
            if not np.isnan(values).all()
        },
        {
            title: {name: float(n / of) for name, (n, of) in groups.items() if of}
            for title, groups in counts.items()
        },
    )


def _groups(file, dataset, shape):
    """The pixels of each code of a dataset: {its name in `flag_meanings`: bool (H, W)}."""
    codes = open_numbers(file, dataset, shape, optional=True)
    if codes is None:
        return {}
    names = str(read_attribute(codes, "flag_meanings", default="")).split()
    codes = read_all(codes)[..., 0].astype(int)
    return {
        names[code].replace("_", " ") if code < len(names) else f"code {code}": codes == code
        for code in np.unique(codes).tolist()
    }
