"""Measurement of basis stability while a network is trained, spread over the processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.distributed.assignment import assign, svd_cost
from app.distributed.processes import Processes
from app.linalg.stability import (
    basis_stability,
    mixing_factor,
    mixing_factor_from_factors,
    mixing_similarity,
)
from app.linalg.svd import economy_svd, effective_rank, numerical_rank
from app.lowrank.conversion import LayerReport, get_layer
from app.lowrank.layer import FactoredLayer


class Basis(NamedTuple):
    """What is remembered of a matrix: its determined singular vectors and its mixing."""

    U: Tensor
    """(m, r), r the numerical rank."""
    Vh: Tensor
    """(r, n)."""
    R: Tensor
    """Mixing factor (k, k)."""


@dataclass(frozen=True, kw_only=True)
class LayerStability:
    """One measurement of one layer; NaN where there is no basis to compare with yet.

    A weight that is a stack of matrices, such as a grouped convolution's, is measured matrix by
    matrix. Similarities and effective rank are the means, ranks and singular values (each place in
    the order by itself) the largest.
    """

    name: str
    stability: float
    mixing_similarity: float
    rank: int
    """Rank of the factorization; min(m, n) of a full-rank layer."""
    reference_rank: int
    """Numerical rank of the basis that was compared with; 0 if there is none."""
    numerical_rank: int
    """Directions that the comparison is restricted to: s > max(m, n) eps s[0]."""
    effective_rank: float
    singular_values: Tensor
    """(rank,) on the CPU."""


class StabilityTracker:
    """Compares every layer's basis with that of ``window`` epochs before.

    Each layer has one owner, which alone remembers its bases. The owner is a function of the dense
    shapes, so that it stays the same over conversions and cuts.
    """

    def __init__(self, layers: Sequence[LayerReport], processes: Processes, *, window: int) -> None:
        """Prepare for these weights.

        Args:
            layers: weights of the dense network.
            processes: who shares the work.
            window: epochs between the bases that are compared.
        """
        costs = [layer.groups * svd_cost(*layer.matrix_shape) for layer in layers]
        owners = assign(costs, processes.count)
        self._mine = [
            layer for layer, owner in zip(layers, owners, strict=True) if owner == processes.index
        ]
        self._order = [layer.name for layer in layers]
        self._processes = processes
        self._window = window
        self._bases: dict[int, dict[str, list[Basis]]] = {}

    @torch.no_grad()
    def measure(self, model: nn.Module, epoch: int) -> list[LayerStability]:
        """Measure all layers and remember their bases. A collective call.

        Args:
            model: the network, dense or low-rank, not wrapped.
            epoch: epochs of training so far.

        Returns:
            One entry per layer, in the order of the network, on all processes.
        """
        earlier = self._bases.get(epoch - self._window, {})
        bases: dict[str, list[Basis]] = {}
        mine = []
        for layer in self._mine:
            bases[layer.name], s = _decompose(model, layer)
            mine.append(_compare(layer.name, bases[layer.name], s, earlier.get(layer.name)))
        self._bases[epoch] = bases
        self._bases = {e: b for e, b in self._bases.items() if e > epoch - self._window}
        rows = {row.name: row for part in self._processes.gather(mine) for row in part}
        return [rows[name] for name in self._order]

    def state_dict(self) -> dict[str, Any]:
        """Return the bases that this process remembers, as plain dictionaries and tensors."""
        return {
            "bases": {
                epoch: {name: [part._asdict() for part in parts] for name, parts in bases.items()}
                for epoch, bases in self._bases.items()
            }
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Take back what this process owns from the states of one or more processes."""
        self._bases = {}
        names = {layer.name for layer in self._mine}
        for state in states:
            for epoch, bases in state["bases"].items():
                kept = self._bases.setdefault(epoch, {})
                for name in set(bases) & names:
                    kept[name] = [
                        Basis(**{k: v.to(device) for k, v in part.items()}) for part in bases[name]
                    ]


def mean_stability(rows: Sequence[LayerStability]) -> float:
    """Mean over the layers whose stability is defined; NaN if there is none."""
    return _mean([row.stability for row in rows])


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _decompose(model: nn.Module, report: LayerReport) -> tuple[list[Basis], Tensor]:
    """Return the basis of each of a layer's matrices and their singular values (groups, rank)."""
    layer = get_layer(model, report.name)
    if isinstance(layer, FactoredLayer):
        stacks = [
            factor.reshape(report.groups, *factor.shape[-2:])
            for factor in (layer.U, layer.core, layer.Vh)
        ]
        decomposed = [_decompose_factors(*factors) for factors in zip(*stacks, strict=True)]
    else:
        weight = model.get_parameter(report.name).detach()
        stack = weight.reshape(report.groups, *report.matrix_shape)
        decomposed = [_decompose_matrix(matrix) for matrix in stack]
    bases, spectra = zip(*decomposed, strict=True)
    return list(bases), torch.stack(spectra).cpu()


def _decompose_matrix(matrix: Tensor) -> tuple[Basis, Tensor]:
    U, s, Vh = economy_svd(matrix)
    return _determined(U, s, Vh, mixing_factor(matrix)), s


def _decompose_factors(U: Tensor, core: Tensor, Vh: Tensor) -> tuple[Basis, Tensor]:
    """Decompose W = U core Vh by its core alone: no (m, n) product is formed."""
    left, s, right = economy_svd(core)
    return _determined(U @ left, s, right @ Vh, mixing_factor_from_factors(U, core, Vh)), s


def _determined(U: Tensor, s: Tensor, Vh: Tensor, R: Tensor) -> Basis:
    r = numerical_rank(s, (U.shape[0], Vh.shape[1]))
    # Copies, so that what is remembered is no larger than what is determined.
    return Basis(U[:, :r].clone(), Vh[:r].clone(), R)


def _compare(
    name: str, bases: list[Basis], s: Tensor, earlier: list[Basis] | None
) -> LayerStability:
    pairs = list(zip(earlier, bases, strict=True)) if earlier is not None else []
    return LayerStability(
        name=name,
        stability=_mean([basis_stability(a.U, a.Vh, b.U, b.Vh) for a, b in pairs]),
        mixing_similarity=_mean([mixing_similarity(a.R, b.R) for a, b in pairs]),
        rank=s.shape[1],
        reference_rank=max((a.U.shape[1] for a, _ in pairs), default=0),
        numerical_rank=max(basis.U.shape[1] for basis in bases),
        effective_rank=_mean([effective_rank(row) for row in s]),
        singular_values=s.amax(0),
    )
