"""Proof that all processes hold the same bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from oialr.placement.processes import Processes


def compare(
    checksums: Tensor, processes: Processes, *, flags: Sequence[Tensor] = ()
) -> tuple[list[int], list[list[int]]]:
    """Compare numbers over all processes, in one exchange. A collective call.

    Args:
        checksums: int64 (n,), on the device.
        processes: the group.
        flags: integers or booleans (n,) each, of which the largest over all processes is wanted.

    Returns:
        The places at which the processes have different checksums, and the largest flags; the
        same on all processes.
    """
    # The complement reverses the order, and its largest is that of the smallest checksum.
    rows = torch.stack([checksums, ~checksums, *(flag.to(checksums) for flag in flags)])
    largest, smallest, *flagged = processes.maximum(rows).tolist()
    places = range(len(checksums))
    return [i for i in places if largest[i] != ~smallest[i]], flagged
