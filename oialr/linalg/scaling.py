"""Scaling of matrices by powers of two, which changes no digit, into the range of safe arithmetic.

What follows a factorization squares entries (Gram matrices, norms) and divides by singular values:
of entries near the ends of a dtype's range the results would be 0, infinity or NaN.
"""

import math

import torch
from torch import Tensor

_SAFE_EXPONENT = 32
"""Largest entries in [2^-32, 2^32] are left alone: so much float32 can square and sum up."""


def scaled(matrix: Tensor) -> tuple[Tensor, int]:
    """Scale so that the largest entry is in [1/2, 1), if it is very large or very small.

    Args:
        matrix: of any shape, finite, float32 or float64.

    Returns:
        The matrix times 2^-e, and e; the matrix itself and 0 where there is no need.
    """
    largest = float(matrix.abs().amax()) if matrix.numel() else 0.0
    exponent = math.frexp(largest)[1]
    if not math.isfinite(largest) or abs(exponent) <= _SAFE_EXPONENT:
        return matrix, 0
    return times_power_of_two(matrix, -exponent), exponent


def times_power_of_two(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply by 2^exponent, in two steps: the power alone may be beyond the dtype's range."""
    if not exponent:
        return tensor
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, whatever the range of the entries."""
    safe, exponent = scaled(tensor)
    return math.ldexp(float(torch.linalg.vector_norm(safe)), exponent)
