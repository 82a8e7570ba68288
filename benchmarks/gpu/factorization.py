"""Conversion and update of whole networks on a GPU, by one method of factorization after another.

For every distinct shape of a network's layers one weight is factorized; seconds of a network are
sums over all its layers. An update factorizes a full core of half the rank. Spectra: Gaussian, as
at the start of a training, and a power law of condition 1e4. "orthonormality" is the spectral norm
of Q^T Q - I, the larger of U's and V's; "error" is ||W - U diag(s) Vh||_F / ||W||_F; both in
float64. The method's limit of orthonormality is oialr.linalg.svd.ORTHONORMAL, 1e-5 in float32.

Then the method itself converts and updates both networks: seconds of ``OIALR.step``.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from app.models.cifar_resnet import CifarResNet
from benchmarks.gpu.measuring import Results, choose_device, command_line, seconds_of, synchronize
from benchmarks.gpu.networks import low_rank_layers, of_timm
from benchmarks.gpu.polynomials import cubic_coefficients, quintic_coefficients
from benchmarks.stability import SPECTRA
from oialr.linalg.svd import Factors, economy_svd
from oialr.method import OIALR

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ViT-B/16": partial(of_timm, "vit_base_patch16_224"),
    "ResNet-RS 101": partial(of_timm, "resnetrs101"),
}
SMALL: dict[str, Callable[[], nn.Module]] = {
    "ViT-B/16": partial(of_timm, "vit_tiny_patch16_224", embed_dim=48, depth=1),
    "ResNet-RS 101": partial(CifarResNet, depth=8, width=4),
}


def by_driver(driver: str | None) -> Callable[[Tensor], Factors]:
    """Return an SVD of a tall matrix by a driver of cuSOLVER; on CPUs there is one alone."""

    def factorize(W: Tensor) -> Factors:
        return Factors(
            *torch.linalg.svd(W, full_matrices=False, driver=driver if W.is_cuda else None)
        )

    return factorize


def on_host(W: Tensor) -> Factors:
    """LAPACK's divide and conquer, on the host."""
    return Factors(*(x.to(W.device) for x in torch.linalg.svd(W.cpu(), full_matrices=False)))


def by_gram(W: Tensor) -> Factors:
    """W^T W = V diag(s^2) V^T and U = W V / s, in float64."""
    exact, s, V = _eigenvectors(W)
    return Factors(*(x.to(W.dtype) for x in ((exact @ V) / s, s, V.mT)))


def by_gram_and_qr(W: Tensor) -> Factors:
    """The same with W V = U R by Householder's QR: orthonormal also where s vanishes."""
    exact, _, V = _eigenvectors(W)
    U, R = torch.linalg.qr(exact @ V)
    diagonal = R.diagonal()
    U = U * torch.where(diagonal < 0, -1.0, 1.0)
    return Factors(*(x.to(W.dtype) for x in (U, diagonal.abs(), V.mT)))


def by_polar(W: Tensor) -> Factors:
    """W = B H by products, H = V diag(s) V^T and U = B V, in the precision of W."""
    return _from_polar(by_products(W, cubic_coefficients(1e-4, torch.finfo(W.dtype).eps)), W)


def by_polar_express(W: Tensor) -> Factors:
    """The same with the quintic polynomials of The Polar Express (arXiv 2505.16932)."""
    return _from_polar(polar_express(W), W)


def _from_polar(B: Tensor, W: Tensor) -> Factors:
    """Return the SVD of W by its polar factor B."""
    s, V = torch.linalg.eigh((H := B.mT @ W) + H.mT)
    return Factors(B @ V.flip(-1), s.flip(-1) / 2, V.flip(-1).mT)


def by_products(W: Tensor, coefficients: Iterator[tuple[float, float]]) -> Tensor:
    """Drive the singular values of W to 1 by X <- X (a I + b X^T X)."""
    X = W / torch.linalg.matrix_norm(W)
    for a, b in coefficients:
        gram = X.mT @ X
        gram.mul_(b).diagonal(dim1=-2, dim2=-1).add_(a)
        X = X @ gram
    return X


def polar_express(W: Tensor, lower: float = 1e-4) -> Tensor:
    """Drive the singular values of W to 1 by X <- X (a I + b G + c G^2), G = X^T X."""
    X = W / torch.linalg.matrix_norm(W)
    for a, b, c in quintic_coefficients(lower, torch.finfo(W.dtype).eps):
        gram = X.mT @ X
        polynomial = c * (gram @ gram)
        polynomial.add_(gram, alpha=b).diagonal(dim1=-2, dim2=-1).add_(a)
        X = X @ polynomial
    return X


