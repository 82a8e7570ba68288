"""Rules of optimizers: those that are shipped, and one that is registered from outside."""

import copy

import pytest
import torch
from support.documentation import blocks
from support.method_loop import CUT, OPTIMIZERS, make, muon, network, of_timm, train, weights
from torch import nn

from oialr import OIALR, OptimizerRule, register_optimizer
from oialr.layers.base import FactoredLayer
from oialr.optimizer_state import transported
from oialr.optimizers.registry import rule_of
from oialr.transport import Projection

NEW = {
    "adagrad": {"sum": "squared"},
    "adamax": {"exp_avg": "linear", "exp_inf": "absolute"},
    "lamb": {"exp_avg": "linear", "exp_avg_sq": "squared"},
    "lion": {"exp_avg": "linear"},
    "muon": {"momentum_buffer": "linear"},
}
"""What the state is of those of which no other module has tests of their own."""


@pytest.fixture(scope="module")
def outside():
    """Return what the page about optimizers defines: the class of an optimizer, registered."""
    (block,) = [b for b in blocks() if b.page == "docs/optimizers.md" and b.language]
    names = {"model": network()}
    exec(block.text, names)
    return names["Scaled"]


@pytest.mark.slow
def test_an_optimizer_from_outside_is_trained_through_all_events(outside):
    model = network()
    optimizer = outside(model.parameters(), lr=1e-2, weight_decay=0.1)
    options = {"delay": 5, "update_interval": 3, "layer_fraction": 1, **CUT}
    method = OIALR(model, optimizer, release=15, frobenius_decay=0.1, **options)
    dense = network()
    dense_optimizer = outside(dense.parameters(), lr=1e-2, weight_decay=0.1)
    train(dense, dense_optimizer, None, 5)
    events = train(model, optimizer, method, 5)
    for i in (0, 2):
        layer, state = model[i], dense_optimizer.state[dense[i].weight]
        mine = optimizer.state[layer.core]
        torch.testing.assert_close(mine["mean"], layer.U.T @ state["mean"] @ layer.Vh.T)
        squared = (layer.U**2).T @ state["power"] @ (layer.Vh**2).T
        torch.testing.assert_close(mine["power"], squared)
        assert mine["count"] == 5
    events += train(model, optimizer, method, 25, first=5)
    kinds = [event.kind for event in events]
    assert (kinds[0], kinds[-1]) == ("convert", "release")
    assert "cut" in kinds
    factors = [factor for i in (0, 2) for factor in model[i].factors]
    for factor in factors:
        state = optimizer.state[factor]
        assert state["mean"].shape == state["power"].shape == factor.shape
        assert state["count"] == 30
    (group,) = [g for g in optimizer.param_groups if any(p is factors[0] for p in g["params"])]
    assert group["weight_decay"] == 0
    assert all(torch.isfinite(w).all() for w in weights(model))


@pytest.mark.slow
def test_a_subclass_is_not_taken_for_what_it_is_derived_from():
    class Mine(torch.optim.AdamW):
        pass

    model = network()
    optimizer = Mine(model.parameters(), lr=1e-2)
    message = r"Mine .*\(it is derived from AdamW, and .*\): oialr.register_optimizer .*'reset'"
    with pytest.raises(ValueError, match=message):
        OIALR(model, optimizer, delay=2, update_interval=2)
    other = OIALR(model, optimizer, delay=2, update_interval=2, unknown_optimizer_state="reset")
    train(model, optimizer, other, 2)
    assert model[0].core not in optimizer.state
    assert "exp_avg" in optimizer.state[model[0].bias]
    register_optimizer(Mine, rule_of(torch.optim.AdamW(network().parameters())))
    model = network()
    optimizer = Mine(model.parameters(), lr=1e-2)
    train(model, optimizer, OIALR(model, optimizer, delay=2, update_interval=2), 2)
    assert optimizer.state[model[0].core]["step"] == 2


