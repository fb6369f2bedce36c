r"""Export the masks of a run as NetCDF, GeoTIFF or PNG.

    python tools/export_masks.py RUN_DIR --format netcdf
    python tools/export_masks.py RUN_DIR --format geotiff --geodetic products/
    python tools/export_masks.py RUN_DIR --format png -o figures

netcdf   <scene>.nc with the conventions CF-1.10: `cloud_mask`, `data_available`,
         `cloud_probability` and `cloud_uncertainty` if the run kept them, latitude, longitude and
         time if they are known.
geotiff  <scene>.tif, 0 clear and 1 cloud with a palette; <scene>_probability.tif and
         <scene>_uncertainty.tif. A swath has no map projection: the files have ground control
         points (EPSG:4326) every 64 pixels, which `gdalwarp -tps -t_srs EPSG:4326` uses to make a
         map; none if positions are unknown. Pixels without data are 255 or NaN, and on a map also
         those outside the swath; the mask of valid pixels in each file marks them too.
png      <scene>.png, one pixel for each pixel: cloud white, clear dark blue, no data grey.

Positions are the datasets `latitude` and `longitude`, (H, W), of the scene file, or with --geodetic
those of the Sentinel-3 product. Pixels without data are those without one of the brightness
temperatures. In NetCDF and GeoTIFF they are the fill value, 255 in masks and NaN in probabilities;
--keep-mask writes what the mask file has there. Scene files are optional: without them positions
are unknown, and so are pixels without data in the masks of an earlier version. Existing files are
replaced.
"""

import logging
import shlex
import sys
import warnings
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import h5py
import numpy as np

from harness.config import load_config
from harness.console import log_to_screen, printable, progress
from harness.data.hdf5 import open_hdf5, open_numbers, read_all, read_attribute
from harness.data.mask_files import find_masks, measured_pixels, read_mask, read_valid
from harness.data.positions import check_geodetic, read_positions
from harness.data.scene_files import PRODUCT_NAME, find_scenes, product_times
from harness.files import check_own, replacing
from harness.records.report.pictures import CLEAR, CLOUD
from harness.records.saved_masks import read_mask_and_label
from harness.records.saved_runs import read_run
from tools.lib.options import add_mask_arguments, command_parser

MEANINGS = "clear cloud"  # of 0 and 1
COLOURS = (CLEAR, CLOUD, (140, 140, 140))  # and no data; they differ in brightness
NUMBERS = {  # of pixels, beside the mask: what they are
    "probability": "probability of cloud by the network",
    "uncertainty": "difference of the probabilities of cloud by two views",
}
FILL = np.uint8(255)  # in a mask, where there are no data
GCP_STEP = 64  # pixels between ground control points

log = logging.getLogger("export_masks")


@dataclass(frozen=True)
class MaskedScene:
    """A mask and what is known about its scene; None or empty where unknown."""

    name: str  # of the scene file, without suffix
    mask: np.ndarray  # uint8 (H, W), 1 is cloud, FILL where it is unknown
    probability: np.ndarray | None  # float32 (H, W), NaN where it is unknown
    valid: np.ndarray | None  # bool (H, W), whether all brightness temperatures were measured
    positions: dict  # latitude and longitude, float32 (H, W) [degrees], NaN where missing
    about: dict  # origin of the mask, texts by name of a global NetCDF attribute
    times: tuple[datetime, datetime] | None  # start and end of the measurement, UTC
    uncertainty: np.ndarray | None = None  # float32 (H, W), NaN where it is unknown

    def filled(self):
        """The same with the fill value where there are no data, as far as this is known."""
        if self.valid is None:
            return self
        filled = {
            name: np.where(self.valid, values, np.float32(np.nan))
            for name in NUMBERS
            if (values := getattr(self, name)) is not None
        }
        return replace(self, mask=np.where(self.valid, self.mask, FILL), **filled)


# --- reading --------------------------------------------------------------------------------


def describe_run(run, config, command):
    """What all masks of a run have in common: texts by name of a global NetCDF attribute."""
    if run.status != "success":
        log.warning("%s has the status '%s': some masks may be missing.", run.folder, run.status)
    about = describe_masks(run.results.get("git_commit"), command)
    return about | {"institution": config.organisation, "run": run.name}


def describe_masks(commit, command):
    """What all masks have in common that a commit of this project and a command have made."""
    return {
        "title": "Cloud mask of a Sentinel-3 SLSTR scene",
        "source": "CloudMask, a network on the nine channels of SLSTR at 1 km, commit "
        f"{commit or 'unknown'}",
        "history": f"{datetime.now(timezone.utc).isoformat(timespec='seconds')}: {command[:2000]}",
        "references": "MLCommons Science, CloudMask, https://github.com/mlcommons/science",
    }


