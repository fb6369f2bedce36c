"""Pictures of masked scenes: what the radiometer saw, the label, the mask, and where they differ.

Classes differ in brightness, so that they are told apart without colour vision and in grey print.
Nothing here needs TensorFlow.
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.hdf5 import open_hdf5, open_numbers
from harness.data.mask_files import measured_pixels, read_mask
from harness.data.scene_files import walk_scenes
from harness.errors import UserError
from harness.files import replacing
from harness.records.saved_runs import number

CLEAR, CLOUD = (8, 48, 107), (255, 255, 255)  # of a mask
DIFFERENCES = {  # brightness of each differs from that of the next by a contrast of 3, WCAG 2
    "both cloud": (255, 255, 255),
    "both clear": (214, 214, 214),
    "cloud in ours alone": (200, 80, 0),
    "cloud in the label alone": (20, 0, 40),
}
STRIPES = ((120, 120, 120), (180, 180, 180))  # where nothing was measured
MOST_COLS = 480  # pixels of a picture in the report
GAMMA = 0.7  # of false colour by day: the sea is dark
PNG_DPI = 200


@dataclass(frozen=True)
class MaskedScene:
    """A mask, and what is known of its scene.

    Attributes:
        mask: bool (H, W), True is cloud.
        label: bool (H, W), the Bayesian mask; None where the scene has none.
        reflectances: float32 (H, W, 3) of S3, S2 and S1, NaN where missing; None by night.
        temperatures: float32 (H, W, 3) of S7 to S9 [K], NaN where missing.
    """

    mask: np.ndarray
    label: np.ndarray | None
    reflectances: np.ndarray | None
    temperatures: np.ndarray


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: What is shown.
        note: How to read it.
        pixels: uint8 (h, w, 3).
        has_classes: Whether it holds a few plain colours only.
    """

    title: str
    note: str
    pixels: np.ndarray
    has_classes: bool = True


class OtherScene(UserError):
    """A scene file that is not the one that a mask was made of."""


# --- reading --------------------------------------------------------------------------------


def scenes_by_name(folder):
    """Scene files below a folder by name of scene, through linked folders too; maybe none."""
    return {path.stem: path for path in walk_scenes(folder)} if Path(folder).is_dir() else {}


def read_mask_and_label(mask_path, scene_path):
    """Read a mask and the label of its scene: by this, or its size, a file is the scene's or not.

    Returns:
        Mask and Bayesian mask, bool (H, W), which is None where the scene has none.

    Raises:
        OtherScene: If it is not.
        UserError: If a file is not what it should be.
    """
    with open_hdf5(mask_path) as file:
        mask = read_mask(file) != 0
        row = json.loads(file.attrs.get("row", "{}"))
        accuracy = number(row.get("accuracy")) if type(row) is dict else None
        size = int(file.attrs.get("scene_bytes", -1))
    with open_hdf5(scene_path) as file:
        label = open_numbers(file, "bayes", (*mask.shape, None), optional=True)
        label = None if label is None else np.nan_to_num(label[..., 0]) != 0
    if label is not None and accuracy is not None:
        is_same = abs(np.mean(mask == label) - accuracy) < 1e-6
    else:
        is_same = size in (-1, scene_path.stat().st_size)
    if not is_same:
        raise OtherScene(
            f"{scene_path} is not the file that was masked. Say where that is with --data."
        )
    return mask, label


def read_masked_scene(mask_path, scene_path):
    """Read a mask and its scene.

    Raises:
        OtherScene: If it is not the scene that was masked.
        UserError: If a file is not what it should be.
    """
    mask, label = read_mask_and_label(mask_path, scene_path)
    with open_hdf5(scene_path) as file:
        temperatures = _measured(open_numbers(file, "bts", (*mask.shape, 3))[:])
        reflectances = _reflectances(open_numbers(file, "refs", (None, None, None)), mask.shape)
    return MaskedScene(mask, label, reflectances, temperatures)


def read_label_and_probability(mask_path, scene_path):
    """Read what calibration needs, of the pixels with data: where these lack, so does the label.

    Returns:
        Bayesian mask, bool (n,), and probability, float32 (n,); or None without either of them.

    Raises:
        OtherScene: If it is not the scene that was masked.
        UserError: If a file is not what it should be.
    """
    with open_hdf5(mask_path) as file:
        probability = open_numbers(file, "probability", (None, None), optional=True)
        probability = None if probability is None else probability[:]
    if probability is None:
        return None
    _, label = read_mask_and_label(mask_path, scene_path)
    with open_hdf5(scene_path) as file:
        measured = measured_pixels(file, probability.shape)
    if label is None or measured is None:
        return None
    known = measured & np.isfinite(probability)
    return label[known], probability[known]


