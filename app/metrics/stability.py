"""Measurement of basis stability while a network is trained, spread over the processes."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from app.distributed.assignment import assign, svd_cost
from app.distributed.processes import Processes
from app.errors import DivergedError, UserError
from app.lowrank.conversion import LayerReport, get_layer
from app.lowrank.layer import FactoredLayer
from app.metrics.measurement import (
    LayerStability,
    Reference,
    Snapshot,
    mean,
    measure_dense,
    measure_factored,
)
from app.settings import StabilitySection


class StabilityTracker:
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
        unit: Literal["epochs", "steps"] = "epochs",
        reference_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare for these weights.

        Args:
            layers: weights of the dense network.
            processes: who shares the work.
            window: time between the bases that are compared.
            unit: in which time is counted; bases that another unit counted are of no use.
            reference_dtype: of the remembered bases. bfloat16 halves them and changes a stability
                by less than 1e-3.
        """
        owners = assign(
            [layer.groups * svd_cost(*layer.matrix_shape) for layer in layers], processes.count
        )
        self._mine = [
            layer for layer, owner in zip(layers, owners, strict=True) if owner == processes.index
        ]
        self._order = [layer.name for layer in layers]
        self._processes = processes
        self._window = window
        self._unit = unit
        self._dtype = reference_dtype
        self._references: dict[int, dict[str, Reference]] = {}

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
        earlier = self._references.get(time - self._window, {})
        references: dict[str, Reference] = {}
        mine: list[LayerStability] = []
        diverged: list[str] = []
        for layer in self._mine:
            snapshot = _measure(model, layer)
            if snapshot is None:
                diverged.append(layer.name)
                continue
            mine.append(
                snapshot.compare(
                    earlier.get(layer.name), name=layer.name, averaged=layer.is_linear_map
                )
            )
            references[layer.name] = snapshot.reference.kept(self._dtype)
        self._references[time] = references
        self._references = {t: r for t, r in self._references.items() if t > time - self._window}
        gathered = self._processes.gather((mine, diverged))
        if names := [name for _, part in gathered for name in part]:
            raise DivergedError(
                f"{names[0]} holds NaN or infinity after {time} {self._unit}: "
                f"the training has diverged"
            )
        rows = {row.name: row for part, _ in gathered for row in part}
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


def build_tracker(
    settings: StabilitySection, layers: Sequence[LayerReport], processes: Processes
) -> StabilityTracker | None:
    """Build the tracker of a configuration; None if nothing is to be measured.

    Raises:
        UserError: as :func:`select_weights`.
    """
    if not settings.enabled:
        return None
    return StabilityTracker(
        select_weights(layers, include=settings.include, exclude=settings.exclude),
        processes,
        window=settings.window,
        unit=settings.unit,
        reference_dtype=getattr(torch, settings.reference_dtype),
    )


def select_weights(
    layers: Sequence[LayerReport], *, include: Sequence[str], exclude: Sequence[str]
) -> list[LayerReport]:
    """Return the weights whose name matches one of the first patterns and none of the second.

    Args:
        layers: weights of the dense network.
        include, exclude: shell-style patterns of parameter names, such as "blocks.*.attn.*".

    Raises:
        UserError: a pattern that matches no weight: most likely it is misspelt.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                raise UserError(f"stability.{option}: the pattern {pattern!r} matches no weight")

    def matches(layer: LayerReport, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(layer.name, pattern) for pattern in patterns)

    return [x for x in layers if matches(x, include) and not matches(x, exclude)]


def mean_stability(rows: Sequence[LayerStability]) -> float:
    """Mean over the averaged weights whose stability is defined; NaN if there is none."""
    return mean([row.stability for row in rows if row.averaged])


def mean_mixing_similarity(rows: Sequence[LayerStability]) -> float:
    """Mean over the averaged weights whose mixing similarity is defined; NaN if there is none."""
    return mean([row.mixing_similarity for row in rows if row.averaged])


def _measure(model: nn.Module, report: LayerReport) -> Snapshot | None:
    """Measure a weight by the factors at hand, if it is low-rank; None if it is not finite."""
    layer = get_layer(model, report.name)
    if isinstance(layer, FactoredLayer):
        U, core, Vh = (
            factor.detach().reshape(report.groups, *factor.shape[-2:])
            for factor in (layer.U, layer.core, layer.Vh)
        )
        return measure_factored(U, core, Vh) if core.isfinite().all() else None
    weight = model.get_parameter(report.name).detach()
    stack = weight.reshape(report.groups, *report.matrix_shape)
    return measure_dense(stack) if stack.isfinite().all() else None