def test_a_class_may_be_registered_by_its_full_name():
    class Named(torch.optim.SGD):
        pass

    Named.__module__, Named.__qualname__ = "package.module", "Named"
    optimizer = Named(network().parameters(), lr=0.1)
    assert rule_of(optimizer) is None
    rule = OptimizerRule(linear={"momentum_buffer"})
    register_optimizer("package.module.Named", rule)
    assert rule_of(optimizer) is rule


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (int, OptimizerRule(), "takes an optimizer's class"),
        ("Lion", OptimizerRule(), "full name such as"),
        (torch.optim.ASGD, "exp_avg", "must be an OptimizerRule"),
    ],
)
def test_what_is_no_rule_is_refused(kind, rule, message):
    with pytest.raises(ValueError, match=message):
        register_optimizer(kind, rule)


def test_names_of_a_rule_are_names_and_mean_one_thing():
    with pytest.raises(ValueError, match="linear must be a collection of names"):
        OptimizerRule(linear="exp_avg")
    with pytest.raises(ValueError, match="exp_avg cannot be two of"):
        OptimizerRule(linear={"exp_avg"}, squared=["exp_avg"])


def test_decay_of_the_product_asks_for_a_rule():
    model = network()
    with pytest.raises(ValueError, match="frobenius_decay: it is not known how weights decay by"):
        OIALR(
            model,
            torch.optim.ASGD(model.parameters()),
            delay=2,
            update_interval=2,
            release=3,
            frobenius_decay=0.1,
            unknown_optimizer_state="reset",
        )


def test_an_object_in_the_state_has_no_known_meaning():
    model, optimizer, method = make("momentum", delay=2)
    train(model, optimizer, None, 1)
    optimizer.state[model[0].weight]["list"] = [torch.zeros(20, 32)]
    before = weights(model)
    train(model, optimizer, None, 1, first=1)
    with pytest.raises(ValueError, match=r"state 'list' of 0.weight is of no known kind"):
        method.step()
    assert not isinstance(model[0], FactoredLayer)
    assert len(before) == 3


def test_what_is_absolute_follows_as_the_root_of_a_square():
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    move = Projection(U[:, :6], Vh[:6].mT)
    rule = OptimizerRule(absolute={"size"})
    moved = transported({"size": G.abs()}, G, move, rule=rule, group={"lr": 0.1}, unknown="error")
    torch.testing.assert_close(moved["size"].square(), move.squared(G.square()))


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("event", ["convert", "cut", "release"])
def test_what_is_linear_follows_exactly_and_squares_as_they_should(kind, event):
    """By the formulas for the gradient of a core L^T W R, and of A and B, of W = A B."""
    released = 5 if event == "release" else None
    options = {"delay": 5, "update_interval": 4, "layer_fraction": 1, **CUT}
    model, optimizer, method = make(kind, release=released, **options)
    twin, twin_optimizer, twin_method = make(kind, **{**options, "update_interval": 100})
    if event != "cut":
        twin_method = None  # stays dense
    steps = 9 if event == "cut" else 5
    assert train(model, optimizer, method, steps)[-1].kind == event
    train(twin, twin_optimizer, twin_method, steps)
    for i in (0, 2):
        layer, other = model[i], twin[i]
        before = twin_optimizer.state[other.weight if event != "cut" else other.core]
        if event == "release":
            A, B = (factor.detach() for factor in layer.factors)
            moves = {layer.A: (None, B.mT), layer.B: (A, None)}
        elif event == "cut":
            moves = {layer.core: (other.U.T @ layer.U, other.Vh @ layer.Vh.T)}
        else:
            moves = {layer.core: (layer.U, layer.Vh.T)}
        for parameter, (L, R) in moves.items():
            state = optimizer.state[parameter]
            assert state.keys() == before.keys()
            assert {*state} - {"step"} == {*NEW[kind]}
            for key, meaning in NEW[kind].items():
                if meaning == "linear":
                    expected = _between(L, before[key], R)
                elif meaning == "squared":
                    expected = _between(_square(L), before[key], _square(R))
                else:
                    expected = _between(_square(L), before[key].square(), _square(R)).sqrt()
                    expected = torch.maximum(expected, state["exp_avg"].abs() / (1 - 0.9**steps))
                torch.testing.assert_close(state[key], expected)


