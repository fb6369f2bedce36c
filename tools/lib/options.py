"""The parser and the arguments that several commands share."""

import argparse
from pathlib import Path


def command_parser(description):
    """A parser with a module's docstring as --help, and with the option --verbose."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def positive(text):
    """Type of an option: a number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text!r}")
    return int(text)


def add_mask_arguments(add):
    """Add the run's folder and the options that choose its masks and the folder of their scenes.

    Args:
        add: The add_argument of the command's parser.
    """
    add("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    add_scene_arguments(add, "the run")


def add_scene_arguments(add, run):
    """Add the options that choose scenes and the folder of their files, by default that of `run`.

    Args:
        add: The add_argument of the command's parser.
        run: Name of the run in the help.
    """
    add("--data", type=Path, help=f"folder of the scene files (default: {run}'s inference_dir)")
    add(
        "--geodetic", metavar="PATH", type=Path,
        help="a Sentinel-3 geodetic_in.nc for one scene, or a folder of PRODUCT.SEN3 folders",
    )  # fmt: skip
    add("--scene", nargs="+", default=[], help="names of scenes, without suffix (default: all)")
