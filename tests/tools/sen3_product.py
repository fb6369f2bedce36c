"""SLSTR Level-1 RBT products for tests, written with the NetCDF library as real ones are.

    python tests/sen3_product.py FOLDER '{"height": 60, "width": 75, "zenith": 40}'

makes FOLDER/<name>.SEN3 and FOLDER/<name>.npz, which holds what its pixels really are. A program of
its own: netCDF4 brings a second HDF5 library, which should stay out of the process of the tests.

Files, variables, flags and attributes are those that the Sentinel-3 SLSTR Product Data Format
Specification names and that readers of real products rely on (satpy, ESA's SNAP): image grids of
500 m (`an`) and 1 km (`in`), tie points every 16 km across the track and every 1 km along it, whose
x falls from column to column; four detectors to a channel; packed integers.
"""

import json
import sys
from pathlib import Path

import netCDF4
import numpy as np

NAME = "_SL_1_RBT____20191001T113221_20191001T113521_20191002T153211_0179_050_023_1980_LN2_O_NT_003"
EARTH = 6371e3  # [m]
SUN = (1837.0, 1526.0, 956.0, 366.0, 248.0, 78.0)  # S1 to S6 [mW m-2 nm-1]
RADIANCE_SCALE = (0.024, 0.02, 0.016, 0.004, 0.004, 0.001)
TIE_STEP, TIE_MARGIN = 16e3, 3  # [m], columns beyond the swath
N_DETECTORS = 4
CONFIDENCE = (
    "coastline ocean tidal land inland_water unfilled spare spare cosmetic duplicate day twilight "
    "sun_glint snow summary_cloud summary_pointing"
)
CLOUD = (
    "visible 1.37_threshold 1.6_small_histogram 1.6_large_histogram 2.25_small_histogram "
    "2.25_large_histogram 11_spatial_coherence gross_cloud thin_cirrus medium_high fog_low_stratus "
    "11_12_view_difference 3.7_11_view_difference thermal_histogram spare spare"
)
BAYES = "single_low single_moderate dual_low dual_moderate spare spare spare spare"


def cosine_of_zenith(x, y, zenith):
    """Of a sun that is `zenith` degrees from overhead at x = y = 0, towards x."""
    lon, lat = x / EARTH, y / EARTH
    tilt = np.radians(zenith)
    return np.cos(lat) * (np.cos(lon) * np.cos(tilt) + np.sin(lon) * np.sin(tilt))


def create(folder, name, shape, resolution, **attributes):
    """Open a NetCDF file with the dimensions and global attributes that all have."""
    file = netCDF4.Dataset(folder / name, "w", format="NETCDF4")
    for dimension, size in zip(("rows", "columns"), shape, strict=True):
        file.createDimension(dimension, size)
    file.createDimension("orphan_pixels", 4)
    file.setncatts(
        {
            "netCDF_version": "4.2",
            "product_name": folder.name,
            "title": f"SLSTR Level 1, {name}",
            "institution": "LN2",
            "source": "tests/sen3_product.py",
            "start_time": "2019-10-01T11:32:21.000000Z",
            "stop_time": "2019-10-01T11:35:21.000000Z",
            "resolution": resolution,
            **attributes,
        }
    )
    return file


def add(file, name, values, dtype, fill=None, dimensions=("rows", "columns"), **attributes):
    """Write a variable packed; NaN becomes the fill value. Return what it unpacks to."""
    scale, offset = attributes.get("scale_factor", 1), attributes.get("add_offset", 0)
    variable = file.createVariable(name, dtype, dimensions, fill_value=fill, zlib=True, complevel=1)
    variable.setncatts(attributes)
    variable.set_auto_maskandscale(False)
    values = np.asarray(values, float)
    packed = (values - offset) / scale
    if np.dtype(dtype).kind in "iu":
        packed = np.round(packed)
    present = np.isfinite(values)
    packed = np.where(present, packed, 0).astype(dtype)
    variable[...] = packed if fill is None else np.where(present, packed, np.array(fill, dtype))
    return np.where(present, packed * scale + offset, np.nan)


def add_flags(file, name, bits, dtype, meanings):
    """Write a variable of bits; return its value."""
    variable = file.createVariable(name, dtype, ("rows", "columns"), zlib=True, complevel=1)
    n_flags = len(meanings.split())
    variable.flag_masks = (1 << np.arange(n_flags)).astype(dtype)
    variable.flag_meanings = meanings
    variable[...] = sum(
        bits.get(meaning, 0) * np.array(1 << i, dtype) for i, meaning in enumerate(meanings.split())
    ) + np.zeros(variable.shape, dtype)


def blobs(rng, shape, scale):
    """A smooth field from -1 to 1, with structures of `scale` pixels."""
    rows, cols = (np.arange(n) / scale for n in shape)
    phases = rng.uniform(0, 6, 3)
    return np.sin(np.add.outer(rows + phases[0], 0.6 * cols)) * np.cos(
        np.add.outer(phases[1] - 0.4 * rows, cols)
    )


