"""A checksum of a tensor's bits, to tell whether processes hold the same."""

from collections.abc import Iterable

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum up bits read as integers, each row and each column with a weight of its own.

    A changed bit changes it, and so do exchanged rows or columns (singular vectors in another
    order), which a plain sum would not see. It costs two passes over the memory and no copy; sums
    wrap around, which is exact whatever the order of summation.

    Args:
        tensors: of any shape and dtype, with the same shapes wherever it is compared.
        device: where the result is.

    Returns:
        int64 scalar.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, tensor in enumerate(tensors, start=1):
        total += (2 * number + 1) * _checksum(tensor).to(device)
    return total


def _checksum(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    tensor = tensor.detach()
    if tensor.element_size() > max(_INTEGERS):  # complex128
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    rows = bits.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    # Sums of int32 in int32: in int64 they would take ten times as long.
    dtype = torch.promote_types(bits.dtype, torch.int32)
    # Of weights odd and even no two are equal: a bit that changes both sums never cancels.
    return _weighted(rows.sum(1, dtype=dtype), 1) + _weighted(rows.sum(0, dtype=dtype), 2)


def _weighted(sums: Tensor, factor: int) -> Tensor:
    """Add numbers up, each with another weight: the factor times an odd number."""
    place = torch.arange(1, len(sums) + 1, device=sums.device, dtype=torch.int64)
    return (sums * (place * 2_654_435_762 + 1) * factor).sum()
