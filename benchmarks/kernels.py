"""Which reading of a kernel keeps the most of it at the same size?

  python -m benchmarks.kernels STATE      # seconds; a checkpoint's state.pt, or another state_dict
  python -m benchmarks.kernels --quick    # of a small network as it begins

For every kernel (out, in, kh, kw) of a trained network with kh, kw > 1, without the first: the
share of its squared entries that is kept when it may store a share of its numbers, read as

- matrix: (out, in kh kw), a product of two factors, as the paper does;
- spatial: (out kh, in kw), a product of two factors (`oialr.convolutions: spatial`);
- channels: bases of the output and of the input channels and a core (r_o, r_i, kh, kw) between
  them, by the higher-order SVD (De Lathauwer et al. 2000), at the best of all pairs of ranks.

Rows are means over the kernels of the same number of output channels, in float64.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from app import models
from app.analysis.checkpoint import read_checkpoint
from app.training.foreign_files import CheckpointError

SHARES = (0.1, 0.2, 0.35, 0.5)


def of_matrix(matrix: Tensor, budget: float) -> float:
    """Return the share of the energy that two factors of at most ``budget`` numbers keep."""
    rank = int(budget // sum(matrix.shape))
    energies = torch.linalg.svdvals(matrix).square()
    return float(energies[:rank].sum() / energies.sum())


def of_channels(kernel: Tensor, budget: float) -> float:
    """Return the share that the best pair of channel bases with a core keeps."""
    outputs, inputs, height, width = kernel.shape
    U_o = torch.linalg.svd(kernel.flatten(1), full_matrices=False)[0]
    U_i = torch.linalg.svd(kernel.transpose(0, 1).flatten(1), full_matrices=False)[0]
    core = torch.einsum("oihw,or,is->rshw", kernel, U_o, U_i)
    kept = core.square().sum((2, 3)).cumsum(0).cumsum(1)
    r_o = torch.arange(1, kept.shape[0] + 1)[:, None]
    r_i = torch.arange(1, kept.shape[1] + 1)[None]
    numbers = r_o * r_i * height * width + r_o * outputs + r_i * inputs
    return float((kept * (numbers <= budget)).max() / kernel.square().sum())


def kept(kernel: Tensor, share: float) -> dict[str, float]:
    """Return what each reading keeps of a kernel (out, in, kh, kw) at a share of its numbers."""
    outputs, inputs, height, width = kernel.shape
    budget = share * kernel.numel()
    return {
        "matrix": of_matrix(kernel.flatten(1), budget),
        "spatial": of_matrix(
            kernel.transpose(1, 2).reshape(outputs * height, inputs * width), budget
        ),
        "channels": of_channels(kernel, budget),
    }


def measure(weights: Iterable[object], shares: Sequence[float]) -> list[dict[str, float]]:
    """Return a row for each share and number of output channels."""
    kernels = [
        weight.double()
        for weight in weights
        if isinstance(weight, Tensor) and weight.dim() == 4 and min(weight.shape[2:]) > 1
    ][1:]
    by_width = defaultdict(list)
    for kernel in kernels:
        by_width[len(kernel)].append(kernel)
    rows = []
    for share in shares:
        for outputs, group in sorted(by_width.items()):
            figures = [kept(kernel, share) for kernel in group]
            means = {
                name: sum(figure[name] for figure in figures) / len(figures) for name in figures[0]
            }
            rows.append({"share": share, "outputs": outputs, "kernels": len(group), **means})
    return rows


def main() -> None:
    """Measure what is asked for, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("state", type=Path, nargs="?", help="file of the weights")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="random weights in place of a file's")
    options = parser.parse_args()
    weights: Iterable[object]
    if options.quick:
        torch.manual_seed(0)
        model = models.build("cifar_resnet", {"depth": 8}, input_shape=(3, 32, 32), outputs=10)
        weights = [parameter.detach() for parameter in model.parameters()]
    elif options.state is None:
        parser.error("no file of weights; see --help")
    else:
        try:
            weights = read_checkpoint(options.state).weights.values()
        except (CheckpointError, OSError) as error:
            parser.error(str(error))
    rows = measure(weights, options.shares)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| stored | output channels | kernels | matrix | spatial | channels |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        figures = " | ".join(f"{row[name]:.3f}" for name in ("matrix", "spatial", "channels"))
        print(f"| {row['share']:g} | {row['outputs']} | {row['kernels']} | {figures} |")


if __name__ == "__main__":
    main()
