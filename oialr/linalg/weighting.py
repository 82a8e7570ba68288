"""Low-rank approximation of a matrix for the inputs that it meets. Ours, not the paper's.

The truncated SVD of W loses least of its entries, |W - W_r|_F (Eckart and Young, 1936). What a
layer computes is W x, of which it loses E |(W - W_r) x|^2 = |(W - W_r) S|_F^2 for any S with S S^T
= E[x x^T]. So the best W_r for the outputs is the truncated SVD of W S, taken back by S^-1. For
trained language models this is SVD-LLM (Wang et al., arXiv 2403.07378).
"""

from typing import Literal

import torch
from torch import Tensor

from oialr.linalg.svd import Factors, economy_svd

Side = Literal["columns", "rows"]
"""Which side of a matrix meets the inputs: W x, or x^T W."""
DAMPING = 0.01
"""Added to the diagonal of a second moment, over its mean: what is never seen counts a little."""


def root_of(moment: Tensor) -> Tensor | None:
    """Return S with S S^T = E[x x^T], damped, of which the mean diagonal entry is scaled to 1.

    Args:
        moment: (n, n), symmetric and positive semidefinite, of any scale; or a stack (g, n, n).

    Returns:
        Lower triangular S (n, n) or (g, n, n); None where the moment is zero or not finite.
    """
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    scaled = moment / size
    scaled.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
    S, failed = torch.linalg.cholesky_ex(scaled)
    return None if failed.any() or not S.isfinite().all() else S


def weighted(matrix: Tensor, S: Tensor, side: Side | None) -> Tensor:
    """Return W S, or S^T W, in the precision of S.

    Args:
        matrix: W (m, n) or (g, m, n).
        S: of the side that meets the inputs, (n, n) or (m, m), or a stack.
        side: which side that is.
    """
    W = matrix.to(S.dtype)
    return W @ S if side == "columns" else S.mT @ W


def taken_back(factors: Factors, r: int, S: Tensor, side: Side | None) -> Factors:
    """Return the SVD of W_r, from that of the weighted matrix.

    Args:
        factors: of :func:`weighted`, of which the first ``r`` singular vectors are enough.
        r: rank that is kept.
        S: as of :func:`weighted`.
        side: as of :func:`weighted`.

    Returns:
        U (m, r), s (r,), Vh (r, n), or stacks of them.
    """
    U, s, Vh = (
        x.to(S.dtype) for x in (factors.U[..., :r], factors.s[..., :r], factors.Vh[..., :r, :])
    )
    if side == "columns":
        Q, R = torch.linalg.qr(torch.linalg.solve_triangular(S.mT, Vh.mT, upper=True))
        inner = economy_svd(s[..., :, None] * R.mT)
        return Factors(U @ inner.U, inner.s, inner.Vh @ Q.mT)
    Q, R = torch.linalg.qr(torch.linalg.solve_triangular(S.mT, U, upper=True))
    inner = economy_svd(R * s[..., None, :])
    return Factors(Q @ inner.U, inner.s, inner.Vh @ Vh)
