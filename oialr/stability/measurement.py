"""What is measured of one weight at one time, and of that against an earlier time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from oialr.linalg.polar import polar
from oialr.linalg.stability import (
    Basis,
    DenseBasis,
    FactoredBasis,
    basis_stability,
    mixing_factor,
    mixing_factor_from_factors,
    mixing_similarity,
)
from oialr.linalg.svd import effective_rank, orthonormality_error, stable_rank


@dataclass(frozen=True, kw_only=True)
class LayerStability:
    """One measurement of one weight; NaN where there is no basis to compare with yet.

    A weight that is a stack of matrices, such as a grouped convolution's, is measured matrix by
    matrix. Similarities, effective and stable rank are the means; other ranks, the orthonormality
    error and singular values (each place in the order by itself) the largest.
    """

    name: str
    """Dense parameter name."""
    averaged: bool
    """Whether means over the weights take it in: not of embeddings, tokens and positions."""
    stability: float
    """Mean cosine similarity of the bases, in [-1, 1]: :func:`basis_stability`."""
    mixing_similarity: float
    """Of the factors R of W = Q R, in [0, 1]: :func:`mixing_similarity`."""
    rank: int
    """Rank of the factorization; min(m, n) of a full-rank layer."""
    reference_rank: int
    """Numerical rank of the basis that was compared with; 0 if there is none."""
    numerical_rank: int
    """Directions that the comparison is restricted to: s > max(m, n) eps s[0]."""
    effective_rank: float
    """Exponential of the spectrum's entropy, in [1, rank]: :func:`effective_rank`."""
    stable_rank: float
    """Squared Frobenius over squared spectral norm, in [1, rank]: :func:`stable_rank`."""
    orthonormality_error: float
    """Of the worse of the frozen factors U and Vh; NaN of a layer without them."""
    singular_values: Tensor
    """(rank,) on the CPU."""

    @classmethod
    def undefined(cls, *, name: str, averaged: bool, rank: int) -> Self:
        """Return the row of a weight of which no decomposition converges."""
        return cls(
            name=name,
            averaged=averaged,
            stability=math.nan,
            mixing_similarity=math.nan,
            rank=rank,
            reference_rank=0,
            numerical_rank=0,
            effective_rank=math.nan,
            stable_rank=math.nan,
            orthonormality_error=math.nan,
            singular_values=torch.full((rank,), math.nan, device="cpu"),
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is remembered of a weight: of each of its matrices the basis and the mixing factor."""

    bases: list[Basis]
    mixing: list[Tensor]
    """R (rank, k) each, in their own precision: their similarity is read in its last digits."""

    def kept(self, dtype: torch.dtype) -> Self:
        """Bring it to host memory, with the bases in another dtype."""
        return type(self)(
            bases=[_converted(basis, torch.device("cpu"), dtype) for basis in self.bases],
            mixing=[R.to("cpu") for R in self.mixing],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain dictionaries and tensors."""
        return {"bases": [basis._asdict() for basis in self.bases], "mixing": self.mixing}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """Return what :meth:`state_dict` was called on."""
        bases: list[Basis] = [
            DenseBasis(**basis) if "factor" in basis else FactoredBasis(**basis)
            for basis in state["bases"]
        ]
        return cls(bases=bases, mixing=state["mixing"])


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A weight at one time."""

    reference: Reference
    """For later comparisons; shares no memory with the weight."""
    singular_values: Tensor
    """(groups, rank) on the CPU."""
    orthonormality_error: float

    def compare(self, earlier: Reference | None, *, name: str, averaged: bool) -> LayerStability:
        """Compare with an earlier time, if there is one."""
        stability, mixing, reference_rank = math.nan, math.nan, 0
        if earlier is not None:
            pairs = list(zip(earlier.bases, self.reference.bases, strict=True))
            stability = mean([_stability(a, b) for a, b in pairs])
            factors = zip(earlier.mixing, self.reference.mixing, strict=True)
            mixing = mean([mixing_similarity(a.to(b.device), b) for a, b in factors])
            reference_rank = max(basis.rank for basis in earlier.bases)
        return LayerStability(
            name=name,
            averaged=averaged,
            stability=stability,
            mixing_similarity=mixing,
            rank=self.singular_values.shape[1],
            reference_rank=reference_rank,
            numerical_rank=max(basis.rank for basis in self.reference.bases),
            effective_rank=mean([effective_rank(s) for s in self.singular_values]),
            stable_rank=mean([stable_rank(s) for s in self.singular_values]),
            orthonormality_error=self.orthonormality_error,
            singular_values=self.singular_values.amax(0),
        )


def measure_dense(stack: Tensor) -> Snapshot:
    """Measure a full-rank weight.

    Args:
        stack: the weight read as matrices (g, m, n), finite. Half precision is computed in float32.
    """
    stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
    polars = [polar(matrix) for matrix in stack]
    return Snapshot(
        reference=Reference(
            bases=[DenseBasis(p.factor, p.rank) for p in polars],
            mixing=[mixing_factor(matrix) for matrix in stack],
        ),
        singular_values=torch.stack([p.s for p in polars]).cpu(),
        orthonormality_error=math.nan,
    )


def measure_factored(U: Tensor, core: Tensor, Vh: Tensor) -> Snapshot:
    """Measure a low-rank weight by its factors: no (m, n) product is formed.

    With core = Q H, Q its polar factor, U core Vh has the basis B = U Q Vh.

    Args:
        U: (g, m, r), with orthonormal columns. core: (g, r, r), finite. Vh: (g, r, n), with
            orthonormal rows. Half precision is computed in float32.
    """
    U, core, Vh = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (U, core, Vh))
    shape = U.shape[1], Vh.shape[2]  # of the weight: full-rank, it has the same numerical rank
    polars = [polar(matrix, shape=shape) for matrix in core]
    factors = list(zip(U, core, Vh, strict=True))
    return Snapshot(
        reference=Reference(
            bases=[
                FactoredBasis(left @ p.factor, right.clone(), p.rank)
                for p, (left, _, right) in zip(polars, factors, strict=True)
            ],
            mixing=[mixing_factor_from_factors(*parts) for parts in factors],
        ),
        singular_values=torch.stack([p.s for p in polars]).cpu(),
        orthonormality_error=max(
            max(orthonormality_error(left), orthonormality_error(right.T))
            for left, _, right in factors
        ),
    )


def measure_released(A: Tensor, B: Tensor) -> Snapshot:
    """Measure a weight A B by its trained factors: no (m, n) product is formed.

    With A = Q R and B^T = P S, A B = Q (R S^T) P^T has orthonormal bases and a core again.

    Args:
        A: (g, m, r), finite, with r <= m. B: (g, r, n), finite, with r <= n. Half precision is
            computed in float32.
    """
    A, B = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (A, B))
    Q, R = torch.linalg.qr(A)
    P, S = torch.linalg.qr(B.mT)
    snapshot = measure_factored(Q, R @ S.mT, P.mT)
    return replace(snapshot, orthonormality_error=math.nan)  # of bases that nobody stores


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _stability(earlier: Basis, later: Basis) -> float:
    """Compare on the later one's device and in its precision."""
    like = later.factor if isinstance(later, DenseBasis) else later.left
    return basis_stability(_converted(earlier, like.device, like.dtype), later)


def _converted(basis: Basis, device: torch.device, dtype: torch.dtype) -> Basis:
    match basis:
        case DenseBasis(factor, rank):
            return DenseBasis(factor.to(device, dtype), rank)
        case FactoredBasis(left, right, rank):
            return FactoredBasis(left.to(device, dtype), right.to(device, dtype), rank)
