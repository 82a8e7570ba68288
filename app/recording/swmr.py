"""HDF5 files with a single writer and multiple readers (SWMR): made, opened, found damaged.

HDF5 checks nothing that was written unless it is told to. Files made here carry checksums over
their structure (the newest file format) and over all values (the fletcher32 filter of each
dataset), so that damage is an error of whoever reads it, never other values.
"""

import ctypes
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np

from app.errors import StorageError, UserError, one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError)
"""What h5py raises where a file is damaged, or is just being written to."""

_DRIVER = "sec2 with an end"
_SUPERBLOCK_3 = b"\x89HDF\r\n\x1a\n\x03"
_SUPERBLOCK_BYTES = 48
_NO_LOCKS = (37, 95, 524)
"""ENOLCK, EOPNOTSUPP and the kernel's ENOTSUPP: what flock says on file systems without locks."""
_without_locks: set[int] = set()
"""Devices of the file systems that were found to have no locks."""
_METADATA_ATTEMPTS = 20
"""Readings of an object of the file's structure whose checksum is wrong. HDF5 doubles the pause
between them, from 1 ns on: these take a millisecond, and its own 100 more time than there is."""
_READ_ATTEMPTS = 8
_CHUNK_CACHE = {"rdcc_nslots": 1, "rdcc_nbytes": 2**12}
"""Of each dataset of a file that is written: the chunk that rows are added to, and no other. HDF5
2.0 would keep 8 MiB of written chunks, and 64 KiB to find them in, for each of thousands of
datasets. What is larger than the cache is written at once; readers have HDF5's own."""
_FIRST_PAUSE = 0.002
"""Seconds before values that could not be read are read again, doubled each time: half a second."""


class UnreadableFileError(UserError):
    """An HDF5 file is damaged, or is none."""

    def __init__(self, path: Path, reason: str) -> None:
        """Say what HDF5 says, and the cure."""
        super().__init__(f"{path}: not a readable HDF5 file ({reason}); restore it from a copy")
        self.path, self.reason = path, reason


def open_swmr(path: Path) -> h5py.File:
    """Open a file whose writer goes on, has ended or was killed.

    Raises:
        UnreadableFileError: it is no HDF5 file, or damaged.
    """

    def open_file(locking: str | bool) -> h5py.File:
        return h5py.File(path, "r", swmr=True, driver=_DRIVER, locking=locking)

    try:
        if _is_truncated(path):
            raise OSError("truncated")
        return patiently(lambda: _with_or_without_locks(path, open_file))
    except READ_ERRORS as error:
        raise UnreadableFileError(path, one_line(error)) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file of what cannot be read in the block.

    Raises:
        UnreadableFileError: h5py failed.
    """
    try:
        yield
    except READ_ERRORS as error:
        raise UnreadableFileError(path, one_line(error)) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file and the cause of what cannot be written in the block.

    Raises:
        StorageError: the disk is full, or h5py failed otherwise.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"run.dir: cannot write {path}: {_cause(error)}; once that is mended, go on by --resume"
        ) from None


def patiently(read: Callable[[], Result]) -> Result:
    """Read something that may be damaged, or that may just be written to: not only once.

    A reader beside a writer meets chunks of which half is written: their checksums are wrong for a
    moment.

    Args:
        read: called until it raises none of READ_ERRORS; should refresh what it reads.
    """
    pause = _FIRST_PAUSE
    for _ in range(_READ_ATTEMPTS - 1):
        try:
            return read()
        except READ_ERRORS:
            time.sleep(pause)
            pause *= 2
    return read()


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File]:
    """A new file that takes the path's place at the end of the block, complete and in SWMR mode.

    If anything fails, what was there before stays, and nothing else.
    """
    partial = path.with_name(path.name + ".partial")

    def create(locking: str | bool) -> h5py.File:
        return h5py.File(partial, "w", libver="latest", locking=locking, **_CHUNK_CACHE)

    file = _with_or_without_locks(path, create)
    try:
        yield file
        file.swmr_mode = True
        sync(file)
        os.replace(partial, path)
    except BaseException:
        abandon(file)
        partial.unlink(missing_ok=True)
        raise


def create_dataset(
    parent: h5py.Group,
    name: str,
    *,
    rows: int,
    width: tuple[int, ...],
    dtype: np.dtype,
    chunk_rows: int,
) -> h5py.Dataset:
    """Create a dataset of rows that may become more, each of a shape, with checksums."""
    return parent.create_dataset(
        name,
        shape=(rows, *width),
        maxshape=(None, *width),
        chunks=(chunk_rows, *width),
        dtype=dtype,
        fletcher32=True,
    )


def is_same_file(file: h5py.File, path: Path) -> bool:
    """Whether a path leads to an open file."""
    # The open file keeps its inode from being used anew: equal numbers are the same file.
    try:
        return os.path.samestat(os.fstat(file.id.get_vfd_handle()), path.stat())
    except OSError as error:
        # A file server says ESTALE of what another node has removed.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            return False
        raise


def sync(file: h5py.File) -> None:
    """Bring everything to the disk."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())


