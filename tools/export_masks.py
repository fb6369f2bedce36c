r"""Turn the masks of a run into files that others can use: NetCDF, GeoTIFF or PNG.

    python tools/export_masks.py RUN_DIR --format netcdf
    python tools/export_masks.py RUN_DIR --format geotiff --geodetic products/
    python tools/export_masks.py RUN_DIR --format png -o figures

netcdf   <scene>.nc, by the conventions CF-1.10: `cloud_mask`, `data_available`, `cloud_probability`
         where the run kept it, latitude, longitude and time where they are known.
geotiff  <scene>.tif, 0 clear and 1 cloud with a palette, and <scene>_probability.tif. A swath has
         no map projection: the files carry ground control points (EPSG:4326) every 64 pixels, which
         `gdalwarp -tps -t_srs EPSG:4326` puts on a map; none where positions are not known.
         Pixels without data are in the files' own mask of valid pixels; on a map they, and what
         lies beside the swath, are 255 or NaN.
png      <scene>.png, one pixel each: cloud white, clear dark blue, no data grey.

Positions are the datasets `latitude` and `longitude`, (H, W), of the scene file, or with --geodetic
those of the Sentinel-3 product. Pixels without data are those of which the scene file lacks a
brightness temperature; their mask is kept as the run made it, in NetCDF and GeoTIFF. Scene files
need not be there: without them neither is known. A file of an earlier export is replaced.
"""

import argparse
import functools
import json
import logging
import shlex
import sys
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import harness.quiet_tensorflow  # noqa: F401
from _command import exit_status

# isort: split
import h5py
import numpy as np

from harness.config import load_config
from harness.console import log_to_screen, printable, progress
from harness.data.hdf5 import open_hdf5, open_numbers
from harness.data.mask_files import find_masks, measured_pixels, read_mask
from harness.data.positions import MAX_DEGREES, check_geodetic, read_positions
from harness.data.scene_files import PRODUCT_NAME, find_scenes, product_times
from harness.errors import UserError
from harness.files import replacing
from harness.records.report.pictures import CLEAR, CLOUD, read_mask_and_label
from harness.records.run import now
from tools.lib.options import add_mask_options

MEANINGS = ("clear", "cloud")  # of 0 and 1
COLOURS = (CLEAR, CLOUD, (140, 140, 140))  # and no data; told apart by brightness
GCP_STEP = 64  # pixels between ground control points

log = logging.getLogger("export_masks")


@dataclass(frozen=True)
class MaskedScene:
    """A mask and what is known of its scene.

    Attributes:
        name: Of the scene's file, without its suffix.
        mask: uint8 (H, W), 1 is cloud.
        probability: float32 (H, W), or None.
        valid: bool (H, W), whether all brightness temperatures were measured; or None.
        latitude: float32 (H, W) [degrees north], NaN where missing; or None.
        longitude: float32 (H, W) [degrees east], NaN where missing; or None.
        facts: Texts that say where the mask comes from, by the names of NetCDF's global attributes.
        times: Start and end of the measurement, in UTC; or None.
    """

    name: str
    mask: np.ndarray
    probability: np.ndarray | None
    valid: np.ndarray | None
    latitude: np.ndarray | None
    longitude: np.ndarray | None
    facts: dict
    times: tuple[datetime, datetime] | None


# --- reading --------------------------------------------------------------------------------


def locate_scenes(config, folder):
    """Paths of the scene files by file name; empty where those of the run are not here.

    Args:
        config: Config of the run.
        folder: Where the user says that they are; None for the run's own inference_dir.

    Raises:
        FileNotFoundError: If the user's folder has none.
    """
    try:
        return {path.name: path for path in find_scenes(folder or config.inference_dir)}
    except FileNotFoundError:
        if folder:
            raise
        log.warning(
            "No scene files in %s: which pixels lack data stays unknown, and positions where "
            "--geodetic has none. Say where the scenes are with --data.",
            config.inference_dir,
        )
        return {}