def read_masked_scene(path, scenes, geodetic, about_run):
    """Read a mask, and what its scene file and its geodetic file say about it.

    Args:
        path: Mask file of a run.
        scenes: Paths of scene files by file name.
        geodetic: File or folder given by --geodetic, or None.
        about_run: Result of `describe_run`.

    Raises:
        UserError: If a file is damaged or belongs to another scene.
    """
    with open_hdf5(path) as file:
        mask = read_mask(file)
        valid = read_valid(file, mask.shape)
        numbers = {name: open_numbers(file, name, mask.shape, optional=True) for name in NUMBERS}
        numbers = {name: read_all(each) for name, each in numbers.items() if each is not None}
        keys = ("scene", "threshold", "model", "model_sha256")
        about = {key: read_attribute(file, key) for key in keys}
    if scene_file := scenes.get(about["scene"]):
        read_mask_and_label(path, scene_file)  # checks that this is the file that was masked
        if valid is None:
            with open_hdf5(scene_file) as file:
                valid = measured_pixels(file, mask.shape)
    positions = read_positions(scene_file, geodetic, path.stem, mask.shape)
    if product := PRODUCT_NAME.match(path.stem):
        about |= {"platform": f"Sentinel-3{product[1][2]}", "instrument": "SLSTR"}
    return MaskedScene(
        path.stem,
        mask,
        numbers.get("probability"),
        valid,
        {name: degrees.astype(np.float32) for name, degrees in positions.items()},
        {key: printable(str(value)) for key, value in (about_run | about).items()},
        product_times(path.stem),
        numbers.get("uncertainty"),
    )


# --- writing --------------------------------------------------------------------------------


def netcdf_variables(scene):
    """Variables of <scene>.nc, {name: (values, attributes)}: those on the grid, and coordinates."""
    flags = {"flag_values": np.array([0, 1], np.uint8)}
    mask = dict(standard_name="cloud_binary_mask", long_name="cloud mask", units="1", **flags)
    grids = {"cloud_mask": (scene.mask, mask | {"flag_meanings": MEANINGS})}
    for name, meaning in NUMBERS.items():
        if (values := getattr(scene, name)) is not None:
            attributes = dict(long_name=meaning, units="1")
            attributes["valid_range"] = np.array([0, 1], np.float32)
            grids[f"cloud_{name}"] = values, attributes
    if scene.valid is not None:
        name = "whether all brightness temperatures were measured"
        attributes = dict(long_name=name, flag_meanings="missing measured", **flags)
        grids["data_available"] = scene.valid.astype(np.uint8), attributes
    if others := [name for name in grids if name != "cloud_mask"]:
        grids["cloud_mask"][1]["ancillary_variables"] = " ".join(others)
    coordinates = {}
    for name, degrees in scene.positions.items():
        units = {"latitude": "degrees_north", "longitude": "degrees_east"}[name]
        coordinates[name] = degrees, dict(standard_name=name, long_name=name, units=units)
    if scene.times:
        attributes = dict(standard_name="time", long_name="middle of the measurement")
        attributes |= {"units": "seconds since 1970-01-01 00:00:00", "calendar": "standard"}
        coordinates["time"] = np.mean([time.timestamp() for time in scene.times]), attributes
    if coordinates:
        for _, attributes in grids.values():
            attributes["coordinates"] = " ".join(coordinates)
    return grids, coordinates


def write_netcdf(scene, folder):
    """Write <scene>.nc with the conventions CF-1.10."""
    import h5netcdf  # netCDF4 would load a second HDF5 library

    about = scene.about | {"Conventions": "CF-1.10"}
    for key, time in zip(("start", "end"), scene.times or (), strict=False):
        about[f"time_coverage_{key}"] = f"{time:%Y-%m-%dT%H:%M:%SZ}"
    grids, coordinates = netcdf_variables(scene)
    path = folder / f"{scene.name}.nc"
    with replacing(path) as temporary, h5netcdf.File(temporary, "w") as file:
        file.dimensions = dict(zip("yx", scene.mask.shape, strict=True))
        file.attrs.update(_netcdf_attributes(about))
        for name, (values, attributes) in (grids | coordinates).items():
            options = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
            if values.dtype == np.float32 and np.isnan(values).any():
                options["fillvalue"] = np.float32(np.nan)
            if values.dtype == np.uint8 and (values == FILL).any():
                options["fillvalue"] = FILL
            dimensions, options = (("y", "x"), options) if values.ndim else ((), {})
            variable = file.create_variable(name, dimensions, values.dtype, **options)
            variable[...] = values
            variable.attrs.update(_netcdf_attributes(attributes))


