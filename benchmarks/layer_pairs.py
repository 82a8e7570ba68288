"""Up to which rank is a layer with two trained factors no slower than the dense one?

  python -m benchmarks.layer_pairs            # a minute on one core
  python -m benchmarks.layer_pairs --quick    # seconds

Forward and backward of single layers, by the CPU time of one thread: A B at several shares of the
dense layer's multiply-adds, over the dense layer. All of a row take their turns in one process, and
the figures are ratios of medians. Margins in oialr/layers/cost.py are chosen by it.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.runtime.host_memory import keep_freed_memory
from oialr.layer_survey import LayerReport, survey

SHARES = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Case:
    """A layer and what it is called with."""

    name: str
    layer: nn.Module
    shape: tuple[int, ...]
    by_direction: bool = False


def cases(*, quick: bool) -> list[Case]:
    """Return layers of Vision Transformers, of ResNet-20 in two widths and of an Autoformer."""
    linear = [(1088, 64, 256), (3200, 192, 192), (3200, 192, 768), (2000, 768, 768)]
    images = [(16, 16, 32, 1), (16, 32, 32, 2), (32, 32, 16, 1), (32, 32, 32, 1)]
    images += [(32, 64, 32, 2), (64, 64, 16, 1), (64, 128, 16, 2), (128, 128, 8, 1)]
    series = [(64, 64, 144), (128, 128, 144)]
    batch = 128
    if quick:
        linear, images, series, batch = linear[:1], images[:2], series[:1], 2
    found = [Case(f"linear {n} -> {m}", nn.Linear(n, m), (rows, n)) for rows, n, m in linear]
    for by_direction in (False, True):
        for n, m, size, stride in images:
            kernel = nn.Conv2d(n, m, 3, stride=stride, padding=1, bias=False)
            name = f"3x3 {n} -> {m}, {size} pixels" + (", stride 2" if stride > 1 else "")
            name += ", directions" if by_direction else ""
            found.append(Case(name, kernel, (batch, n, size, size), by_direction))
    for n, m, length in series:
        series_kernel = nn.Conv1d(n, m, 3, padding=1, bias=False)
        found.append(Case(f"3 {n} -> {m}, {length} steps", series_kernel, (32, n, length)))
    return found


def pairs(case: Case, report: LayerReport) -> dict[float, nn.Module]:
    """Make the layer with two factors at those shares that a rank comes near, by the share."""
    m, n = report.matrix_shape
    dense = report.adapter.full_rank_multiply_adds(rows=1, m=m, n=n)
    found: dict[float, nn.Module] = {}
    for share in SHARES:
        r = max(1, round(share * dense / report.released_multiply_adds(1, 1)))
        actual = report.released_multiply_adds(1, r) / dense
        if r <= report.full_rank and abs(actual - share) < 0.05:
            factors = torch.randn(m, r) / r**0.5, torch.randn(r, n) / n**0.5
            found[share], _ = report.adapter.factorize(case.layer, "weight", factors)
    return found


def seconds(layer: nn.Module, x: Tensor, gradient: Tensor) -> float:
    """Time forward and backward once, in CPU seconds.

    Gradients are new ones, as those of activations are in a network: nothing is added to them.
    """
    x.grad = None
    layer.zero_grad(set_to_none=True)
    start = time.process_time()
    layer(x).backward(gradient)
    return time.process_time() - start


def measure(case: Case, *, rounds: int) -> tuple[float, dict[float, float]]:
    """Return the seconds of the dense layer, and what those with two factors take over it."""
    torch.manual_seed(0)
    (report,) = survey(
        nn.Sequential(case.layer),
        keep_last_layer=False,
        convolutions="spatial" if case.by_direction else "matrix",
    )
    layers: dict[float, nn.Module] = {1.0: case.layer, **pairs(case, report)}
    x = torch.randn(case.shape)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)  # weights follow, as in the application
    x.requires_grad_()
    gradient = torch.randn_like(case.layer(x))
    times: dict[float, list[float]] = {share: [] for share in layers}
    for _ in range(rounds + 1):
        for share, layer in layers.items():
            times[share].append(seconds(layer, x, gradient))
    medians = {share: statistics.median(taken[1:]) for share, taken in times.items()}
    dense = medians.pop(1.0)
    return dense, {share: taken / dense for share, taken in medians.items()}


def main() -> None:
    """Measure each layer, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="small batches, once each")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    keep_freed_memory()  # as app.train does
    measured = {case.name: measure(case, rounds=1 if quick else 7) for case in cases(quick=quick)}
    if options.json:
        print(json.dumps(measured, indent=1))
        return
    print("| layer | dense, ms |", *(f" {share:.2f} |" for share in SHARES), sep="")
    print("| --- | --- |", *(" --- |" for _ in SHARES), sep="")
    for name, (dense, ratios) in measured.items():
        cells = (f" {ratios[share]:.2f} |" if share in ratios else "  |" for share in SHARES)
        print(f"| {name} | {1e3 * dense:.1f} |", *cells, sep="")


if __name__ == "__main__":
    main()
