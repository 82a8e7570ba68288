"""HDF5 files with a single writer and multiple readers (SWMR): made, opened, found damaged."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from app.errors import UserError

_SUPERBLOCK_3 = b"\x89HDF\r\n\x1a\n\x03"


def open_swmr(path: Path) -> h5py.File:
    """Open a file whose writer goes on, has ended or was killed.

    Raises:
        UserError: it is no HDF5 file, or damaged.
    """
    try:
        if _is_truncated(path):
            raise OSError("truncated; restore it from a copy")
        return h5py.File(path, "r", swmr=True, locking="best-effort")
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file ({one_line(error)})") from None


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File]:
    """A new file that takes the path's place at the end of the block, complete and in SWMR mode.

    If anything fails, what was there before stays, and nothing else.
    """
    partial = path.with_name(path.name + ".partial")
    file = h5py.File(partial, "w", libver="latest", locking="best-effort")
    try:
        yield file
        file.swmr_mode = True
        sync(file)
        os.replace(partial, path)
    except BaseException:
        file.close()
        partial.unlink(missing_ok=True)
        raise


def sync(file: h5py.File) -> None:
    """Bring everything to the disk."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())


def one_line(error: Exception) -> str:
    """Return a message of HDF5, which has many lines, as one."""
    return " ".join(str(error).split())


def _is_truncated(path: Path) -> bool:
    """Whether a file ends before the end that its superblock gives.

    In SWMR mode HDF5 waits for the missing part, in fact for ever. Version 3 of the superblock
    (HDF5 file format specification, section II.A) has 48 bytes, the end of file in bytes 28 to 35.
    HDF5 writes it after what lies before that end.
    """
    with path.open("rb") as file:
        superblock = file.read(48)
        size = os.fstat(file.fileno()).st_size
    end = int.from_bytes(superblock[28:36], "little")
    return superblock.startswith(_SUPERBLOCK_3) and (len(superblock) < 48 or end > size)
