"""The stability measure of all layers of ViT-B/16: polar factors by each method against SVDs.

One measurement of a network's 49 weights and its head: polar factor, singular values and numerical
rank of every weight. "svd" is torch.linalg.svd, restricted to the determined directions; the others
are those of app.linalg.polar. Errors are ||B - B64||_F / sqrt(r), B64 by the SVD in float64 on the
same device, restricted in the same way. Spectra: Gaussian, a power law of condition 1e4, and half
of the full rank. "similarity" is what comparing with an earlier basis and the mixing add.
"""

import math
import statistics
from typing import Any, get_args

import torch
from torch import Tensor

from app.linalg.polar import Method, choose_method, polar
from app.linalg.stability import DenseBasis, basis_stability, mixing_factor, mixing_similarity
from app.linalg.svd import numerical_rank
from benchmarks.gpu.measuring import Results, choose_device, command_line, seconds_of
from benchmarks.stability import NETWORKS, gaussian, power_law

SMALL = {(48, 16): 2, (16, 16): 1, (16, 64): 2}


def half_rank(m: int, n: int) -> Tensor:
    """Draw a Gaussian product of half the full rank (m, n)."""
    r = min(m, n) // 2
    return gaussian(m, r) @ gaussian(r, n) / math.sqrt(r)


SPECTRA = {"gaussian": gaussian, "power law": power_law, "half rank": half_rank}


def by_svd(W: Tensor) -> tuple[Tensor, int]:
    """Polar factor and rank by torch.linalg.svd alone, restricted to determined directions."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    r = numerical_rank(s, (W.shape[0], W.shape[1]))
    return U[:, :r] @ Vh[:r], r


def measure(options: Any, device: torch.device, results: Results) -> None:
    """Measure all methods on all spectra."""
    shapes = SMALL if options.dry_run else NETWORKS["ViT-B/16"]
    for spectrum, draw in SPECTRA.items():
        weights = {shape: draw(*shape).to(device) for shape in shapes}
        exact = {}
        for shape, W in weights.items():
            U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
            r = numerical_rank(s.to(W.dtype), shape)
            exact[shape] = (U[:, :r] @ Vh[:r], r)
        reference = None
        for method in ("svd", *(m for m in get_args(Method) if m != "svd"), None):
            total = worst = 0.0
            right_ranks = True
            for shape, count in shapes.items():
                W = weights[shape]

                def one(W: Tensor = W, method: Any = method) -> tuple[Tensor, int]:
                    if method == "svd":
                        return by_svd(W)
                    found = polar(W, method)
                    return found.factor, found.rank

                B, r = one()
                repeat = 1 if method == "svd" else 5
                total += count * statistics.median(seconds_of(one, device) for _ in range(repeat))
                B64, r64 = exact[shape]
                right_ranks &= r == r64
                error = float(torch.linalg.norm(B.double() - B64)) / math.sqrt(max(1, r64))
                worst = max(worst, error)
            reference = reference or total
            results.add(
                spectrum=spectrum,
                method=method or "chosen",
                seconds=total,
                times_faster_than_svd=reference / total,
                error=worst,
                right_ranks=right_ranks,
                chosen=None if method else choose_method(shape, W.dtype, device),
            )
        results.add(spectrum=spectrum, method="similarity", seconds=similarity(weights, shapes))


def similarity(weights: dict[tuple[int, int], Tensor], shapes: dict[tuple[int, int], int]) -> float:
    """Seconds that the comparison with an earlier basis and the mixing add."""
    total = 0.0
    for shape, W in weights.items():
        found = polar(W)
        basis, R = DenseBasis(found.factor, found.rank), mixing_factor(W)

        def one(W: Tensor = W, basis: DenseBasis = basis, R: Tensor = R) -> None:
            basis_stability(basis, basis)
            mixing_similarity(R, mixing_factor(W))

        one()
        total += shapes[shape] * statistics.median(seconds_of(one, W.device) for _ in range(5))
    return total


def main() -> None:
    """Measure."""
    options = command_line(__doc__).parse_args()
    device = choose_device(dry_run=options.dry_run)
    measure(options, device, Results("stability", options.output, device))


if __name__ == "__main__":
    main()
