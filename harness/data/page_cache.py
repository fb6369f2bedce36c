"""Evict files from this node's page cache, and ask the kernel whether they are out of it.

Needs no root: posix_fadvise evicts clean pages that no process has mapped, mincore counts what is
left. File systems in memory (tmpfs) keep all pages.
"""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from harness.files import open_regular

# File systems that keep data in caches of their own, which mincore does not see.
OWN_CACHE = ("afs", "beegfs", "fuse", "gpfs", "zfs")
MOUNTS = Path("/proc/self/mountinfo")

_libc = ctypes.CDLL(None, use_errno=True)


def evict(paths):
    """Evict files from the page cache.

    Args:
        paths: Paths; one that cannot be opened counts as unverified, reading it fails later.

    Returns:
        Dictionary with `bytes` of all files, `remaining_bytes` that are still in the page cache,
        and `unverified_bytes` of files for which that is unknown.
    """
    counts = {"bytes": 0, "remaining_bytes": 0, "unverified_bytes": 0}
    types = file_system_types()
    for path in paths:
        size = remaining = 0
        try:
            size = os.path.getsize(path)
            with open_regular(Path(path)) as file:
                os.fsync(file.fileno())  # pages that are not on the disk yet cannot be evicted
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                is_known = may_ask(file, types)
                remaining = resident_bytes(file) if is_known else 0
        except OSError:
            is_known = False
        counts["bytes"] += size
        counts["remaining_bytes"] += remaining
        counts["unverified_bytes"] += 0 if is_known else max(size, 1)
    return counts


def resident_bytes(file):
    """How many bytes of an open file are in the page cache, counted in whole pages."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return 0
    flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)  # bit 0: the page is in the cache
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapping:
        pages = np.frombuffer(mapping, np.uint8)
        address, length = ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(size)
        failed = _libc.mincore(address, length, ctypes.c_void_p(flags.ctypes.data))
        del pages  # a mapping that is in use cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
    return min(size, int((flags & 1).sum()) * mmap.PAGESIZE)


def may_ask(file, types):
    """Whether mincore tells the truth about an open file.

    Since Linux 5.2 it does so only for the owner of a file and for those who may write to it;
    to others it reports all pages as cached.
    """
    found = os.fstat(file.fileno())
    device = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    is_mine = os.geteuid() in (0, found.st_uid) or os.access(file.name, os.W_OK)
    return is_mine and not types.get(device, "").startswith(OWN_CACHE)


def file_system_types():
    """The types of the mounted file systems: {'major:minor' of the device: 'ext4' and so on}."""
    types = {}
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, system = line.partition(" - ")
        types[mount.split()[2]] = system.split()[0]
    return types
