"""Polynomials that drive singular values to 1, the best in each step."""

import math
from collections.abc import Iterator

import torch


def cubic_coefficients(lower: float, tolerance: float) -> Iterator[tuple[float, float]]:
    """Coefficients (a, b) of the Newton-Schulz iteration x <- a x + b x^3, the best in each step.

    On [l, u] the odd cubic closest to 1 in the maximum norm is scale * q(alpha x) with
    q(x) = (3 x - x^3) / 2, alpha = sqrt(3 / (u^2 + l u + l^2)) and
    scale = 4 / (2 + l u (l + u) alpha^3); it maps the interval to [2 - u', u'], u' = scale (Chen
    and Chow, A stable scaling of Newton-Schulz for improving the sign function computation of a
    Hermitian matrix, 2014). While l is small it multiplies l by 2.6 and not by 1.5. Composed
    greedily such polynomials are the best composition there is (Amsel et al., The Polar Express,
    arXiv 2505.16932, theorem 3.1).

    Args:
        lower: smallest singular value over the largest, in (0, 1].
        tolerance: yields end once all singular values are within this of 1.
    """
    l, u = lower, 1.0  # noqa: E741 - the interval's usual names
    while True:
        alpha = math.sqrt(3 / (u * u + l * u + l * l))
        scale = 4 / (2 + l * u * (l + u) * alpha**3)
        yield 1.5 * scale * alpha, -0.5 * scale * alpha**3
        l, u = 2 - scale, scale  # noqa: E741
        if u - 1 <= max(tolerance, 1e-15):  # what float64 resolves here
            return


def quintic_coefficients(lower: float, tolerance: float) -> Iterator[tuple[float, float, float]]:
    """Coefficients (a, b, c) of the best x <- a x + b x^3 + c x^5 on an interval, one by one.

    The best odd quintic on [l, u] equioscillates around 1 in four points, l, q, r and u (Amsel et
    al., The Polar Express, arXiv 2505.16932, section 3): Remez' exchange finds it.

    Args:
        lower: smallest singular value over the largest.
        tolerance: yields end once all singular values are within this of 1.
    """
    l, u = lower, 1.0  # noqa: E741
    while True:
        a, b, c, error = _best_quintic(l, u)
        yield a, b, c
        l, u = 1 - error, 1 + error  # noqa: E741
        if error <= max(tolerance, 1e-15):
            return


def _best_quintic(l: float, u: float) -> tuple[float, float, float, float]:  # noqa: E741
    if u - l < 1e-5 * u:  # beyond that the exchange cannot tell its points apart
        return 15 / 8, -10 / 8, 3 / 8, max(u - 1, 1 - l) ** 3
    points = torch.tensor([l, 0.75 * l + 0.25 * u, 0.25 * l + 0.75 * u, u], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for _ in range(30):
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones_like(points)).tolist()
        # Extrema of the quintic: a + 3 b x^2 + 5 c x^4 = 0.
        root = (9 * b * b - 20 * a * c) ** 0.5
        inner = sorted(((-3 * b + sign * root) / (10 * c)) ** 0.5 for sign in (1, -1))
        moved = points.clone()
        moved[1:3] = torch.tensor(inner, dtype=torch.float64)
        if torch.allclose(moved, points, rtol=1e-12, atol=0):
            break
        points = moved
    return a, b, c, abs(error)
