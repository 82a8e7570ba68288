"""The orthogonal polar factor B of a matrix, W = B H, three ways (arXiv 2401.08505, section 3).

With W = U diag(s) Vh the factor is B = U Vh, (m, n). Where singular values vanish, their vectors
are arbitrary, so that every function here restricts B to the r determined directions, those with
s > rtol * s[0], rtol = max(m, n) * eps of the matrix's dtype (numerical_rank in app.linalg.svd):
B = U[:, :r] Vh[:r] is then a partial isometry, B^T B an orthogonal projector of rank r.

What the methods give, and at which cost, k = min(m, n), l = max(m, n):

========  ==========================================  ===========================================
method    computed from                               multiply-adds
========  ==========================================  ===========================================
svd       economy SVD in the matrix's precision       that, and l k^2
eigh      eigendecomposition of the Gram matrix of    l k^2 and the decomposition in float64,
          the tall orientation in float64             k^3 and l k^2 in the matrix's precision
products  Newton-Schulz iteration in the matrix's     2 l k^2 per iteration, and in float64 l k^2
          precision, on bounds from the eigenvalues   and the eigenvalues without vectors
          of that Gram matrix
========  ==========================================  ===========================================

All of them give B, the singular values and r. The error of B is that which rounding W to its dtype
makes already: eps * s[0] / s[r - 1] times a small constant, since the condition number of the polar
factor is 2 / (s[r - 2] + s[r - 1]) (Higham, Functions of Matrices, 2008, section 8.4).
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from app.linalg.scaling import scaled, times_power_of_two
from app.linalg.svd import economy_svd, numerical_rank

Method = Literal["svd", "eigh", "products"]


class Polar(NamedTuple):
    """The polar factor of a matrix (m, n), k = min(m, n), and the spectrum it comes with."""

    factor: Tensor
    """B (m, n), a partial isometry of rank ``rank``."""
    s: Tensor
    """Singular values (k,) of W, descending."""
    rank: int
    """Number r of determined directions."""


def polar(matrix: Tensor, method: Method | None = None) -> Polar:
    """Compute the polar factor, restricted to the determined directions.

    Args:
        matrix: (m, n), finite. Half precision is computed in float32.
        method: None: the fastest for its shape, dtype and device.

    Returns:
        In float32, or float64 for a float64 matrix. A zero matrix has the factor 0 of rank 0.

    Raises:
        torch.linalg.LinAlgError: nothing converges, the SVD in all its ways neither.
    """
    matrix = matrix.detach()
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    method = method or choose_method(_shape(matrix), matrix.dtype, matrix.device)
    matrix, exponent = scaled(matrix)  # the factor is that of the matrix itself
    factor, s, rank = _polar_in_range(matrix, method)
    return Polar(factor, times_power_of_two(s, exponent), rank)


def choose_method(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Method:
    """Return the fastest method. A pure function.

    On CPUs the Gram matrix pays where the matrix is small or far from square: 0.23 s against 0.58 s
    for (768, 3072), 0.15 s against 0.13 s for (768, 768) (benchmarks/stability.py). On GPUs
    decompositions wait for their many small steps, and products do not. A Gram matrix in float64
    resolves singular values down to 1e-8 s[0]: not enough for a float64 matrix.

    Args:
        shape: (m, n).
        dtype: float32 or float64.
        device: where the matrix lies.
    """
    if dtype == torch.float64:
        return "svd"
    if device.type != "cpu":
        return "products"
    k = min(shape)
    return "eigh" if k < 512 or max(shape) >= 1.25 * k else "svd"


def _polar_in_range(matrix: Tensor, method: Method) -> Polar:
    """Compute the polar factor of a matrix whose entries can be squared and divided by."""
    if method != "svd":
        try:
            return _polar_by_eigh(matrix) if method == "eigh" else _polar_by_products(matrix)
        except torch.linalg.LinAlgError:
            pass  # the SVD has more drivers to try
    return _polar_by_svd(matrix)


def _polar_by_svd(matrix: Tensor) -> Polar:
    U, s, Vh = economy_svd(matrix)
    r = numerical_rank(s, _shape(matrix))
    return Polar(U[:, :r] @ Vh[:r], s, r)


def _polar_by_eigh(matrix: Tensor) -> Polar:
    """B = W V diag(1 / s) V^T, with the eigenvectors V of W^T W = V diag(s^2) V^T."""
    tall = _tall(matrix)
    eigenvalues, V = torch.linalg.eigh(_gram(tall))
    s = _singular_values(eigenvalues)
    r = numerical_rank(s.to(matrix.dtype), _shape(matrix))
    V = V.flip(1)[:, :r]
    # The small product in float64, the large one in the matrix's precision.
    inverse_root = (V / s[:r]) @ V.T
    return _like(matrix, tall @ inverse_root.to(matrix.dtype), s, r)


def _polar_by_products(matrix: Tensor) -> Polar:
    """X <- X (a I + b X^T X) drives all singular values to 1, from X = W / s[0].

    Where a direction is not determined, the iteration would blow it up: then the eigenvectors are
    needed, and :func:`_polar_by_eigh` takes over.
    """
    tall = _tall(matrix)
    s = _singular_values(torch.linalg.eigvalsh(_gram(tall)))
    r = numerical_rank(s.to(matrix.dtype), _shape(matrix))
    if r < len(s):
        return _polar_by_eigh(matrix)
    lower = float(s[-1] / s[0])
    X = tall / s[0].to(matrix.dtype)
    for a, b in cubic_coefficients(lower, torch.finfo(matrix.dtype).eps):
        gram = X.T @ X
        gram.mul_(b).diagonal().add_(a)
        X = X @ gram
    return _like(matrix, X, s, r)


def cubic_coefficients(lower: float, tolerance: float) -> Iterator[tuple[float, float]]:
    """Coefficients (a, b) of the Newton-Schulz iteration x <- a x + b x^3, the best in each step.

    On [l, u] the odd cubic closest to 1 in the maximum norm is scale * q(alpha x) with
    q(x) = (3 x - x^3) / 2, alpha = sqrt(3 / (u^2 + l u + l^2)) and
    scale = 4 / (2 + l u (l + u) alpha^3); it maps the interval to [2 - u', u'], u' = scale (Chen
    and Chow, A stable scaling of Newton-Schulz for improving the sign function computation of a
    Hermitian matrix, 2014). While l is small it multiplies l by 2.6 and not by 1.5. Composed
    greedily such polynomials are the best composition there is (Amsel et al., The Polar Express,
    arXiv 2505.16932, theorem 3.1).

    Args:
        lower: smallest singular value over the largest, in (0, 1].
        tolerance: yields end once all singular values are within this of 1.
    """
    l, u = lower, 1.0  # noqa: E741 - the interval's usual names
    while True:
        alpha = math.sqrt(3 / (u * u + l * u + l * l))
        scale = 4 / (2 + l * u * (l + u) * alpha**3)
        yield 1.5 * scale * alpha, -0.5 * scale * alpha**3
        l, u = 2 - scale, scale  # noqa: E741
        if u - 1 <= max(tolerance, 1e-15):  # what float64 resolves here
            return


def _shape(matrix: Tensor) -> tuple[int, int]:
    m, n = matrix.shape
    return m, n


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _gram(tall: Tensor) -> Tensor:
    """W^T W (k, k) in float64: squaring costs half of its digits, and leaves those of float32."""
    exact = tall.double()
    return exact.T @ exact


def _singular_values(eigenvalues: Tensor) -> Tensor:
    """Descending, from the ascending eigenvalues of the Gram matrix, rounded below 0 or not."""
    return eigenvalues.clamp_min(0).sqrt().flip(0)


def _like(matrix: Tensor, tall: Tensor, s: Tensor, rank: int) -> Polar:
    """Turn the tall factor back into the orientation of the matrix."""
    factor = tall if tall.shape == matrix.shape else tall.T
    return Polar(factor.contiguous(), s.to(matrix.dtype), rank)
