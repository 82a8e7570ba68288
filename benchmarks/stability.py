"""How fast and how exact is the polar factor by each method, against U Vh of torch.linalg.svd?

  python -m benchmarks.stability            # a minute on one core
  python -m benchmarks.stability --quick    # some seconds

For the weights of whole networks, Gaussian or with a power-law spectrum of condition 1e4. Times are
the best of several rounds, in milliseconds; errors are ||B - B64||_F / sqrt(r), B64 by the singular
value decomposition in float64, restricted to the r determined directions. The methods of
oialr.linalg.polar give singular values and numerical rank too. The last row of a network is one
measurement of all its weights: "chosen" is what the tracker would take, and similarity what the
comparison with the reference and the mixing add.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from oialr.linalg.polar import Method, choose_method, polar
from oialr.linalg.stability import DenseBasis, basis_stability, mixing_factor, mixing_similarity
from oialr.linalg.svd import numerical_rank

METHODS = ("torch.linalg.svd", *get_args(Method))

# Shapes as matrices, with the number of such weights.
NETWORKS = {
    "digits ViT (default configuration)": {
        (192, 64): 4,
        (64, 64): 4,
        (256, 64): 4,
        (64, 256): 4,
        (64, 4): 1,
        (10, 64): 1,
    },
    "ViT-B/16": {
        (2304, 768): 12,
        (768, 768): 13,
        (3072, 768): 12,
        (768, 3072): 12,
        (1000, 768): 1,
    },
    "convolutions of ResNet-RS 101": {
        (32, 27): 1,
        (64, 576): 1,
        (256, 64): 1,
        (128, 1152): 1,
        (512, 256): 1,
        (256, 2304): 1,
        (1024, 256): 1,
        (512, 4608): 1,
        (2048, 512): 1,
    },
}


def gaussian(m: int, n: int) -> Tensor:
    """Draw independent normal entries (m, n)."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n))


def power_law(m: int, n: int) -> Tensor:
    """Draw a matrix (m, n) with s_i = i^(-a), the condition number being 1e4."""
    k = min(m, n)
    U, V = (torch.linalg.qr(gaussian(side, k).double()).Q for side in (m, n))
    s = torch.arange(1, k + 1, dtype=torch.float64) ** (-4 / math.log10(k))
    return ((U * s) @ V.T).float()


SPECTRA = {"gaussian": gaussian, "power law": power_law}


def main() -> None:
    """Measure all networks and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--spectrum", choices=SPECTRA, default="gaussian")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="one round, nothing above 768 x 768")
    options = parser.parse_args()
    results = {
        network: measure_network(
            shapes, SPECTRA[options.spectrum], torch.device(options.device), quick=options.quick
        )
        for network, shapes in NETWORKS.items()
    }
    if options.json:
        print(json.dumps(results))
        return
    for network, rows in results.items():
        print(f"\n{network}\n\n| shape | count | chosen | similarity ms |", end="")
        print("".join(f" {method} ms | error |" for method in METHODS))
        print("| --- " * (4 + 2 * len(METHODS)) + "|")
        for row in rows:
            cells = [row["shape"], str(row["count"]), row["chosen"], f"{row['similarity_ms']:.2f}"]
            for method in METHODS:
                error = row["error"].get(method)
                cells += [f"{row['ms'][method]:.2f}", "" if error is None else f"{error:.0e}"]
            print("| " + " | ".join(cells) + " |")


def measure_network(
    shapes: dict[tuple[int, int], int],
    draw: Callable[[int, int], Tensor],
    device: torch.device,
    *,
    quick: bool,
) -> list[dict[str, Any]]:
    """Measure each shape; the last row is the sum over the network's weights."""
    rows = [
        {"count": count, **measure(draw(m, n).to(device), rounds=1 if quick else 5)}
        for (m, n), count in shapes.items()
        if not quick or m * n <= 768 * 768
    ]
    total = {method: sum(row["count"] * row["ms"][method] for row in rows) for method in METHODS}
    chosen = sum(row["count"] * row["ms"][row["chosen"]] for row in rows)
    summary = {
        "shape": "all",
        "count": sum(row["count"] for row in rows),
        "chosen": f"{chosen:.2f} ms",
        "similarity_ms": sum(row["count"] * row["similarity_ms"] for row in rows),
        "ms": total,
        "error": {},
    }
    return [*rows, summary]


def measure(matrix: Tensor, *, rounds: int) -> dict[str, Any]:
    """Measure one matrix."""
    m, n = matrix.shape
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    r = numerical_rank(s.to(matrix.dtype), (m, n))
    reference = U[:, :r] @ Vh[:r]
    ways: dict[str, Callable[[], Tensor]] = {
        "torch.linalg.svd": lambda: _by_torch(matrix, r),
        "svd": lambda: polar(matrix, "svd").factor,
        "eigh": lambda: polar(matrix, "eigh").factor,
    }
    errors = {
        name: float(torch.linalg.norm(way() - reference)) / math.sqrt(r)
        for name, way in ways.items()
    }
    basis = DenseBasis(ways["svd"](), r)
    R = mixing_factor(matrix)

    def compare() -> None:
        basis_stability(basis, basis)
        mixing_similarity(R, mixing_factor(matrix))

    return {
        "shape": f"{m} x {n}",
        "chosen": choose_method((m, n), matrix.dtype, matrix.device),
        "similarity_ms": _milliseconds(compare, matrix.device, rounds),
        "ms": {name: _milliseconds(way, matrix.device, rounds) for name, way in ways.items()},
        "error": errors,
    }


def _by_torch(matrix: Tensor, r: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = U[:, :r] @ Vh[:r]
    return product


def _milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the best time of several rounds of calls, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


if __name__ == "__main__":
    main()