def write_view(folder, rng, view, height, width, zenith, bayes, tie_points_missing):
    """Write the files of a view; return what its pixels are."""
    v, fine, coarse = view[0], (2 * height, 2 * width), (height, width)
    offset = width  # column of the track on the 500 m grid
    attributes = {"track_offset": np.int16(offset), "start_offset": np.int16(0)}
    on_fine = {**attributes, "resolution": "[ 500 500 ]"}
    on_coarse = {"track_offset": np.int16(offset // 2), "start_offset": np.int16(0)}
    on_coarse["resolution"] = "[ 1000 1000 ]"
    metres = {"scale_factor": 0.001, "units": "m"}
    missing = -(2**31)

    axis_x = (offset - 0.5 - np.arange(2 * width)) * 500.0
    axis_y = (np.arange(2 * height) + 0.5 - height) * 500.0
    x, y = np.meshgrid(axis_x, axis_y)
    cosine = cosine_of_zenith(x, y, zenith)
    for suffix, fields, about in (
        ("a", (x, y), on_fine),
        ("i", [f.reshape(height, 2, width, 2).mean(axis=(1, 3)) for f in (x, y)], on_coarse),
    ):
        with create(folder, f"cartesian_{suffix}{v}.nc", fields[0].shape, **about) as file:
            for name, field in zip("xy", fields, strict=True):
                add(file, f"{name}_{suffix}{v}", field, "i4", missing, **metres)
        latitude, longitude = 50 + fields[1] / 111e3, -1 - fields[0] / 71e3
        latitude[0, 0] = np.nan
        with create(folder, f"geodetic_{suffix}{v}.nc", latitude.shape, **about) as file:
            kept = [
                add(file, f"{name}_{suffix}{v}", degrees, "i4", missing, scale_factor=1e-6)
                for name, degrees in (("latitude", latitude), ("longitude", longitude))
            ]
    truth = {"cosine": cosine, "latitude": kept[0], "longitude": kept[1]}

    # A row of tie points for each 1 km, one more at each end.
    n_tie = int(np.ceil(width * 1e3 / TIE_STEP)) + 2 * TIE_MARGIN
    tie_x, tie_y = np.meshgrid(
        (n_tie / 2 - np.arange(n_tie)) * TIE_STEP, (np.arange(height + 2) - height / 2) * 1e3
    )
    about = {"track_offset": np.int16(n_tie // 2), "start_offset": np.int16(0)}
    about["resolution"] = "[ 16000 1000 ]"
    if view == "nadir":  # one grid for both views
        with create(folder, "cartesian_tx.nc", tie_x.shape, **about) as file:
            add(file, "x_tx", tie_x, "i4", missing, **metres)
            add(file, "y_tx", tie_y, "i4", missing, **metres)
    else:
        with netCDF4.Dataset(folder / "cartesian_tx.nc") as file:
            tie_x, tie_y = file["x_tx"][:].data, file["y_tx"][:].data
    angle = np.degrees(np.arccos(cosine_of_zenith(tie_x, tie_y, zenith)))
    if tie_points_missing:  # outside the swath, as far as the last tie point within it
        angle[np.abs(tie_x) > width * 500] = np.nan
    with create(folder, f"geometry_t{v}.nc", angle.shape, **about) as file:
        for name, values in (("solar_zenith", angle), ("solar_azimuth", angle * 0 + 130)):
            add(file, f"{name}_t{v}", values, "f8", 9.969209968386869e36, units="degrees")

    # Beside the swath lie unfilled pixels; some within it are missing too.
    unfilled = np.zeros(coarse, bool)
    unfilled[:, : width // 12] = unfilled[:, -(width // 15) :] = True
    beside = unfilled.repeat(2, axis=0).repeat(2, axis=1)
    detector = (np.add.outer(3 * np.arange(2 * height), np.arange(2 * width) // 3)) % N_DETECTORS
    detector = np.where(beside, np.nan, detector)
    detector[rng.random(fine) < 0.002] = np.nan  # cosmetic fill: a radiance, no detector
    with create(folder, f"indices_a{v}.nc", fine, **on_fine) as file:
        add(file, f"detector_a{v}", detector, "u1", 255)
    with create(folder, f"indices_i{v}.nc", coarse, **on_coarse) as file:
        add(file, f"detector_i{v}", np.add.outer(np.arange(height), np.zeros(width)) % 2, "u1", 255)
    truth["detector"] = detector

    bright = 0.3 + 0.33 * blobs(rng, fine, 15)  # below 0 where it is dark, as offsets do
    irradiances, radiances = [], []
    with netCDF4.Dataset(folder / "viscal.nc", "a") as viscal:
        for i, (sun, scale) in enumerate(zip(SUN, RADIANCE_SCALE, strict=True), 1):
            irradiance = np.float32(sun * (1 + 0.02 * rng.standard_normal(N_DETECTORS)))
            with create(folder, f"S{i}_quality_a{v}.nc", fine, **on_fine) as file:
                file.createDimension("detectors", N_DETECTORS)
                name = f"S{i}_solar_irradiance_a{v}"
                add(file, name, irradiance, "f4", -999.0, ("detectors",), units="mW.m-2.nm-1")
            viscal[f"S{i}_solar_irradiances"][:, "no".index(v)] = irradiance
            irradiances.append([*irradiance.tolist(), irradiance.astype(float).mean()])
            by_pixel = np.array(irradiances[-1])[
                np.where(np.isfinite(detector), detector, -1).astype(int)
            ]
            light = bright * (1 - 0.1 * i) * by_pixel * np.maximum(cosine, 0) / np.pi
            light += scale * rng.integers(-3, 4, fine)  # noise
            light[beside | (rng.random(fine) < 0.02)] = np.nan
            light[4:8, width : width + 4] = np.nan  # whole 1 km pixels
            if cosine.max() < 0:
                light[:] = np.nan
            with create(folder, f"S{i}_radiance_a{v}.nc", fine, **on_fine) as file:
                name = f"S{i}_radiance_a{v}"
                packing = {"scale_factor": scale, "add_offset": 0.0, "units": "mW.m-2.sr-1.nm-1"}
                radiances.append(add(file, name, light, "i2", -32768, **packing))
                add(file, f"S{i}_exception_a{v}", 128 * np.isnan(light), "u1")
                orphans = np.zeros((fine[0], 4))
                where = ("rows", "orphan_pixels")
                add(file, f"S{i}_radiance_orphan_a{v}", orphans, "i2", -32768, where, **packing)
    truth["radiance"] = np.stack(radiances, axis=-1)
    truth["irradiance"] = irradiances  # of each channel: of each detector, and their mean

    field = blobs(rng, coarse, 8)
    temperatures = []
    for i in (7, 8, 9):
        kelvin = np.where(unfilled, np.nan, 285 - 0.5 * i - 25 * np.maximum(field, 0))
        kelvin[rng.random(coarse) < 0.01] = np.nan
        with create(folder, f"S{i}_BT_i{v}.nc", coarse, **on_coarse) as file:
            name = f"S{i}_BT_i{v}"
            packing = {"scale_factor": 0.01, "add_offset": 283.73, "units": "K"}
            temperatures.append(add(file, name, kelvin, "i2", -32768, **packing))
    truth["bts"] = np.stack(temperatures, axis=-1)

    by_day = cosine.reshape(height, 2, width, 2).mean(axis=(1, 3)) > 0
    clouds = {
        "single_low": (field > 0.2) & ~unfilled,
        "single_moderate": (field > 0.4) & ~unfilled,
        "dual_low": (field < -0.8) & ~unfilled,
        "spare": 0,
    }
    truth["bayes"] = clouds["single_low"] | clouds["single_moderate"] | clouds["dual_low"]
    truth["summary"] = (field > 0.1) & ~unfilled
    truth["unfilled"] = unfilled
    confidence = {
        "unfilled": unfilled,
        "ocean": ~unfilled,
        "day": by_day & ~unfilled,  # an unfilled pixel has no other flag
        "summary_cloud": truth["summary"],
    }
    with create(folder, f"flags_i{v}.nc", coarse, **on_coarse) as file:
        add_flags(file, f"confidence_i{v}", confidence, "u2", CONFIDENCE)
        add_flags(file, f"cloud_i{v}", {"gross_cloud": truth["summary"]}, "u2", CLOUD)
        if bayes:
            add_flags(file, f"bayes_i{v}", clouds, "u1", BAYES)
            likely = np.where(unfilled, np.nan, np.clip(field, 0, 1))
            packing = {"scale_factor": 0.0001}
            add(file, f"probability_cloud_single_i{v}", likely, "i2", -32768, **packing)
    return {f"{name}_{view}": values for name, values in truth.items()}


def build(
    folder, height=60, width=75, zenith=40.0, bayes=True, tie_points_missing=False,
    platform="S3A", views=("nadir", "oblique"),
):  # fmt: skip
    """Write a product.

    Args:
        folder: For the product and its truth.
        height: Rows of the 1 km grid.
        width: Columns of the 1 km grid, in the nadir view; the oblique one has 3 of 5 of them.
        zenith: Of the sun in the middle of the image [degrees].
        bayes: Whether there is a Bayesian mask.
        tie_points_missing: Whether those outside the swath are missing.
        platform: S3A, S3B or S3C.
        views: The views to write, nadir first.
    """
    product = Path(folder, f"{platform}{NAME}.SEN3")
    product.mkdir(parents=True)
    rng = np.random.default_rng(3)
    with netCDF4.Dataset(product / "viscal.nc", "w") as file:
        file.createDimension("detectors", N_DETECTORS)
        file.createDimension("views", 2)
        for i in range(1, 7):
            file.createVariable(f"S{i}_solar_irradiances", "f4", ("detectors", "views"))
    (product / "xfdumanifest.xml").write_text("<xfdu/>")
    truth = {}
    for view in views:
        columns = width if view == "nadir" else width * 3 // 5
        truth |= write_view(product, rng, view, height, columns, zenith, bayes, tie_points_missing)
    np.savez(Path(folder, f"{platform}{NAME}.npz"), **truth)


if __name__ == "__main__":
    build(sys.argv[1], **json.loads(sys.argv[2]))
