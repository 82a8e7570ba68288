"""What readings of a kernel keep, against kernels of which it is known."""

import itertools

import pytest
import torch

from benchmarks.kernels import kept, measure


def random(*shape):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    )


def test_a_reading_keeps_all_of_a_kernel_of_its_own_rank():
    outputs, inputs, size = 12, 10, 3
    matrix = (random(outputs, 2) @ random(2, inputs * size**2)).view(outputs, inputs, size, size)
    spatial = random(outputs * size, 2) @ random(2, inputs * size)
    spatial = spatial.view(outputs, size, inputs, size).transpose(1, 2)
    channels = torch.einsum(
        "rshw,or,is->oihw", random(2, 3, size, size), random(outputs, 2), random(inputs, 3)
    )
    numbers = {
        "matrix": 2 * (outputs + inputs * size**2),
        "spatial": 2 * (outputs + inputs) * size,
        "channels": 2 * 3 * size**2 + 2 * outputs + 3 * inputs,
    }
    kernels = {"matrix": matrix, "spatial": spatial, "channels": channels}
    for name, kernel in kernels.items():
        assert kept(kernel, numbers[name] / kernel.numel())[name] == pytest.approx(1)
        # One number less is a rank less.
        assert kept(kernel, (numbers[name] - 1) / kernel.numel())[name] < 0.999


def test_the_channels_are_those_of_the_best_pair_of_ranks():
    kernel = random(5, 4, 3, 3)
    budget = 0.5 * kernel.numel()
    U_o = torch.linalg.eigh(torch.einsum("oihw,pihw->op", kernel, kernel))[1].flip(1)
    U_i = torch.linalg.eigh(torch.einsum("oihw,ojhw->ij", kernel, kernel))[1].flip(1)
    best = 0.0
    for r_o, r_i in itertools.product(range(1, 6), range(1, 5)):
        if 9 * r_o * r_i + 5 * r_o + 4 * r_i <= budget:
            P, Q = U_o[:, :r_o] @ U_o[:, :r_o].T, U_i[:, :r_i] @ U_i[:, :r_i].T
            projected = torch.einsum("oihw,op,ij->pjhw", kernel, P, Q)
            best = max(best, float(projected.square().sum() / kernel.square().sum()))
    assert kept(kernel, 0.5)["channels"] == pytest.approx(best)


def test_rows_are_means_of_the_kernels_after_the_first_one():
    first, left, right, point = (
        random(8, 3, 3, 3),
        random(6, 8, 3, 3),
        random(6, 6, 3, 3),
        random(6, 6, 1, 1),
    )
    (row,) = measure([first, random(4, 4), left.float(), point, right], [0.3])
    assert (row["share"], row["outputs"], row["kernels"]) == (0.3, 6, 2)
    expected = (kept(left, 0.3)["spatial"] + kept(right, 0.3)["spatial"]) / 2
    assert row["spatial"] == pytest.approx(expected, rel=1e-5)
