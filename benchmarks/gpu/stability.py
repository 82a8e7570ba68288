"""The stability measure of all layers of ViT-B/16: polar factors by each method against SVDs.

One measurement of a network's 49 weights and its head: polar factor, singular values and numerical
rank of every weight. "svd" is torch.linalg.svd, restricted to the determined directions; the others
are those of oialr.linalg.polar. Errors are ||B - B64||_F / sqrt(r), B64 by the SVD in float64 on
the same device, restricted in the same way. Spectra: Gaussian, a power law of condition 1e4, and
half of the full rank. "similarity" is what comparing with an earlier basis and the mixing add.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.gpu.measuring import Results, choose_device, command_line, seconds_of
from benchmarks.gpu.networks import of_timm
from benchmarks.gpu.polynomials import cubic_coefficients
from benchmarks.stability import NETWORKS, gaussian, power_law
from oialr.layer_survey import survey
from oialr.linalg.polar import Method, choose_method, polar
from oialr.linalg.stability import DenseBasis, basis_stability, mixing_factor, mixing_similarity
from oialr.linalg.svd import numerical_rank
from oialr.placement.processes import Processes
from oialr.stability.tracker import BasisTracker

SMALL = {(48, 16): 2, (16, 16): 1, (16, 64): 2}


def half_rank(m: int, n: int) -> Tensor:
    """Draw a Gaussian product of half the full rank (m, n)."""
    r = min(m, n) // 2
    return gaussian(m, r) @ gaussian(r, n) / math.sqrt(r)


SPECTRA = {"gaussian": gaussian, "power law": power_law, "half rank": half_rank}


def by_products(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factors of a stack by products alone, restricted to the determined directions.

    With G = W^T W in float64 the iteration X <- X (a I + b X^T X) is run on k x k matrices: Z, the
    product of the polynomials, and G, which goes to 1 where a direction is determined, s > rtol
    s[0], and stays near 0 where it is noise. Then P <- 3 P^2 - 2 P^3 (McWeeny 1960) makes a
    projector of it, and B = W Z P. A Cholesky decomposition proves that what was kept is above the
    limit. Matrices with singular values near the limit, or in the power-law spectrum all along, are
    told: they need their eigenvectors.

    Args:
        stack: (g, m, n), m >= n, float32.

    Returns:
        B (g, m, n), ranks (g,), and whether both are proven to be those of the definition (g,).
    """
    g, m, k = stack.shape
    exact = stack.double()
    gram = exact.mT @ exact
    # trace(G^16)^(1/16) is above the largest eigenvalue, by k^(1/16) at most; power iteration with
    # G^8 comes close to it from below.
    eighth = gram / torch.linalg.matrix_norm(gram)[:, None, None]
    for _ in range(3):
        eighth = eighth @ eighth
    bound = torch.linalg.matrix_norm(eighth) ** 0.125 * torch.linalg.matrix_norm(gram)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(k, 1, generator=generator, dtype=torch.float64).to(stack.device).expand(g, k, 1)
    for _ in range(4):
        x = eighth @ x
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    largest = torch.linalg.vector_norm(gram @ x, dim=(1, 2))
    lower = m * torch.finfo(stack.dtype).eps * float((largest / bound).sqrt().min())
    bound = bound[:, None, None]
    first = gram = gram / bound
    Z = torch.eye(k, dtype=torch.float64, device=stack.device).expand(g, k, k)
    for a, b in cubic_coefficients(lower, 1e-9):
        polynomial = b * gram
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        Z = Z @ polynomial
        gram = (gram @ polynomial) @ polynomial
    P = gram
    for _ in range(3):
        square = P @ P
        P = 3 * square - 2 * (square @ P)
    ranks = P.diagonal(dim1=-2, dim2=-1).sum(-1).round().long()
    # All that was kept is above the limit, and all that was left out together below it.
    one = torch.eye(k, dtype=torch.float64, device=stack.device)
    kept = torch.linalg.cholesky_ex(first + (one - P) - (1.02 * lower) ** 2 * one).info == 0
    left_out = (first * (one - P)).sum((-2, -1)) < (0.9 * lower) ** 2
    B = exact @ ((Z @ P) / bound.sqrt())
    return B.to(stack.dtype), ranks, kept & left_out


STACKED: dict[str, Callable[[Tensor], Any]] = {
    "products, stacked": by_products,
    "eigvalsh, stacked": lambda stack: torch.linalg.eigvalsh(_gram(stack)),
    "eigh, stacked": lambda stack: torch.linalg.eigh(_gram(stack)),
    "eigh in float32, stacked": lambda stack: torch.linalg.eigh(_gram(stack).float()),
}


def _gram(stack: Tensor) -> Tensor:
    exact = stack.double()
    return exact.mT @ exact


def measure_stacked(
    weights: dict[tuple[int, int], Tensor],
    shapes: dict[tuple[int, int], int],
    exact: dict[tuple[int, int], tuple[Tensor, int]],
) -> Iterator[dict[str, Any]]:
    """Measure what factorizes all weights of one shape at a time."""
    stacks, references = [], []
    for shape, count in shapes.items():
        W, (B64, r64) = weights[shape], exact[shape]
        is_wide = shape[0] < shape[1]
        tall = W.T if is_wide else W
        stacks.append(tall.expand(count, *tall.shape).contiguous())
        references.append((B64.T if is_wide else B64, r64))
    device = stacks[0].device
    for method, call in STACKED.items():

        def one(call: Any = call) -> list[Any]:
            return [call(stack) for stack in stacks]

        row: dict[str, Any] = {"method": method}
        results = one()
        if method == "products, stacked":
            found = list(zip(results, references, strict=True))
            row["certain"] = all(bool(certain.all()) for (_, _, certain), _ in found)
            row["right_ranks"] = all(
                bool((ranks == r64).all()) for (_, ranks, _), (_, r64) in found
            )
            row["error"] = max(
                float(torch.linalg.norm(B[0].double() - B64)) / math.sqrt(max(1, r64))
                for (B, _, _), (B64, r64) in found
            )
        row["seconds"] = statistics.median(seconds_of(one, device) for _ in range(5))
        yield row


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
        for method in ("svd", "economy_svd", *(m for m in get_args(Method) if m != "svd"), None):
            total = worst = 0.0
            right_ranks = True
            for shape, count in shapes.items():
                W = weights[shape]

                def one(W: Tensor = W, method: Any = method) -> tuple[Tensor, int]:
                    if method == "svd":
                        return by_svd(W)
                    found = polar(W, "svd" if method == "economy_svd" else method)
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
        for row in measure_stacked(weights, shapes, exact):
            times = reference / row["seconds"] if reference else None
            results.add(spectrum=spectrum, times_faster_than_svd=times, **row)
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


def measure_tracker(options: Any, device: torch.device, results: Results) -> None:
    """Let the tracker measure a network twice, as it does in a training."""
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 48, "depth": 1} if options.dry_run else {}
    model = of_timm("vit_base_patch16_224", **small).to(device)
    tracker = BasisTracker(survey(model), Processes(), window=1, unit="steps")
    for time in range(3):
        seconds = seconds_of(partial(tracker.measure, model, time), device)
        if time:  # the first has nothing to compare with, and makes handles and workspaces
            results.add(method="StabilityTracker.measure", seconds=seconds)
    tracker.close()


def main() -> None:
    """Measure."""
    options = command_line(__doc__).parse_args()
    device = choose_device(dry_run=options.dry_run)
    results = Results("stability", options.output, device)
    measure(options, device, results)
    measure_tracker(options, device, results)


if __name__ == "__main__":
    main()
