"""Command-line options that several commands share."""

from pathlib import Path


def add_mask_options(add):
    """Add the options that choose masks of a run and the folder of their scenes.

    Args:
        add: The add_argument of the command's parser.
    """
    add("--data", type=Path, help="folder of the scene files (default: the run's inference_dir)")
    add(
        "--geodetic", metavar="PATH", type=Path,
        help="a Sentinel-3 geodetic_in.nc for one scene, or a folder of PRODUCT.SEN3 folders",
    )  # fmt: skip
    add("--scene", nargs="+", default=[], help="names of scenes, without suffix (default: all)")
