"""Economy SVD of one matrix, and what is read from its spectrum."""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """An economy SVD, W = U diag(s) Vh, with k = min(m, n).

    That of a stack of g matrices has a leading dimension g everywhere.
    """

    U: Tensor
    """Left singular vectors (m, k)."""
    s: Tensor
    """Singular values (k,), descending."""
    Vh: Tensor
    """Right singular vectors, transposed (k, n)."""


def economy_svd(matrix: Tensor) -> Factors:
    """Factorize a matrix, or each of a stack, in its own precision, at least float32.

    A factorization that does not converge is tried once more in float64.

    Args:
        matrix: (m, n) or (g, m, n), any real floating dtype, finite.

    Returns:
        Contiguous factors of the dtype of the computation: float32, or float64 for a float64
            matrix.
        Contiguity matters: another memory layout on another process would select another matrix
        product and so give other bits.

    Raises:
        torch.linalg.LinAlgError: not even float64 converges.
    """
    matrix = matrix.detach()
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    try:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Factors(*(factor.to(matrix.dtype).contiguous() for factor in (U, s, Vh)))


def numerical_rank(s: Tensor, shape: tuple[int, int]) -> int:
    """Count the singular values above rtol * s[0], rtol = max(m, n) * eps of the dtype.

    This is the tolerance of LAPACK's users (numpy.linalg.matrix_rank): below it a singular value
    and its vectors are rounding noise. A zero matrix has rank 0.

    Args:
        s: singular values (k,), descending.
        shape: (m, n) of the matrix they belong to.
    """
    rtol = max(shape) * torch.finfo(s.dtype).eps
    return int((s > rtol * s[0]).sum()) if s.numel() else 0


def effective_rank(s: Tensor) -> float:
    """Exponential of the entropy of the normalized spectrum (Roy and Vetterli, EUSIPCO 2007).

    Between 1 and k; NaN for a zero matrix.

    Args:
        s: singular values (k,).
    """
    p = s.double() / s.double().sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))
