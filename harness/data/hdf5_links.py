"""Open a dataset of a HDF5 file without following the file to other places.

An HDF5 file can name other files: in links, in external storage and in virtual datasets. HDF5
follows them anywhere. Here links must stay inside the file, and the numbers must be stored in the
file itself or in files of its folder and the folders below, so that reading a dataset opened with
`open_dataset` reads no other file.
"""

import os

import h5py

from harness.files import check_regular

MAX_LINKS = 16  # soft links on the way to one dataset; HDF5's own default
MAX_PLACES = 1000  # files or datasets that hold the numbers of one dataset
MAX_NAME = 250  # bytes of a file name in external storage; h5py cuts off longer ones


def open_dataset(file, name):
    """Open a dataset by its name.

    Args:
        file: h5py.File.
        name: Path of the dataset in the file.

    Returns:
        h5py.Dataset, or None if the file has no such dataset.

    Raises:
        ValueError: If a link leads out of the file, or numbers are stored outside its folder.
    """
    dataset = _find(file, name.encode())
    if dataset is not None:
        folder = os.path.realpath(os.path.dirname(file.filename))
        _check_external(dataset, folder)
        if dataset.is_virtual:
            _check_sources(dataset, folder)
    return dataset


def _find(file, name):
    """Follow the links one by one: h5py would open the file that an external link names."""
    root = here = file["/"].id
    parts, n_soft_links = name.split(b"/"), 0
    while parts:
        part = parts.pop(0)
        if part in (b"", b"."):
            continue
        if not isinstance(here, h5py.h5g.GroupID) or not here.links.exists(part):
            return None
        kind = here.links.get_info(part).type
        if kind == h5py.h5l.TYPE_HARD:
            here = h5py.h5o.open(here, part)
        elif kind == h5py.h5l.TYPE_SOFT and n_soft_links < MAX_LINKS:
            n_soft_links += 1
            target = here.links.get_val(part)
            here = root if target.startswith(b"/") else here
            parts = target.split(b"/") + parts
        else:
            found = "too many links" if kind == h5py.h5l.TYPE_SOFT else "a link out of the file"
            raise ValueError(
                f"dataset '{os.fsdecode(name)}' should be stored in this file, found {found} "
                "(copy the dataset into the file)"
            )
    if not isinstance(here, h5py.h5d.DatasetID):
        return None
    return h5py.Dataset(here, readonly=True)  # which caches its shape: HDF5 takes 8 us to give it


def _check_external(dataset, folder):
    properties = dataset.id.get_create_plist()
    n_files = properties.get_external_count()
    _check(dataset, n_files <= MAX_PLACES, f"{n_files} files")
    for i in range(n_files):
        name = os.fsdecode(properties.get_external(i)[0])
        is_whole = len(os.fsencode(name)) <= MAX_NAME
        _check(dataset, is_whole, f"a file name of more than {MAX_NAME} bytes")
        _check_inside(dataset, os.path.join(os.getcwd(), name), folder)  # where HDF5 looks


def _check_sources(dataset, folder):
    properties, path = dataset.id.get_create_plist(), dataset.file.filename
    n_sources = properties.get_virtual_count()
    _check(dataset, n_sources <= MAX_PLACES, f"{n_sources} sources")
    sources = {
        (properties.get_virtual_filename(i), properties.get_virtual_dsetname(i))
        for i in range(n_sources)
    }
    for file_name, dataset_name in sources:
        # HDF5 replaces %b with numbers: one source becomes many files and datasets.
        _check(dataset, "%" not in file_name + dataset_name, f"the pattern {file_name!r}")
        if file_name == ".":
            _check_source(dataset, dataset.file, dataset_name, folder)
            continue
        # HDF5 looks here first, and nowhere else if the file can be opened.
        source = os.path.join(os.path.dirname(path), file_name)
        _check_inside(dataset, source, folder)
        check_regular(source)
        with h5py.File(source, "r") as file:
            _check_source(dataset, file, dataset_name, folder)


def _check_source(dataset, file, name, folder):
    source = _find(file, os.fsencode(name))
    _check(dataset, source is not None, f"no dataset {name!r} in {file.filename!r}")
    _check(dataset, not source.is_virtual, f"a virtual dataset {name!r} as its source")
    _check_external(source, folder)


def _check_inside(dataset, path, folder):
    inside = os.path.commonpath([os.path.realpath(path), folder]) == folder
    _check(dataset, inside and os.path.isfile(path), repr(path))


def _check(dataset, is_allowed, found):
    if not is_allowed:
        raise ValueError(
            f"dataset '{dataset.name}' should have its numbers in this file, or in regular files "
            f"of its folder or below, found {found} (copy the numbers into the file)"
        )
