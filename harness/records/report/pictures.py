"""Pictures of masked scenes: the channels, the label, the mask, and where the two differ.

A scene becomes planes of small whole numbers, from which the viewer in the page draws its pictures
and reads its values. Pixels without data are transparent; what is behind them is hatched. Classes
differ in brightness, so that they are distinct without colour vision and in grey print.
Nothing here needs TensorFlow.
"""

import base64
import io
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.data.hdf5 import open_hdf5, open_numbers, read_all, read_numbers
from harness.data.mask_files import measured_pixels, read_valid
from harness.data.positions import read_positions
from harness.data.scene_files import walk_scenes
from harness.files import replacing
from harness.records.saved_masks import read_mask_and_label

CLEAR, CLOUD = (8, 48, 107), (255, 255, 255)  # of a mask
DIFFERENCES = {  # in this order in `draw`; the contrast of neighbours is at least 3, WCAG 2
    "both cloud": (255, 255, 255),
    "both clear": (214, 214, 214),
    "cloud only in the mask": (200, 80, 0),
    "cloud only in the label": (20, 0, 40),
}
HATCH = ("#80778c", "#d9d4de")  # lines and ground, as in report.css
GAMMA = 0.7  # of false colour by day: the sea is dark
PNG_DPI = 200
MEASURED, LABEL, MASK = 4, 2, 1  # bits of the plane of classes


@dataclass(frozen=True)
class MaskedScene:
    """A mask and its scene, rows and columns (H, W)."""

    mask: np.ndarray  # bool, True is cloud
    label: np.ndarray | None  # bool, the Bayesian mask; None if the scene has none
    reflectances: np.ndarray | None  # float32 (H, W, 3), S3, S2, S1; NaN if missing; None by night
    temperatures: np.ndarray  # float32 (H, W, 3), S7 to S9 [K]; NaN if missing
    probability: np.ndarray | None = None  # float, of cloud; None if the run did not keep it
    positions: dict = field(default_factory=dict)  # of `read_positions`
    uncertainty: np.ndarray | None = None  # float, 0 to 1; NaN where unknown, None if everywhere


@dataclass(frozen=True)
class Plane:
    """Values of all pixels in equal steps: value = low + step * code; code 0 is no data.

    Attributes:
        codes: uint8 or uint16 (H, W).
        label, unit, digits: How people read a value; digits after the point.
        names: Texts of all codes, instead of numbers; or None.
    """

    codes: np.ndarray
    label: str = ""
    unit: str = ""
    digits: int = 0
    low: float = 0.0
    step: float = 1.0
    names: list | None = None

    def values(self, codes):
        """The numbers that codes stand for."""
        return self.low + self.step * codes


@dataclass(frozen=True)
class Picture:
    """A picture: a plane and a colour for each of its codes, or an image.

    Attributes:
        title: Its name.
        note: How to read it.
        plane: Name of the plane; None for an image.
        colours: Red, green, blue, opacity: uint8 (256, 4) by code, or (H, W, 4) of an image.
    """

    title: str
    note: str
    plane: str | None
    colours: np.ndarray


def scenes_by_name(folder):
    """Scene files below a folder, or in a list, by name of scene; empty if there are none."""
    return {path.stem: path for path in walk_scenes(folder)} if Path(folder).exists() else {}


def read_masked_scene(mask_path, scene_path):
    """Read a MaskedScene.

    Raises:
        UserError: If it is not the scene that was masked, or a file is damaged.
    """
    mask, label = read_mask_and_label(mask_path, scene_path)
    with open_hdf5(scene_path) as file:
        temperatures = nan_where_missing(read_numbers(open_numbers(file, "bts", (*mask.shape, 3))))
        refs = open_numbers(file, "refs", (None, None, None))
        fold = refs.shape[0] // mask.shape[0]  # 2 on the 500 m grid: every other pixel is enough
        if fold not in (1, 2) or refs.shape[:2] != (fold * mask.shape[0], fold * mask.shape[1]):
            raise ValueError(
                f"'refs' should have the grid {mask.shape} or its double: {refs.shape}"
            )
        is_day = refs.shape[2] >= 3
        refs = nan_where_missing(read_numbers(refs)[::fold, ::fold, 2::-1]) if is_day else None
        is_day = is_day and (refs > 0).mean() > 0.01
    with open_hdf5(mask_path) as file:
        kept = {
            name: read_all(values)
            for name in ("probability", "uncertainty")
            if (values := open_numbers(file, name, mask.shape, optional=True)) is not None
        }
    if not np.isfinite(kept.get("uncertainty", np.nan)).any():
        kept.pop("uncertainty", None)  # by night
    positions = read_positions(scene_path, None, scene_path.stem, mask.shape)
    return MaskedScene(
        mask, label, refs if is_day else None, temperatures, positions=positions, **kept
    )


