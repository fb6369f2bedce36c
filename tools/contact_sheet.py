"""Draw a contact sheet of scenes: quick-looks, and below each its label.

    python tools/contact_sheet.py scenes/ssts --output scenes.jpg

By day a quick-look shows S5, S3, S2 as red, green and blue, so that ice and clouds of ice are cyan;
by night it shows S8, cold is bright. A pixel of the sheet is the mean of about 9 km, as in the
published pictures of the real scenes. Scenes by day come first.
"""

import sys
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import numpy as np
from PIL import Image

from harness.console import log_to_screen
from harness.data.hdf5 import open_hdf5, open_numbers, read_all
from harness.data.scene_files import day_or_night, find_scenes
from harness.files import replacing
from tools.lib.options import command_parser, positive

THUMBNAIL = (131, 165)  # rows and columns; 1200 x 1500 km in pixels of 9.1 km
MARGIN = 4  # [pixels] between thumbnails
GREY = 128  # behind them
DAY_CHANNELS = (4, 2, 1)  # S5, S3, S2
BRIGHTEST = (0.75, 1.0, 1.0)  # reflectance that is white
GAMMA = 0.85
JPEG_QUALITY = 85


def read_thumbnails(path):
    """Read a scene file; return its quick-look and label, uint8 (rows, columns, 3)."""
    with open_hdf5(path) as file:
        bts = np.nan_to_num(read_all(open_numbers(file, "bts", (None, None, 3)))[..., 1])
        refs = open_numbers(file, "refs", (None, None, 6))
        refs = np.nan_to_num(read_all(refs)[..., DAY_CHANNELS])
        label = open_numbers(file, "bayes", (*bts.shape, 1), optional=True)
        label = np.zeros(bts.shape) if label is None else read_all(label)[..., 0]
    if refs.any():
        levels = np.clip(refs / BRIGHTEST, 0, 1) ** GAMMA
    else:
        measured = bts[bts > 0]
        warm, cold = np.percentile(measured, (99, 1)) if measured.size else (1, 0)
        levels = np.clip((warm - bts) / max(warm - cold, 1), 0, 1) * (bts > 0)
    return shrink(levels), shrink(label > 0)


def shrink(levels):
    """Average levels from 0 to 1, (H, W) or (H, W, 3), to a thumbnail: uint8, three colours."""
    image = Image.fromarray(np.uint8(255 * levels)).convert("RGB")
    return np.asarray(image.resize(THUMBNAIL[::-1], Image.Resampling.BOX))


def draw_sheet(folder, output, n_scenes, n_columns):
    """Write the contact sheet of the first scenes below a folder; see the options of the command.

    Raises:
        SceneError: If a file is no scene.
    """
    paths = sorted(find_scenes(folder), key=lambda path: (day_or_night(path), path.name))[:n_scenes]
    rows, cols = (length + MARGIN for length in THUMBNAIL)
    n_rows = 2 * -(-len(paths) // n_columns)
    sheet = np.full((n_rows * rows + MARGIN, n_columns * cols + MARGIN, 3), GREY, np.uint8)
    for index, path in enumerate(paths):
        row, column = divmod(index, n_columns)
        left = MARGIN + column * cols
        for below, thumbnail in enumerate(read_thumbnails(path)):
            top = MARGIN + (2 * row + below) * rows
            sheet[top : top + THUMBNAIL[0], left : left + THUMBNAIL[1]] = thumbnail
    with replacing(output) as temporary:
        image_format = Image.registered_extensions()[output.suffix.lower()]
        Image.fromarray(sheet).save(temporary, image_format, quality=JPEG_QUALITY)


def parse_arguments(argv):
    """Parse the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of scenes")
    add("--output", type=Path, default=Path("scenes.jpg"), metavar="FILE", help=".jpg or .png")
    add("--scenes", type=positive, default=20, metavar="N", help="number of scenes (default: 20)")
    add("--columns", type=positive, default=10, metavar="N", help="of the sheet (default: 10)")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix.lower() not in (".jpg", ".png"):
        parser.error(f"--output should end in .jpg or .png, found {arguments.output}")
    return arguments


def main(argv=None):
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    return exit_status(
        lambda: draw_sheet(arguments.folder, arguments.output, arguments.scenes, arguments.columns),
        arguments.verbose,
    )


if __name__ == "__main__":
    sys.exit(main())
