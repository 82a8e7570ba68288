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
]


class StorageError(Exception):
    """A file system failed or ran full, or somebody else changed what is ours: one line.

    Exit code 1, no traceback.
    """


class TakenOverError(StorageError):
    """Another program owns the folder of this one."""


class AgreedStorageError(StorageError):
    """One that all processes raise together, so that process 0 alone reports it."""
