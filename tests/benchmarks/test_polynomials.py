"""The polynomials of the benchmark on GPUs, against what they promise."""

import math

import pytest
import torch

from benchmarks.gpu.polynomials import cubic_coefficients, quintic_coefficients

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("lower", [1.0, 0.5, 1e-2, 1e-4, 1e-6])
def test_the_cubics_bring_the_whole_interval_to_one_in_few_steps(lower):
    x = torch.logspace(math.log10(lower), 0, 1000, dtype=torch.float64)
    steps = 0
    for a, b in cubic_coefficients(lower, EPS):
        x = a * x + b * x**3
        steps += 1
    assert (x - 1).abs().max() <= EPS * 1.01
    plain = torch.tensor(lower, dtype=torch.float64)  # Newton-Schulz without scaling
    plain_steps = 0
    while 1 - plain > EPS:
        plain = 1.5 * plain - 0.5 * plain**3
        plain_steps += 1
    assert steps <= max(1, plain_steps)
    if lower <= 1e-4:
        assert steps < 0.6 * plain_steps


def test_no_other_cubic_is_closer_to_one():
    lower = 0.1
    a, b = next(cubic_coefficients(lower, EPS))
    x = torch.linspace(lower, 1, 2000, dtype=torch.float64)

    def distance(a, b):
        return float((a * x + b * x**3 - 1).abs().max())

    for change in (1e-3, -1e-3):
        assert distance(a + change, b) > distance(a, b)
        assert distance(a, b + change) > distance(a, b)
        assert distance(a + change, b - change) > distance(a, b)


@pytest.mark.parametrize("lower", [0.5, 1e-2, 1e-4])
def test_the_quintics_bring_the_whole_interval_to_one_in_fewer_steps(lower):
    x = torch.logspace(math.log10(lower), 0, 1000, dtype=torch.float64)
    coefficients = list(quintic_coefficients(lower, EPS))
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    assert (x - 1).abs().max() <= EPS * 1.01
    assert len(coefficients) < len(list(cubic_coefficients(lower, EPS)))
