"""Second moments of what layers meet in a forward pass, for cuts that keep their outputs. Ours.

:mod:`oialr.linalg.weighting` has the mathematics, and adapters of layers know what meets the matrix
that a weight is read as.
"""

import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from oialr.convert import get_layer
from oialr.layer_survey import LayerReport
from oialr.linalg.precision import full_precision
from oialr.linalg.weighting import root_of
from oialr.placement.processes import Processes

LARGEST_SIDE = 8192
"""Of a matrix whose inputs are looked at: a second moment has so many numbers squared."""


class InputMoments:
    """Looks at the inputs of dense layers, from :meth:`watch` to :meth:`end`.

    The latest forward pass with gradients counts, in training or evaluation mode: a validation
    leaves no trace. What is compiled already is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at nothing yet."""
        self._model = model
        self._remove_hook: Any = None
        self._moments: dict[str, Tensor] = {}

    @property
    def watching(self) -> bool:
        """Whether the next forward pass is looked at."""
        return self._remove_hook is not None

    def watch(self, reports: Iterable[LayerReport], *, without_gradients: bool = False) -> None:
        """Look at the inputs of layers from now on, and forget what was seen.

        The hook is one for all modules: a layer with hooks of its own could not be replaced, and
        copies of it would have them too. It goes with this object at the latest.

        Args:
            reports: of the layers, which are dense.
            without_gradients: look at passes without gradients, add them up, and at no others.
        """
        self.end()
        moments: dict[str, Tensor] = {}
        looked_at = WeakKeyDictionary(
            (get_layer(self._model, report.name), report)
            for report in reports
            if report.adapter.inputs_meet and _side_length(report) <= LARGEST_SIDE
        )

        def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            report = looked_at.get(layer)
            if report is None or torch.is_grad_enabled() == without_gradients:
                return
            x = next((value for value in inputs if isinstance(value, Tensor)), None)
            if x is None:
                return
            moment = _moment(layer, report, x)
            before = moments.get(report.name) if without_gradients else None
            moments[report.name] = moment if before is None else before + moment

        self._moments = moments
        handle = register_module_forward_pre_hook(look)
        self._remove_hook = weakref.finalize(self, handle.remove)

    def end(self) -> None:
        """Look no more; what was seen is kept."""
        if self._remove_hook is not None:
            self._remove_hook()
        self._remove_hook = None

    def roots(self, reports: Sequence[LayerReport], processes: Processes) -> dict[str, Tensor]:
        """Return S of the mean over all processes for each layer that all have seen; collective.

        Args:
            reports: of the layers, the same on all processes.
            processes: of which each has seen its share.
        """
        seen = processes.gather([report.name in self._moments for report in reports])
        roots = {}
        for report, flags in zip(reports, zip(*seen, strict=True), strict=True):
            if all(flags):
                S = root_of(processes.sum(self._moments.pop(report.name)))
                if S is not None:
                    roots[report.name] = S
        self._moments = {}
        return roots


def unseen(reports: Iterable[LayerReport], roots: Collection[str]) -> str | None:
    """Say of which layers nobody has seen inputs, if there are any; for a warning."""
    names = [report.name for report in reports if report.name not in roots]
    if not names:
        return None
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} weights are cut by their own spectra, since no inputs of theirs were seen: "
        f"{shown}; a layer of another kind, one that is not called, or a network that is compiled"
    )


def _side_length(report: LayerReport) -> int:
    m, n = report.matrix_shape
    return n if report.adapter.inputs_meet == "columns" else m


@torch.no_grad()
def _moment(layer: nn.Module, report: LayerReport, x: Tensor) -> Tensor:
    """Return X^T X of a layer's inputs X (b, n), in the precision of its weight."""
    dtype = layer.get_parameter(report.name.rpartition(".")[2]).dtype
    with torch.autocast(x.device.type, enabled=False), full_precision():
        inputs = report.adapter.inputs(layer, report.reading, x).to(dtype)
        return inputs.mT @ inputs
