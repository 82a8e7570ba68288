"""What the execution by cost would do: a table of layers, ranks, ways and FLOPs."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from app.training.folding import fold
from oialr.allocation import stored_parameters
from oialr.layer_survey import LayerReport
from oialr.layers.registry import claims, kind_of
from oialr.options import Execution

FRACTIONS = (0.1, 0.25, 0.5, 1.0)
LEGEND = {
    "layer": "parameter name; 0-3: those of the layers 0 to 3, which are alike",
    "rows": "tokens or positions that a process's backward pass sees",
    "rank": "shares of the full rank, or the present one",
    "way": "factored: ((x Vh^T) core^T) U^T; folded: the core into a factor first; dense: the "
    "weight first",
    "FLOPs": "of forward and backward, over those of the full-rank layer",
    "released": "FLOPs once both factors of W = A B are trained; dense: then W is trained",
}
"""What the columns say."""


@torch.no_grad()
def rows_per_sample(
    model: nn.Module, layers: Sequence[LayerReport], forward: Callable[[], Any], samples: int
) -> dict[str, int]:
    """Count the rows (tokens or output positions) that each layer sees per sample.

    Args:
        model: the dense network; left as it was.
        layers: those to watch.
        forward: calls the network once, on a batch of so many samples.
        samples: in that batch.

    Returns:
        Rows by dense parameter name; 0 for a layer that was not called.
    """
    rows = {layer.name: 0 for layer in layers}
    handles = []
    claimed = claims(model)
    for layer in layers:
        module = model.get_submodule(layer.name.rpartition(".")[0])
        if module in claimed:  # it is not called: the layer around it reads its weight
            _, module = claimed[module]

        def count(
            module: nn.Module,
            inputs: tuple[Any, ...],
            named: dict[str, Any],
            output: Any,
            name: str = layer.name,
        ) -> None:
            rows_of_call = kind_of(module).rows(module, (*inputs, *named.values()), output)
            rows[name] += rows_of_call // samples

        handles.append(module.register_forward_hook(count, with_kwargs=True))
    training = model.training
    try:
        model.eval()
        forward()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return rows


def explain(
    layers: Sequence[LayerReport],
    rows: dict[str, int],
    samples: int,
    ranks: dict[str, int | None] | None,
    execution: Execution = "auto",
    *,
    released: Mapping[str, str | None] | None = None,
    will_release: bool = False,
    has_target: bool = False,
) -> str:
    """Return the table: layer, shape, rank, way, FLOPs of a training step against full-rank.

    Equal layers are folded together, totals are its last rows, and below a blank line what the
    columns say.

    Args:
        layers: every multidimensional weight of the network.
        rows: per sample, by dense parameter name.
        samples: per backward pass of a process.
        ranks: the present rank of each layer, None for one that is full-rank as yet; or None: at
            several fractions of the full rank.
        execution: "auto", or the way that is forced.
        released: layers that a release has changed: "factors" where two of them are trained.
        will_release: show what a step takes after a release too.
        has_target: to a size, for which ranks pay.
    """
    lines = [["layer", "shape", "rows", "rank", "way", "FLOPs"]]
    forms = {name: form for name, form in (released or {}).items() if form}
    totals: dict[str, _Total] = defaultdict(_Total)
    will_release = will_release and not forms
    if will_release:
        lines[0].append("released")
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        if layer.stays_dense is not None:
            lines.append([layer.name, shape, "", "", f"dense: {layer.stays_dense}", ""])
            continue
        m, n = layer.matrix_shape
        adapter = layer.adapter
        b = rows[layer.name] * samples
        several = {f"{f:.0%}": max(1, round(f * layer.full_rank)) for f in FRACTIONS}
        present = ranks[layer.name] if ranks else None
        if not b:
            lines.append([layer.name, shape, "0", "", "not called in evaluation", ""])
            continue
        whole = adapter.full_rank_multiply_adds(rows=b, m=m, n=n)
        if ranks and present is None:
            lines.append([layer.name, shape, str(b), str(layer.full_rank), "full-rank", "1.00"])
            totals["present"].add(whole, 1.0, 1.0)
            continue
        shown = set()
        for share, r in {"present": present}.items() if present else several.items():
            after = layer.released_multiply_adds(b, r) / whole
            cheapest = adapter.cheapest_way(rows=b, m=m, n=n, r=r)
            way = cheapest if execution == "auto" else execution
            ratio = adapter.multiply_adds(way, rows=b, m=m, n=n, r=r) / whole
            if layer.name in forms:
                ratio = after
            stored = stored_parameters(layer.stack_shape, r, has_core=False)
            turns_dense = stored >= math.prod(layer.shape) or (
                has_target and layer.released_pays(1) and not layer.released_pays(r)
            )
            totals[share].add(whole, ratio, 1.0 if turns_dense else after)
            if r in shown:
                continue
            shown.add(r)
            shown_way = "two factors" if layer.name in forms else way
            lines.append([layer.name, shape, str(b), str(r), shown_way, f"{ratio:.2f}"])
            if will_release:
                lines[-1].append("dense" if turns_dense else f"{after:.2f}")
    entries = [
        (name, tuple(tuple(line[1:]) for line in group))
        for name, group in groupby(lines[1:], key=lambda line: line[0])
    ]
    lines[1:] = [[name, *line] for name, content in fold(entries) for line in content]
    for share, total in totals.items():
        lines.append(["together", "", "", share, "", f"{total.cost / total.whole:.2f}"])
        if will_release:
            lines[-1].append(f"{total.released / total.whole:.2f}")
    legend = [[column, LEGEND[column]] for column in lines[0] if column in LEGEND]
    return f"{_aligned(lines)}\n\n{_aligned(legend)}"


@dataclass
class _Total:
    """Multiply-adds of several layers."""

    whole: float = 0.0
    """At full rank."""
    cost: float = 0.0
    released: float = 0.0

    def add(self, whole: float, ratio: float, released: float) -> None:
        """Add a layer's, and the ratios of the other two to it."""
        self.whole += whole
        self.cost += ratio * whole
        self.released += released * whole


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Put cells below each other; a text without a rank may reach beyond its column."""
    lines = [[*line, *[""] * (len(lines[0]) - len(line))] for line in lines]
    widths = [
        max(len(line[i]) for line in lines if i != 4 or line[3]) for i in range(len(lines[0]))
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
