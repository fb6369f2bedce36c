"""Open HDF5 files and their datasets of numbers, with one kind of clear error for all faults."""

import contextlib
import itertools
import math
import os

import h5py
import numpy as np

from harness.data.hdf5_links import open_dataset
from harness.data.hdf5_rows import MissingFilter, check_storage, read_all, storage
from harness.errors import UserError
from harness.files import check_regular

MAX_NUMBERS = 200_000_000  # of one dataset; a scene's reflectances on the 500 m grid are 43 million
MAX_TEXTS, MAX_LENGTH = 1_000_000, 64  # of one dataset, and characters of each
MAX_TEXT_BYTES = 1 << 28  # read at once
LOCKED_ADVICE = (
    "Another program writes to it. If none does, its file system has no locks: set the environment "
    "variable HDF5_USE_FILE_LOCKING to FALSE."
)
FILTER_ADVICE = (
    "Install it: pip install hdf5plugin; or set the environment variable HDF5_PLUGIN_PATH to the "
    "folder that has it."
)


@contextlib.contextmanager
def open_hdf5(path, name=None, advice="Make or copy it again.", error_class=UserError):
    """Open an HDF5 file for reading; whatever is wrong with it becomes an error for the user.

    Args:
        path: HDF5 or NetCDF-4 file.
        name: Name of the file in errors; its path by default.
        advice: What the user should do about an error.
        error_class: UserError or a subclass of it.

    Yields:
        h5py.File.

    Raises:
        UserError: If the file, or what is read from it inside the context, is damaged or not what
            it should be. The message is one line.
    """
    try:
        check_regular(path)
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    # h5py raises all of these for damaged files; a type that NumPy lacks is a TypeError.
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, FileNotFoundError) and not os.path.exists(path):
            reason, advice = "it does not exist", "Check the path."
        advice = LOCKED_ADVICE if "unable to lock file" in reason else advice
        advice = FILTER_ADVICE if isinstance(error, MissingFilter) else advice
        raise error_class(f"{name or path} cannot be used: {reason}. {advice}") from error


def open_numbers(file, name, shape=None, optional=False, most=MAX_NUMBERS):
    """Open a dataset of numbers after checking its headers; see `open_dataset` for its safety.

    Read it with `read_all` or in blocks of rows, which check its chunks first.

    Args:
        file: h5py.File of `open_hdf5`.
        name: Path of the dataset in the file.
        shape: Its shape, in which None stands for any length; None for any shape.
        optional: Whether to return None, and not to raise, if there is no such dataset.
        most: Numbers that it may hold, if `shape` does not say how many.

    Returns:
        h5py.Dataset.

    Raises:
        ValueError: If it is absent, of another shape or type, or too large.
        OSError: If it cannot be stored in the file as the file says.
    """
    dataset = open_dataset(file, name)
    if dataset is None:
        if optional:
            return None
        found = list(itertools.islice(file, 8))  # there may be millions
        raise ValueError(f"it has no dataset '{name}', found {found or 'none'}")
    if dataset.dtype.kind not in "fiu" or dataset.id.get_type().get_size() > 8:
        found = str(dataset.dtype)[:99]
        raise ValueError(f"dataset '{name}' should hold numbers of at most 8 bytes, found {found}")
    if shape is not None and not shape_matches(shape, dataset.shape):
        expected = str(shape).replace("None", "any")
        raise ValueError(f"dataset '{name}' has shape {dataset.shape}, expected {expected}")
    if not dataset.size or dataset.size > most:
        raise ValueError(
            f"dataset '{name}' should hold 1 to {most} numbers, found shape {dataset.shape}"
        )
    check_storage(dataset)
    return dataset


def shape_matches(shape, found):
    """Whether a shape equals another one in which None stands for any length."""
    return (
        found is not None
        and len(shape) == len(found)
        and all(n in (None, m) for n, m in zip(shape, found, strict=True))
    )


def unpack(dataset):
    """Read a dataset packed by the NetCDF conventions: see `unpacked`."""
    return unpacked(dataset, read_all(dataset))


def read_numbers(dataset):
    """Read a dataset as the benchmark reads scenes: packed numbers as float64, others as stored."""
    return unpack(dataset) if is_packed(dataset) else read_all(dataset)


