"""torch's deterministic algorithms, for the time of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from app.errors import AgreedUserError

_REFUSED = "does not have a deterministic implementation"


@contextmanager
def deterministic_algorithms(*, wanted: bool) -> Iterator[None]:
    """Let torch add in a fixed order on GPUs too, and leave all as it was afterwards.

    Args:
        wanted: whether; False changes nothing.

    Raises:
        AgreedUserError: an operator of the network has no such algorithm on this device, which all
            processes find alike.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads it when it starts, which is at the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if _REFUSED not in str(error):
            raise
        operator = str(error).split(_REFUSED)[0].strip()
        raise AgreedUserError(
            f"training.deterministic: {operator} of this network {_REFUSED} on this device: leave "
            f"it false, or replace that operator"
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
