"""Opening HDF5 files and datasets that nobody vouches for.

An HDF5 file can name other files: in links, in external storage and in virtual datasets. HDF5
follows them wherever they lead. Here links stay in the file, and numbers lie in the file itself or
in files of its own folder and the folders below. Who reads a dataset that `open_dataset` gave
opens no other file. The numbers themselves are not looked at: `hdf5_rows` reads them.
"""

import os
import stat

import h5py

MAX_LINKS = 16  # soft links on the way to one dataset; HDF5's own default
MAX_PLACES = 1000  # files or datasets that hold the numbers of one dataset
MAX_NAME = 250  # bytes of a file name in external storage; h5py cuts longer ones off


class ForbiddenSource(ValueError):
    """A file whose numbers would come from somewhere else; the message is complete."""


def open_file(path):
    """Open an HDF5 file for reading: a regular one, or a link to one.

    Raises:
        OSError: If it is absent, something else (a pipe would be waited for) or not HDF5.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")
    return h5py.File(path, "r")


def open_dataset(file, name):
    """Open a dataset by its name.

    Args:
        file: h5py.File of `open_file`.
        name: Path of the dataset in the file.

    Returns:
        h5py.Dataset, or None where the name leads to no dataset.

    Raises:
        ForbiddenSource: If a link leads out of the file, or numbers lie outside its folder.
    """
    dataset = _find(file, name.encode())
    if dataset is not None:
        folder = os.path.realpath(os.path.dirname(file.filename))
        _check_external(dataset, folder)
        if dataset.is_virtual:
            _check_sources(dataset, folder)
    return dataset


def _find(file, name):
    """Walk links one by one: h5py would follow an external one to answer any question."""
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
            found = "one link too many" if kind == h5py.h5l.TYPE_SOFT else "a link out of the file"
            raise ForbiddenSource(
                f"{file.filename}: '{os.fsdecode(name)}' should be a dataset of this file, found "
                f"{found}. Copy the dataset into the file or remove the file."
            )
    if not isinstance(here, h5py.h5d.DatasetID):
        return None
    return h5py.Dataset(here, readonly=True)  # which keeps its shape: HDF5 takes 8 us to tell it


def _check_external(dataset, folder):
    plan = dataset.id.get_create_plist()
    n_files = plan.get_external_count()
    _check(dataset, n_files <= MAX_PLACES, f"{n_files} files")
    for i in range(n_files):
        name = os.fsdecode(plan.get_external(i)[0])
        _check(dataset, len(os.fsencode(name)) <= MAX_NAME, f"a file name of over {MAX_NAME} bytes")
        _check_inside(dataset, os.path.join(os.getcwd(), name), folder)  # where HDF5 looks


def _check_sources(dataset, folder):
    plan, path = dataset.id.get_create_plist(), dataset.file.filename
    n_sources = plan.get_virtual_count()
    _check(dataset, n_sources <= MAX_PLACES, f"{n_sources} sources")
    sources = {
        (plan.get_virtual_filename(i), plan.get_virtual_dsetname(i)) for i in range(n_sources)
    }
    for file_name, dataset_name in sources:
        # HDF5 puts numbers in place of %b, and then has many files and datasets.
        _check(dataset, "%" not in file_name + dataset_name, f"the pattern {file_name!r}")
        if file_name == ".":
            _check_source(dataset, dataset.file, dataset_name, folder)
            continue
        # HDF5 looks here first. What can be opened here is not looked for elsewhere.
        source = os.path.join(os.path.dirname(path), file_name)
        _check_inside(dataset, source, folder)
        with open_file(source) as file:
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
        raise ForbiddenSource(
            f"{dataset.file.filename}: dataset '{dataset.name}' should have its numbers in this "
            f"file, or in regular files of its folder or below, found {found}. Copy the numbers "
            "into the file or remove the file."
        )