def describe_run(folder, config, command):
    """What all masks of a run have in common, as texts by names of global attributes.

    Raises:
        UserError: If the folder has no results.json.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        status, commit = results["status"], results["git_commit"] or "unknown"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'results.json'} should be that of a run ({type(error).__name__}: {error}). "
            "Name the folder of a run."
        ) from None
    if status != "success":
        log.warning("%s has ended as '%s': its masks may not be all.", folder, status)
    return {
        "title": "Cloud mask of a Sentinel-3 SLSTR scene",
        "institution": config.organisation,
        "source": f"CloudMask, U-Net on the nine channels of SLSTR at 1 km, commit {commit}",
        "history": f"{now()}: {command[:2000]}",
        "references": "MLCommons Science, CloudMask, https://github.com/mlcommons/science",
        "run": folder.resolve().name,
    }


def read_masked_scene(path, scenes, geodetic, about_run):
    """Read a mask, and what its scene file and its geodetic file say of it.

    Args:
        path: Mask file of a run.
        scenes: Paths of scene files by name.
        geodetic: File or folder of --geodetic, or None.
        about_run: Of `describe_run`.

    Returns:
        MaskedScene.

    Raises:
        UserError: If a file is not what it should be.
    """
    valid = None
    with open_hdf5(path) as file:
        mask = read_mask(file)
        probability = open_numbers(file, "probability", mask.shape, optional=True)
        probability = None if probability is None else probability[:]
        made_by = {key: file.attrs[key] for key in ("scene", "threshold", "model", "model_sha256")}
    if scene_file := scenes.get(made_by["scene"]):
        read_mask_and_label(path, scene_file)  # sees whether it is the one that was masked
        with open_hdf5(scene_file) as file:
            valid = measured_pixels(file, mask.shape)
    positions = {
        name: degrees.astype(np.float32)
        for name, degrees in read_positions(scene_file, geodetic, path.stem, mask.shape).items()
    }
    product = PRODUCT_NAME.match(path.stem)
    platform = {"platform": f"Sentinel-3{product[1][2]}", "instrument": "SLSTR"} if product else {}
    facts = about_run | platform | made_by
    return MaskedScene(
        path.stem,
        mask,
        probability,
        valid,
        positions.get("latitude"),
        positions.get("longitude"),
        {key: printable(str(value)) for key, value in facts.items()},
        product_times(path.stem),
    )


# --- writing --------------------------------------------------------------------------------


def write_netcdf(scene, folder):
    """Write <scene>.nc, by CF-1.10."""
    import h5netcdf  # netCDF4 would bring a second HDF5 library into the process

    facts = scene.facts | {"Conventions": "CF-1.10"}
    coordinates = [name for name in MAX_DEGREES if getattr(scene, name) is not None]
    if scene.times:
        coordinates.append("time")
        for key, time in zip(("start", "end"), scene.times, strict=True):
            facts[f"time_coverage_{key}"] = f"{time:%Y-%m-%dT%H:%M:%SZ}"
    common = {"coordinates": " ".join(coordinates)} if coordinates else {}
    grid = ("y", "x")
    with (
        replacing(folder / f"{scene.name}.nc") as temporary,
        h5netcdf.File(temporary, "w") as file,
    ):
        file.dimensions = dict(zip(grid, scene.mask.shape, strict=True))
        file.attrs.update({key: _characters(text) for key, text in facts.items()})
        add = functools.partial(_add_variable, file)
        more = {"cloud_probability": scene.probability, "data_available": scene.valid}
        more = " ".join(name for name, values in more.items() if values is not None)
        add(
            *("cloud_mask", grid, scene.mask),
            standard_name="cloud_binary_mask",
            long_name="cloud mask",
            units="1",
            flag_values=np.array([0, 1], np.uint8),
            flag_meanings=" ".join(MEANINGS),
            **({"ancillary_variables": more} if more else {}),
            **common,
        )
        if scene.probability is not None:
            add(
                *("cloud_probability", grid, scene.probability),
                long_name="probability of cloud by the network",
                units="1",
                valid_range=np.array([0, 1], np.float32),
                **common,
            )
        if scene.valid is not None:
            add(
                *("data_available", grid, scene.valid.astype(np.uint8)),
                long_name="whether all brightness temperatures were measured",
                flag_values=np.array([0, 1], np.uint8),
                flag_meanings="missing measured",
                **common,
            )
        if scene.latitude is not None:
            for name, direction in (("latitude", "north"), ("longitude", "east")):
                add(
                    *(name, grid, getattr(scene, name)),
                    standard_name=name,
                    long_name=name,
                    units=f"degrees_{direction}",
                )
        if scene.times:
            add(
                *("time", (), np.mean([time.timestamp() for time in scene.times])),
                standard_name="time",
                long_name="middle of the measurement",
                units="seconds since 1970-01-01 00:00:00",
                calendar="standard",
            )


def _add_variable(file, name, dimensions, values, **attributes):
    values = np.asarray(values)
    packing = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    if values.dtype == np.float32 and np.isnan(values).any():
        packing["fillvalue"] = np.float32(np.nan)
    variable = file.create_variable(
        name, dimensions, values.dtype, **(packing if values.ndim == 2 else {})
    )
    variable[...] = values
    for key, value in attributes.items():
        variable.attrs[key] = _characters(value) if isinstance(value, str) else value


def _characters(text):
    """A text as NetCDF's characters, which more programs read than NetCDF's strings."""
    encoded = text.encode()
    return np.array(encoded, h5py.string_dtype("utf-8", len(encoded) or 1))


def write_geotiff(scene, folder):
    """Write <scene>.tif, and <scene>_probability.tif where there is one."""
    palette = dict(enumerate(COLOURS[:2]))
    _write_raster(scene, folder / f"{scene.name}.tif", scene.mask, palette)
    probability_file = folder / f"{scene.name}_probability.tif"
    if scene.probability is None:
        probability_file.unlink(missing_ok=True)  # that of an earlier export
    else:
        _write_raster(scene, probability_file, scene.probability)


def _write_raster(scene, path, values, palette=None):
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    places = {}
    if scene.latitude is not None:
        places = {"gcps": control_points(scene.latitude, scene.longitude), "crs": "EPSG:4326"}
    with warnings.catch_warnings(), replacing(path) as temporary:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a swath without positions is not
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(
                *(temporary, "w", "GTiff", *reversed(values.shape), 1),
                dtype=values.dtype,
                nodata=255 if palette else np.nan,  # what a map has beside the swath
                compress="deflate",
                tiled=True,
                **({} if palette else {"predictor": 3}),
                **places,
            ) as file,
        ):
            if palette:
                file.write_colormap(1, palette)  # before the pixels, as TIFF wants it
            file.write(values, 1)
            if scene.valid is not None:
                file.write_mask(scene.valid)
            file.set_band_description(1, "cloud mask" if palette else "probability of cloud")
            tags = {"flag_values": "0 1", "flag_meanings": " ".join(MEANINGS)} if palette else {}
            if scene.times:
                tags["TIFFTAG_DATETIME"] = f"{scene.times[0]:%Y:%m:%d %H:%M:%S}"
            file.update_tags(**scene.facts, **tags)


def control_points(latitude, longitude):
    """Ground control points of a swath.

    Args:
        latitude: float32 (H, W) [degrees north], NaN where missing.
        longitude: float32 (H, W) [degrees east], NaN where missing.

    Returns:
        List of rasterio's GroundControlPoint, in the middle of every 64th pixel and of the last
        ones. Across the date line longitudes go on beyond 180.
    """
    from rasterio.control import GroundControlPoint

    rows, cols = (sorted({*range(0, n, GCP_STEP), n - 1}) for n in latitude.shape)
    known = np.isfinite(latitude) & np.isfinite(longitude)
    rows, cols = np.array([(i, j) for i in rows for j in cols if known[i, j]], int).reshape(-1, 2).T
    x, y = longitude[rows, cols].astype(float), latitude[rows, cols].astype(float)
    x = (x - x[:1] + 180) % 360 - 180 + x[:1]  # no jump from 180 to -180
    x += 360 * (x < -180).any()
    return [
        GroundControlPoint(row + 0.5, col + 0.5, *place)
        for row, col, *place in zip(rows, cols, x, y, strict=True)
    ]


def write_png(scene, folder):
    """Write <scene>.png with the palette COLOURS."""
    from PIL import Image, PngImagePlugin

    index = scene.mask if scene.valid is None else np.where(scene.valid, scene.mask, np.uint8(2))
    image = Image.fromarray(index)
    image.putpalette([level for colour in COLOURS for level in colour])
    texts = PngImagePlugin.PngInfo()
    for key, text in scene.facts.items():
        texts.add_itxt(key, text)
    with replacing(folder / f"{scene.name}.png") as temporary:
        image.save(temporary, optimize=True, pnginfo=texts)


WRITERS = {"netcdf": write_netcdf, "geotiff": write_geotiff, "png": write_png}


# --- the program ----------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    add("--format", choices=WRITERS, required=True)
    add("-o", "--output", type=Path, help="folder for the files (default RUN_DIR/export)")
    add_mask_options(add)
    add("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def export(arguments, command):
    """Export the masks of a run."""
    config = load_config(arguments.run / "config.yaml")
    masks = find_masks(arguments.run, arguments.scene)
    check_geodetic(arguments.geodetic, masks)
    about_run = describe_run(arguments.run, config, command)
    scenes = locate_scenes(config, arguments.data)
    folder = arguments.output or arguments.run / "export"
    n_placed = 0
    for path in progress(masks, "Exporting", len(masks)):
        scene = read_masked_scene(path, scenes, arguments.geodetic, about_run)
        WRITERS[arguments.format](scene, folder)
        n_placed += scene.latitude is not None
    log.info(
        "%d mask(s) are in %s, %d of them of scenes with latitude and longitude.",
        *(len(masks), folder, n_placed),
    )


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    command = shlex.join(["export_masks.py", *(argv or sys.argv[1:])])
    return exit_status(lambda: export(arguments, command), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
