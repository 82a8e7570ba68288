"""The methods of benchmarks/accuracy/methods.yaml on layers, against their formulas."""

import copy
import math

import pytest
import torch
from support.launching import ROOT
from torch import nn

from app import OIALR
from benchmarks.study.definition import read_study
from benchmarks.study.given_ranks import give_ranks
from oialr.convert import get_layer
from oialr.layer_survey import parameter_counts
from oialr.rank_choice import RankChoice

METHODS = ROOT / "benchmarks" / "accuracy" / "methods.yaml"
NAMES = ("0.weight", "2.weight", "5.weight")
FULL_RANKS = {"0.weight": 16, "2.weight": 20, "5.weight": 24}


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 20, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(180, 24, bias=False),
        nn.Linear(24, 4),
    ).double()
    nn.init.orthogonal_(model[5].weight)  # a flat spectrum, which no cutoff would cut
    return model


def options_of(method, **more):
    """Return what a method sets of OIALR, for a run of which the first step is the delay."""
    keys = read_study_of_methods().keys_of(method)
    options = {key.removeprefix("oialr."): value for key, value in keys.items() if "oialr" in key}
    steps = {key: 1 for key in ("delay", "release") if options.get(key) is not None}
    decay = {"frobenius_decay": 0.1} if options.get("frobenius_decay") else {}
    return {**options, **steps, "update_interval": 1000, **decay, **more}


def read_study_of_methods():
    """Return the methods, of no network."""
    return read_study(METHODS)


def convert(method, **more):
    """Take a step of a zero learning rate and convert; return the dense network and the other."""
    options = options_of(method, **more)
    dense = network()
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    low_rank = OIALR(model, optimizer, **options)
    model(torch.zeros(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert low_rank.step()
    return dense, model, low_rank


def truncated(weight, rank):
    """Return the best approximation of a rank, and the singular values that it keeps."""
    U, s, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).reshape(weight.shape), s[:rank]


def assert_truncated(dense, model, ranks):
    for name, rank in ranks.items():
        weight = get_layer(model, name).weight
        expected, _ = truncated(dense.get_parameter(name), rank)
        if name == "5.weight":  # singular vectors of equal values are any
            assert torch.linalg.matrix_rank(weight.detach().clone().flatten(1)) == rank
        else:
            torch.testing.assert_close(
                weight.detach().clone(), expected.detach(), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize("method", ["truncated", "truncated, cores recover", "frozen bases"])
def test_a_quarter_is_the_best_approximation_of_a_quarter_of_the_rank(method):
    dense, model, low_rank = convert(method)
    quarter = {name: math.ceil(k / 4) for name, k in FULL_RANKS.items()}
    assert low_rank.ranks() == quarter
    assert_truncated(dense, model, quarter)
    trained = sum(r * r for r in quarter.values()) + 24 * 4 + 4
    assert parameter_counts(model)[0] == trained


def test_no_delay_leaves_the_weight_and_trains_the_cores():
    dense, model, low_rank = convert("no delay")
    assert low_rank.ranks() == FULL_RANKS
    assert_truncated(dense, model, {"0.weight": 16, "2.weight": 20})


@pytest.mark.slow
def test_given_ranks_take_the_place_of_a_cutoff(monkeypatch):
    """As of Cuttlefish, with the layers that it factorizes."""
    monkeypatch.setattr(RankChoice, "after", RankChoice.after)  # put back after it
    ranks = {"0.weight": 5, "2.weight": 3, "5.weight": 9}
    give_ranks(ranks)
    dense, model, low_rank = convert("quarter")
    assert low_rank.ranks() == ranks
    assert_truncated(dense, model, ranks)
    # At a release a rank that saves nothing leaves the layer dense: 16 (16 + 27) >= 16 * 27.
    give_ranks({**ranks, "0.weight": 16})
    dense, model, _ = convert("spectral")
    assert type(model[0]) is nn.Conv2d
    assert_truncated(dense, model, {"0.weight": 16, "2.weight": 3})


@pytest.mark.parametrize(
    "method", ["spectral", "spectral, Frobenius decay", "Pufferfish", "truncated, factors recover"]
)
def test_released_factors_are_balanced_and_trained(method):
    """A = U diag(sqrt s), B = diag(sqrt s) Vh of the truncated weight (arXiv 2105.01029, 3.1)."""
    dense, model, low_rank = convert(method)
    quarter = {name: math.ceil(k / 4) for name, k in FULL_RANKS.items()}
    names = NAMES[1:] if method == "Pufferfish" else NAMES
    assert_truncated(dense, model, {name: quarter[name] for name in names})
    for name in names:
        rank = quarter[name]
        m, n = dense.get_parameter(name).flatten(1).shape
        factors = [p for p in get_layer(model, name).parameters() if p.requires_grad]
        assert sorted(p.numel() for p in factors) == sorted([m * rank, rank * n])
        _, s = truncated(dense.get_parameter(name), rank)
        for factor in factors:
            flat = factor.detach().reshape(factor.shape[0], -1)
            gram = flat @ flat.mT if flat.shape[0] == rank else flat.mT @ flat
            torch.testing.assert_close(gram, torch.diag(s).detach(), rtol=0, atol=1e-9)
    if method == "Pufferfish":
        assert low_rank.survey[0].stays_dense == "the network's first layer (keep_first_layer)"
