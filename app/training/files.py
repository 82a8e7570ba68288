"""Files and folders of checkpoints: written to the disk, linked, counted, removed."""

import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def link_or_write(earlier: Path | None, path: Path, content: dict[str, Any]) -> None:
    """Link a file to the same one of before; write it where that cannot be done."""
    if earlier:
        try:
            os.link(earlier, path)
        except OSError:  # a file system without links, or the earlier checkpoint was deleted
            if _are_one(earlier, path):  # NFS asked twice, and the second answer is "File exists"
                return
        else:
            return
    write(path, content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a new file, to the disk; where that is full, the file makes room again.

    A file that lies there makes way: written into, it would change wherever a link leads to it.
    """
    path.unlink(missing_ok=True)
    file = _File(path)
    try:
        with file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError):
        path.unlink(missing_ok=True)
        if file.error:
            raise OSError(file.error.errno, file.error.strerror, str(path)) from None
        raise


class _File(io.FileIO):
    """A file that remembers why it could not be written, of which torch.save says nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write all of a buffer."""
        view = memoryview(content).cast("B")
        try:
            written = 0
            while written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            self.error = error
            raise
        return written


def _are_one(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # one is not there
        return False


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder; of one that has several links once."""
    files = [path.stat() for path in folder.rglob("*.pt")]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


def remove_old(folder: Path) -> None:
    """Remove a checkpoint that a newer one has followed; one that stays is no reason to end."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", folder, error.strerror)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
