"""The errors that end a program with an exit code of their own."""


class UserError(Exception):
    """What the user did wrong, in one line: the culprit and the cure. Exit code 2, no traceback."""


class DivergedError(Exception):
    """A weight holds NaN or infinity: the training has diverged. Exit code 1."""


class DifferingReplicasError(Exception):
    """The processes no longer hold the same network. Exit code 1, on all processes alike."""


class AgreedUserError(UserError):
    """A user's mistake that all processes raise together, so that process 0 alone reports it."""


class StorageError(Exception):
    """A file system failed or ran full, or somebody else changed what is ours: one line.

    Exit code 1, no traceback.
    """


class TakenOverError(StorageError):
    """Another program owns the folder of this one."""


class AgreedStorageError(StorageError):
    """One that all processes raise together, so that process 0 alone reports it."""
