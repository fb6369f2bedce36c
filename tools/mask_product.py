r"""Mask Sentinel-3 SLSTR products: from a product to its mask, a map and a picture.

    python tools/mask_product.py S3A_SL_1_RBT____....SEN3 --model outputs/RUN/model.keras -o masks
    python tools/mask_product.py products/*.zip --model model.keras -o masks --format netcdf geotiff

A product is a Level-1 RBT product, a folder or the zip file as downloaded. The command converts it
as convert_sen3.py does, masks the scene as `--mode inference` does with its default settings, and
exports the mask as export_masks.py does. It writes, for each product,

DIR/day/<product>.hdf    the scene, or DIR/night/<product>.hdf; kept if it exists
DIR/<product>.nc         mask, probability, positions and time, with the conventions CF-1.10; or
                         <product>.tif and <product>_probability.tif
DIR/<product>.png        false colour by day (S3, S2, S1) or S9 by night, beside the mask

Pixels without one of the brightness temperatures have no data: they are 255 in masks, NaN in
probabilities and hatched in the picture. Existing exports and pictures are replaced. A product that
cannot be used is reported, and the others are masked.
"""

import logging
import shlex
import sys
import traceback
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)
import numpy as np

from cloudmask import N_CHANNELS, predict_scene
from data_loader import REFLECTANCE_OFFSET, read_scene
from harness.console import log_to_screen
from harness.data.positions import read_positions
from harness.data.scene_files import product_times
from harness.errors import Failure, one_line
from harness.files import file_sha256, replacing
from harness.inference.scores import THRESHOLD, ratio
from harness.records.run_folder import git_commit
from tools.convert_sen3 import convert
from tools.export_masks import COLOURS, WRITERS, MaskedScene, describe_masks
from tools.lib.options import command_parser

GAMMA = 0.7  # of false colour: the sea is dark
PNG_DPI, INCHES = 150, 6  # of the picture, and of the width of each of its two panels

log = logging.getLogger("mask_product")


def mask_product(path, model, arguments, about):
    """Mask and export a scene, and draw its picture.

    Args:
        path: Scene file of a product.
        model: keras.Model.
        arguments: Of the command line.
        about: What all masks have in common, see `export_masks.MaskedScene`.

    Returns:
        One line about the mask.

    Raises:
        UserError: If the scene or the model cannot be used.
    """
    folder = arguments.output
    mask, probability = predict_scene(model, path)
    scene = read_scene(path, (*mask.shape, N_CHANNELS), labelled=False)
    masked = MaskedScene(
        path.stem,
        mask,
        probability,
        scene.valid,
        {
            name: degrees.astype(np.float32)
            for name, degrees in read_positions(path, None, path.stem, mask.shape).items()
        },
        about | {"scene": path.name, "platform": f"Sentinel-{path.stem[1:3]}"},
        product_times(path.stem),
    )
    for kind in arguments.format:
        WRITERS[kind](masked.filled(), folder)
    picture = folder / f"{path.stem}.png"
    write_picture(picture, scene, mask, by_day=path.parent.name == "day")
    n_valid = np.count_nonzero(scene.valid)
    text = (
        f"{path.parent.name}, {mask.shape[0]} x {mask.shape[1]}, {scene.valid.mean():.1%} with "
        f"data, of these {ratio(np.count_nonzero(mask[scene.valid]), n_valid):.1%} cloud"
    )
    if scene.cloud is not None:
        n_equal = np.count_nonzero((mask == scene.cloud[..., 0])[scene.valid])
        text += f" and {ratio(n_equal, n_valid):.1%} as in the Bayesian mask"
    return f"{text}: {picture}"


