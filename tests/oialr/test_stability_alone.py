"""The tracker that needs a network and nothing else."""

import copy
import math
import sys

import pytest
import torch
from support.low_rank import low_rank
from torch import nn

import oialr
from oialr import OIALR, DivergedError, StabilityTracker, UserError
from oialr.convert import to_dense
from oialr.linalg.svd import economy_svd


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 24)
        self.conv = nn.Conv1d(24, 32, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens):
        x = torch.relu(self.conv(self.embedding(tokens).mT)).mT
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))


@pytest.mark.parametrize("release", [False, True])
def test_half_precision_is_measured_in_float32(release):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.Linear(24, 4))
    oialr.compress(model, target_size=0.7, release=release, rank_multiple=1)
    tracker = StabilityTracker(model, window=1)
    tracker.measure()
    model.bfloat16()
    rows = tracker.measure()
    assert all(row.stability > 0.99 for row in rows)
    assert all(row.singular_values.dtype == torch.float32 for row in rows)


NAMES = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]


def network():
    torch.manual_seed(0)
    return Network()


def shaken(model, scale=0.02):
    """Change the trained weights of a network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def by_definition(before, after, name, groups):
    """Stability of the dense weights, in float64; of each group's matrix, and then the mean."""
    values = []
    for old, new in zip(
        *(x.double().flatten(1).chunk(groups) for x in (before, after)), strict=True
    ):
        bases = []
        for matrix in (old, new):
            U, s, Vh = economy_svd(matrix)
            r = int((s > max(matrix.shape) * torch.finfo(torch.float32).eps * s[0]).sum())
            bases.append((U[:, :r] @ Vh[:r], r))
        (B_i, r_i), (B_j, r_j) = bases
        values.append(float((B_i * B_j).sum()) / min(r_i, r_j))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("prepare", "options"),
    [
        (lambda model: model, {}),
        (lambda model: low_rank(model, 0.4), {}),
        (lambda model: low_rank(model, 0.4, released=True), {}),
        # read as three matrices by the method, and as one by the tracker
        (lambda model: low_rank(model, 0.4, attention_projection="separate"), {}),
        (nn.DataParallel, {}),
    ],
    ids=["dense", "low-rank", "released", "separate", "wrapped"],
)
def test_stability_is_that_of_the_dense_weights(prepare, options):
    model = prepare(network())
    tracker = StabilityTracker(model, window=1, **options)
    inner = model.module if isinstance(model, nn.DataParallel) else model
    before = to_dense(copy.deepcopy(inner)).state_dict()
    first = tracker.measure()
    assert [row.name for row in first] == NAMES
    assert all(math.isnan(row.stability) for row in first)
    shaken(inner)
    after = to_dense(copy.deepcopy(inner)).state_dict()
    for row in tracker.measure():
        groups = 2 if row.name == "conv.weight" else 1
        expected = by_definition(before[row.name], after[row.name], row.name, groups)
        assert row.stability == pytest.approx(expected, abs=2e-4)  # polar factors in float32
        assert row.stability < 0.9999


@pytest.mark.slow
def test_it_follows_layers_that_turn_low_rank_meanwhile():
    model = network()
    tracker = StabilityTracker(model, window=1)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"cutoff": 0.3, "layer_fraction": 1.0, "rank_multiple": 1}
    method = OIALR(model, optimizer, delay=2, update_interval=2, **options)
    for step in range(6):
        tokens = torch.randint(30, (8, 7), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 5).backward()
        optimizer.step()
        method.step()
        rows = tracker.measure()
    assert method.converted
    assert [row.name for row in rows] == NAMES
    assert all(0.9 < row.stability <= 1.0001 for row in rows)
    assert {row.name: row.rank for row in rows if row.name != "head.weight"} == method.ranks()


def test_the_table_has_a_row_for_each_weight_and_measurement():
    model = network()
    tracker = StabilityTracker(model, window=2, exclude=["attention.*"])
    for _ in range(3):
        tracker.measure()
        shaken(model)
    table = tracker.to_pandas()
    assert list(table.columns[:4]) == ["measurement", "name", "averaged", "stability"]
    assert "singular_values" not in table
    assert list(table.name) == ["conv.weight", "head.weight"] * 3
    assert list(table.measurement) == [0, 0, 1, 1, 2, 2]
    means = table.groupby("measurement").stability.mean()
    assert means.isna().tolist() == [True, True, False]
    assert [row.stability for row in tracker.history[2]] == table.stability[4:].tolist()


def test_without_pandas_one_line_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        StabilityTracker(network()).to_pandas()


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="window must be at least 1, not 0"):
        StabilityTracker(network(), window=0)
    with pytest.raises(UserError, match=r"^include: the pattern 'nothing' matches no weight"):
        StabilityTracker(network(), include=["nothing"])
    with pytest.raises(ValueError, match="no linear layer, convolution or attention"):
        StabilityTracker(nn.Embedding(3, 3))
    model = network()
    tracker = StabilityTracker(model)
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"head\.weight holds NaN"):
        tracker.measure()
