"""Random fields: fractal noise, cells, and how they are stretched and refined.

Lengths are in km or in shares of a scene's height, which is 1200 km, so that a scene of 300 rows
shows the same structures as one of 1200.
"""

import numpy as np
from scipy import fft
from scipy.ndimage import distance_transform_edt, map_coordinates

SCENE_KM = 1200.0  # height of a scene: 1200 pixels of 1 km
COARSE_ROWS = 600  # large structures are drawn on fewer than twice so many rows, and refined
BAND_ROWS = 100  # rows that are computed at once where the arithmetic should stay in the cache


def coarse_step(shape, rows=COARSE_ROWS):
    """Pixels along a side of those of a coarser grid with `rows` to 2 * rows rows: a power of 2."""
    step = 1
    while shape[0] >= 2 * rows * step:
        step *= 2
    return step


def coarse_shape(shape):
    """The grid (rows, columns) on which large structures of a scene are drawn."""
    step = coarse_step(shape)
    return -(-shape[0] // step), -(-shape[1] // step)


def axes_km(shape):
    """Distances from the middle of a scene: rows (H, 1) and columns (1, W), float32 [km]."""
    pixel = SCENE_KM / shape[0]
    rows, cols = (pixel * (np.arange(n, dtype=np.float32) - (n - 1) / 2) for n in shape)
    return rows[:, None], cols[None]


def fractal_field(rng, shape, scale, slope):
    """Draw a Gaussian random field with a power-law spectrum.

    Args:
        rng: NumPy Generator.
        shape: (rows, columns).
        scale: Size of the largest structures [km].
        slope: The amplitude falls as wavenumber**-slope; smaller is rougher.

    Returns:
        float32, mean 0, standard deviation 1, continuous across opposite sides.
    """
    rows = (fft.fftfreq(shape[0]) * shape[0]).astype(np.float32)[:, None]  # cycles per height
    cols = (fft.rfftfreq(shape[1]) * shape[0]).astype(np.float32)
    wavenumber_squared = rows**2 + cols**2 + (SCENE_KM / scale) ** 2
    noise = rng.standard_normal(shape, dtype=np.float32)
    spectrum = fft.rfft2(noise) * wavenumber_squared ** np.float32(-slope / 2)
    spectrum[0, 0] = 0  # the mean
    field = fft.irfft2(spectrum, s=shape)
    return field / field.std()


def cell_field(rng, shape, spacing):
    """Distance from the middle of the nearest cell, in a pattern of cells of similar size.

    Args:
        rng: NumPy Generator.
        shape: (rows, columns).
        spacing: Distance of neighbouring cells [km]; at least three pixels are used.

    Returns:
        float32, mean 0, standard deviation 1: lowest in the middle of cells, highest between them.
    """
    step = max(3.0, spacing * shape[0] / SCENE_KM)
    nodes = np.mgrid[0 : shape[0] : step, 0 : shape[1] : step]
    nodes = nodes + rng.uniform(0, 0.85 * step, nodes.shape)  # jitter: no visible lattice
    rows, cols = (nodes[i].astype(int) % shape[i] for i in range(2))
    away = np.ones(shape, dtype=bool)
    away[rows, cols] = False
    distance = distance_transform_edt(away).astype(np.float32)
    return (distance - distance.mean()) / distance.std()


def sample(field, rows_km, cols_km):
    """Read a periodic field at other places: float32, of the shape of the places [km]."""
    pixel = SCENE_KM / field.shape[0]
    places = np.stack([rows_km, cols_km]) / np.float32(pixel)
    return map_coordinates(field, places, order=1, mode="grid-wrap")


def refine(field, shape):
    """Interpolate a coarse field linearly to the grid of a scene, doubling its rows and columns."""
    while field.shape[0] < shape[0]:
        field = double_rows(double_rows(field).T).T
    return field[: shape[0], : shape[1]]


def double_rows(field):
    """Interpolate a field linearly to twice as many rows."""
    padded = np.concatenate([field[:1], field, field[-1:]])
    fine = np.empty((2 * len(field), field.shape[1]), dtype=field.dtype)
    near = np.float32(0.75) * field
    fine[0::2] = near + np.float32(0.25) * padded[:-2]
    fine[1::2] = near + np.float32(0.25) * padded[2:]
    return fine


def bands(height):
    """Slices of rows that together cover a scene."""
    return [slice(start, start + BAND_ROWS) for start in range(0, height, BAND_ROWS)]


def rows_of(fields, rows):
    """Some rows of a NamedTuple of fields (H, W)."""
    return type(fields)(*(field[rows] for field in fields))