def is_packed(dataset):
    """Whether the attributes of a dataset give its stored numbers another meaning.

    Raises:
        ValueError: If they do so in a way that is not supported.
    """
    if not len(dataset.attrs):  # as in the published scenes
        return False
    if str(dataset.attrs.get("_Unsigned")).lower() == "true" and dataset.dtype.kind != "u":
        raise ValueError(f"'{dataset.name}' has the attribute _Unsigned; store it as unsigned type")
    return _scaling(dataset) != (1, 0) or not np.isnan(_missing(dataset)).all()


def unpacked(dataset, packed):
    """What the stored numbers of a dataset mean by the NetCDF conventions.

    Returns:
        float64, scaled by `scale_factor` and `add_offset`, NaN where missing.

    Raises:
        ValueError: If `scale_factor` or `add_offset` is not finite.
    """
    scale, offset = _scaling(dataset)
    values = packed.astype(np.float64)
    values *= scale
    values += offset
    values[is_fill(dataset, packed)] = np.nan
    return values


def is_fill(dataset, packed):
    """Where the stored numbers of a dataset equal its `_FillValue` or `missing_value`."""
    fill, missing = _missing(dataset)
    return (packed == fill) | (packed == missing)


def read_texts(dataset):
    """Read a dataset (N,) of `open_dataset` with short texts: list of N texts.

    Raises:
        ValueError: If it has another shape, too many or too long texts, or is compressed with texts
            of variable length: one that HDF5 decompresses may stand for any number of bytes.
        OSError: If the file is truncated or damaged.
    """
    kind = h5py.check_string_dtype(dataset.dtype)
    if len(dataset.shape) != 1 or dataset.size > MAX_TEXTS or (kind.length or 0) > MAX_LENGTH:
        raise ValueError(
            f"'{dataset.name}' should hold at most {MAX_TEXTS} texts of at most {MAX_LENGTH} "
            f"bytes, found shape {dataset.shape}, type {str(dataset.dtype)[:99]}"
        )
    check_storage(dataset)
    if kind.length:
        return np.char.decode(read_all(dataset), kind.encoding).tolist()
    if storage(dataset) not in ("contiguous", "compact", "chunked"):
        raise ValueError(
            f"'{dataset.name}' should hold texts of fixed length, or not be compressed, found "
            f"storage {storage(dataset)}"
        )
    # Each text may be as large as the file, which cannot hold it in fewer bytes.
    step, texts = max(MAX_TEXT_BYTES // os.stat(dataset.file.filename).st_size, 1), []
    for first in range(0, dataset.size, step):
        block = dataset.asstr()[first : first + step].tolist()
        if longest := max((text for text in block if len(text) > MAX_LENGTH), default="", key=len):
            raise ValueError(
                f"'{dataset.name}' should hold texts of at most {MAX_LENGTH} characters, found "
                f"{len(longest)}"
            )
        texts += block
    return texts


def read_attribute(owner, name, default=None, most=1):
    """Read an attribute of a file or dataset.

    Args:
        owner: h5py.File or h5py.Dataset.
        name: Name of the attribute.
        default: Returned if there is none; None if it is required.
        most: Number of values that it may have: a few bytes of the file may name one text often.

    Returns:
        Its value; an array of shape (n,) if `most` is not 1.

    Raises:
        ValueError: If it is required and absent, or has no value or too many.
    """
    if name not in owner.attrs:
        if default is None:
            raise ValueError(f"it has no attribute '{name}'")
        return default
    shape = owner.attrs.get_id(name).shape
    if not 0 < (n := 0 if shape is None else math.prod(shape)) <= most:
        expected = "1 value" if most == 1 else f"1 to {most} values"
        raise ValueError(f"'{owner.name}' should have {expected} in its {name}, found {n}")
    values = np.ravel(owner.attrs[name])
    return values[0] if most == 1 else values


def _scaling(dataset):
    scale, offset = _attribute(dataset, "scale_factor", 1), _attribute(dataset, "add_offset", 0)
    if not np.isfinite([scale, offset]).all():
        raise ValueError(
            f"'{dataset.name}' should have a finite scale_factor and add_offset, found {scale} "
            f"and {offset}"
        )
    return scale, offset


def _missing(dataset):
    return [_attribute(dataset, name, np.nan) for name in ("_FillValue", "missing_value")]


def _attribute(dataset, name, default):
    value = read_attribute(dataset, name, default)
    if np.asarray(value).dtype.kind not in "fiu":
        raise ValueError(
            f"'{dataset.name}' should have a number as {name}, found {str(value)[:99]}"
        )
    return value
