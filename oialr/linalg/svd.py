"""Economy SVD of one matrix, and what is read from its spectrum."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from oialr.linalg.scaling import scaled, times_power_of_two

ORTHONORMAL = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest spectral norm of Q^T Q - I, by dtype, that up to 1,024 singular vectors may have.

LAPACK's divide and conquer leaves 5e-6 for 1,024 columns in float32, but ten times as much for some
matrices of low rank with equal rows or columns, a constant one among them (seen with MKL). Beyond
1,024 columns the limit grows with their number.
"""
_POWER_STEPS = 4


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

    A wide matrix is factorized as its transpose: LAPACK's driver for tall ones takes down to a
    third of the time.

    On a GPU a float32 matrix is factorized by :func:`gram_svd`: cuSOLVER's drivers in float32 leave
    vectors that are not orthonormal enough, and in float64 take ten times as long (docs/gpu.md).

    A factorization that does not converge, or whose vectors are not orthonormal
    (:data:`ORTHONORMAL`), is tried again in float64, then by another driver (QR iteration, LAPACK's
    gesvd, instead of divide and conquer), and last on the CPU; there by gesvd too where scipy is
    installed.

    Args:
        matrix: (m, n) or (g, m, n), any real floating dtype, finite.

    Returns:
        Contiguous factors of the dtype of the computation: float32, or float64 for a float64
            matrix.
        Contiguity matters: another memory layout on another process would select another matrix
        product and so give other bits.

    Raises:
        torch.linalg.LinAlgError: nothing converges, or a singular value exceeds the dtype's range.
    """
    matrix = matrix.detach()
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    is_wide = matrix.shape[-2] < matrix.shape[-1]
    matrix, exponent = scaled(matrix)
    U, s, Vh = _first_success(matrix.mT if is_wide else matrix)
    if exponent:
        s = times_power_of_two(s, exponent)
        if not s.isfinite().all():
            raise torch.linalg.LinAlgError(f"singular values are beyond the range of {s.dtype}")
    if is_wide:
        U, Vh = Vh.mT, U.mT
    return Factors(*(factor.contiguous() for factor in (U, s, Vh)))


def truncated(factors: Factors, r: int, dtype: torch.dtype) -> Factors:
    """Keep what belongs to the first r singular values: W's best approximation of that rank.

    Args:
        factors: of at least r singular vectors, or stacks of them.
        r: rank that is kept (Eckart and Young, 1936).
        dtype: of what is returned.

    Returns:
        U (m, r) and Vh (r, n), contiguous, and s (r,); of a stack with a leading dimension g.
    """
    U, s, Vh = (factor.to(dtype) for factor in factors)
    return Factors(U[..., :r].contiguous(), s[..., :r], Vh[..., :r, :].contiguous())


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return A = U diag(s)^(1/2) (m, r) and B = diag(s)^(1/2) Vh (r, n), whose product is W.

    Both have the same singular values, as in spectral initialization (arXiv 2105.01029), but where
    these are 0 (:func:`squares_of_b`).
    """
    of_a, of_b = factors.s.sqrt(), squares_of_b(factors.s).sqrt()
    return factors.U * of_a[..., None, :], of_b[..., :, None] * factors.Vh


def squares_of_b(s: Tensor) -> Tensor:
    """Return the squared singular values of B where A B has the singular values s: s itself.

    A direction in which A and B are 0 would never be trained, since the gradient of each is a
    product with the other. So where s is 0, A is, and B is as large as it is in the first direction
    of the matrix, or has rows of length 1 in a zero matrix: a step then changes A.

    Args:
        s: (r,), descending, or (g, r) of a stack.
    """
    largest = torch.where(s[..., :1] > 0, s[..., :1], torch.ones_like(s[..., :1]))
    return torch.where(s > 0, s, largest)


def diagonal_svd(matrix: Tensor) -> Factors:
    """Factorize a diagonal matrix, or each of a stack: order and signs alone, without rounding.

    Args:
        matrix: (r, r) or (g, r, r), diagonal, finite.
    """
    diagonal = matrix.detach().diagonal(dim1=-2, dim2=-1)
    s, order = diagonal.abs().sort(dim=-1, descending=True, stable=True)
    right = torch.nn.functional.one_hot(order, matrix.shape[-1]).to(matrix.dtype)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(matrix.dtype)
    left = (right * signs[..., None, :]).mT.contiguous()
    return Factors(left, s, right)


def is_diagonal(matrix: Tensor) -> Tensor:
    """Whether all that is not 0 lies on the diagonal; a boolean scalar on the matrix's device."""
    return matrix.count_nonzero() == matrix.diagonal(dim1=-2, dim2=-1).count_nonzero()


