"""Factors of many layers packed into few messages. Pure functions: nothing here communicates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oialr.linalg.svd import Factors
from oialr.placement.assignment import Plan

BUCKET_BYTES = 32 * 2**20
"""Size up to which factors are collected: far above the latency of a message."""


@dataclass(frozen=True, kw_only=True)
class MatrixInfo:
    """What every process knows of a matrix or stack before it is factorized."""

    shape: tuple[int, ...]
    """(m, n) or (g, m, n)."""
    dtype: torch.dtype
    """Of the matrix; factors have at least float32."""
    device: torch.device
    is_diagonal: bool = False

    @property
    def factor_dtype(self) -> torch.dtype:
        """Dtype in which :func:`oialr.linalg.svd.economy_svd` returns the factors."""
        return torch.promote_types(self.dtype, torch.float32)

    def factor_shapes(self, rank: int) -> list[tuple[int, ...]]:
        """Shapes of U, s, Vh, of which the singular vectors are cut to a rank."""
        *batch, m, n = self.shape
        return [(*batch, m, rank), (*batch, min(m, n)), (*batch, rank, n)]

    def numbers(self, rank: int) -> int:
        """Numbers in these three."""
        return sum(math.prod(shape) for shape in self.factor_shapes(rank))


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Layers whose factors travel together."""

    owner: int
    layers: list[int]


def make_buckets(
    plan: Plan, infos: Sequence[MatrixInfo], ranks: Sequence[int], limit: int = BUCKET_BYTES
) -> list[Bucket]:
    """Collect the layers of each owner, in the order of its work, up to a number of bytes.

    Args:
        plan: has an owner for each layer.
        infos: of the layers.
        ranks: to which the singular vectors are cut.
        limit: bytes of a bucket, unless one layer alone has more.

    Returns:
        In the order in which all processes send and receive them: as they are predicted to be
        done. Buckets of one owner keep the order of its work.
    """
    buckets: list[Bucket] = []
    of_owner: dict[int, Bucket] = {}
    size: dict[int, int] = {}
    for i in plan.order:
        owner, dtype = plan.groups[i][0], infos[i].factor_dtype
        numbers = infos[i].numbers(ranks[i]) * dtype.itemsize
        last = of_owner.get(owner)
        is_like = last is not None and infos[last.layers[-1]].factor_dtype == dtype
        if last is None or not is_like or size[owner] + numbers > limit:
            of_owner[owner] = last = Bucket(owner=owner, layers=[])
            buckets.append(last)
            size[owner] = 0
        last.layers.append(i)
        size[owner] += numbers
    return sorted(buckets, key=lambda bucket: (plan.finish[bucket.layers[-1]], bucket.owner))


def empty_bucket(
    bucket: Bucket, infos: Sequence[MatrixInfo], ranks: Sequence[int]
) -> tuple[Tensor, list[list[Tensor]]]:
    """Make the memory of a bucket.

    Returns:
        All numbers (n,), and for each of its layers U, s and Vh as views of them.
    """
    first = infos[bucket.layers[0]]
    total = sum(infos[i].numbers(ranks[i]) for i in bucket.layers)
    flat = torch.empty(total, dtype=first.factor_dtype, device=first.device)
    views, start = [], 0
    for i in bucket.layers:
        parts = []
        for shape in infos[i].factor_shapes(ranks[i]):
            end = start + math.prod(shape)
            parts.append(flat[start:end].view(shape))
            start = end
        views.append(parts)
    return flat, views


def pack(factors: Factors | None, views: Sequence[Tensor]) -> None:
    """Copy factors into a bucket, as far as there is room for their columns; None as NaN."""
    if factors is None:
        for view in views:
            view.fill_(torch.nan)
        return
    rank = views[0].shape[-1]
    cut = factors.U[..., :rank], factors.s, factors.Vh[..., :rank, :]
    for view, factor in zip(views, cut, strict=True):
        view.copy_(factor)


def unpack(views: Sequence[Tensor]) -> Factors | None:
    """Return factors with memory of their own, so that the bucket can go; None for NaN."""
    if views[1].isnan().any():
        return None
    return Factors(*(view.clone() for view in views))
