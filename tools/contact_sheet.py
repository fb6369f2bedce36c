"""Draw a contact sheet of scenes: names and quick-looks, and below each its label or other masks.

    python tools/contact_sheet.py scenes/ssts --output scenes.jpg
    python tools/contact_sheet.py scenes/ssts --masks bayes outputs/RUN --errors

A mask is the folder of a run or of mask files, or a name: bayes, summary, or threshold. With
--errors missed cloud is red, false cloud yellow, and pixels without data are grey, in scenes that
contain `truth`, as synthetic ones do. The last line of the sheet says what it shows.

By day a quick-look shows S5, S3, S2 as red, green and blue, so that ice and clouds of ice are cyan;
by night it shows S8, cold is bright. A pixel of the sheet is the mean of about 9 km, as in the
published pictures of the real scenes. Scenes by day come first.
"""

import sys
import textwrap
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import numpy as np
from PIL import Image, ImageDraw

from harness.config import Config
from harness.console import log_to_screen
from harness.data.hdf5 import open_hdf5, open_numbers, read_numbers
from harness.data.scene_files import day_or_night, short_name
from harness.errors import UserError
from harness.files import replacing
from tools.lib.masks import common_scenes, open_masks, read_fields
from tools.lib.options import command_parser, positive

THUMBNAIL = (131, 165)  # rows and columns; 1200 x 1500 km in pixels of 9.1 km
MARGIN = 4  # [pixels] between thumbnails
GREY = 128  # behind them, and where there are no data
FONT_SIZE, TEXT_HEIGHT, CHARACTER = 11, 15, 6  # [pixels] of the font, of a line, of a letter
DAY_CHANNELS = (4, 2, 1)  # S5, S3, S2
BRIGHTEST = (0.75, 1.0, 1.0)  # reflectance that is white
GAMMA = 0.85
JPEG_QUALITY = 85
MISSED, FALSE = (1, 0.2, 0.1), (1, 0.85, 0)  # colours of cloud that a mask misses, and invents


def read_thumbnails(path, masks, errors):
    """Read a scene file; return its quick-look and its masks, uint8 (rows, columns, 3).

    Args:
        path: Scene file.
        masks: List of Mask, see tools/lib/masks.py.
        errors: Whether to colour errors.

    Raises:
        UserError: If the scene does not have a mask, or no truth to show errors.
    """
    with open_hdf5(path) as file:
        bts = np.nan_to_num(read_numbers(open_numbers(file, "bts", (None, None, 3)))[..., 1])
        refs = open_numbers(file, "refs", (None, None, 6))
        refs = np.nan_to_num(read_numbers(refs)[..., DAY_CHANNELS])
    if refs.any():
        levels = np.clip(refs / BRIGHTEST, 0, 1) ** GAMMA
    else:
        measured = bts[bts > 0]
        warm, cold = np.percentile(measured, (99, 1)) if measured.size else (1, 0)
        levels = np.clip((warm - bts) / max(warm - cold, 1), 0, 1) * (bts > 0)
    fields = read_fields(masks, Config().min_sst, path)
    if errors and "truth" not in fields:
        raise UserError(f"{path} has no dataset 'truth', which --errors needs. Omit --errors.")
    pictures = [shrink(levels)]
    for i in range(len(masks)):
        mask = fields[f"mask {i}"]
        picture = np.repeat(mask[..., None].astype(float), 3, axis=-1)
        if errors:
            picture[~mask & fields["truth"]] = MISSED
            picture[mask & ~fields["truth"]] = FALSE
            picture[~fields["measured"]] = GREY / 255
        pictures.append(shrink(picture))
    return pictures


def shrink(levels):
    """Average levels from 0 to 1, (H, W) or (H, W, 3), to a thumbnail: uint8, three colours."""
    image = Image.fromarray(np.uint8(255 * levels)).convert("RGB")
    return np.asarray(image.resize(THUMBNAIL[::-1], Image.Resampling.BOX))


def draw_sheet(folder, output, n_scenes, n_columns, mask_names, errors):
    """Write the contact sheet of the first scenes below a folder; see the options of the command.

    Raises:
        UserError: If a file is no scene, or does not have a mask.
    """
    masks = open_masks(mask_names)
    paths = common_scenes(masks, folder, ()).values()
    paths = sorted(paths, key=lambda path: (day_or_night(path), path.name))[:n_scenes]
    rows, cols = (length + MARGIN for length in THUMBNAIL)
    n_columns = min(n_columns, len(paths))
    width = n_columns * cols + MARGIN
    lines = textwrap.wrap(describe(masks, errors), (width - 2 * MARGIN) // CHARACTER)
    row_height = TEXT_HEIGHT + (1 + len(masks)) * rows  # of a row of scenes
    below = -(-len(paths) // n_columns) * row_height  # where the legend begins
    sheet = Image.new("RGB", (width, below + len(lines) * TEXT_HEIGHT + MARGIN), (GREY,) * 3)
    draw = ImageDraw.Draw(sheet)
    for index, path in enumerate(paths):
        row, column = divmod(index, n_columns)
        left, top = MARGIN + column * cols, row * row_height
        title = f"{short_name(path.stem)} {day_or_night(path)}"[: cols // CHARACTER]
        draw.text((left, top), title, "black", font_size=FONT_SIZE)
        for i, thumbnail in enumerate(read_thumbnails(path, masks, errors)):
            sheet.paste(Image.fromarray(thumbnail), (left, top + TEXT_HEIGHT + i * rows))
    for i, line in enumerate(lines):
        draw.text((MARGIN, below + i * TEXT_HEIGHT), line, "black", font_size=FONT_SIZE)
    with replacing(output) as temporary:
        image_format = Image.registered_extensions()[output.suffix.lower()]
        sheet.save(temporary, image_format, quality=JPEG_QUALITY)


def describe(masks, errors):
    """The legend: what the pictures of a scene show, from the top, and what the colours mean."""
    text = "From the top: " + ", ".join(["quick-look", *(mask.name for mask in masks)])
    text += "; white: cloud, black: clear" if masks else ""
    text += ", red: missed cloud, yellow: false cloud, grey: no data" if masks and errors else ""
    return f"{text}."


def parse_arguments(argv):
    """Parse the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of scenes")
    add("--output", type=Path, default=Path("scenes.jpg"), metavar="FILE", help=".jpg or .png")
    add("--scenes", type=positive, default=20, metavar="N", help="number of scenes (default: 20)")
    add("--masks", nargs="*", default=["bayes"], metavar="MASK", help="masks (default: bayes)")
    add("--errors", action="store_true", help="show where the masks differ from `truth`")
    add("--columns", type=positive, default=10, metavar="N", help="of the sheet (default: 10)")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix.lower() not in (".jpg", ".png"):
        parser.error(f"--output should end in .jpg or .png, found {arguments.output}")
    return arguments


def main(argv=None):
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    a = arguments
    return exit_status(
        lambda: draw_sheet(a.folder, a.output, a.scenes, a.columns, a.masks, a.errors), a.verbose
    )


if __name__ == "__main__":
    sys.exit(main())
