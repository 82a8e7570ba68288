"""Second moments of what layers meet in a forward pass, for cuts that keep their outputs. Ours.

:mod:`oialr.linalg.weighting` has the mathematics, and adapters of layers know what meets the matrix
that a weight is read as.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from oialr.convert import get_layer
from oialr.layer_survey import LayerReport
from oialr.linalg.precision import full_precision
from oialr.linalg.weighting import root_of
from oialr.naming import some
from oialr.placement.processes import Processes

LARGEST_SIDE = 8192
"""Of a matrix whose inputs are looked at: a second moment has so many numbers squared."""


class InputMoments:
    """Looks at the inputs of dense layers, from :meth:`watch` to :meth:`end`.

    The latest pass of the network with gradients counts, with all calls of a layer in it: a
    validation leaves no trace, nor does a pass that was thrown away before. What is compiled is not
    seen.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at nothing yet."""
        self._model = model
        self._remove_hook: Any = None
        self._moments: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        """Of each moment, how many rows of inputs it is of."""

    @property
    def watching(self) -> bool:
        """Whether the next forward pass is looked at."""
        return self._remove_hook is not None

    def watch(self, reports: Iterable[LayerReport], *, without_gradients: bool = False) -> None:
        """Look at the inputs of layers from now on, and forget what was seen.

        The hook is one of all modules: a layer with hooks of its own could not be replaced, and
        copies of it would have them too. It goes with this object at the latest. (One that is told
        of arguments by name leaves a trace in torch 2.13 when it is removed.)

        Args:
            reports: of the layers, which are dense.
            without_gradients: look at passes without gradients, add them up, and at no others.
        """
        self.forget()
        moments, rows = self._moments, self._rows
        looked_at = WeakKeyDictionary(
            (get_layer(self._model, report.name), report)
            for report in reports
            if report.adapter.inputs_meet and _side_length(report) <= LARGEST_SIDE
        )
        if not looked_at:
            return
        network = weakref.ref(self._model)

        def passes_by() -> bool:
            transformed = torch._C._functorch.maybe_current_level() is not None
            others = torch.is_grad_enabled() == without_gradients
            return torch.compiler.is_compiling() or transformed or others

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if passes_by():
                return
            if module is network() and not without_gradients:
                moments.clear()
                rows.clear()
            report = looked_at.get(module)
            x = next((x for x in args if isinstance(x, Tensor)), None)
            if report is None or x is None or not _is_plain(x):
                return
            moment, count = _moment(module, report, x.detach())
            before = moments.get(report.name)
            moments[report.name] = moment if before is None else before + moment
            rows[report.name] = rows.get(report.name, 0) + count

        handle = register_module_forward_pre_hook(look)
        self._remove_hook = weakref.finalize(self, handle.remove)

    def end(self) -> None:
        """Look no more; what was seen is kept."""
        if self._remove_hook is not None:
            self._remove_hook()
        self._remove_hook = None

    def forget(self) -> None:
        """Look no more, and forget what was seen."""
        self.end()
        self._moments, self._rows = {}, {}

    def disregard(self) -> None:
        """Let what was seen count nothing, though it was seen."""
        for name, moment in self._moments.items():
            moment.zero_()
            self._rows[name] = 0

    def roots(
        self, reports: Sequence[LayerReport], processes: Processes | None = None
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
        """Return S of the mean over all processes for each layer that all have seen; collective.

        Args:
            reports: of the layers, the same on all processes.
            processes: of which each has seen its share; None: this one alone has seen all.

        Returns:
            S by name; and of those of which fewer rows were seen than the matrix has singular
            values, both numbers.
        """
        processes = processes or Processes()
        seen = processes.gather([self._rows.get(report.name) for report in reports])
        roots: dict[str, Tensor] = {}
        scarce: dict[str, tuple[int, int]] = {}
        for report, rows in zip(reports, zip(*seen, strict=True), strict=True):
            if None not in rows:  # none at all may have come to one of the processes
                S = root_of(processes.sum(self._moments.pop(report.name)))
                if S is not None:
                    roots[report.name] = S
                    if sum(rows) < report.full_rank:
                        scarce[report.name] = sum(rows), report.full_rank
        self.forget()
        return roots, scarce


class InputWatch:
    """Lets inputs be looked at in the step that ends with an event, and at no other time."""

    def __init__(
        self,
        moments: InputMoments | None,
        due: Callable[..., Sequence[Any]],
        dense: Callable[[], Iterable[LayerReport]],
    ) -> None:
        """Put the parts together.

        Args:
            moments: that look; None: nobody wants to know.
            due: returns the events that are due, or will be ``steps_ahead``.
            dense: returns the layers that are full-rank as yet.
        """
        self._moments, self._due, self._dense = moments, due, dense

    @property
    def is_on(self) -> bool:
        """Whether the next forward pass is looked at."""
        return self._moments is not None and self._moments.watching

    def disregard(self) -> None:
        """Let the last pass count nothing."""
        if self._moments is not None:
            self._moments.disregard()

    def look_ahead(self) -> None:
        """Begin or end, as the step says that was taken last."""
        if self._moments is None:
            return
        if self._due():
            self._moments.end()  # what was seen is kept for the event
        elif not self._due(steps_ahead=1):
            self._moments.forget()
        elif not self._moments.watching:
            self._moments.watch(self._dense())

    def begin_anew(self) -> None:
        """Forget what was seen: the network is another one now."""
        if self._moments:
            self._moments.forget()
        self.look_ahead()


def unseen(names: Sequence[str]) -> str:
    """Say of which weights nobody has seen inputs, for a warning."""
    return (
        f"{len(names)} weights are cut by their own spectra, since what meets them was not seen: "
        f"{some(names)}; layers of another kind, called by keyword or not at all, or compiled"
    )


def scarce(rows: Mapping[str, tuple[int, int]]) -> str:
    """Say of which weights few inputs were seen, for a warning.

    Args:
        rows: as of :meth:`InputMoments.roots`.
    """
    shown = [f"{name} ({seen} inputs, rank {rank})" for name, (seen, rank) in rows.items()]
    return (
        f"{len(rows)} weights are cut by what they compute of fewer inputs than their rank: "
        f"{some(shown)}"
    )


def _side_length(report: LayerReport) -> int:
    m, n = report.matrix_shape
    return n if report.adapter.inputs_meet == "columns" else m


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is one of numbers that lie in memory: not sparse, nor nested."""
    return not (x.is_nested or x.layout != torch.strided or x.is_meta)


@torch.no_grad()
def _moment(layer: nn.Module, report: LayerReport, x: Tensor) -> tuple[Tensor, int]:
    """Return X^T X of a layer's inputs X (b, n), in the precision of its weight, and b."""
    dtype = getattr(layer, report.name.rpartition(".")[2]).dtype
    with full_precision():
        inputs = report.adapter.inputs(layer, report.reading, x).to(dtype)
        return inputs.mT @ inputs, inputs.shape[-2]
