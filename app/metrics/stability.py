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
from app.lowrank.conversion import LayerReport, get_layer, matrix_shape
from app.lowrank.layer import FactoredLayer


class Basis(NamedTuple):
    """What is remembered of a layer: its determined singular vectors and its mixing."""

    U: Tensor
    """(m, r), r the numerical rank."""
    Vh: Tensor
    """(r, n)."""
    R: Tensor
    """Mixing factor (k, k)."""


@dataclass(frozen=True, kw_only=True)
class LayerStability:
    """One measurement of one layer; NaN where there is no basis to compare with yet."""

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
        """Prepare for the linear maps among the layers.

        Args:
            layers: the weights of the dense network.
            processes: who shares the work.
            window: epochs between the bases that are compared.
        """
        layers = [layer for layer in layers if layer.is_linear_map]
        owners = assign([svd_cost(*layer.matrix_shape) for layer in layers], processes.count)
        self._mine = [
            layer.name
            for layer, owner in zip(layers, owners, strict=True)
            if owner == processes.index
        ]
        self._order = [layer.name for layer in layers]
        self._processes = processes
        self._window = window
        self._bases: dict[int, dict[str, Basis]] = {}

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
        bases: dict[str, Basis] = {}
        mine = []
        for name in self._mine:
            basis, rank, s = _decompose(model, name)
            mine.append(_compare(name, basis, rank, s, earlier.get(name)))
            bases[name] = basis
        self._bases[epoch] = bases
        self._bases = {e: b for e, b in self._bases.items() if e > epoch - self._window}
        rows = {row.name: row for part in self._processes.gather(mine) for row in part}
        return [rows[name] for name in self._order]

    def state_dict(self) -> dict[str, Any]:
        """Return the bases that this process remembers, as plain dictionaries and tensors."""
        return {
            "bases": {
                epoch: {name: basis._asdict() for name, basis in bases.items()}
                for epoch, bases in self._bases.items()
            }
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Take back what this process owns from the states of one or more processes."""
        self._bases = {}
        for state in states:
            for epoch, bases in state["bases"].items():
                kept = self._bases.setdefault(epoch, {})
                for name in set(bases) & set(self._mine):
                    kept[name] = Basis(**{k: v.to(device) for k, v in bases[name].items()})


def mean_stability(rows: Sequence[LayerStability]) -> float:
    """Mean over the layers whose stability is defined; NaN if there is none."""
    values = [row.stability for row in rows if not math.isnan(row.stability)]
    return math.fsum(values) / len(values) if values else math.nan


def _decompose(model: nn.Module, name: str) -> tuple[Basis, int, Tensor]:
    """Return a layer's basis, its rank and its singular values (rank,).

    Of a factorized layer only the core is decomposed, and no (m, n) product is formed.
    """
    layer = get_layer(model, name)
    if isinstance(layer, FactoredLayer):
        core = economy_svd(layer.core)
        U, s, Vh = layer.U @ core.U, core.s, core.Vh @ layer.Vh
        R = mixing_factor_from_factors(layer.U, layer.core, layer.Vh)
    else:
        weight = model.get_parameter(name).detach()
        matrix = weight.reshape(matrix_shape(weight.shape))
        U, s, Vh = economy_svd(matrix)
        R = mixing_factor(matrix)
    r = numerical_rank(s, (U.shape[0], Vh.shape[1]))
    # Copies, so that what is remembered is no larger than what is determined.
    return Basis(U[:, :r].clone(), Vh[:r].clone(), R), len(s), s.cpu()


def _compare(
    name: str, basis: Basis, rank: int, s: Tensor, earlier: Basis | None
) -> LayerStability:
    stability = similarity = math.nan
    if earlier is not None:
        stability = basis_stability(earlier.U, earlier.Vh, basis.U, basis.Vh)
        similarity = mixing_similarity(earlier.R, basis.R)
    return LayerStability(
        name=name,
        stability=stability,
        mixing_similarity=similarity,
        rank=rank,
        reference_rank=earlier.U.shape[1] if earlier is not None else 0,
        numerical_rank=basis.U.shape[1],
        effective_rank=effective_rank(s),
        singular_values=s,
    )
