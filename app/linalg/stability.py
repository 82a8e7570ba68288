"""Basis stability and linear mixing of a weight at two times (arXiv 2401.08505, section 3)."""

import torch
from torch import Tensor


def basis_stability(U_i: Tensor, Vh_i: Tensor, U_j: Tensor, Vh_j: Tensor) -> float:
    """Similarity of two orthogonal bases B = U Vh, in [-1, 1].

    stability = trace(B_i^T B_j) / min(r_i, r_j) = sum((U_i^T U_j) * (Vh_i Vh_j^T)) / min(r_i, r_j).
    For full-rank weights this is the mean cosine similarity of the bases' columns (of the tall
    orientation), the paper's Stability. It is 1 for equal and for nested bases, so a cut of the
    rank alone does not look like a collapse, and no (m, n) product is formed.

    Args:
        U_i, Vh_i: (m, r_i) and (r_i, n), the determined singular vectors at time i.
        U_j, Vh_j: (m, r_j) and (r_j, n), those at time j.

    Returns:
        The stability; NaN where a rank is 0.
    """
    rank = min(U_i.shape[1], U_j.shape[1])
    if rank == 0:
        return float("nan")
    overlap = (U_i.T @ U_j) * (Vh_i @ Vh_j.T)
    return float(overlap.sum(dtype=torch.float64)) / rank


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
        (k, k), k = min(m, n), with zero rows below the rank.
    """
    m, n = U.shape[0], Vh.shape[1]
    R = _unique_r(core @ Vh if m >= n else core.T @ U.T)
    padded = R.new_zeros(min(m, n), R.shape[1])
    padded[: R.shape[0]] = R
    return padded


def mixing_similarity(R_i: Tensor, R_j: Tensor) -> float:
    """Similarity of two mixing factors: 1 - ||R_i - R_j||_F / (||R_i||_F + ||R_j||_F), in [0, 1].

    1 for equal matrices; by the triangle inequality never below 0. The paper tracks R without
    giving its formula, so only the shape of the curve can be compared.

    Args:
        R_i, R_j: (k, k) mixing factors of the same weight.

    Returns:
        The similarity; 1 for two zero matrices.
    """
    scale = float(torch.linalg.norm(R_i) + torch.linalg.norm(R_j))
    return 1.0 - float(torch.linalg.norm(R_i - R_j)) / scale if scale else 1.0


def _unique_r(matrix: Tensor) -> Tensor:
    R = torch.linalg.qr(matrix, mode="r").R
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    return sign[:, None] * R