def is_orthonormal(Q: Tensor, add_up: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Whether columns are as orthonormal as :data:`ORTHONORMAL` asks for; a boolean scalar.

    Power iteration on Q^T Q - I comes from below to about three quarters of its norm, and farther
    where a few directions stand out, as they do in what LAPACK gets wrong. It costs the time of a
    few products with vectors, where the norm itself would cost half of that of an SVD.

    Args:
        Q: (m, k) or (g, m, k), or some of its rows.
        add_up: adds a vector (k, 1) up over those who hold the other rows.
    """
    k, limit = Q.shape[-1], 0.7 * ORTHONORMAL[Q.dtype] * max(1.0, Q.shape[-1] / 1024)
    Q = Q.double()  # sums over many rows would be off by more than the limit in float32
    generator = torch.Generator().manual_seed(0)  # the global one is not touched
    x = torch.randn(k, 1, generator=generator, device="cpu").to(Q)
    previous = x
    for _ in range(_POWER_STEPS):
        previous, x = x, add_up(Q.mT @ (Q @ x)) - x
    norm, of_previous = (torch.linalg.vector_norm(y, dim=-2) for y in (x, previous))
    return (norm <= limit * of_previous).all()


def gram_svd(matrix: Tensor) -> Factors:
    """Factorize a float32 matrix by the eigenvectors of its Gram matrix in float64.

    W^T W = V diag(s^2) V^T, and U = W V / s. Squaring costs half of the digits of float64 and
    leaves those of float32: the columns of U are orthonormal up to eps s[0]^2 / (s_i s_j), eps =
    2e-16. Where singular values are too small for that, U comes from the QR decomposition of W V
    (Householder), W V = U R with R diagonal up to eps s[0]^2 / s_i: small against s[0] even where
    s_i vanishes.

    Args:
        matrix: (m, n) or (g, m, n) with m >= n, float32, finite.

    Returns:
        In float64. Singular values below 1e-8 s[0] are rounding noise.
    """
    exact = matrix.double()
    eigenvalues, V = torch.linalg.eigh(exact.mT @ exact)
    s, V = eigenvalues.clamp_min(0).sqrt().flip(-1), V.flip(-1)
    image = exact @ V
    if (s[..., -1] > 1e-4 * s[..., 0]).all():
        return Factors(image / s[..., None, :], s, V.mT)
    U, R = torch.linalg.qr(image)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    s, order = diagonal.abs().sort(dim=-1, descending=True, stable=True)
    U = U * torch.where(diagonal < 0, -1.0, 1.0).to(U.dtype)[..., None, :]
    columns = order[..., None, :]
    return Factors(
        U.gather(-1, columns.expand(U.shape)), s, V.gather(-1, columns.expand(V.shape)).mT
    )


def _first_success(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Try one driver after another on a tall matrix or stack; return what is like the matrix."""
    for attempt in _attempts(matrix):
        try:
            U, s, Vh = (factor.to(matrix) for factor in attempt())
        except torch.linalg.LinAlgError:
            continue
        if s.isfinite().all() & is_orthonormal(U) & is_orthonormal(Vh.mT):
            return U, s, Vh
    raise torch.linalg.LinAlgError(f"no SVD of {tuple(matrix.shape)} converges")


def _attempts(matrix: Tensor) -> Iterator[Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    if matrix.is_cuda and matrix.dtype == torch.float32:
        yield lambda: gram_svd(matrix)
    else:
        yield lambda: torch.linalg.svd(matrix, full_matrices=False)
    yield lambda: torch.linalg.svd(matrix.double(), full_matrices=False)
    if matrix.is_cuda:
        yield lambda: torch.linalg.svd(matrix.double(), full_matrices=False, driver="gesvd")
        yield lambda: torch.linalg.svd(matrix.double().cpu(), full_matrices=False)
    yield lambda: _gesvd(matrix.double().cpu())


def _gesvd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's gesvd, which torch offers on GPUs only, of each matrix of a stack."""
    try:
        from scipy.linalg import LinAlgError, svd
    except ImportError as error:  # one way less, and no reason to end a training
        raise torch.linalg.LinAlgError(f"gesvd on the CPU needs scipy: {error}") from None

    stack = matrix.reshape(-1, *matrix.shape[-2:]).numpy()
    try:
        parts = [svd(one, full_matrices=False, lapack_driver="gesvd") for one in stack]
    except LinAlgError as error:
        raise torch.linalg.LinAlgError(str(error)) from None
    U, s, Vh = (torch.stack([torch.from_numpy(x) for x in xs]) for xs in zip(*parts, strict=True))
    batch = matrix.shape[:-2]
    return U.view(*batch, *U.shape[1:]), s.view(*batch, -1), Vh.view(*batch, *Vh.shape[1:])


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


def stable_rank(s: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm (Rudelson and Vershynin, JACM 54, 2007).

    Between 1 and the rank, and hardly moved by small singular values; NaN for a zero matrix.

    Args:
        s: singular values (k,), descending.
    """
    return float((s.double() / s[0].double()).square().sum())


def orthonormalized(U: Tensor) -> tuple[Tensor, Tensor]:
    """Make columns orthonormal again that rounding has left nearly so: U = Q H, the polar factors.

    By Newton and Schulz's iteration Q <- Q (3 I - Q^T Q) / 2, products alone. It squares the error
    |Q^T Q - I|: the 2^-8 of bfloat16 are below that of float64 after three rounds.

    Args:
        U: (..., m, r) with singular values in (0, sqrt 3), in the dtype to compute in.

    Returns:
        Q (..., m, r) and H (..., r, r), near I.
    """
    Q = U
    for _ in range(3):
        Q = 1.5 * Q - 0.5 * (Q @ (Q.mT @ Q))
    return Q, Q.mT @ U


def orthonormality_error(factor: Tensor) -> float:
    """Return ||Q^T Q - I||_F / sqrt(r): how far columns are from orthonormal, per column.

    Args:
        factor: Q (m, r). The product is formed in float64, so that it adds nothing itself.
    """
    Q = factor.double()
    gram = Q.T @ Q
    gram.diagonal().sub_(1)
    return float(torch.linalg.norm(gram)) / math.sqrt(Q.shape[1])
