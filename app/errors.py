"""The errors that end a program with an exit code of their own; the library's among them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from oialr.errors import (
    AgreedUserError,
    DifferingReplicasError,
    DivergedError,
    UserError,
    of_the_machine,
    out_of_memory,
    refused_path,
)

__all__ = [
    "AgreedStorageError",
    "AgreedUserError",
    "DifferingReplicasError",
    "DivergedError",
    "OutputError",
    "StorageError",
    "TakenOverError",
    "UserError",
    "of_the_machine",
    "one_line",
    "out_of_memory",
    "refused_path",
    "refusing_paths",
    "typed_line",
]


def one_line(error: BaseException) -> str:
    """Return what an error says, which may be many lines, as one; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def refusing_paths() -> Iterator[None]:
    """Take a path that the system refuses for the user's mistake, which it nearly always is.

    Raises:
        UserError: in place of such an error.
    """
    try:
        yield
    except OSError as error:
        if (line := refused_path(error)) is None:
            raise
        raise UserError(line) from None


def typed_line(error: BaseException) -> str:
    """Return an error's type and what it says as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class StorageError(Exception):
    """A file system failed or ran full, or somebody else changed what is ours: one line.

    Exit code 1, no traceback.
    """


class TakenOverError(StorageError):
    """Another program owns the folder of this one."""


class AgreedStorageError(StorageError):
    """One that all processes raise together, so that process 0 alone reports it."""


class OutputError(Exception):
    """stdout does not take what the program was asked to print."""

    def __init__(self, error: OSError) -> None:
        """Keep what the system said."""
        super().__init__(f"cannot write to stdout: {error.strerror or error}")
        self.nobody_reads = error.errno == errno.EPIPE
        """Whether the reader has enough, such as head: no fault."""