def write_picture(path, scene, mask, by_day):
    """Draw a scene beside its mask.

    Args:
        path: PNG file.
        scene: data_loader.Scene.
        mask: uint8 (H, W), 1 is cloud.
        by_day: Whether to show false colour, not S9.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    from matplotlib.patches import Patch

    clear, cloud, no_data = (np.divide(colour, 255) for colour in COLOURS)
    figure = Figure((2 * INCHES, INCHES * mask.shape[0] / mask.shape[1] + 1), layout="constrained")
    left, right = figure.subplots(1, 2)
    if by_day:
        colour = scene.channels[..., 2::-1] + REFLECTANCE_OFFSET  # S3, S2, S1
        brightest = np.percentile(colour[scene.valid], 99) if scene.valid.any() else 1
        left.imshow(np.clip(colour / max(brightest, 0.01), 0, 1) ** GAMMA)
        left.set_title("False colour: S3, S2, S1")
    else:
        kelvin = np.where(scene.valid, scene.bt_12um, np.nan)
        image = left.imshow(kelvin, cmap="gray_r")
        left.set_title("S9 (12 µm), cold is bright")
        figure.colorbar(image, ax=left, label="brightness temperature [K]", shrink=0.8)
    right.imshow(mask, cmap=ListedColormap([clear, cloud]), vmin=0, vmax=1, interpolation="none")
    right.set_title("Cloud mask")
    for axes in (left, right):
        axes.set(xticks=[], yticks=[])
        if not scene.valid.all():
            hatch = {"colors": [no_data], "hatches": ["////"]}
            axes.contourf(~scene.valid, levels=[0.5, 1.5], **hatch)
    figure.legend(
        handles=[
            Patch(facecolor=clear, edgecolor="0.3", label="clear"),
            Patch(facecolor=cloud, edgecolor="0.3", label="cloud"),
            Patch(facecolor=no_data, edgecolor="0.3", hatch="////", label="no data"),
        ],
        loc="outside lower right", ncols=3, frameon=False,
    )  # fmt: skip
    figure.suptitle(path.stem, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=PNG_DPI)


def mask_all(arguments, command):
    """Mask the products that the command line names."""
    if not arguments.model.is_file():
        raise FileNotFoundError(f"No model file {arguments.model}. Give the .keras file of a run.")
    for product in arguments.products:
        if not product.exists():
            raise FileNotFoundError(
                f"No product {product}. Give folders (PRODUCT.SEN3) or zip files."
            )
    about = describe_masks(git_commit(), command) | {
        "threshold": str(THRESHOLD),
        "model": str(arguments.model),
        "model_sha256": file_sha256(arguments.model),
        "instrument": "SLSTR",
    }
    import harness.quiet_tensorflow  # noqa: F401  (before any other import of TensorFlow)
    from harness.networks.model_files import read_model

    model = read_model(arguments.model, "--model")
    options = {"view": "nadir", "refs_grid": "1km"}
    options |= {"positions": arguments.positions, "overwrite": arguments.overwrite}
    n_failed, total = 0, len(arguments.products)
    for i, product in enumerate(arguments.products, 1):
        try:
            kind, path, text = convert(product, arguments.output, **options)
            log.info("%d of %d, %s: %s", i, total, kind, text)
            text = mask_product(path, model, arguments, about)
            log.info("%d of %d, masked: %s", i, total, text)
        except Exception as error:
            if arguments.verbose:
                traceback.print_exc()
            n_failed += 1
            log.error("%d of %d, failed: %s: %s", i, total, product, one_line(error))
    if n_failed:
        raise Failure(f"{n_failed} of {total} failed. The lines above give the reasons.")


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("products", type=Path, nargs="+", metavar="PRODUCT.SEN3", help="folder or zip file")
    add("--model", type=Path, required=True, help="model file of a run, .keras or .h5")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="for all files")
    add(
        "--format", nargs="+", choices=("netcdf", "geotiff"), default=["netcdf"],
        help="formats of the export (default netcdf)",
    )  # fmt: skip
    add("--no-positions", dest="positions", action="store_false", help="omit latitude, longitude")
    add("--overwrite", action="store_true", help="convert existing scenes again")
    arguments = parser.parse_args(argv)
    log_to_screen(arguments.verbose)
    command = shlex.join(["mask_product.py", *(argv or sys.argv[1:])])
    return exit_status(lambda: mask_all(arguments, command), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