METHODS: dict[str, Callable[[Tensor], Factors]] = {
    "gesvdj": by_driver("gesvdj"),
    "gesvda": by_driver("gesvda"),
    "Gram matrix": by_gram,
    "Gram matrix and QR": by_gram_and_qr,
    "polar, cubic": by_polar,
    "polar, quintic": by_polar_express,
    "economy_svd": economy_svd,
    "host": on_host,
    "gesvd": by_driver("gesvd"),  # last: it may take minutes
}


def _eigenvectors(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W, its singular values and right singular vectors, in float64."""
    exact = W.double()
    eigenvalues, V = torch.linalg.eigh(exact.mT @ exact)
    return exact, eigenvalues.clamp_min(0).sqrt().flip(-1), V.flip(-1)


def measure_shape(
    W: Tensor, method: Callable[[Tensor], Factors], *, repeat: int
) -> dict[str, float]:
    """Return seconds and errors of a method on a tall matrix."""
    factors = method(W)  # the first call makes handles and workspaces
    seconds = statistics.median(seconds_of(lambda: method(W), W.device) for _ in range(repeat))
    U, s, Vh = (factor.double() for factor in factors)
    exact = W.double()
    one = torch.eye(s.shape[-1], dtype=torch.float64, device=W.device)
    return {
        "seconds": seconds,
        "orthonormality": max(
            float(torch.linalg.eigvalsh(Q.mT @ Q - one).abs().max()) for Q in (U, Vh.mT)
        ),
        "error": float(torch.linalg.norm((U * s) @ Vh - exact) / torch.linalg.norm(exact)),
    }


@cache
def draw(spectrum: str, shape: tuple[int, int]) -> Tensor:
    """Draw a weight; each but once, since a power law takes longer than most factorizations."""
    return SPECTRA[spectrum](*shape)


def shapes_of(build: Callable[[], nn.Module], *, update: bool) -> Counter[tuple[int, int]]:
    """Count the tall shapes that a conversion factorizes, or an update at half the rank."""
    sides = [
        (max(report.matrix_shape), min(report.matrix_shape)) for report in low_rank_layers(build())
    ]
    return Counter((k // 2, k // 2) if update else (long, k) for long, k in sides)


def measure_methods(options: Any, device: torch.device, results: Results) -> None:
    """Measure every method on both networks, conversions of both spectra and an update."""
    networks = SMALL if options.dry_run else NETWORKS
    cases = [
        (network, event, spectrum)
        for event, spectrum in (
            ("conversion", "gaussian"),
            ("conversion", "power law"),
            ("update", "gaussian"),
        )
        for network in networks
    ]
    shapes_by_case = {
        (network, event): shapes_of(networks[network], update=event == "update")
        for network, event, _ in cases
    }
    for method in options.methods:
        factorize = METHODS[method]
        for network, event, spectrum in cases:
            if results.seconds > options.seconds * (0.5 if method in ("host", "gesvd") else 0.7):
                print(f"{method}: no time is left for {event} of {network}")
                continue
            measured, failed = [], None
            for shape, count in shapes_by_case[network, event].items():
                W = draw(spectrum, shape).to(device)
                try:
                    figures = measure_shape(W, factorize, repeat=1 if method == "gesvd" else 3)
                except torch.linalg.LinAlgError as error:
                    failed = f"{shape}: {str(error)[:100]}"
                    break
                measured.append((count, figures))
            if failed:
                results.add(method=method, network=network, event=event, failed=failed)
                continue
            results.add(
                method=method,
                network=network,
                event=event,
                spectrum=spectrum,
                seconds=sum(count * figures["seconds"] for count, figures in measured),
                orthonormality=max(figures["orthonormality"] for _, figures in measured),
                error=max(figures["error"] for _, figures in measured),
            )


@contextmanager
def peak_of(device: torch.device) -> Iterator[dict[str, float]]:
    """Tell the most memory that was taken within, in GiB over what was there before."""
    told: dict[str, float] = {}
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield told
    if device.type == "cuda":
        told["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        told["before_gib"] = before / 2**30


def measure_events(options: Any, device: torch.device, results: Results) -> None:
    """Let the method convert and update both networks."""
    for network, build in (SMALL if options.dry_run else NETWORKS).items():
        torch.manual_seed(0)
        model = build().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        method = OIALR(model, optimizer, delay=1, update_interval=1, layer_fraction=1.0, cutoff=0.2)
        for event in ("conversion", "update", "second update"):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            with peak_of(device) as memory:
                seconds = seconds_of(method.step, device)
            results.add(
                method="OIALR.step", network=network, event=event, seconds=seconds, **memory
            )


def main() -> None:
    """Measure methods, and then the method."""
    parser = command_line(__doc__)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    device = choose_device(dry_run=options.dry_run)
    results = Results("factorization", options.output, device)
    measure_events(options, device, results)
    measure_methods(options, device, results)


if __name__ == "__main__":
    main()
