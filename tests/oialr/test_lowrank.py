"""Factorized layers equal their dense twins; conversion; the update schedule."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from oialr.convert import factorize_layer, get_layer, to_dense
from oialr.layer_survey import parameter_counts, survey
from oialr.layers.base import FactoredLayer
from oialr.linalg.svd import economy_svd
from oialr.options import RankRule
from oialr.schedule import energy_rank, event_at, kept_rank, layers_in_turn, minimum_rank

KEEP = {"keep_first_layer": False, "keep_last_layer": False, "minimum_rank_fraction": 0.01}


def factorized(layer, rank=None):
    """Return the factorized twin of a layer, cut to a rank."""
    holder = nn.Sequential(copy.deepcopy(layer))
    weight = holder[0].weight
    U, s, Vh = economy_svd(weight.flatten(1))
    r = rank or len(s)
    return factorize_layer(
        holder, "0.weight", U[:, :r].contiguous(), torch.diag(s[:r]), Vh[:r].contiguous()
    )


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2)},
    {"padding": 1, "padding_mode": "replicate", "bias": False},
    {"kernel_size": 1},
    {"kernel_size": (3, 1), "padding": (1, 0)},
]


def layers():
    yield "linear", nn.Linear(12, 7), (5, 12)
    yield "linear without bias", nn.Linear(7, 12, bias=False), (3, 4, 7)
    yield "linear, empty batch", nn.Linear(12, 7), (0, 12)
    for options in CONVOLUTIONS:
        arguments = {"kernel_size": 3, **options}
        yield f"convolution {options}", nn.Conv2d(4, 10, **arguments), (2, 4, 9, 8)


@pytest.mark.parametrize("execution", ["auto", "factored", "folded", "dense"])
@pytest.mark.parametrize(("_name", "layer", "shape"), list(layers()), ids=lambda v: str(v)[:40])
def test_factorized_layer_equals_its_dense_twin(_name, layer, shape, execution):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    twin = factorized(layer)
    twin.execution = execution
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = twin(x), layer(y)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    if layer.bias is not None:
        torch.testing.assert_close(twin.bias.grad, layer.bias.grad)
    G = layer.weight.grad.reshape(twin.matrix_shape)
    torch.testing.assert_close(twin.core.grad, twin.U.T @ G @ twin.Vh.T)
    assert twin.U.grad is None
    assert twin.Vh.grad is None
    torch.testing.assert_close(twin.form_weight(), layer.weight)


def test_convolution_keeps_channels_last():
    layer = nn.Conv2d(4, 10, 3, padding=1)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    y = factorized(layer)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Conv2d(4, 10, 3, stride=2, padding=1)])
def test_factorized_layer_is_copied_pickled_and_turned_dense(layer):
    twin = factorized(layer, rank=4).eval()
    x = torch.randn((5, 12) if isinstance(layer, nn.Linear) else (2, 4, 8, 8))
    expected = twin(x)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), twin.to_dense()):
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
        assert not other.training
    dense = twin.to_dense()
    assert type(dense) is type(layer)
    assert dense.bias is twin.bias
    assert str(twin)


def test_forward_does_not_form_the_dense_weight_where_factors_are_cheaper():
    dense = nn.Linear(64, 64)
    x, flops = torch.randn(256, 64), []
    for layer in (factorized(dense, rank=16), dense):
        with FlopCounterMode(display=False) as counter:
            layer(x)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.6 * flops[1]


def test_saved_activations_have_the_width_of_the_rank():
    twin = factorized(nn.Linear(64, 64), rank=8)
    twin.execution = "factored"
    saved = []
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        twin(x)
    factors = {twin.U.data_ptr(), twin.core.data_ptr(), twin.Vh.data_ptr()}
    activations = {t.data_ptr(): t.numel() for t in saved if t.data_ptr() not in factors}
    assert sum(activations.values()) <= 2 * 32 * 8


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Flatten(),
        nn.Linear(16, 32),
        nn.Linear(32, 2, bias=False),
        nn.Linear(2, 32),
    )


def test_survey_names_every_weight_and_why_it_stays():
    reports = {r.name: r for r in survey(network(), **KEEP)}
    assert list(reports) == ["0.weight", "1.weight", "3.weight", "4.weight", "5.weight"]
    assert reports["0.weight"].stays_dense is None
    assert reports["0.weight"].matrix_shape == (16, 27)
    assert "grouped convolution (16 groups)" in reports["1.weight"].stays_dense
    assert reports["3.weight"].stays_dense is None


def test_first_and_last_layer_are_those_of_the_network():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    kept = {**KEEP, "keep_first_layer": True, "keep_last_layer": True}
    reasons = [report.stays_dense for report in survey(model, **kept)]
    assert "first" in reasons[0]
    assert reasons[1] is None
    assert "last" in reasons[2]
    # A head that cannot be factorized anyway: nothing else stays dense for its sake.
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    assert survey(model, **kept)[1].stays_dense == "too small to save anything at any rank"
    kept["keep_first_layer"] = False
    assert survey(model, **kept)[0].stays_dense is None


def test_shared_frozen_hooked_half_and_foreign_weights_stay_dense():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict(
        {
            "a": nn.Linear(16, 16),
            "b": nn.Linear(16, 16),
            "frozen": nn.Linear(16, 16).requires_grad_(False),
            "hooked": nn.Linear(16, 16),
            "hooked backward": nn.Linear(16, 16),
            "hooked weight": nn.Linear(16, 16),
            "low": nn.Linear(16, 16, dtype=torch.bfloat16),
            "complex": nn.Linear(16, 16, dtype=torch.complex64),
            "own": Own(16, 16),
            "embedding": nn.Embedding(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
        }
    )
    model["b"].weight = model["a"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    model["hooked backward"].register_full_backward_pre_hook(lambda *_: None)
    model["hooked weight"].weight.register_hook(lambda gradient: None)
    reasons = {report.name: report.stays_dense for report in survey(model, **KEEP)}
    assert "tied" in reasons["a.weight"]
    assert "not trained" in reasons["frozen.weight"]
    assert "hooks" in reasons["hooked.weight"]
    assert "hooks" in reasons["hooked backward.weight"]
    assert "hooks" in reasons["hooked weight.weight"]
    assert "bfloat16; weights must be float32 or float64" in reasons["low.weight"]
    assert "complex64; weights must be float32 or float64" in reasons["complex.weight"]
    assert "Own is never factorized" in reasons["own.weight"]
    assert "Embedding" in reasons["embedding.weight"]
    assert reasons["attention.in_proj_weight"] is None
    assert reasons["attention.out_proj.weight"] is None


def test_a_module_that_is_held_twice_is_replaced_in_both_places():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.append(model[0])
    U, s, Vh = economy_svd(model[0].weight)
    expected = model(torch.ones(1, 8))
    twin = factorize_layer(model, "0.weight", U, torch.diag(s), Vh)
    assert model[0] is twin
    assert model[2] is twin
    torch.testing.assert_close(model(torch.ones(1, 8)), expected)


def test_to_dense_restores_types_and_function():
    model = network()
    before = parameter_counts(model)
    bias = model[0].bias
    x = torch.randn(1, 3, 3, 3)
    model[1] = nn.Identity()
    expected = model(x)
    for report in survey(model, **KEEP):
        if report.stays_dense is None:
            weight = get_layer(model, report.name).weight
            U, s, Vh = economy_svd(weight.reshape(report.matrix_shape))
            factorize_layer(model, report.name, U, torch.diag(s), Vh)
    assert any(isinstance(module, FactoredLayer) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    to_dense(model)
    assert not any(isinstance(module, FactoredLayer) for module in model.modules())
    assert model[0].bias is bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert parameter_counts(model)[0] < before[0]  # without the grouped convolution


def test_events_come_at_the_delay_and_at_every_interval_after_it():
    events = {step: event_at(step, delay=5, update_interval=3) for step in range(1, 13)}
    assert {step: e for step, e in events.items() if e is not None} == {5: 0, 8: 1, 11: 2}


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(10, 0.1, [1, 2, 3]), (100, 0.29, [29, 58, 87, 100]), (4, 0.1, [1, 1, 1, 1, 2]), (3, 1, [3])],
)
def test_the_last_layers_come_first(count, fraction, expected):
    turns = [layers_in_turn(i + 1, count, layer_fraction=fraction) for i in range(len(expected))]
    assert turns == expected


CUT = {"rank_multiple": 1, "cutoff": 0.1, "largest_cut": 0.5, "minimum_rank_fraction": 0.01}


@pytest.mark.parametrize(
    ("s", "options", "expected"),
    [
        ([10, 5, 1.0, 0.99, 0.5], {}, 3),  # 1.0 is not below 0.1 * 10
        ([10, 0.1, 0.1, 0.1, 0.1], {}, 3),  # never below (1 - largest_cut) r = 2.5
        ([10, 0.1, 0.1, 0.1, 0.1], {"largest_cut": 0.9}, 1),
        ([10, 0.1, 0.1, 0.1, 0.1], {"minimum_rank_fraction": 0.04}, 4),
        ([10, 0.1], {"minimum_rank_fraction": 0.04}, 2),  # never growing
        ([0, 0, 0], {}, 3),  # a zero matrix tells nothing
        ([1.0], {}, 1),
        ([10] * 5 + [0.1] * 15, {"rank_multiple": 4}, 12),  # rounded up from the guard, 10
        ([10] * 5 + [0.1] * 15, {"rank_multiple": 4, "largest_cut": 0.9}, 8),
        ([10] * 5 + [0.1] * 15, {"rank_multiple": 13, "largest_cut": 0.9}, 5),  # 8 * 13 > 100
        ([10, 9, 8], {"rank_multiple": 4}, 3),  # never growing
        # Energies 16, 4, 1, 1.
        ([4, 2, 1, 1], {"retained_energy": 0.72, "largest_cut": 0.9}, 1),
        ([4, 2, 1, 1], {"retained_energy": 0.9, "largest_cut": 0.9}, 2),
        ([4, 2, 1, 1], {"retained_energy": 0.92, "largest_cut": 0.9}, 3),
        ([4, 2, 1, 1], {"retained_energy": 0.72}, 2),  # the guard, (1 - largest_cut) r
        ([0, 0, 0, 0], {"retained_energy": 0.99}, 2),
        # 1 is below the cutoff, 2 of 22 may go or not
        ([4, 2, 1, 1], {"cutoff": 0.4, "largest_energy_cut": 0.1}, 2),
        ([4, 2, 1, 1], {"cutoff": 0.4, "largest_energy_cut": 0.09}, 3),
        ([4, 2, 1, 1], {"cutoff": 0.4, "largest_energy_cut": 0.04}, 4),
        ([[4, 2, 1, 1], [4, 0, 0, 0]], {"retained_energy": 0.92, "largest_cut": 0.9}, 3),
    ],
)
def test_kept_rank(s, options, expected):
    rule = RankRule(**{**CUT, **options})
    assert kept_rank(torch.tensor(s), rule, full_rank=100) == expected


@pytest.mark.slow
@given(
    values=st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=12),
    share=st.floats(0.01, 0.99),
)
def test_energy_rank_is_the_smallest_that_loses_no_more(values, share):
    s = np.sort(np.array(values, dtype=np.float64))[::-1].copy()
    kept = energy_rank(torch.from_numpy(s), largest_loss=share)
    total, margin = (s**2).sum(), 1 + 1e-9
    assert (s[kept:] ** 2).sum() <= share * total * margin
    if kept:
        assert (s[kept - 1 :] ** 2).sum() > share * total / margin


@pytest.mark.parametrize(
    ("full", "fraction", "expected"), [(100, 0.01, 1), (150, 0.01, 2), (64, 0, 1), (100, 0.07, 7)]
)
def test_minimum_rank(full, fraction, expected):
    assert minimum_rank(full, fraction) == expected


def test_a_wanted_rank_keeps_to_the_bounds_of_a_cut():
    s = torch.tensor([4.0, 2, 1, 1])
    rule = RankRule(**{**CUT, "largest_cut": 0.9})
    assert kept_rank(s, rule, full_rank=100, wanted=1) == 1
    rule = RankRule(**{**CUT, "largest_cut": 0.9, "largest_energy_cut": 0.09})
    assert kept_rank(s, rule, full_rank=100, wanted=1) == 3


def test_a_rank_is_rounded_up_to_what_the_hardware_asks_for():
    s, rule = torch.tensor([10.0] * 5 + [0.1] * 15), RankRule(largest_cut=0.9)
    ranks = [kept_rank(s, rule, full_rank=k, alignment=8) for k in (31, 32, 64)]
    assert ranks == [5, 8, 8]
    assert kept_rank(s, rule, full_rank=64) == 5
