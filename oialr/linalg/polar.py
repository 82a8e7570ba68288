"""The orthogonal polar factor B of a matrix, W = B H, two ways (arXiv 2401.08505, section 3).

With W = U diag(s) Vh the factor is B = U Vh, (m, n). Where singular values vanish, their vectors
are arbitrary, so that every function here restricts B to the r determined directions, those with
s > rtol * s[0], rtol = max(m, n) * eps of the matrix's dtype (numerical_rank in oialr.linalg.svd):
B = U[:, :r] Vh[:r] is then a partial isometry, B^T B an orthogonal projector of rank r.

What the methods give, and at which cost, k = min(m, n), l = max(m, n):

========  ==========================================  ===========================================
method    computed from                               multiply-adds
========  ==========================================  ===========================================
svd       economy SVD in the matrix's precision       that, and l k^2
eigh      eigendecomposition of the Gram matrix of    l k^2 and the decomposition in float64,
          the tall orientation in float64             k^3 and l k^2 in the matrix's precision
========  ==========================================  ===========================================

Both give B, the singular values and r. The error of B is that which rounding W to its dtype
makes already: eps * s[0] / s[r - 1] times a small constant, since the condition number of the polar
factor is 2 / (s[r - 2] + s[r - 1]) (Higham, Functions of Matrices, 2008, section 8.4).

B alone could be had by products of matrices (Newton-Schulz iterations), on a GPU in an eighth of
the time; but the spectrum is wanted with it, and takes as long as the eigenvectors (docs/gpu.md).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from oialr.linalg.scaling import scaled, times_power_of_two
from oialr.linalg.svd import economy_svd, numerical_rank

Method = Literal["svd", "eigh"]


class Polar(NamedTuple):
    """The polar factor of a matrix (m, n), k = min(m, n), and the spectrum it comes with."""

    factor: Tensor
    """B (m, n), a partial isometry of rank ``rank``."""
    s: Tensor
    """Singular values (k,) of W, descending."""
    rank: int
    """Number r of determined directions."""


def polar(
    matrix: Tensor, method: Method | None = None, *, shape: tuple[int, int] | None = None
) -> Polar:
    """Compute the polar factor, restricted to the determined directions.

    Args:
        matrix: (m, n), finite. Half precision is computed in float32.
        method: None: the fastest for its shape, dtype and device.
        shape: by which directions count as determined, such as that of U core Vh where the matrix
            is the core; None: the matrix's own.

    Returns:
        In float32, or float64 for a float64 matrix. A zero matrix has the factor 0 of rank 0.

    Raises:
        torch.linalg.LinAlgError: nothing converges, the SVD in all its ways neither.
        TypeError: the matrix is complex.
    """
    matrix = matrix.detach()
    if matrix.is_complex():
        raise TypeError(f"the polar factor of a complex matrix ({matrix.dtype}) is not measured")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    method = method or choose_method(_shape(matrix), matrix.dtype, matrix.device)
    matrix, exponent = scaled(matrix)  # the factor is that of the matrix itself
    factor, s, rank = _polar_in_range(matrix, method, shape or _shape(matrix))
    return Polar(factor, times_power_of_two(s, exponent), rank)


def choose_method(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Method:
    """Return the fastest method. A pure function.

    On CPUs the Gram matrix pays where the matrix is small or far from square: 0.23 s against 0.58 s
    for (768, 3072), 0.15 s against 0.13 s for (768, 768) (benchmarks/stability.py). On GPUs it pays
    always: all of ViT-B/16 in 0.45 s against 0.52 s (docs/gpu.md). A Gram matrix in float64
    resolves singular values down to 1e-8 s[0]: not enough for a float64 matrix.

    Args:
        shape: (m, n).
        dtype: float32 or float64.
        device: where the matrix lies.
    """
    if dtype == torch.float64:
        return "svd"
    if device.type != "cpu":
        return "eigh"
    k = min(shape)
    return "eigh" if k < 512 or max(shape) >= 1.25 * k else "svd"


def _polar_in_range(matrix: Tensor, method: Method, shape: tuple[int, int]) -> Polar:
    """Compute the polar factor of a matrix whose entries can be squared and divided by."""
    if method == "eigh":
        try:
            return _polar_by_eigh(matrix, shape)
        except torch.linalg.LinAlgError:
            pass  # the SVD has more drivers to try
    return _polar_by_svd(matrix, shape)


def _polar_by_svd(matrix: Tensor, shape: tuple[int, int]) -> Polar:
    U, s, Vh = economy_svd(matrix)
    r = numerical_rank(s, shape)
    return Polar(U[:, :r] @ Vh[:r], s, r)


def _polar_by_eigh(matrix: Tensor, shape: tuple[int, int]) -> Polar:
    """B = W V diag(1 / s) V^T, with the eigenvectors V of W^T W = V diag(s^2) V^T."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    # Squaring costs half of the digits of float64, and leaves those of float32.
    exact = tall.double()
    eigenvalues, V = torch.linalg.eigh(exact.T @ exact)
    s = eigenvalues.clamp_min(0).sqrt().flip(0)
    r = numerical_rank(s.to(matrix.dtype), shape)
    V = V.flip(1)[:, :r]
    inverse_root = (V / s[:r]) @ V.T
    # The large product in the matrix's precision; but on GPUs that may be TF32, which a measurement
    # beside the training cannot switch off.
    factor = exact @ inverse_root if matrix.is_cuda else tall @ inverse_root.to(matrix.dtype)
    B = factor if tall is matrix else factor.T
    return Polar(B.to(matrix.dtype).contiguous(), s.to(matrix.dtype), r)


def _shape(matrix: Tensor) -> tuple[int, int]:
    m, n = matrix.shape
    return m, n
