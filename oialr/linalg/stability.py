"""Basis stability and linear mixing of a weight at two times (arXiv 2401.08505, section 3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from oialr.linalg.scaling import norm, scaled, times_power_of_two


class DenseBasis(NamedTuple):
    """The basis of a full-rank weight, held as the polar factor itself."""

    factor: Tensor
    """B (m, n), restricted to the determined directions."""
    rank: int
    """Number of determined directions."""


class FactoredBasis(NamedTuple):
    """The basis of a weight U core Vh, B = left right: no (m, n) product is formed."""

    left: Tensor
    """U Q (m, r), Q being the polar factor of the core."""
    right: Tensor
    """Vh (r, n)."""
    rank: int
    """Number of determined directions, those of the core; at most r."""


Basis = DenseBasis | FactoredBasis


def basis_stability(earlier: Basis, later: Basis) -> float:
    """Similarity of two orthogonal bases B = U Vh of one weight, in [-1, 1].

    stability = trace(B_i^T B_j) / min(r_i, r_j). For full-rank weights this is the mean cosine
    similarity of the bases' columns (of the tall orientation), the paper's Stability. It is 1 for
    equal and for nested bases, so a cut of the rank alone does not look like a collapse.

    Args:
        earlier, later: of the same (m, n), on the same device, in one dtype.

    Returns:
        The stability; NaN where a rank is 0.
    """
    rank = min(earlier.rank, later.rank)
    return _trace(earlier, later) / rank if rank else math.nan


def _trace(a: Basis, b: Basis) -> float:
    """Return trace(A^T B) = sum(A * B), with factors: sum((A_l^T B_l) * (A_r B_r^T))."""
    match a, b:
        case DenseBasis(), DenseBasis():
            product = a.factor * b.factor
        case DenseBasis(), FactoredBasis():
            product = (b.left.T @ a.factor) * b.right
        case FactoredBasis(), DenseBasis():
            product = (a.left.T @ b.factor) * a.right
        case FactoredBasis(), FactoredBasis():
            product = (a.left.T @ b.left) * (a.right @ b.right.T)
    return float(product.sum(dtype=torch.float64))


def mixing_factor(matrix: Tensor) -> Tensor:
    """R of W = Q R in the tall orientation, with a non-negative diagonal, so that it is unique.

    Args:
        matrix: (m, n).

    Returns:
        Upper triangular (k, k), k = min(m, n).
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return _unique_r(tall)


def mixing_factor_from_factors(U: Tensor, core: Tensor, Vh: Tensor) -> Tensor:
    """R of W = U core Vh from the factors: no (m, n) product is formed.

    W = U (core Vh), and U has orthonormal columns, so that R of W is R of core Vh; for a wide W the
    same holds for its transpose.

    Args:
        U: (m, r). core: (r, r). Vh: (r, n).

    Returns:
        Upper trapezoidal (r, k), k = min(m, n): the rows of R below the rank, zeros, are left out.
    """
    return _unique_r(core @ Vh if U.shape[0] >= Vh.shape[1] else core.T @ U.T)


def mixing_similarity(R_i: Tensor, R_j: Tensor) -> float:
    """Similarity of two mixing factors: 1 - ||R_i - R_j||_F / (||R_i||_F + ||R_j||_F), in [0, 1].

    1 for equal matrices; by the triangle inequality never below 0. The paper tracks R without
    giving its formula, so only the shape of the curve can be compared.

    Args:
        R_i, R_j: (r_i, k) and (r_j, k), mixing factors of the same weight, on the same device.

    Returns:
        The similarity; 1 for two zero matrices.
    """
    r = min(len(R_i), len(R_j))
    parts = (R_i[:r] - R_j[:r], R_i[r:], R_j[r:])
    distance = math.hypot(*(norm(part) for part in parts))
    scale = norm(R_i) + norm(R_j)
    return 1.0 - distance / scale if scale else 1.0


def _unique_r(matrix: Tensor) -> Tensor:
    matrix, exponent = scaled(matrix)
    R = torch.linalg.qr(matrix, mode="r").R
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    return times_power_of_two(sign[:, None] * R, exponent)