def _between(L, M, R):
    M = M if L is None else L.mT @ M
    return M if R is None else M @ R


def _square(factor):
    return None if factor is None else factor.square()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("cutoff", [1e-9, 0.4])
def test_the_first_step_after_an_update_is_no_larger(kind, cutoff):
    """Than that of a twin without the update, from the same batch.

    Without a cut within 2 %: Lion's entries are as large in any basis, Muon's are bfloat16, and a
    second moment is right in expectation only.
    """
    options = {"delay": 10, "layer_fraction": 1, "cutoff": cutoff}
    parts = make(kind, update_interval=10, **options)
    twin = make(kind, update_interval=1000, **options)
    changes = []
    for model, optimizer, method in (parts, twin):
        train(model, optimizer, method, 20)
        before = weights(model)
        train(model, optimizer, method, 1, first=20)
        pairs = zip(weights(model), before, strict=True)
        changes.append([torch.linalg.norm(a - b) for a, b in pairs])
    for mine, theirs in zip(changes[0][:2], changes[1][:2], strict=True):
        assert 0 < mine <= theirs * (1.02 if cutoff < 0.1 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("stop", [8, 14])
def test_a_resumed_training_is_the_one_that_was_not_stopped(kind, stop):
    options = {"delay": 5, "release": 12, "layer_fraction": 1, **CUT}
    options["core_learning_rate_factor"] = 2.0
    model, optimizer, method = make(kind, **options)
    train(model, optimizer, method, stop)
    states = copy.deepcopy([part.state_dict() for part in (method, model, optimizer)])
    other, other_optimizer, other_method = make(kind, seed=1, **options)
    other_method.load_state_dict(states[0])
    other.load_state_dict(states[1])
    other_optimizer.load_state_dict(states[2])
    for parts in ((model, optimizer, method), (other, other_optimizer, other_method)):
        train(*parts, 10, first=stop)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_muon_is_unchanged_by_updates_that_cut_nothing(monkeypatch):
    """As far as the polynomial goes; in bfloat16, as torch computes it, to a few percent."""

    def polynomial(grad, coefficients, steps, eps):
        a, b, c = coefficients
        X = grad if grad.shape[0] <= grad.shape[1] else grad.mT
        X = X / X.norm().clamp(min=eps)
        for _ in range(steps):
            gram = X @ X.mT
            X = a * X + (b * gram + c * gram @ gram) @ X
        return X if grad.shape[0] <= grad.shape[1] else X.mT

    changes = []
    for exact in (True, False):
        if exact:
            monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", polynomial)
        else:
            monkeypatch.undo()
        model, optimizer, method = make("muon", layer_fraction=1, cutoff=1e-9)
        other, other_optimizer, other_method = make("muon", update_interval=10**6)
        start = weights(model)
        events = train(model, optimizer, method, 25)
        train(other, other_optimizer, other_method, 25)
        assert [event.kind for event in events] == ["convert"] + ["update"] * 6
        for mine, theirs, first in zip(weights(model), weights(other), start, strict=True):
            changes.append((mine - theirs).norm() / (theirs - first).norm())
    assert max(changes[:3]) < 1e-9
    assert 1e-6 < max(changes[3:]) < 0.1


class Attention(nn.Module):
    """A layer of attention without biases, and its output layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, bias=False)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.slow
def test_muon_refuses_stacks_before_the_training_and_not_within_it():
    model = Attention()
    options = {"delay": 1, "update_interval": 1}
    message = r"Muon takes matrices alone, and attention\.in_proj_weight would be a stack of 3: ex"
    with pytest.raises(ValueError, match=message):
        OIALR(model, muon(model.parameters()), attention_projection="separate", **options)
    optimizer = muon(model.parameters())
    method = OIALR(model, optimizer, attention_projection="packed", **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(5, 2, 16)).square().sum().backward()
        optimizer.step()
        method.step()
    assert method.converted


@pytest.mark.slow
def test_other_parameters_may_be_trained_beside_muon():
    model = network()
    optimizer = muon(model.parameters())
    others = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-2)
    method = OIALR(
        model, optimizer, delay=5, update_interval=3, release=12, layer_fraction=1, **CUT
    )
    optimizer.register_step_post_hook(lambda *_: others.step())
    bias = model[0].bias.detach().clone()
    events = train(model, optimizer, method, 20)
    assert events[-1].kind == "release"
    assert method.step_count == 20
    assert not torch.equal(bias, model[0].bias)
    assert others.state[model[0].bias]["step"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 5, 30])
def test_no_entry_moves_by_more_than_adamax_allows(steps):
    """Its denominator bounds the first moment, in any basis: an entry moves by the learning rate.

    By a hundredth more where the first moment has grown and the denominator decayed.
    """
    options = {"delay": steps, "update_interval": 4, "layer_fraction": 1, "cutoff": 0.4}
    model, optimizer, method = make("adamax", release=steps + 9, release_warmup=0, **options)
    train(model, optimizer, method, steps)
    for step in range(steps, steps + 12):
        layer = model[0]
        trained = [p for p in layer.parameters() if p.requires_grad and p.ndim == 2]
        before = [parameter.detach().clone() for parameter in trained]
        for parameter in trained:
            state = optimizer.state[parameter]
            corrected = state["exp_avg"].abs() / (1 - 0.9 ** state["step"])
            assert (corrected <= state["exp_inf"] * 1.01).all()
        train(model, optimizer, None, 1, first=step)
        for parameter, was in zip(trained, before, strict=True):
            assert (parameter - was).abs().max() <= 1.02e-2
        method.step()


@pytest.mark.slow
def test_lamb_counts_its_steps_alike_in_all_groups():
    """Also in those that the method adds when some steps have been taken."""
    model = network()
    optimizer = of_timm("Lamb", model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, None, 3)
    method = OIALR(
        model, optimizer, delay=2, update_interval=2, release=6, core_learning_rate_factor=2
    )
    train(model, optimizer, method, 8, first=3)
    assert [int(group["step"]) for group in optimizer.param_groups] == [11] * 4


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("always", [False, True])
def test_lamb_goes_on_adapting_to_layers_whose_decay_is_replaced(decay, always):
    model = network()
    optimizer = of_timm(
        "Lamb", model.parameters(), lr=1e-2, weight_decay=decay, always_adapt=always
    )
    OIALR(model, optimizer, delay=2, update_interval=2, release=4, frobenius_decay=0.1)
    weights_group, factors, dense = optimizer.param_groups
    assert factors["weight_decay"] == 0
    assert factors["always_adapt"] == (always or decay > 0)
    assert weights_group["always_adapt"] == dense["always_adapt"] == always


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.3),
        lambda p: of_timm("Lion", p, lr=0.1, weight_decay=0.3),
        lambda p: of_timm("Lion", p, lr=0.1, weight_decay=0.3, corrected_weight_decay=True),
        lambda p: of_timm("Lamb", p, lr=0.1, weight_decay=0.3, decoupled_decay=True),
    ],
)
def test_the_rate_of_decay_is_that_of_the_optimizer_itself(build):
    """With a gradient of zero it is all that a step does."""
    weight = nn.Parameter(torch.rand(6, 4, dtype=torch.float64) + 1)
    optimizer = build([weight])
    (group,) = optimizer.param_groups
    group["lr"] = 0.05  # of which the largest was twice as much
    weight.grad, before = torch.zeros_like(weight), weight.detach().clone()
    optimizer.step()
    rate = rule_of(optimizer).decay_rate(group)
    torch.testing.assert_close(weight.detach(), before * (1 - rate * 0.3))
