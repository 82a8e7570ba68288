"""The FLOP model against torch's own counter, and the choice that follows from it."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app.lowrank.conversion import FACTORED
from app.lowrank.cost import SMALL_PRODUCT, cheapest_way, full_rank_cost, training_cost


def count(layer, x):
    """Return torch's count of multiply-adds of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("way", ["factored", "folded", "dense"])
def test_the_model_counts_what_torch_counts(m, n, way):
    rows, r = 50, 8
    dense = nn.Linear(n, m)
    layer = FACTORED[nn.Linear].from_dense(
        dense, torch.randn(m, r), torch.randn(r, r), torch.randn(r, n)
    )
    layer.execution = way
    x = torch.randn(rows, n, requires_grad=True)
    expected = training_cost(way, rows=rows, m=m, n=n, r=r)
    if way == "factored":
        expected -= rows * SMALL_PRODUCT * r
    assert count(layer, x) == pytest.approx(expected, rel=0.02)
    assert count(dense, x) == full_rank_cost(rows=rows, m=m, n=n)


@pytest.mark.parametrize(
    ("rows", "m", "n", "r", "way"),
    [
        (512, 1024, 1024, 256, "factored"),
        (512, 1024, 1024, 768, "factored"),  # few rows: folding costs more than it saves
        (4160, 768, 192, 96, "folded"),
        (4160, 192, 192, 192, "dense"),
        (1, 64, 64, 4, "factored"),
    ],
)
def test_the_cheapest_way(rows, m, n, r, way):
    assert cheapest_way(rows, m, n, r) == way


def test_no_rows_and_rank_one_have_a_way_too():
    for rows in (0, 1):
        assert cheapest_way(rows, 4, 4, 1) in {"factored", "folded", "dense"}
