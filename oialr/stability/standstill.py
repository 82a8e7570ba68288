"""Which layers have a basis that has stood still for a while: they can be converted.

What is remembered of a window are the weights at its beginning, which all processes hold alike: so
the state is the same everywhere and can be stored by any of them, and goes on with another number
of processes. The bases of both ends are computed when the window ends, each layer's by one process.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oialr.errors import DivergedError
from oialr.layer_survey import LayerReport
from oialr.linalg.polar import polar
from oialr.linalg.precision import full_precision
from oialr.linalg.stability import DenseBasis, basis_stability
from oialr.placement.assignment import assign, svd_cost
from oialr.placement.processes import Processes
from oialr.stability.measurement import mean


class Standstill:
    """Compares full-rank weights with those at the beginning of a window, one after the other."""

    def __init__(self, processes: Processes, *, threshold: float, window: int) -> None:
        """Begin without a window.

        Args:
            processes: who shares the work.
            threshold: stability from which a basis has stood still.
            window: optimizer steps.
        """
        self._processes = processes
        self._threshold = threshold
        self._window = window
        self._began: int | None = None
        self._earlier: dict[str, Tensor] = {}
        """Weights at the beginning, in host memory; the matrices that they are read as."""

    def look(self, step: int, weights: Mapping[LayerReport, Tensor]) -> list[str]:
        """End a window if it is over, and begin the next. A collective call.

        Args:
            step: optimizer steps taken.
            weights: matrices (m, n) or stacks (g, m, n) of the layers that are full-rank still.

        Returns:
            Names of those whose basis has stood still.

        Raises:
            DivergedError: a weight holds NaN or infinity; on all processes.
        """
        if self._began is not None and step - self._began < self._window:
            return []
        found = self._stabilities({r: w for r, w in weights.items() if r.name in self._earlier})
        if diverged := [name for name, stability in found.items() if stability == -math.inf]:
            raise DivergedError(
                f"{diverged[0]} holds NaN or infinity at step {step}: the training has diverged"
            )
        still = [name for name, stability in found.items() if stability >= self._threshold]
        self._began = step
        self._earlier = {
            report.name: weight.detach().to("cpu", copy=True)
            for report, weight in weights.items()
            if report.name not in still
        }
        return still

    def forget(self) -> None:
        """Let go of the window: there is nothing to be looked at any more."""
        self._began, self._earlier = None, {}

    @torch.no_grad()
    @full_precision()
    def _stabilities(self, weights: Mapping[LayerReport, Tensor]) -> dict[str, float]:
        """Return the stability of each layer over the window; NaN: unknown, -inf: it diverged."""
        if not weights:
            return {}
        costs = [svd_cost(report.stack_shape) for report in weights]
        owners = assign(costs, self._processes.count)
        mine = {
            report.name: _stability(self._earlier[report.name].to(weight), weight.detach())
            for (report, weight), owner in zip(weights.items(), owners, strict=True)
            if owner == self._processes.index
        }
        gathered: dict[str, float] = {}
        for part in self._processes.gather(mine):
            gathered |= part
        return {report.name: gathered[report.name] for report in weights}

    def state_dict(self) -> dict[str, Any]:
        """Return the window; it is the same on all processes, and no collective call."""
        return {"began": self._began, "weights": list(self._earlier.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a stored window."""
        self._began = state["began"]
        self._earlier = {name: weight.to("cpu") for name, weight in dict(state["weights"]).items()}


def _stability(earlier: Tensor, later: Tensor) -> float:
    """Compare the bases of two weights, matrix by matrix; the mean of a stack."""
    if not later.isfinite().all():
        return -math.inf
    stacks = [w.reshape(-1, *w.shape[-2:]) for w in (earlier, later)]
    try:
        return mean([basis_stability(_basis(a), _basis(b)) for a, b in zip(*stacks, strict=True)])
    except torch.linalg.LinAlgError:
        return math.nan


def _basis(matrix: Tensor) -> DenseBasis:
    found = polar(matrix)
    return DenseBasis(found.factor, found.rank)
