"""Keep decoded patches on a local disk, or in memory."""

import hashlib
import logging
import os
import secrets
from pathlib import Path

import numpy as np

from harness.files import open_own, owner_in

log = logging.getLogger(__name__)


def cached(read, cache_dir, key):
    """Give a function that reads patches a cache on a local disk.

    Each patch has a file with its channels, then its cloud. Files are written under a temporary
    name and renamed, so that they are complete or absent; a damaged one is written again. Scenes
    are recognised by path, size and modification time. Files of other users are not read.

    Args:
        read: Function of a path and of arrays for patches, such as `data_loader.read_patches`.
        cache_dir: Local directory, made if absent.
        key: Text with all else that the patches depend on: the size of scenes and patches.

    Returns:
        Function of the same arguments and result as `read`.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        own = owner_in(cache_dir)
    except OSError:  # a full or read-only disk, whose files may be good all the same
        own = os.geteuid()

    def read_cached(path, patches):
        try:
            stat = path.stat()
        except OSError:
            return read(path, patches)  # which raises a better error
        identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {key}"
        name = f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        files = {i: cache_dir / f"{name}-{i}.raw" for i in patches}
        absent = {i: patch for i, patch in patches.items() if not _load(files[i], patch, own)}
        out_of_range = read(path, absent) if absent else 0
        for i, patch in absent.items():
            _store(files[i], patch)
        return out_of_range

    return read_cached


def kept_in_memory(read):
    """Give a function that reads patches a memory: each patch is read once.

    Args:
        read: Function of a path and of arrays for patches, such as `data_loader.read_patches`.

    Returns:
        Function of the same arguments and result as `read`.
    """
    kept = {}  # (channels, cloud) by path and index of the patch

    def read_kept(path, patches):
        absent = {i: patch for i, patch in patches.items() if (path, i) not in kept}
        out_of_range = read(path, absent) if absent else 0
        if absent:
            # In arrays of many patches, for which Linux uses larger pages: copies are faster.
            stacks = [np.stack(arrays) for arrays in zip(*absent.values(), strict=True)]
            for i, *patch in zip(absent, *stacks, strict=True):
                kept[path, i] = patch
        for i in patches.keys() - absent.keys():
            for array, values in zip(patches[i], kept[path, i], strict=True):
                array[:] = values
        return out_of_range

    return read_kept


def _load(path, patch, own):
    """Fill the arrays of a patch from its cache file; return whether that worked."""
    try:
        with open_own(path, own) as file:
            if sum(file.readinto(part) for part in patch) != sum(part.nbytes for part in patch):
                raise EOFError("it ends early")
        return True
    except FileNotFoundError:
        return False
    except (EOFError, OSError) as error:
        log.warning("The cache file %s is damaged and is written again: %s", path, error)
        return False


def _store(path, patch):
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.part")  # nobody can put a link there
    try:
        with temporary.open("xb") as file:
            file.writelines(patch)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.warning("Could not write the cache file %s: %s", path, error)
