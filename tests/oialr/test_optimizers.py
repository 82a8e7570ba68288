"""Rules of optimizers: those that are shipped, and one that is registered from outside."""

import pytest
import torch
from support.documentation import blocks
from support.method_loop import CUT, make, network, train, weights

from oialr import OIALR, OptimizerRule, register_optimizer
from oialr.layers.base import FactoredLayer
from oialr.optimizer_state import transported
from oialr.optimizers.registry import rule_of
from oialr.transport import Projection


@pytest.fixture(scope="module")
def outside():
    """Return what the page about optimizers defines: the class of an optimizer, registered."""
    (block,) = [b for b in blocks() if b.page == "docs/optimizers.md" and b.language]
    names = {"model": network()}
    exec(block.text, names)
    return names["Scaled"]


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
