"""Measurement of basis stability while a network is trained, spread over the processes.

:class:`BasisTracker` is what the application and :class:`oialr.StabilityTracker` stand on.
"""

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from oialr.convert import get_layer
from oialr.errors import DivergedError, UserError
from oialr.layer_survey import LayerReport
from oialr.layers.base import FactoredLayer
from oialr.linalg.precision import without_autocast
from oialr.placement.assignment import assign, svd_cost
from oialr.placement.processes import Processes
from oialr.stability.background import Background
from oialr.stability.measurement import (
    LayerStability,
    Reference,
    Snapshot,
    mean,
    measure_dense,
    measure_factored,
    measure_released,
)

logger = logging.getLogger(__name__)


class BasisTracker:
    """Compares the basis of every weight with that of ``window`` epochs or steps before.

    Each weight has one owner, which alone remembers its bases, in host memory. The owner is a
    function of the dense shapes, so that it stays the same over conversions and cuts.
    """

    def __init__(
        self,
        layers: Sequence[LayerReport],
        processes: Processes,
        *,
        window: int,
        unit: Literal["epochs", "steps", "measurements"] = "epochs",
        reference_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare for these weights.

        Args:
            layers: weights of the dense network; those of complex numbers are left out.
            processes: who shares the work.
            window: time between the bases that are compared.
            unit: in which time is counted; bases that another unit counted are of no use.
            reference_dtype: of the remembered bases. bfloat16 halves them and changes a stability
                by less than 1e-3.
        """
        layers = [layer for layer in layers if not layer.is_complex]
        owners = assign([svd_cost(layer.stack_shape) for layer in layers], processes.count)
        self._mine = [
            layer for layer, owner in zip(layers, owners, strict=True) if owner == processes.index
        ]
        self._order = [layer.name for layer in layers]
        self._processes = processes
        self._window = window
        self._unit = unit
        self._dtype = reference_dtype
        self._references: dict[int, dict[str, Reference]] = {}
        self._background: Background[_Measured] = Background()

    @torch.no_grad()
    def measure(self, model: nn.Module, time: int) -> list[LayerStability]:
        """Measure all weights and remember their bases. A collective call.

        Args:
            model: the network, dense or low-rank, not wrapped.
            time: epochs or steps of training so far.

        Returns:
            One entry per weight, in the order of the network, on all processes.

        Raises:
            DivergedError: a weight holds NaN or infinity; on all processes.
        """
        assert not self.under_way
        with without_autocast():
            taken = {layer.name: _take(model, layer) for layer in self._mine}
            return self._share(self._measure_mine(taken, time))

    @torch.no_grad()
    def start(self, model: nn.Module, time: int) -> None:
        """Begin a measurement that a worker thread makes from a copy of this process's weights.

        What it computes is what :meth:`measure` would return now. One measurement at a time is
        under way, so that there is one copy.

        Args:
            model, time: as of :meth:`measure`.
        """
        with without_autocast():
            taken = {
                layer.name: [tensor.clone() for tensor in _take(model, layer)]
                for layer in self._mine
            }
        device = next(model.parameters()).device
        self._background.start(lambda: self._measure_mine(taken, time), device)

    @property
    def under_way(self) -> bool:
        """Whether a measurement was started and not finished."""
        return self._background.busy

    def finish(self) -> list[LayerStability]:
        """Return what :meth:`start` began. A collective call.

        Raises:
            DivergedError: as :meth:`measure`.
        """
        return self._share(self._background.result())

    def close(self) -> None:
        """Wait for what :meth:`start` began, on this process alone, and forget it."""
        self._background.close()

    def has_measured(self, time: int) -> bool:
        """Whether the bases of a time are remembered, those of this process or of all."""
        return time in self._references

    def _measure_mine(self, taken: Mapping[str, Sequence[Tensor]], time: int) -> "_Measured":
        """Measure this process's weights, from what :func:`_take` returned."""
        earlier = self._references.get(time - self._window, {})
        references: dict[str, Reference] = {}
        measured = _Measured(time, [], [], [])
        for layer in self._mine:
            tensors = taken[layer.name]
            try:
                snapshot = _measure(tensors)
            except torch.linalg.LinAlgError:
                measured.failed.append(layer.name)
                measured.rows.append(
                    LayerStability.undefined(
                        name=layer.name,
                        averaged=layer.is_linear_map,
                        rank=min(min(tensor.shape[-2:]) for tensor in tensors),
                    )
                )
                continue
            if snapshot is None:
                measured.diverged.append(layer.name)
                continue
            measured.rows.append(
                snapshot.compare(
                    earlier.get(layer.name), name=layer.name, averaged=layer.is_linear_map
                )
            )
            references[layer.name] = snapshot.reference.kept(self._dtype)
        kept = {t: r for t, r in self._references.items() if t > time - self._window}
        self._references = {**kept, time: references}
        return measured

    def _share(self, mine: "_Measured") -> list[LayerStability]:
        """Give all processes the measurements of all."""
        gathered = self._processes.gather(mine)
        if names := [name for part in gathered for name in part.diverged]:
            raise DivergedError(
                f"{names[0]} holds NaN or infinity after {mine.time} {self._unit}: "
                f"the training has diverged"
            )
        for name in (name for part in gathered for name in part.failed):
            logger.warning(
                "%s is not measured after %d %s: no decomposition of it converges",
                name,
                mine.time,
                self._unit,
            )
        rows = {row.name: row for part in gathered for row in part.rows}
        return [rows[name] for name in self._order]

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        """Return what this process remembers, a part for each time, which never changes."""
        return {
            self._part_name(time): {name: r.state_dict() for name, r in references.items()}
            for time, references in self._references.items()
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, dict[str, Any]]]) -> None:
        """Take back what this process owns from the parts of one or more processes."""
        self._references = {}
        names = {layer.name for layer in self._mine}
        for state in states:
            for part, references in state.items():
                time = int(part.rpartition("-")[-1])
                if part != self._part_name(time):
                    continue
                kept = self._references.setdefault(time, {})
                for name in references.keys() & names:
                    kept[name] = Reference.from_state_dict(references[name])

    def _part_name(self, time: int) -> str:
        return f"stability-{self._unit}-{time:08d}"