def abandon(file: h5py.File) -> None:
    """Close a file that cannot be written any more, and leave what is on the disk as it is.

    HDF5 would try again at every turn, and at last at the end of the process, where it crashes.
    What it has left to write goes into memory that nobody sees.
    """
    if hasattr(os, "memfd_create"):  # on Linux
        handle = file.id.get_vfd_handle()
        memory = os.memfd_create("abandoned")
        try:
            os.ftruncate(memory, os.fstat(handle).st_size)
            os.dup2(memory, handle, inheritable=False)
        finally:
            os.close(memory)
    with suppress(OSError, RuntimeError):  # what it was at when it failed it may not take up again
        file.close()


def close(file: h5py.File, path: Path) -> None:
    """Write what is left and close the file.

    Raises:
        StorageError: it cannot be written, which may show at the very last of it; it is closed.
    """
    try:
        with writing(path):
            file.flush()
            # HDF5 closes by writing the superblock, and crashes at the end of the process where it
            # cannot: whether it can is tried before, with the bytes that are there.
            handle = file.id.get_vfd_handle()
            os.pwrite(handle, os.pread(handle, _SUPERBLOCK_BYTES, 0), 0)
    except StorageError:
        abandon(file)
        raise
    with writing(path):
        file.close()


def _cause(error: Exception) -> str:
    """Return what the system said, which stands within a long message of HDF5's."""
    number = re.search(r"errno = (\d+)", str(error))
    if number:
        return os.strerror(int(number[1]))
    return (
        os.strerror(error.errno) if isinstance(error, OSError) and error.errno else one_line(error)
    )


def _set_access(access: h5py.h5p.PropFAID) -> None:
    """Set up h5py's usual driver, with an end to HDF5's patience.

    h5py has no name for this function of the C library, which is found through a module of h5py
    that is linked to it; where the library hides its names, HDF5's own patience stays.
    """
    access.set_fapl_sec2()
    library = ctypes.CDLL(h5py.h5p.__file__)
    set_attempts = getattr(library, "H5Pset_metadata_read_attempts", None)
    if set_attempts is not None:
        set_attempts.argtypes = (ctypes.c_int64, ctypes.c_uint)
        set_attempts(access.id, _METADATA_ATTEMPTS)


h5py.register_driver(_DRIVER, _set_access)


def _with_or_without_locks(path: Path, open_file: Callable[[str | bool], h5py.File]) -> h5py.File:
    """Open a file with a lock on it, without one where the file system has none.

    Args:
        path: for the warning.
        open_file: given h5py's ``locking``, which by "best-effort" forgives ENOSYS alone.
    """
    device = path.parent.stat().st_dev
    if device in _without_locks:
        # Not tried again: HDF5 wants all openings of a file in a process to be alike.
        return open_file(False)
    try:
        return open_file("best-effort")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        file = open_file(False)
        _without_locks.add(device)
        logger.warning(
            "%s: its file system has no locks (errno %d): HDF5 files there are used without, as "
            "with HDF5_USE_FILE_LOCKING=FALSE",
            path.parent,
            error.errno,
        )
        return file


def _is_truncated(path: Path) -> bool:
    """Whether a file ends before the end that its superblock gives.

    In SWMR mode HDF5 waits for the missing part, in fact for ever. Version 3 of the superblock
    (HDF5 file format specification, section II.A) has 48 bytes, the end of file in bytes 28 to 35.
    HDF5 writes it after what lies before that end.
    """
    with path.open("rb") as file:
        superblock = file.read(_SUPERBLOCK_BYTES)
        size = os.fstat(file.fileno()).st_size
    end = int.from_bytes(superblock[28:36], "little")
    return superblock.startswith(_SUPERBLOCK_3) and (
        len(superblock) < _SUPERBLOCK_BYTES or end > size
    )
