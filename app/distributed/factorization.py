"""Factorizations spread over the processes: the owner computes, all receive."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from app.distributed.assignment import assign, svd_cost
from app.distributed.processes import Processes
from app.linalg.svd import Factors, economy_svd


def place(
    shapes: Sequence[tuple[int, ...]], processes: Processes, *, replicated: bool
) -> list[int]:
    """Return the owner of each matrix or stack; every process itself for replicated work."""
    if replicated:
        return [processes.index] * len(shapes)
    costs = [math.prod(batch) * svd_cost(m, n) for *batch, m, n in shapes]
    return assign(costs, processes.count)


def factorize(
    shapes: Sequence[tuple[int, ...]],
    get_matrix: Callable[[int], Tensor],
    processes: Processes,
    *,
    replicated: bool = False,
) -> Iterator[tuple[int, Factors, int]]:
    """Factorize matrices that all processes hold; every process receives the same bits.

    First come the matrices that this process owns, each as soon as it is factorized, so that the
    caller can give up the matrix before the next one is made; then the others, in their order. So
    the order differs between the processes. The caller must not change the factors in place before
    the iterator is exhausted.

    Args:
        shapes: (m, n) of each matrix, or (g, m, n) of a stack that is treated as one.
        get_matrix: returns the matrix or stack of an index, finite.
        processes: the group; all its processes must exhaust the iterator.
        replicated: every process factorizes every matrix and nothing is sent.

    Yields:
        Index of the matrix, its factors and its owner.
    """
    owners = place(shapes, processes, replicated=replicated)
    mine: dict[int, Factors] = {}
    for i, owner in enumerate(owners):
        if owner == processes.index:
            factors = economy_svd(get_matrix(i))
            if not replicated and processes.count > 1:
                mine[i] = factors
            yield i, factors, owner
    if replicated or processes.count == 1:
        return
    for i, owner in enumerate(owners):
        if owner == processes.index:
            processes.broadcast(_pack(mine.pop(i)), owner)
        else:
            yield i, _receive(shapes[i], get_matrix(i), owner, processes), owner


def _pack(factors: Factors) -> Tensor:
    return torch.cat([factor.flatten() for factor in factors])


def _receive(shape: tuple[int, ...], like: Tensor, owner: int, processes: Processes) -> Factors:
    """Receive packed factors of the dtype in which :func:`economy_svd` returns them."""
    *batch, m, n = shape
    k = min(m, n)
    shapes = [(*batch, m, k), (*batch, k), (*batch, k, n)]
    sizes = [math.prod(shape) for shape in shapes]
    dtype = torch.promote_types(like.dtype, torch.float32)
    packed = torch.empty(sum(sizes), dtype=dtype, device=like.device)
    processes.broadcast(packed, owner)
    parts = zip(packed.split(sizes), shapes, strict=True)
    # Copies of their own, so that no factor keeps the others' memory alive.
    return Factors(*(part.view(shape).clone() for part, shape in parts))
