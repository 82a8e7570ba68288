"""What the execution by cost would do: a table of layers, ranks, ways and FLOPs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oialr.conversion import LayerReport, get_layer
from oialr.layers.attention import attention_of
from oialr.layers.cost import (
    cheapest_way,
    full_rank_cost,
    multiply_adds,
    released_multiply_adds,
)
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
    for layer in layers:
        # Dense attention uses the weight of its out_proj without calling it.
        module = get_layer(model, layer.name)
        module = attention_of(model, module) or module

        def count(
            module: nn.Module, inputs: tuple[Tensor, ...], output: Any, name: str = layer.name
        ) -> None:
            result = output[0] if isinstance(output, tuple) else output
            channels = result.shape[1 if isinstance(module, nn.modules.conv._ConvNd) else -1]
            rows[name] += result.numel() // channels // samples

        handles.append(module.register_forward_hook(count))
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
            whole = full_rank_cost(rows=b, m=m, n=n)
            after = released_multiply_adds(rows=b, m=m, n=n, r=r) / whole
            if layer.name in forms:
                lines.append([layer.name, shape, str(b), str(r), "two factors", f"{after:.2f}"])
                continue
            way = cheapest_way(b, m, n, r) if execution == "auto" else execution
            ratio = multiply_adds(way, rows=b, m=m, n=n, r=r) / whole
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
