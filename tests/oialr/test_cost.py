"""The FLOP model against torch's own counter, and the choice that follows from it."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app.training.folding import fold
from app.training.layer_table import explain, rows_per_sample
from oialr.layer_survey import survey
from oialr.layers.cost import (
    MARGIN,
    SMALL_PRODUCT,
    cheapest_way,
    full_rank_cost,
    multiply_adds,
    rank_pays,
)
from oialr.layers.registry import kind_of
from oialr.schedule import rounded_up


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
    factors = torch.randn(m, r), torch.randn(r, r), torch.randn(r, n)
    _, layer = kind_of(dense).factorize(dense, "weight", factors)
    layer.execution = way
    x = torch.randn(rows, n, requires_grad=True)
    assert count(layer, x) == pytest.approx(multiply_adds(way, rows=rows, m=m, n=n, r=r))
    assert count(dense, x) == full_rank_cost(rows=rows, m=m, n=n)


@pytest.mark.parametrize("convolutions", ["matrix", "spatial"])
@pytest.mark.parametrize("stride", [1, 2, (1, 2), (2, 1)], ids=str)
def test_two_factors_of_a_convolution_take_what_torch_counts(convolutions, stride):
    dense = nn.Conv2d(4, 6, 3, stride=stride, padding=1, bias=False)
    (report,) = survey(nn.Sequential(dense), keep_last_layer=False, convolutions=convolutions)
    m, n = report.matrix_shape
    layer, _ = report.adapter.factorize(dense, "weight", (torch.randn(m, 3), torch.randn(3, n)))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    rows = dense(x)[:, 0].numel()
    counted = count(layer, x)
    assert counted == report.released_multiply_adds(rows, 3)
    assert count(dense, x) == report.adapter.full_rank_multiply_adds(rows=rows, m=m, n=n)


@pytest.mark.parametrize(
    ("layer", "options", "largest"),
    [
        (nn.Linear(40, 40), {}, 18),  # 0.9 * 40 * 40 / (40 + 40)
        (nn.Conv1d(8, 24, 3), {}, 10),  # 0.9 * 24 * 24 / (24 + 24)
        (nn.Conv2d(16, 16, 3), {}, 11),  # 0.8 * 16 * 144 / (16 + 144)
        (nn.Conv2d(16, 16, 3), {"convolutions": "spatial"}, 16),  # 0.7 * 48 * 48 / (48 + 48)
        (nn.Conv2d(16, 16, 3, stride=2), {"convolutions": "spatial"}, 11),  # / (48 + 2 * 48)
        (nn.Conv2d(16, 16, 3, stride=(1, 2)), {"convolutions": "spatial"}, 16),
        (nn.Embedding(40, 40), {"include_embeddings": True}, 40),
    ],
    ids=str,
)
def test_the_largest_rank_of_two_factors_that_pays(layer, options, largest):
    (report,) = survey(nn.Sequential(layer), keep_last_layer=False, **options)
    ranks = range(1, report.full_rank + 1)
    assert [r for r in ranks if report.released_pays(r)] == list(range(1, largest + 1))


def test_explain_tells_when_two_factors_take_more_than_the_weight_and_which_turn_dense():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Embedding(40, 40))
    options = {"keep_last_layer": False, "convolutions": "spatial", "include_embeddings": True}
    layers = survey(model, **options)
    rows = {"0.weight": 16, "1.weight": 16}
    for has_target in (False, True):
        table = explain(layers, rows, 2, None, will_release=True, has_target=has_target)
        lines = [line.split() for line in table.splitlines()[1:9]]
        released = {(line[0], line[3]): line[-1] for line in lines}
        # A rank of 24 stores what the weight does; its first convolution has twice the positions.
        assert released["0.weight", "5"] == "0.31"
        assert released["0.weight", "12"] == ("dense" if has_target else "0.75")
        assert released["0.weight", "24"] == "dense"
        assert released["1.weight", "10"] == "30.00"  # stores half of the rows, and multiplies
        assert released["1.weight", "20"] == "dense"


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


@pytest.mark.parametrize(("m", "n"), [(192, 192), (1024, 1024), (768, 192), (64, 576)])
def test_the_largest_rank_that_pays(m, n):
    budget, k, linear = MARGIN * 3 * m * n, min(m, n), 2 * (m + n) + SMALL_PRODUCT
    folded = budget / (2 * (m + n) + k)
    factored = (math.sqrt(linear**2 + 12 * budget) - linear) / 6  # 3 r^2 + linear r = budget
    largest = min(k, math.floor(max(folded, factored)))
    pays = [rank_pays(m, n, r) for r in range(1, k + 1)]
    assert pays == [True] * largest + [False] * (k - largest)
    assert pays == [rank_pays(n, m, r) for r in range(1, k + 1)]


def test_no_rows_and_rank_one_have_a_way_too():
    for rows in (0, 1):
        assert cheapest_way(rows, 4, 4, 1) in {"factored", "folded", "dense"}


def test_explain_counts_rows_and_names_the_cheapest_way():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 64), nn.Linear(64, 9)
    )
    layers = survey(model)
    batch = torch.zeros(2, 3, 8, 8)
    rows = rows_per_sample(model, layers, lambda: model(batch), 2)
    assert rows == {"0.weight": 16, "2.weight": 32, "3.weight": 32}
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    table, legend = map(str.splitlines, explain(layers, rows, 10, None).split("\n\n"))
    assert table[0].split() == ["layer", "shape", "rows", "rank", "way", "FLOPs"]
    # 0.1, 0.25, 0.5 and 1 of the rank 16, and no rank twice
    ranks = [line.split()[3] for line in table if line.startswith("2.weight")]
    assert ranks == ["2", "4", "8", "16"]
    assert "the network's last layer" in table[-5]
    assert [line.split()[0] for line in legend] == ["layer", "rows", "rank", "way", "FLOPs"]
    # Totals: each layer's cost at its share of its rank, over the sum of the full-rank ones.
    shapes = {"0.weight": (160, 32, 27), "2.weight": (320, 64, 16)}
    whole = sum(full_rank_cost(rows=b, m=m, n=n) for b, m, n in shapes.values())
    for line, fraction in zip(table[-4:], (0.1, 0.25, 0.5, 1), strict=True):
        cost = sum(
            multiply_adds(cheapest_way(b, m, n, r), rows=b, m=m, n=n, r=r)
            for b, m, n in shapes.values()
            for r in [round(fraction * min(m, n))]
        )
        assert line.split() == ["together", f"{fraction:.0%}", f"{cost / whole:.2f}"]
    way = cheapest_way(320, 64, 16, 4)
    ratio = multiply_adds(way, rows=320, m=64, n=16, r=4) / full_rank_cost(rows=320, m=64, n=16)
    expected = ["2.weight", "64x16", "320", "4", way, f"{ratio:.2f}"]
    assert expected in [line.split() for line in table]
    present = explain(layers, rows, 10, {"0.weight": 5, "2.weight": 3}).splitlines()
    assert [line.split()[3] for line in present[1:3]] == ["5", "3"]


def test_equal_layers_are_folded_together():
    block = [("attn.qkv", 1), ("attn.proj", 2), ("mlp.0.fc", 3)]
    entries = [("stem", 0)]
    entries += [(f"blocks.{i}.{name}.weight", x) for i in range(3) for name, x in block]
    entries += [("blocks.4.attn.qkv.weight", 1), ("blocks.5.attn.qkv.weight", 9), ("head", 0)]
    assert fold(entries) == [
        ("stem", 0),
        ("blocks.0-2.attn.qkv.weight", 1),
        ("blocks.0-2.attn.proj.weight", 2),
        ("blocks.0-2.mlp.0.fc.weight", 3),
        ("blocks.4.attn.qkv.weight", 1),  # a gap, and another content
        ("blocks.5.attn.qkv.weight", 9),
        ("head", 0),
    ]


def test_numbers_at_two_places_are_folded():
    """As in hierarchical networks: stages of blocks."""
    depths = {0: 2, 1: 2, 2: 3}
    entries = [(f"layers.{i}.blocks.{j}.fc", 1) for i, d in depths.items() for j in range(d)]
    assert fold(entries) == [("layers.0-1.blocks.0-1.fc", 1), ("layers.2.blocks.0-2.fc", 1)]
    assert fold([]) == []


def test_explain_folds_what_is_alike_at_the_present_ranks():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)], nn.Linear(16, 3))
    layers = survey(model)
    rows = {layer.name: 4 for layer in layers}
    ranks = {"0.weight": 4, "1.weight": 4, "2.weight": 3, "3.weight": None}
    lines = [line.split() for line in explain(layers, rows, 2, ranks).splitlines()]
    assert [line[0] for line in lines[1:5]] == ["0-1.weight", "2.weight", "3.weight", "4.weight"]
    cost = [multiply_adds(cheapest_way(8, 16, 16, r), rows=8, m=16, n=16, r=r) for r in (4, 4, 3)]
    whole = full_rank_cost(rows=8, m=16, n=16)
    assert lines[5] == ["together", "present", f"{(sum(cost) + whole) / (4 * whole):.2f}"]


@pytest.mark.parametrize("way", ["factored", "folded", "dense"])
def test_explain_shows_the_way_that_is_forced(way):
    layers = survey(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 9)))
    table = explain(layers, {"0.weight": 32, "1.weight": 32}, 10, {"0.weight": 4}, way)
    ratio = multiply_adds(way, rows=320, m=64, n=16, r=4) / full_rank_cost(rows=320, m=64, n=16)
    assert table.splitlines()[1].split() == ["0.weight", "64x16", "320", "4", way, f"{ratio:.2f}"]


def test_explain_of_attention_and_of_a_layer_that_evaluation_leaves_out():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4)
            self.auxiliary = nn.Linear(16, 16)

        def forward(self, x):
            x, _ = self.attention(x, x, x)
            return x + self.auxiliary(x) if self.training else x

    model = Network()
    layers = survey(model, keep_last_layer=False)
    rows = rows_per_sample(model, layers, lambda: model(torch.zeros(5, 2, 16)), 2)
    names = ["attention.in_proj_weight", "attention.out_proj.weight", "auxiliary.weight"]
    assert rows == dict(zip(names, [5, 5, 0], strict=True))
    last = explain(layers, rows, 10, None).split("\n\n")[0].splitlines()[-5]
    assert last.split(maxsplit=3) == [names[2], "16x16", "0", "not called in evaluation"]


def test_ranks_are_rounded_up_in_layers_of_twelve_multiples_and_more():
    assert rounded_up(77, full_rank=192, multiple=16) == 80
    assert rounded_up(80, full_rank=192, multiple=16) == 80
    assert rounded_up(77, full_rank=191, multiple=16) == 77
    assert rounded_up(195, full_rank=200, multiple=16) == 200
    assert rounded_up(77, full_rank=192, multiple=1) == 77


def test_smaller_layers_are_rounded_up_to_what_the_hardware_asks_for():
    assert rounded_up(25, full_rank=64, multiple=16, alignment=8) == 32
    assert rounded_up(51, full_rank=128, multiple=16, alignment=8) == 56
    assert rounded_up(9, full_rank=31, multiple=16, alignment=8) == 9
    assert rounded_up(31, full_rank=33, multiple=16, alignment=8) == 32
    assert rounded_up(33, full_rank=33, multiple=16, alignment=8) == 33
    assert rounded_up(77, full_rank=192, multiple=16, alignment=8) == 80
    assert rounded_up(25, full_rank=64, multiple=1, alignment=8) == 25