def _measured(values):
    """Float32 with NaN where nothing was measured."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return np.where(np.isfinite(values) & (values != 0), values, np.nan)


def _reflectances(dataset, grid):
    """S3, S2 and S1 on the 1 km grid; None where there is no light, or no such channels."""
    fold = dataset.shape[0] // grid[0]  # 2 on the 500 m grid, of which every other pixel will do
    if fold not in (1, 2) or dataset.shape[:2] != (fold * grid[0], fold * grid[1]):
        raise ValueError(f"'refs' should be on the grid {grid} or twice as fine: {dataset.shape}")
    if dataset.shape[2] < 3:
        return None
    values = _measured(dataset[:][::fold, ::fold, 2::-1])
    return values if (values > 0).mean() > 0.01 else None


# --- drawing --------------------------------------------------------------------------------


def panels(scene, most_cols=None):
    """Pictures of a scene, in the order to be shown.

    Args:
        scene: MaskedScene.
        most_cols: Larger pictures are reduced by a whole number; None for none.
    """
    step = -(-scene.mask.shape[1] // most_cols) if most_cols else 1
    cold_bright = "cold is bright"
    temperatures = _reduced(scene.temperatures, step)
    if scene.reflectances is None:
        title, note = "False colour, night", f"S7, S8, S9 as red, green, blue; {cold_bright}"
        colour = np.stack(
            [1 - _stretched(temperatures[..., i], *_range(temperatures[..., i])) for i in range(3)],
            axis=-1,
        )
    else:
        title, note = "False colour, day", "S3, S2, S1 as red, green, blue"
        values = _reduced(scene.reflectances, step)
        colour = _stretched(values, 0, _range(values)[1]) ** GAMMA
    low, high = _range(temperatures[..., 2])
    grey = 1 - _stretched(temperatures[..., 2], low, high)
    shown = [
        Panel(title, note, _painted(colour), has_classes=False),
        Panel(
            "S9, 12 µm",
            f"{low:.0f} to {high:.0f} K; {cold_bright}",
            _painted(np.repeat(grey[..., None], 3, axis=-1)),
            has_classes=False,
        ),
    ]
    mask = scene.mask[step // 2 :: step, step // 2 :: step]  # a share of pixels stays what it is
    if scene.label is not None:
        label = scene.label[step // 2 :: step, step // 2 :: step]
        shown.append(Panel("Bayesian mask", "cloud is white", _classes(label, (CLEAR, CLOUD))))
    shown.append(Panel("Our mask", "cloud is white", _classes(mask, (CLEAR, CLOUD))))
    if scene.label is not None:
        share = np.mean(scene.mask != scene.label)
        index = np.where(mask == label, ~mask, 2 + label).astype(np.uint8)
        shown.append(
            Panel(
                "Where they differ",
                f"in {share:.1%} of the pixels",
                _classes(index, tuple(DIFFERENCES.values())),
            )
        )
    return shown


def _reduced(values, step):
    """Means over step x step pixels of those measured; what does not fill a cell is cut off."""
    h, w, c = values.shape
    if step == 1:
        return values
    cells = values[: h // step * step, : w // step * step].reshape(
        h // step, step, w // step, step, c
    )
    count = np.isfinite(cells).sum(axis=(1, 3))
    total = np.nansum(cells, axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _range(values):
    """Where brightness begins and ends: the middle 98 % of what was measured."""
    measured = values[np.isfinite(values)]
    if not measured.size:
        return 0.0, 1.0
    low, high = np.percentile(measured, (1, 99))
    return (low, high) if high > low else (low, low + 1)


def _stretched(values, low, high):
    return np.clip((values - low) / (high - low), 0, 1)  # NaN stays


def _painted(levels):
    """Bytes of red, green and blue, striped where one of them is NaN."""
    missing = np.isnan(levels).any(axis=-1)
    pixels = (np.nan_to_num(levels) * 255).round().astype(np.uint8)
    rows, cols = np.nonzero(missing)
    pixels[rows, cols] = np.array(STRIPES, np.uint8)[(rows + cols) // 4 % 2]
    return pixels


def _classes(index, colours):
    return np.array(colours, np.uint8)[np.asarray(index, np.uint8)]


def data_uri(panel):
    """A picture as the address of an <img>."""
    from PIL import Image

    space = io.BytesIO()
    how = {"lossless": True} if panel.has_classes else {"quality": 75}
    Image.fromarray(panel.pixels).save(space, "webp", method=4, **how)
    return "data:image/webp;base64," + base64.b64encode(space.getvalue()).decode()


def write_png(path, name, facts, shown):
    """Write the pictures of a scene as one PNG with titles and legend.

    Args:
        path: File to write.
        name: Of the scene.
        facts: A line of text below the name.
        shown: Of `panels`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = shown[0].pixels.shape[:2]
    panel_inches = 3.6
    figure = Figure(
        figsize=(3 * panel_inches, 2 * (panel_inches * height / width + 0.45) + 0.5),
        layout="constrained",
    )
    figure.suptitle(f"{_plain(name)}\n{_plain(facts)}", fontsize=9, parse_math=False)
    cells = figure.subplots(2, 3).ravel()
    for axes, panel in zip(cells, shown, strict=False):
        axes.imshow(panel.pixels, interpolation="none")
        axes.set_title(f"{panel.title} ({panel.note})", fontsize=8)
        axes.set(xticks=[], yticks=[])
    for axes in cells[len(shown) :]:
        axes.set_axis_off()
    handles = [Patch(facecolor=np.divide(STRIPES[0], 255), hatch="///", label="not measured")]
    if len(shown) == 5:
        handles += [
            Patch(facecolor=np.divide(colour, 255), edgecolor="0.3", label=label)
            for label, colour in DIFFERENCES.items()
        ]
    cells[-1].legend(handles=handles, loc="center left", frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=PNG_DPI, metadata={"Title": _plain(name)})


def _plain(name):
    """A name that any font can show."""
    return name.encode("ascii", "backslashreplace").decode()