def select_weights(
    layers: Sequence[LayerReport],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    section: str = "",
) -> list[LayerReport]:
    """Return the weights whose name matches one of the first patterns and none of the second.

    Args:
        layers: weights of the dense network.
        include, exclude: shell-style patterns of parameter names, such as "blocks.*.attn.*".
        section: of a configuration, with a dot, where the patterns stand in one.

    Raises:
        UserError: a pattern that matches no weight: most likely it is misspelt.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                raise UserError(f"{section}{option}: the pattern {pattern!r} matches no weight")

    def matches(layer: LayerReport, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(layer.name, pattern) for pattern in patterns)

    return [x for x in layers if matches(x, include) and not matches(x, exclude)]


def mean_stability(rows: Sequence[LayerStability]) -> float:
    """Mean over the averaged weights whose stability is defined; NaN if there is none."""
    return mean([row.stability for row in rows if row.averaged])


def mean_mixing_similarity(rows: Sequence[LayerStability]) -> float:
    """Mean over the averaged weights whose mixing similarity is defined; NaN if there is none."""
    return mean([row.mixing_similarity for row in rows if row.averaged])


class _Measured(NamedTuple):
    """What one process has measured at one time."""

    time: int
    rows: list[LayerStability]
    diverged: list[str]
    """Names of weights that are not finite."""
    failed: list[str]
    """Names of weights of which no decomposition converges: their figures are NaN."""


def _take(model: nn.Module, report: LayerReport) -> list[Tensor]:
    """Return what a measurement needs of a weight, as stacks: its factors, or the weight."""
    layer = get_layer(model, report.name)
    if isinstance(layer, FactoredLayer) and layer.reading.stack_shape == report.stack_shape:
        return [
            factor.detach().reshape(report.groups, *factor.shape[-2:]) for factor in layer.operands
        ]
    if isinstance(layer, FactoredLayer):  # factorized in another reading
        weight = layer.form_weight().detach()
    else:
        weight = model.get_parameter(report.name).detach()
    return [report.reading.to_matrix(weight).reshape(report.groups, *report.matrix_shape)]


def _measure(taken: Sequence[Tensor]) -> Snapshot | None:
    """Measure a weight by the factors at hand, if it is low-rank; None if it is not finite."""
    if not all(tensor.isfinite().all() for tensor in taken):
        return None
    match len(taken):
        case 1:
            return measure_dense(*taken)
        case 2:
            return measure_released(*taken)
        case _:
            return measure_factored(*taken)
