"""Conversions that wait until the rank pays, and the memory that a conversion needs."""

import copy

import pytest
import torch
from torch import nn

from app import OIALR
from oialr.convert import get_layer
from oialr.layers.base import FactoredLayer
from oialr.layers.cost import rank_pays
from oialr.memory import TensorMemory, tensors_of

K = 48


def spectrum_of(*, rank):
    """Return a weight (K, K) with so many large singular values; the others are small."""
    s = torch.full((K,), 1e-4)
    s[:rank] = torch.linspace(1, 0.5, rank)
    left, right = (torch.linalg.qr(torch.randn(K, K)).Q for _ in range(2))
    return left * s @ right


def make(ranks, **options):
    """Return a network with layers of these ranks, its optimizer and the method."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(K, K) for _ in ranks), nn.Linear(K, 3))
    for layer, rank in zip(model, ranks, strict=False):
        layer.weight.data = spectrum_of(rank=rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    arguments = {"delay": 2, "update_interval": 2, "layer_fraction": 1.0, "cutoff": 0.1, **options}
    return model, optimizer, OIALR(model, optimizer, **arguments)


def train(model, optimizer, method, steps):
    events = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, K)).square().mean().backward()
        optimizer.step()
        if event := method.step():
            events.append(event)
    return events


def is_dense(model, index):
    return not isinstance(get_layer(model, f"{index}.weight"), FactoredLayer)


@pytest.mark.slow
def test_a_layer_is_converted_when_its_spectrum_leaves_a_rank_that_pays():
    model, optimizer, method = make([K, 20], defer_conversion=True)
    (event,) = train(model, optimizer, method, 3)
    assert event.kind == "convert"
    assert is_dense(model, 0)
    assert not is_dense(model, 1)
    # Cut at once, yet to no less than half.
    assert method.ranks() == {"0.weight": K, "1.weight": K // 2}
    assert [layer.rank for layer in event.layers] == [K, K // 2]

    with torch.no_grad():
        model[0].weight.copy_(spectrum_of(rank=5))
    x = torch.randn(7, K)
    before = model[0](x)
    (event,) = train(model, optimizer, method, 1)
    assert event.kind == "cut"
    assert event.shapes_changed
    assert method.ranks() == {"0.weight": K // 2, "1.weight": 20}
    torch.testing.assert_close(model[0](x), before, atol=2e-3, rtol=0)
    core = model[0].core
    assert optimizer.state[core]["exp_avg"].shape == core.shape
    assert optimizer.state[core]["step"] == 4
    assert sum(p is core for p in optimizer.param_groups[0]["params"]) == 1


def test_a_layer_whose_rank_never_pays_stays_as_it_is():
    model, optimizer, method = make([K], defer_conversion=True)
    weight = model[0].weight
    events = train(model, optimizer, method, 6)
    assert [event.kind for event in events] == ["convert", "update", "update"]
    assert model[0].weight is weight
    assert not method.converted
    assert method.trainable_percent() == 100


def test_without_the_option_all_layers_are_converted():
    model, optimizer, method = make([K, 20])
    train(model, optimizer, method, 2)
    assert method.ranks() == {"0.weight": K, "1.weight": K}
    assert not is_dense(model, 0)


def test_a_rank_that_is_left_pays():
    model, optimizer, method = make([8, 20, 26, 30, 36, K], defer_conversion=True, rank_multiple=1)
    train(model, optimizer, method, 2)
    for i in range(6):
        rank = method.ranks()[f"{i}.weight"]
        assert is_dense(model, i) == (not rank_pays(K, K, rank))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_stored_state_tells_which_layers_wait(factor):
    options = {"defer_conversion": True, "core_learning_rate_factor": factor}
    model, optimizer, method = make([K, 20], **options)
    train(model, optimizer, method, 3)
    states = copy.deepcopy([part.state_dict() for part in (method, model, optimizer)])
    assert states[0]["ranks"] == {"0.weight": None, "1.weight": K // 2}

    other, its_optimizer, its_method = make([30, 10], **options)
    its_method.load_state_dict(states[0])
    other.load_state_dict(states[1])
    its_optimizer.load_state_dict(states[2])
    for parts in ((model, optimizer, method), (other, its_optimizer, its_method)):
        with torch.no_grad():
            parts[0][0].weight.mul_(torch.linspace(1, 0, K))
        train(*parts, 4)
    assert its_method.ranks() == method.ranks()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_conversion_holds_one_layer_twice_at_most():
    count = 12
    model, optimizer, method = make([K] * count, measure_memory=True)
    train(model, optimizer, method, 1)
    (event,) = train(model, optimizer, method, 1)
    with TensorMemory(tensors_of(model, optimizer)) as memory:
        after = memory.bytes
    square = K * K * 4
    # What is there in the end, and for one layer: weight and moments, U, s, Vh, copies of them.
    # All dense weights and moments together would be 36 squares.
    assert after < event.peak_bytes < after + 12 * square


def test_cores_stand_in_the_order_of_the_layers_whichever_comes_first():
    """As those of a resumed training do, whose moments are stored by their places."""
    model, optimizer, method = make(
        [K, 20], defer_conversion=True, core_learning_rate_factor=3.0, rank_multiple=1
    )
    train(model, optimizer, method, 3)
    assert is_dense(model, 0)
    assert not is_dense(model, 1)
    with torch.no_grad():
        model[0].weight.copy_(spectrum_of(rank=5))
    train(model, optimizer, method, 1)
    cores = [model[0].core, model[1].core]
    assert any([*map(id, g["params"])] == [*map(id, cores)] for g in optimizer.param_groups)


def test_steps_are_counted_from_when_layers_turn_low_rank():
    """A warm-up began where the conversion was put off, and not where it happened."""
    options = {"defer_conversion": True}
    model, optimizer, method = make([K, K], **options)
    train(model, optimizer, method, 3)
    counts = [method.steps_since_conversion]
    for layer in (model[0], model[1]):
        with torch.no_grad():
            layer.weight.copy_(spectrum_of(rank=5))
        for _ in range(2):
            train(model, optimizer, method, 1)
            counts.append(method.steps_since_conversion)
    assert counts == [None, 0, 1, 0, 1]
    _, _, its_method = make([30, 10], **options)
    state = method.state_dict()
    its_method.load_state_dict(state)
    assert its_method.steps_since_conversion == 1
    _, _, its_method = make([30, 10], **options)
    its_method.load_state_dict({**state, "turns": None})  # of an earlier version
    assert its_method.steps_since_conversion == 5
