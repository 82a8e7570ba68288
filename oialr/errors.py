"""The errors that end a training."""


class UserError(Exception):
    """What the user did wrong, in one line: the culprit and the cure. Exit code 2, no traceback."""


class AgreedUserError(UserError):
    """A user's mistake that all processes raise together, so that process 0 alone reports it."""


class DivergedError(Exception):
    """A weight holds NaN or infinity: the training has diverged. Exit code 1."""


class DifferingReplicasError(Exception):
    """The processes no longer hold the same network. Exit code 1, on all processes alike."""


class ExportError(Exception):
    """A network cannot be written in a format, or what was written differs. No file is left."""
