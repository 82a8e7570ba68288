"""The errors that end a program with an exit code of their own; the library's among them."""

from oialr.errors import AgreedUserError, DifferingReplicasError, DivergedError, UserError

__all__ = [
    "AgreedStorageError",
    "AgreedUserError",
    "DifferingReplicasError",
    "DivergedError",
    "StorageError",
    "TakenOverError",
    "UserError",
    "one_line",
    "typed_line",
]


def one_line(error: BaseException) -> str:
    """Return what an error says, which may be many lines, as one; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


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
