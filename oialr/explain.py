"""What the execution by cost would do: a table of layers, ranks, ways and FLOPs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from oialr.layer_survey import LayerReport
from oialr.layers.registry import claims, kind_of
from oialr.options import Execution

FRACTIONS = (0.1, 0.25, 0.5, 1.0)


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
    released: Mapping[str, str] | None = None,
    will_release: bool = False,
) -> str:
    """Return the table: layer, shape, rank, way, FLOPs of a training step against full-rank.

    Args:
        layers: every multidimensional weight of the network.
        rows: per sample, by dense parameter name.
        samples: per backward pass of a process.
        ranks: the present rank of each layer, None for one that is full-rank as yet; or None: at
            several fractions of the full rank.
        execution: "auto", or the way that is forced.
        released: layers that a release has changed: "factors" where two of them are trained.
        will_release: show what a step takes after a release too.
    """
    lines = [["layer", "shape", "rows", "rank", "way", "FLOPs"]]
    forms = released or {}
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
        several = {max(1, round(fraction * layer.full_rank)) for fraction in FRACTIONS}
        present = ranks[layer.name] if ranks else None
        if not b:
            lines.append([layer.name, shape, "0", "", "not called in evaluation", ""])
            continue
        if ranks and present is None:
            lines.append([layer.name, shape, str(b), str(layer.full_rank), "full-rank", "1.00"])
            continue
        for r in [present] if present else sorted(several):
            whole = adapter.full_rank_multiply_adds(rows=b, m=m, n=n)
            after = adapter.released_multiply_adds(rows=b, m=m, n=n, r=r) / whole
            if layer.name in forms:
                lines.append([layer.name, shape, str(b), str(r), "two factors", f"{after:.2f}"])
                continue
            cheapest = adapter.cheapest_way(rows=b, m=m, n=n, r=r)
            way = cheapest if execution == "auto" else execution
            ratio = adapter.multiply_adds(way, rows=b, m=m, n=n, r=r) / whole
            lines.append([layer.name, shape, str(b), str(r), way, f"{ratio:.2f}"])
            if will_release:
                lines[-1].append(f"{after:.2f}" if after < 1 else "dense")
    lines = [[*line, *[""] * (len(lines[0]) - len(line))] for line in lines]
    widths = [
        max(len(line[i]) for line in lines if i != 4 or line[3]) for i in range(len(lines[0]))
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
