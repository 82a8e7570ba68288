"""The decay of a product of two factors, in place of that of each of them."""

import copy

import pytest
import torch
from support.method_loop import CUT, make, muon, of_timm, train

DECAY = 0.3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2, decoupled_weight_decay=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "lion": lambda p: of_timm("Lion", p, lr=1e-2, weight_decay=0.2),
    "lamb": lambda p: of_timm("Lamb", p, lr=1e-2, weight_decay=0.2),
    "muon": muon,
}
DECOUPLED = {"adamw", "nadam", "radam", "fused", "lion", "lamb", "muon"}


@pytest.fixture(params=OPTIMIZERS)
def released(request, monkeypatch):
    """Return the name of an optimizer, and a network, optimizer and method after a release."""
    monkeypatch.setitem(make.__globals__["OPTIMIZERS"], request.param, OPTIMIZERS[request.param])
    parts = make(request.param, release=5, frobenius_decay=DECAY, release_warmup=0, **CUT)
    train(*parts, 7)
    return request.param, *parts


def test_it_is_the_gradient_of_half_the_squared_norm(released):
    kind, model, optimizer, _ = released
    factors = [p for i in (0, 2) for p in model[i].factors]
    loss = sum(DECAY / 2 * (model[i].A @ model[i].B).square().sum() for i in (0, 2))
    decay = torch.autograd.grad(loss, factors)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    twin = copy.deepcopy((model, optimizer))  # without the hooks of the method
    assert not twin[1]._optimizer_step_pre_hooks
    for mine, other in zip(model.parameters(), twin[0].parameters(), strict=True):
        other.grad = mine.grad.clone()
    theirs = [p for i in (0, 2) for p in twin[0][i].factors]
    with torch.no_grad():
        for parameter, term in zip(theirs, decay, strict=True):
            if kind in DECOUPLED:
                rate = next(g["lr"] for g in twin[1].param_groups if g["params"])
                parameter.sub_(rate * term)
            else:
                parameter.grad.add_(-term if kind == "momentum" else term)
    gradients = [(factor.grad, factor.grad.clone()) for factor in factors]
    optimizer.step()
    twin[1].step()
    for mine, other in zip(model.parameters(), twin[0].parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    for factor, (gradient, values) in zip(factors, gradients, strict=True):
        assert factor.grad is gradient  # norms that are read now are those of the loss
        assert torch.equal(gradient, values)


@pytest.mark.parametrize("named", [False, True])
def test_gradients_that_a_closure_makes_decay_alike(released, named):
    """As in Lightning, whose closures begin with zero_grad: the decay was lost there."""
    _, model, optimizer, _ = released
    twin = copy.deepcopy(model)
    theirs = copy.deepcopy(optimizer.state_dict())
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(3, 20)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    loss = closure()
    optimizer.step()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(theirs)
    found = optimizer.step(closure=closure) if named else optimizer.step(closure)
    assert found == loss
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_the_weight_decay_of_the_others_stays(released):
    kind, model, optimizer, _ = released
    factors = {id(p) for i in (0, 2) for p in model[i].factors}
    decays = {
        id(p) in factors: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decays[True] == 0
    assert decays[False] == (
        0.2
        if kind in {"sgd", "adam"}
        else OPTIMIZERS[kind]([torch.ones(1, 1)]).param_groups[0]["weight_decay"]
    )


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused", "fused adam"])
@pytest.mark.parametrize("overflow", [False, True])
def test_scaled_gradients_decay_alike(kind, overflow, monkeypatch):
    """GradScaler hands scaled gradients to fused optimizers, and unscaled ones to the others."""
    optimizers = {**OPTIMIZERS, "fused adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True)}
    monkeypatch.setitem(make.__globals__["OPTIMIZERS"], kind, optimizers[kind])
    model, optimizer, method = make(kind, release=5, frobenius_decay=DECAY, **CUT)
    model.float()
    for state in optimizer.state.values():
        state.clear()
    train(model, optimizer, method, 6)
    states = copy.deepcopy([part.state_dict() for part in (method, model, optimizer)])
    other = make(kind, seed=1, release=5, frobenius_decay=DECAY, **CUT)
    other[0].float()
    for part, state in zip((other[2], *other[:2]), states, strict=True):
        part.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x = torch.linspace(-1, 1, 60).reshape(3, 20)
    for parts, scale in ((other, None), ((model, optimizer, method), scaler)):
        parts[1].zero_grad()
        loss = parts[0](x).square().sum()
        if scale is None:
            loss.backward()
            parts[1].step()
        else:
            scale.scale(loss).backward()
            if overflow:
                model[4].weight.grad[0, 0] = torch.inf
            scale.step(optimizer)
            scale.update()
    expected = before if overflow else other[0].state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)


def test_a_factor_without_a_gradient_does_not_decay(released):
    _, model, optimizer, _ = released
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
