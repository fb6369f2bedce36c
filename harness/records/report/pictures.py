"""Pictures of masked scenes: the channels, the label, the mask, and where the two differ.

Classes differ in brightness, so that they can be told apart without colour vision and in grey
print. Nothing here needs TensorFlow.
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.hdf5 import open_hdf5, open_numbers, read_all
from harness.data.mask_files import measured_pixels, read_mask
from harness.data.scene_files import walk_scenes
from harness.errors import UserError
from harness.files import replacing
from harness.records.saved_runs import clean_row

CLEAR, CLOUD = (8, 48, 107), (255, 255, 255)  # of a mask
DIFFERENCES = {  # neighbours in brightness have a contrast of at least 3, WCAG 2
    "both cloud": (255, 255, 255),
    "both clear": (214, 214, 214),
    "cloud only in our mask": (200, 80, 0),
    "cloud only in the label": (20, 0, 40),
}
NOT_MEASURED = (150, 90, 170)
MAX_COLS = 500  # pixels of a picture in the report
GAMMA = 0.7  # of false colour by day: the sea is dark
PNG_DPI = 200


@dataclass(frozen=True)
class MaskedScene:
    """A mask and its scene, rows and columns (H, W)."""

    mask: np.ndarray  # bool, True is cloud
    label: np.ndarray | None  # bool, the Bayesian mask; None if the scene has none
    reflectances: np.ndarray | None  # float32 (H, W, 3), S3, S2, S1; NaN if missing; None by night
    temperatures: np.ndarray  # float32 (H, W, 3), S7 to S9 [K]; NaN if missing


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    note: str  # how to read it
    pixels: np.ndarray  # uint8 (h, w, 3)
    lossless: bool = True  # whether lossy compression would blur it: it has a few plain colours


def scenes_by_name(folder):
    """Scene files below a folder by name of scene; an empty dictionary if there are none."""
    return {path.stem: path for path in walk_scenes(folder)} if Path(folder).is_dir() else {}


def read_row(mask_path):
    """Read the row of scenes.csv in a mask file, see `clean_row`; empty if there is none."""
    with open_hdf5(mask_path) as file:
        return clean_row(dict(json.loads(file.attrs.get("row", "{}"))))


def read_mask_and_label(mask_path, scene_path):
    """Read a mask and the label of its scene, and check that it is the scene that was masked.

    The accuracy that the mask file records identifies it; a scene without a label, its size.

    Returns:
        Mask and Bayesian mask, bool (H, W), the latter None if the scene has none.

    Raises:
        UserError: If it is another scene, or a file is damaged.
    """
    accuracy = read_row(mask_path).get("accuracy", np.nan)
    with open_hdf5(mask_path) as file:
        mask = read_mask(file) != 0
        size = int(file.attrs.get("scene_bytes", -1))
    with open_hdf5(scene_path) as file:
        label = open_numbers(file, "bayes", (*mask.shape, None), optional=True)
        label = None if label is None else np.nan_to_num(read_all(label)[..., 0]) != 0
    if label is not None and np.isfinite(accuracy):
        is_same = abs(np.mean(mask == label) - accuracy) < 1e-6
    else:
        is_same = size in (-1, scene_path.stat().st_size)
    if not is_same:
        raise UserError(
            f"{scene_path} is not the file that was masked. Name the folder of the masked files "
            "with --data."
        )
    return mask, label


def read_masked_scene(mask_path, scene_path):
    """Read a MaskedScene.

    Raises:
        UserError: If it is not the scene that was masked, or a file is damaged.
    """
    mask, label = read_mask_and_label(mask_path, scene_path)
    with open_hdf5(scene_path) as file:
        temperatures = _nan_where_missing(read_all(open_numbers(file, "bts", (*mask.shape, 3))))
        refs = open_numbers(file, "refs", (None, None, None))
        fold = refs.shape[0] // mask.shape[0]  # 2 on the 500 m grid: every other pixel is enough
        if fold not in (1, 2) or refs.shape[:2] != (fold * mask.shape[0], fold * mask.shape[1]):
            raise ValueError(
                f"'refs' should have the grid {mask.shape} or its double: {refs.shape}"
            )
        is_day = refs.shape[2] >= 3
        refs = _nan_where_missing(read_all(refs)[::fold, ::fold, 2::-1]) if is_day else None
        is_day = is_day and (refs > 0).mean() > 0.01
    return MaskedScene(mask, label, refs if is_day else None, temperatures)


def read_label_and_probability(mask_path, scene_path):
    """Read what calibration needs, for the pixels with data.

    Returns:
        Bayesian mask, bool (n,), and probability, float32 (n,); or None if a file lacks one.

    Raises:
        UserError: If it is not the scene that was masked, or a file is damaged.
    """
    with open_hdf5(mask_path) as file:
        probability = open_numbers(file, "probability", (None, None), optional=True)
        probability = None if probability is None else read_all(probability)
    if probability is None:
        return None
    _, label = read_mask_and_label(mask_path, scene_path)
    with open_hdf5(scene_path) as file:
        measured = measured_pixels(file, probability.shape)
    if label is None or measured is None:
        return None
    known = measured & np.isfinite(probability)
    return label[known], probability[known]


def _nan_where_missing(values):
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return np.where(np.isfinite(values) & (values != 0), values, np.nan)


# --- drawing --------------------------------------------------------------------------------


def panels(scene, max_cols=None):
    """Draw a scene: five panels, or three without a label.

    Args:
        scene: MaskedScene.
        max_cols: In wider pictures only every n-th row and column is kept; None for all.
    """
    step = -(-scene.mask.shape[1] // max_cols) if max_cols else 1
    kept = np.s_[step // 2 :: step, step // 2 :: step]
    mask, temperatures = scene.mask[kept], scene.temperatures[kept]
    if scene.reflectances is None:
        title, note = "False colour, night", "S7, S8, S9 as red, green, blue; cold is bright"
        colour = 1 - np.stack([_stretch(temperatures[..., i])[0] for i in range(3)], axis=-1)
    else:
        title, note = "False colour, day", "S3, S2, S1 as red, green, blue"
        colour = _stretch(scene.reflectances[kept], low=0.0)[0] ** GAMMA
    grey, low, high = _stretch(temperatures[..., 2])
    shown = [
        Panel(title, note, _paint(colour), lossless=False),
        Panel(
            "S9, 12 µm", f"{low:.0f} to {high:.0f} K; cold is bright",
            _paint(np.repeat(1 - grey[..., None], 3, axis=-1)), lossless=False,
        ),
        Panel("Our mask", "cloud is white", _colour_classes(mask, (CLEAR, CLOUD))),
    ]  # fmt: skip
    if scene.label is None:
        return shown
    label, share = scene.label[kept], np.mean(scene.mask != scene.label)
    index = np.where(mask == label, ~mask, 2 + label)  # in the order of DIFFERENCES
    differing = _colour_classes(index, tuple(DIFFERENCES.values()))
    shown[2:2] = [Panel("Bayesian mask", "cloud is white", _colour_classes(label, (CLEAR, CLOUD)))]
    return [*shown, Panel("Where they differ", f"in {share:.1%} of the pixels", differing)]


def _stretch(values, low=None):
    """Map the middle 98 % of the values to 0 to 1; returns these, and the limits."""
    measured = values[np.isfinite(values)]
    first, high = np.percentile(measured, (1, 99)) if measured.size else (0.0, 1.0)
    low = first if low is None else low
    high = max(high, low + 1e-3)
    return np.clip((values - low) / (high - low), 0, 1), low, high  # NaN stays


def _paint(levels):
    """Bytes of red, green and blue; NOT_MEASURED where one of them is NaN."""
    missing = np.isnan(levels).any(axis=-1, keepdims=True)
    pixels = (np.nan_to_num(levels) * 255).round().astype(np.uint8)
    return np.where(missing, np.array(NOT_MEASURED, np.uint8), pixels)


def _colour_classes(index, colours):
    return np.array(colours, np.uint8)[index.astype(np.uint8)]


def data_uri(panel):
    """A picture as the address of an <img>."""
    from PIL import Image

    buffer = io.BytesIO()
    options = {"lossless": True} if panel.lossless else {"quality": 75}
    Image.fromarray(panel.pixels).save(buffer, "webp", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_png(path, name, facts, shown):
    """Write the `panels` of a scene as one PNG, below its name and a line of facts."""
    from matplotlib.figure import Figure  # without pyplot, as in charts.py
    from matplotlib.patches import Patch

    name, facts = (text.encode("ascii", "backslashreplace").decode() for text in (name, facts))
    height, width = shown[0].pixels.shape[:2]
    figure = Figure((10.8, 2 * (3.6 * height / width + 0.45) + 0.5), layout="constrained")
    figure.suptitle(f"{name}\n{facts}", fontsize=9, parse_math=False)
    cells = figure.subplots(2, 3).ravel()
    for axes, panel in zip(cells, shown, strict=False):
        axes.imshow(panel.pixels, interpolation="none")
        axes.set_title(f"{panel.title} ({panel.note})", fontsize=8)
        axes.set(xticks=[], yticks=[])
    for axes in cells[len(shown) :]:
        axes.set_axis_off()
    classes = {"not measured": NOT_MEASURED, **(DIFFERENCES if len(shown) == 5 else {})}
    handles = [
        Patch(facecolor=np.divide(colour, 255), edgecolor="0.3", label=label)
        for label, colour in classes.items()
    ]
    cells[-1].legend(handles=handles, loc="center left", frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=PNG_DPI, metadata={"Title": name})
