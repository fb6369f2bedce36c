"""Write a scene as a file in the published format."""

import h5py
import numpy as np

from harness.files import replacing


def as_stored(arrays, dtype, byteorder):
    """Convert arrays by dataset name: `refs` and `bts` to a dtype, all to an order of bytes.

    Args:
        arrays: Arrays by dataset name.
        dtype: "published" (as they are), "float32" or "float64".
        byteorder: "little" or "big".
    """
    stored = {}
    for name, array in arrays.items():
        kept = dtype == "published" or name not in ("refs", "bts")
        wanted = np.dtype(array.dtype if kept else dtype).newbyteorder(byteorder)
        stored[name] = array.astype(wanted, copy=False)
    return stored


def flag_meanings():
    """What the codes of a dataset mean, by its name: a word for each code from 0, as in CF."""
    from tools.lib.scenes.clouds import REGIME_CODES
    from tools.lib.scenes.surface import SURFACES

    words = {"surface": SURFACES, "cloud_regime": REGIME_CODES}
    return {name: " ".join(w.replace(" ", "_") for w in codes) for name, codes in words.items()}


def write_scene(path, arrays, chunks=None, compression=None, shuffle=False):
    """Write a scene file, whose attribute `synthetic` says what it is.

    An existing file is replaced only when the new one is complete.

    Args:
        path: The file.
        arrays: Arrays by dataset name.
        chunks: None for contiguous, "auto" for h5py's choice, or (rows, columns, channels), limited
            to the size of each dataset. Compression and shuffle need chunks: None becomes "auto".
        compression: None, "gzip" or "lzf".
        shuffle: Whether to group bytes of equal significance before compression.
    """
    if chunks is None and (compression or shuffle):
        chunks = "auto"
    meanings = flag_meanings() if {"surface", "cloud_regime"} & set(arrays) else {}
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["synthetic"] = True
        for name, array in arrays.items():
            fitted = chunks and (chunks == "auto" or tuple(map(min, chunks, array.shape)))
            options = {"chunks": fitted, "compression": compression, "shuffle": shuffle}
            # Without timestamps, the same scene gives the same bytes.
            dataset = file.create_dataset(name, data=array, track_times=False, **options)
            if name in meanings:
                dataset.attrs["flag_meanings"] = meanings[name]
