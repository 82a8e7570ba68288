"""The errors that end a training."""

import errno
import os

LONGEST_PATH = 300
"""Characters of one that is shown as a whole."""
_REFUSALS = {
    errno.EACCES: "; have it opened to this user, or name another path",
    errno.EPERM: "; have it opened to this user, or name another path",
    errno.ELOOP: "; name a path without a link to itself",
    errno.ENAMETOOLONG: "; name a shorter path",
}
"""What the system says of a path, whatever is done with it, and the cure."""
_NO_MEMORY = ("can't allocate memory", "out of memory")
"""What RuntimeErrors say of it: on CPUs, and as Module.load_state_dict wraps what it meets."""


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


def refused_path(error: OSError) -> str | None:
    """Return in one line that the system refuses a path, which is the user's to choose or to open.

    Returns:
        None: the error is another one, or tells no path.
    """
    if error.errno not in _REFUSALS or not isinstance(error.filename, str | bytes):
        return None
    path = os.fsdecode(error.filename)
    shown = path if len(path) <= LONGEST_PATH else f"{path[:60]}..."
    shown = shown if shown.isprintable() else repr(shown)
    return f"{shown}: {error.strerror}{_REFUSALS[error.errno]}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of the device or of the host."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def of_the_machine(error: BaseException) -> bool:
    """Whether an error says that memory has run out or that a device has failed.

    torch raises most of its errors as RuntimeError, so where those are taken for somebody's mistake
    these are to be told apart.
    """
    import torch

    if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)