def _netcdf_attributes(attributes):
    """Texts as arrays of characters, which more programs read than NetCDF's own strings."""
    texts = {key: value.encode() for key, value in attributes.items() if isinstance(value, str)}
    return attributes | {
        key: np.array(text, h5py.string_dtype("utf-8", len(text) or 1))
        for key, text in texts.items()
    }


def write_geotiff(scene, folder):
    """Write <scene>.tif, <scene>_probability.tif and <scene>_uncertainty.tif."""
    _write_raster(scene, folder / f"{scene.name}.tif", scene.mask, "cloud mask")
    for name, meaning in NUMBERS.items():
        path = folder / f"{scene.name}_{name}.tif"
        if (values := getattr(scene, name)) is None:
            path.unlink(missing_ok=True)  # from an earlier export
        else:
            _write_raster(scene, path, values, meaning)


def _write_raster(scene, path, values, meaning):
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    is_mask = values is scene.mask
    options = {"nodata": FILL} if is_mask else {"nodata": np.nan, "predictor": 3}
    if scene.positions:
        options |= {"gcps": control_points(**scene.positions), "crs": "EPSG:4326"}
    tags = {"flag_values": "0 1", "flag_meanings": MEANINGS} if is_mask else {}
    if scene.times:
        tags["TIFFTAG_DATETIME"] = f"{scene.times[0]:%Y:%m:%d %H:%M:%S}"
    shape = {"height": values.shape[0], "width": values.shape[1], "count": 1}
    options |= shape | {"dtype": values.dtype, "compress": "deflate", "tiled": True}
    environment = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with warnings.catch_warnings(), environment, replacing(path) as temporary:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # expected without positions
        with rasterio.open(temporary, "w", "GTiff", **options) as file:
            if is_mask:
                file.write_colormap(1, dict(enumerate(COLOURS[:2])))  # TIFF: before the pixels
            file.write(values, 1)
            if scene.valid is not None:
                file.write_mask(scene.valid)
            file.set_band_description(1, meaning)
            file.update_tags(**scene.about, **tags)


def control_points(latitude, longitude):
    """Ground control points of a swath.

    Args:
        latitude: float32 (H, W) [degrees north], NaN where missing.
        longitude: float32 (H, W) [degrees east], NaN where missing.

    Returns:
        List of rasterio's GroundControlPoint, in the middle of every 64th pixel and of the last
        row and column. Longitudes continue beyond 180 across the date line.
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
    for key, text in scene.about.items():
        texts.add_itxt(key, text)
    with replacing(folder / f"{scene.name}.png") as temporary:
        image.save(temporary, optimize=True, pnginfo=texts)


WRITERS = {"netcdf": write_netcdf, "geotiff": write_geotiff, "png": write_png}


# --- the command ----------------------------------------------------------------------------


def export(arguments, command):
    """Export the masks of a run."""
    run, config = read_run(arguments.run), load_config(arguments.run / "config.yaml")
    masks = find_masks(arguments.run, arguments.scene)
    check_geodetic(arguments.geodetic, masks)
    about_run = describe_run(run, config, command)
    try:
        scenes = {path.name: path for path in find_scenes(arguments.data or config.inference_dir)}
    except FileNotFoundError:
        if arguments.data:
            raise
        log.warning(
            "No scene files in %s: positions without --geodetic are unknown, and so are pixels "
            "without data in masks of an earlier version. Give the folder of the scenes with "
            "--data.",
            config.inference_dir,
        )
        scenes = {}
    folder, positioned = arguments.output or arguments.run / "export", 0
    if not arguments.output:
        check_own(folder)
    for path in progress(masks, "Exporting", len(masks)):
        scene = read_masked_scene(path, scenes, arguments.geodetic, about_run)
        WRITERS[arguments.format](scene if arguments.keep_mask else scene.filled(), folder)
        positioned += bool(scene.positions)
    log.info(
        "Scenes exported: %d, of which %d with positions. Files: %s", len(masks), positioned, folder
    )


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add_mask_arguments(add)
    add("--format", choices=WRITERS, required=True)
    add("-o", "--output", type=Path, help="folder for the files (default: RUN_DIR/export)")
    add(
        "--keep-mask", action="store_true",
        help="keep mask, probability and uncertainty where there are no data, without fill value",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    log_to_screen(arguments.verbose)
    command = shlex.join(["export_masks.py", *(argv or sys.argv[1:])])
    return exit_status(lambda: export(arguments, command), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