def read_label_and_probability(mask_path, scene_path):
    """Read what calibration needs, for the pixels with data.

    Returns:
        Bayesian mask, bool (n,), and probability, float32 (n,); or None if a file lacks one.

    Raises:
        UserError: If it is not the scene that was masked, or a file is damaged.
    """
    with open_hdf5(mask_path) as file:
        probability = open_numbers(file, "probability", (None, None), optional=True)
        if probability is None:
            return None
        probability = read_all(probability)
        valid = read_valid(file, probability.shape)
    _, label = read_mask_and_label(mask_path, scene_path)
    if valid is None:
        with open_hdf5(scene_path) as file:
            valid = measured_pixels(file, probability.shape)
    if label is None or valid is None:
        return None
    known = valid & np.isfinite(probability)
    return label[known], probability[known]


def nan_where_missing(values):
    """float32, NaN where the file has no value: there it has 0."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return np.where(np.isfinite(values) & (values != 0), values, np.nan)


# --- drawing --------------------------------------------------------------------------------


def draw(scene):
    """Draw a MaskedScene.

    Returns:
        {name: Plane}, and the list of Pictures.
    """
    mask, label, temperatures = scene.mask, scene.label, scene.temperatures
    measured = np.isfinite(temperatures).all(axis=-1)
    classes = MEASURED * measured + (0 if label is None else LABEL * label) + MASK * mask
    bt_12um = temperatures[..., 2]
    planes = {
        "classes": Plane(classes.astype(np.uint8), names=class_names(label is not None)),
        "S9": quantise("S9", bt_12um, (150, 350), 0.5, 1, " K"),
        "S8-S9": quantise("S8−S9", temperatures[..., 1] - bt_12um, (-5, 20), 0.1, 1, " K"),
    }
    for name in ("probability", "uncertainty"):
        if (values := getattr(scene, name)) is not None:
            known = np.where(measured, values, np.nan)
            planes[name] = quantise(name, known, (0, 1), 0.01, 2)
    for name, degrees in scene.positions.items():
        planes[name] = quantise(name, degrees, (-180, 360), 0.01, 2, "°", np.uint16)

    codes = np.arange(256)
    is_measured, in_label, in_mask = ((codes & bit) > 0 for bit in (MEASURED, LABEL, MASK))

    def of_classes(title, note, colours, index):
        return Picture(title, note, "classes", opaque(np.array(colours)[index], is_measured))

    def of_numbers(title, note, plane, share, low_colour, high_colour):
        ramp = np.outer(1 - share, low_colour) + np.outer(share, high_colour)
        return Picture(title, note, plane, opaque(ramp, codes > 0))

    low, high = limits(bt_12um)
    share = stretch(planes["S9"].values(codes), low, high)
    note = f"12 µm, {low:.0f} to {high:.0f} K; cold is bright"
    pictures = [
        false_colour(scene, measured),
        of_numbers("S9", note, "S9", share, CLOUD, (0, 0, 0)),
    ]
    if label is not None:
        note = "the Bayesian mask; white: cloud"
        pictures.append(of_classes("Label", note, (CLEAR, CLOUD), in_label * 1))
    pictures.append(of_classes("Mask", "white: cloud", (CLEAR, CLOUD), in_mask * 1))
    if scene.probability is not None:
        share = np.clip(planes["probability"].values(codes), 0, 1)
        note = "of cloud; white: 1"
        pictures.append(of_numbers("Probability", note, "probability", share, CLEAR, CLOUD))
    if scene.uncertainty is not None:
        share = np.clip(planes["uncertainty"].values(codes), 0, 1)
        note = "difference of the probabilities by two views; black: 1"
        pictures.append(of_numbers("Uncertainty", note, "uncertainty", share, CLOUD, (0, 0, 0)))
    if label is not None:
        share = np.mean((mask != label)[measured]) if measured.any() else 0.0
        note = f"mask and label differ in {share:.1%} of the pixels with data"
        index = np.where(in_mask == in_label, ~in_mask, 2 + in_label)
        pictures.append(of_classes("Differences", note, list(DIFFERENCES.values()), index))
    return planes, pictures


def class_names(is_labelled):
    """What the codes of the plane of classes mean, as texts."""
    words, names = ("clear", "cloud"), []
    for code in range(2 * MEASURED):
        parts = [] if code & MEASURED else ["no data"]
        parts.append(f"mask {words[bool(code & MASK)]}")
        parts += [f"label {words[bool(code & LABEL)]}"] if is_labelled else []
        names.append(" · ".join(parts))
    return names


def quantise(label, values, bounds, step, digits, unit="", dtype=np.uint8):
    """Make a Plane of numbers.

    Args:
        label: Its label.
        values: float (H, W), NaN where missing.
        bounds: Values outside become these.
        step: Smallest step; larger if the values span more steps than there are codes.
        digits: Digits after the point.
        unit: Text after a value.
        dtype: Of the codes.
    """
    values = np.clip(values, *bounds)
    known = np.isfinite(values)
    low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 0.0)
    low = np.floor(low / step) * step
    step = max(step, float(high - low) / (np.iinfo(dtype).max - 1))
    codes = np.where(known, 1 + np.round((values - low) / step), 0).astype(dtype)
    return Plane(codes, label, unit, digits, float(low) - step, step)


def false_colour(scene, measured):
    """The picture of the reflectances by day, of the brightness temperatures by night."""
    if scene.reflectances is None:
        note = "night: S7, S8, S9 as red, green, blue; cold is bright"
        channels = np.moveaxis(scene.temperatures, -1, 0)
        levels = np.stack([1 - stretch(channel, *limits(channel)) for channel in channels], axis=-1)
    else:
        note = "day: S3, S2, S1 as red, green, blue"
        levels = stretch(scene.reflectances, 0, limits(scene.reflectances)[1]) ** GAMMA
    known = measured & np.isfinite(levels).all(axis=-1)
    return Picture("False colour", note, None, opaque(255 * np.nan_to_num(levels), known))


def limits(values):
    """The middle 98 % of the values, from a sixteenth of them: lowest and highest."""
    values = values[::4, ::4]
    values = values[np.isfinite(values)]
    return np.percentile(values, (1, 99)) if values.size else (0.0, 1.0)


def stretch(values, low, high):
    """Map low to 0 and high to 1; NaN stays."""
    return np.clip((values - low) / max(high - low, 1e-3), 0, 1)


def opaque(colours, known):
    """Bytes (..., 4) of colours (..., 3) from 0 to 255; transparent where not known."""
    return np.concatenate([np.rint(colours), 255 * known[..., None]], axis=-1).astype(np.uint8)


def viewer_data(planes, pictures):
    """What the viewer reads, as JSON without "<".

    Planes are stored as differences between rows, which compress better, by zlib and base64.
    """
    from PIL import Image

    rows, cols = planes["classes"].codes.shape
    shown = {"rows": rows, "cols": cols, "planes": {}, "pictures": []}
    for name, plane in planes.items():
        differences = np.diff(plane.codes, axis=0, prepend=plane.codes.dtype.type(0))
        packed = zlib.compress(differences.astype(differences.dtype.newbyteorder("<")).tobytes(), 1)
        shown["planes"][name] = vars(plane) | {
            "codes": base64.b64encode(packed).decode(), "bytes": plane.codes.itemsize,
        }  # fmt: skip
    for picture in pictures:
        values = vars(picture) | {"colours": None}
        if picture.plane:
            values["colours"] = picture.colours.view("<u4").ravel().tolist()
        else:
            buffer = io.BytesIO()
            Image.fromarray(picture.colours).save(buffer, "webp", quality=85, method=2)
            values["image"] = (
                "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
            )
        shown["pictures"].append(values)
    return json.dumps(shown).replace("<", r"\u003c")


def write_png(path, name, facts, planes, pictures):
    """Write what `draw` returns as one PNG, below the name of the scene and a line of facts."""
    from matplotlib.figure import Figure  # without pyplot, as in charts.py
    from matplotlib.patches import Patch

    name, facts = (text.encode("ascii", "backslashreplace").decode() for text in (name, facts))
    height, width = planes["classes"].codes.shape
    n_cols = max(3, -(-len(pictures) // 2))
    size = 3.6 * n_cols, 2 * (3.6 * height / width + 0.45) + 0.8  # [inches]
    figure = Figure(size, layout="constrained")
    figure.suptitle(f"{name}\n{facts}", fontsize=9, parse_math=False)
    hatch = {"facecolor": HATCH[1], "edgecolor": HATCH[0], "hatch": "/////"}
    for axes in (cells := figure.subplots(2, n_cols).ravel()):
        axes.set_axis_off()
    for axes, picture in zip(cells, pictures, strict=False):
        colours = picture.colours
        axes.set_axis_on()
        axes.patch.set(**hatch)
        axes.imshow(
            colours[planes[picture.plane].codes] if picture.plane else colours,
            interpolation="none",
        )
        axes.set_title(f"{picture.title} ({picture.note})", fontsize=7)
        axes.set(xticks=[], yticks=[])
    classes = DIFFERENCES if any(picture.title == "Differences" for picture in pictures) else {}
    handles = [Patch(label="no data", **hatch)] + [
        Patch(facecolor=np.divide(colour, 255), edgecolor="0.3", label=label)
        for label, colour in classes.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=PNG_DPI, metadata={"Title": name})
