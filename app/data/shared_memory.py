"""What it means when a process that loads data ends: mostly that shared memory is full."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import StorageError, one_line

FOLDER = "/dev/shm"


@contextmanager
def naming_shared_memory() -> Iterator[None]:
    """Name shared memory where a worker of a DataLoader died in the block, and the cure.

    A worker that writes beyond the end of shared memory is ended by the system (SIGBUS), and torch
    says little more than that it is gone.

    Raises:
        StorageError: so it was.
    """
    try:
        yield
    except RuntimeError as error:
        line = one_line(error)
        if "DataLoader worker" not in line and "shared memory" not in line:
            raise
        try:
            total, _, free = (size >> 20 for size in shutil.disk_usage(FOLDER))
            state = f"{FOLDER} has {free} of {total} MiB free"
        except OSError as missing:
            state = f"{FOLDER}: {missing.strerror}"
        raise StorageError(
            f"data.workers: a process that loads data has ended ({line[:200]}); its shared memory "
            f"{state}: make it larger, or set data.workers=0"
        ) from None
