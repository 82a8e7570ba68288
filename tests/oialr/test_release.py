"""The release of both factors, in a training loop that is not ours, on one process."""

import copy
import math

import pytest
import torch
from support.method_loop import CUT, OPTIMIZERS, batch, make, network, train, weights
from torch import nn

from oialr import OIALR, prepare
from oialr.averages import WEIGHT_AVERAGE
from oialr.convert import get_layer
from oialr.layer_survey import survey
from oialr.layers.base import FactoredLayer
from oialr.placement.processes import Processes
from oialr.stability.tracker import BasisTracker


def factored(model, method):
    layers = [get_layer(model, report.name) for report in method.layers]
    return [layer for layer in layers if isinstance(layer, FactoredLayer)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("delay", [5, 12])
def test_the_way_of_a_release(kind, delay):
    model, optimizer, method = make(kind, delay=delay, release=12, layer_fraction=1, **CUT)
    events = train(model, optimizer, method, 11)
    assert method.steps_since_release is None
    assert method.event_due is False
    before = weights(model)
    stored = method.compression_percent()
    (event,) = train(model, optimizer, method, 1, first=11)
    kinds = [e.kind for e in (*events, event)]
    updates = [e for e in kinds if e in {"cut", "update"}]
    assert kinds == (["release"] if delay == 12 else ["convert", *updates, "release"])
    assert len(updates) == (0 if delay == 12 else 2)
    assert event.shapes_changed
    assert [layer.name for layer in event.layers] == ["0.weight", "2.weight"]
    layers = factored(model, method)
    assert layers
    for layer in layers:
        assert layer.released
        assert layer.rank * sum(layer.matrix_shape) < math.prod(layer.matrix_shape)
        assert layer.A.requires_grad
        assert layer.B.requires_grad
        torch.testing.assert_close(layer.A.mT @ layer.A, layer.B @ layer.B.mT)
        for factor in layer.factors:
            for key, value in optimizer.state[factor].items():
                if isinstance(value, torch.Tensor) and value.dim():
                    assert value.shape == factor.shape, key
                    assert torch.isfinite(value).all()
    assert before[0].shape == weights(model)[0].shape
    assert method.compression_percent() < stored
    total = sum(p.numel() for p in network().parameters())
    mine = sum(p.numel() for p in model.parameters())
    assert method.compression_percent() == pytest.approx(100 * mine / total)
    assert method.trainable_percent() == method.compression_percent()
    ranks = method.ranks()
    assert not train(model, optimizer, method, 20, first=12)
    assert method.ranks() == ranks
    assert method.steps_since_release == 20
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if kind != "muon" or p.ndim == 2]  # but for biases
    assert sorted(held) == sorted(map(id, trained))
    assert all(torch.isfinite(w).all() for w in weights(model))


@pytest.mark.slow
def test_a_release_leaves_the_function_where_nothing_is_cut():
    model, optimizer, method = make("adamw", release=9, cutoff=0.6, largest_cut=0.8)
    twin, twin_optimizer, twin_method = make("adamw", cutoff=0.6, largest_cut=0.8)
    for parts in ((model, optimizer, method), (twin, twin_optimizer, twin_method)):
        train(*parts, 9)
    # One of the layers may be cut by the release, the last update of all.
    for mine, theirs, layer in zip(weights(model), weights(twin), method.layers, strict=False):
        s = torch.linalg.svdvals(theirs)
        rank = method.ranks()[layer.name]
        lost = s[rank:].norm() if rank < layer.full_rank else 0.0
        assert torch.linalg.norm(mine - theirs) <= lost + 1e-9


@pytest.mark.slow
def test_layers_whose_factors_would_store_no_less_return_to_dense():
    model, optimizer, method = make("adamw", release=9, cutoff=1e-9)
    twin, twin_optimizer, twin_method = make("adamw", cutoff=1e-9)
    bias = model[0].bias
    events = train(model, optimizer, method, 9)
    train(twin, twin_optimizer, twin_method, 9)
    assert not method.converted
    assert type(model[0]) is nn.Linear
    assert model[0].bias is bias
    assert events[-1].shapes_changed
    assert method.trainable_percent() == method.compression_percent() == 100
    assert method.ranks() == {"0.weight": 20, "2.weight": 32}
    for mine, theirs in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(mine, theirs)
    core = twin[0].core
    U, Vh = twin[0].U.detach(), twin[0].Vh.detach()
    state, before = optimizer.state[model[0].weight], twin_optimizer.state[core]
    torch.testing.assert_close(state["exp_avg"], U @ before["exp_avg"] @ Vh)
    assert state["step"] == before["step"]
    train(model, optimizer, method, 5, first=9)


def test_a_deferred_layer_stays_dense_at_a_release_that_would_save_nothing():
    model, optimizer, method = make("sgd", release=5, cutoff=1e-9)
    weight = model[0].weight
    (event,) = train(model, optimizer, method, 5)
    assert (event.kind, event.shapes_changed) == ("release", False)
    assert model[0].weight is weight


def test_moments_at_a_release_from_the_dense_weight():
    """M_A = M B^T and M_B = A^T M exactly, second moments by the squares of the factors."""
    model, optimizer, method = make("adam", release=5, **CUT)
    dense, dense_optimizer, _ = make("adam")
    train(model, optimizer, method, 5)
    train(dense, dense_optimizer, None, 5)
    for i in (0, 2):
        before, (A, B) = dense_optimizer.state[dense[i].weight], model[i].factors
        A_, B_ = A.detach(), B.detach()
        M, v = before["exp_avg"], before["exp_avg_sq"]
        torch.testing.assert_close(optimizer.state[A]["exp_avg"], M @ B_.mT)
        torch.testing.assert_close(optimizer.state[B]["exp_avg"], A_.mT @ M)
        torch.testing.assert_close(optimizer.state[A]["exp_avg_sq"], v @ B_.square().mT)
        torch.testing.assert_close(optimizer.state[B]["exp_avg_sq"], A_.square().mT @ v)
        for factor in (A, B):
            assert optimizer.state[factor]["step"] == before["step"] == 5
        assert optimizer.state[A]["step"] is not optimizer.state[B]["step"]


@pytest.mark.slow
def test_moments_at_a_release_from_cores():
    """With core = L diag(s) R^T: M_A = U L M' sqrt(s), M_B = sqrt(s) M' R^T Vh, M' = L^T M R."""
    options = {"delay": 5, "update_interval": 4, "layer_fraction": 1, **CUT}
    model, optimizer, method = make("adam", release=12, **options)
    twin, twin_optimizer, twin_method = make("adam", **options)
    train(model, optimizer, method, 12)
    train(twin, twin_optimizer, twin_method, 12)
    for i in (0, 2):
        A, B = model[i].factors
        layer, before = twin[i], twin_optimizer.state[twin[i].core]
        L, s, Rh = torch.linalg.svd(layer.core.detach())
        r = model[i].rank
        L, s, Rh = L[:, :r], s[:r], Rh[:r]
        U, Vh = layer.U @ L, Rh @ layer.Vh
        signs = torch.sign((U * A).sum(0)).detach()
        L, U, Rh, Vh = L * signs, U * signs, Rh * signs[:, None], Vh * signs[:, None]
        torch.testing.assert_close(A.detach(), (U * s.sqrt()).detach())
        M = L.mT @ before["exp_avg"] @ Rh.mT
        torch.testing.assert_close(optimizer.state[A]["exp_avg"], (U @ M * s.sqrt()).detach())
        expected = (s.sqrt()[:, None] * (M @ Vh)).detach()
        torch.testing.assert_close(optimizer.state[B]["exp_avg"], expected)
        v = L.square().mT @ before["exp_avg_sq"] @ Rh.square().mT
        rows = U.square() / U.square().sum(1, keepdim=True)
        expected = (rows @ v * s).detach()
        torch.testing.assert_close(optimizer.state[A]["exp_avg_sq"], expected)


@pytest.mark.slow
def test_second_moments_are_right_in_expectation_for_gradients_of_noise():
    """Of the variance of G B^T and A^T G: from the dense weight for any, from a core for equal."""
    generator = torch.Generator().manual_seed(0)
    for from_core in (False, True):
        model, optimizer, method = make(
            "adam", delay=5 if from_core else 9, release=9, update_interval=100, **CUT
        )
        train(model, optimizer, method, 8)
        weight = model[2].core if from_core else model[2].weight
        scale = torch.rand(48, 32, generator=generator, dtype=torch.float64) + 0.5
        if from_core:
            scale = torch.full_like(scale, 0.7)
        variance = scale.square() if not from_core else torch.full_like(weight, 0.49)
        optimizer.state[weight]["exp_avg_sq"].copy_(variance)
        for group in optimizer.param_groups:
            group["betas"] = (0.9, 1 - 1e-12)
        train(model, optimizer, method, 1, first=8)
        A, B = model[2].factors
        noise = torch.randn(4000, 48, 32, generator=generator, dtype=torch.float64) * scale
        expected = {A: noise @ B.detach().mT, B: A.detach().mT @ noise}
        for factor, gradients in expected.items():
            carried = optimizer.state[factor]["exp_avg_sq"]
            torch.testing.assert_close(
                carried, gradients.square().mean(0), rtol=0.15, atol=1e-6, msg=str(from_core)
            )
            ratio = carried.sum() / gradients.square().mean(0).sum()
            assert ratio == pytest.approx(1, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("delay", [8, 20])
@pytest.mark.parametrize("seed", range(2))
def test_the_first_change_of_the_weights_is_no_larger_than_the_step_before(kind, delay, seed):
    """With the step before repeated on the same batch, too: that of the twin without a release."""
    options = {"delay": delay, "update_interval": 4, "layer_fraction": 1, **CUT, "seed": seed}
    model, optimizer, method = make(kind, release=20, **options)
    train(model, optimizer, method, 19)
    earlier = weights(model)
    twin = copy.deepcopy((model, optimizer))  # without the method, and so without a release
    train(*twin, None, 1, first=19)
    last = weights(twin[0])
    train(*twin, None, 1, first=20)
    same = weights(twin[0])
    train(model, optimizer, method, 1, first=19)
    released = weights(model)
    train(model, optimizer, method, 1, first=20)
    for i, layer in enumerate(factored(model, method)):
        change = torch.linalg.norm(weights(model)[i] - released[i])
        assert layer.released
        assert 0 < change <= torch.linalg.norm(last[i] - earlier[i])
        assert change <= torch.linalg.norm(same[i] - last[i])


def test_the_learning_rate_rises_over_the_warm_up_and_is_left_to_schedules():
    model, optimizer, method = make(
        "sgd", release=5, release_warmup=3, factor_learning_rate_factor=2.0, **CUT
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, method, 5)
    (factors,) = [g for g in optimizer.param_groups if any(p is model[0].A for p in g["params"])]
    assert len(factors["params"]) == 4
    assert [id(p) for p in factors["params"][:2]] == [id(model[0].A), id(model[0].B)]
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(factors["lr"]))
    for step in range(5):
        train(model, optimizer, method, 1, first=5 + step)
        assert factors["lr"] == pytest.approx(2e-2 / (1 + step))  # untouched outside of the step
        schedule.step()
    expected = [2e-2 / (1 + i) * min(1, (i + 1) / 4) for i in range(5)]
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 6)


@pytest.mark.slow
def test_an_average_of_the_weights_follows():
    options = {"delay": 5, "update_interval": 4, "layer_fraction": 1, **CUT}
    for delay in (5, 9):
        model, optimizer, method = make("adamw", release=9, **{**options, "delay": delay})
        train(model, optimizer, method, 8)
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        averages = {}
        for i in (0, 2):
            held = model[i].core if delay == 5 else model[i].weight
            average = held.detach() + 0.1 * torch.randn_like(held)
            averages[i] = average
            if delay == 5:
                average = model[i].U @ average @ model[i].Vh
            averages[i] = average.detach()
        for p in parameters:
            optimizer.state[p][WEIGHT_AVERAGE] = p.detach().clone()
        for i in (0, 2):
            held = model[i].core if delay == 5 else model[i].weight
            value = averages[i]
            if delay == 5:
                value = model[i].U.mT @ value @ model[i].Vh.mT
            optimizer.state[held][WEIGHT_AVERAGE] = value.detach()
        train(model, optimizer, method, 1, first=8)
        for i in (0, 2):
            A, B = (optimizer.state[p][WEIGHT_AVERAGE] for p in model[i].factors)
            torch.testing.assert_close(B, model[i].B.detach())
            onto = torch.linalg.pinv(B) @ B
            torch.testing.assert_close(A @ B, averages[i] @ onto)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "momentum", "centered"])
@pytest.mark.parametrize("factors", [{}, {"core_learning_rate_factor": 3.0}])
@pytest.mark.parametrize("cutoff", [1e-9, 0.6, 0.75])
@pytest.mark.parametrize("stop", [8, 11, 12, 15, 40])
def test_a_resumed_training_is_the_one_that_was_not_stopped(kind, factors, cutoff, stop):
    options = {"delay": 5, "release": 12, "layer_fraction": 1, **CUT, "cutoff": cutoff, **factors}
    model, optimizer, method = make(kind, **options)
    train(model, optimizer, method, stop)
    states = copy.deepcopy([part.state_dict() for part in (method, model, optimizer)])
    other = make(kind, seed=1, **options)
    other[2].load_state_dict(states[0])
    other[0].load_state_dict(states[1])
    other[1].load_state_dict(states[2])
    assert other[2].state_dict() == states[0]
    assert list(other[0].state_dict()) == list(model.state_dict())
    for parts in ((model, optimizer, method), other):
        train(*parts, 20, first=stop)
    for mine, theirs in zip(other[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert other[2].trainable_percent() == method.trainable_percent()
    assert other[2].ranks() == method.ranks()
    for mine, theirs in zip(other[1].param_groups, optimizer.param_groups, strict=True):
        assert [p.shape for p in mine["params"]] == [p.shape for p in theirs["params"]]


def mixed(seed=0, **options):
    """Make a network of which a release brings one layer back to dense, and not the other one."""
    options = {"delay": 5, "release": 12, "layer_fraction": 1, **CUT, **options}
    model, optimizer, method = make(seed=seed, **options)
    nn.init.orthogonal_(model[0].weight, gain=20)
    return model, optimizer, method


@pytest.mark.parametrize("has_schedule", [False, True])
@pytest.mark.parametrize("stop", [3, 8, 14])
def test_states_are_loaded_in_the_order_of_frameworks(stop, has_schedule):
    """Network, optimizer, method: a layer that is dense again was not known as such."""
    model, optimizer, method = mixed(has_schedule=has_schedule)
    train(model, optimizer, method, stop)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, method)])
    train(model, optimizer, method, 14 - stop, first=stop)
    assert {*method.state_dict()["released"].values()} == {"factors", "dense"}
    train(model, optimizer, method, 6, first=14)
    # Into new ones, and into those of the end, which go back to an earlier phase.
    for other in (mixed(1, has_schedule=has_schedule), (model, optimizer, method)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for part, state in zip(other, copy.deepcopy(states), strict=True):
            part.load_state_dict(state)
        assert other[2].state_dict() == states[2]
        train(*other, 20 - stop, first=stop)
        assert all(map(torch.equal, other[0].parameters(), before))


def test_a_state_of_an_optimizer_from_before_does_not_name_dense_weights_and_is_loaded_last():
    model, optimizer, method = mixed()
    train(model, optimizer, method, 14)
    states = copy.deepcopy([part.state_dict() for part in (model, method, optimizer)])
    del states[2]["oialr_returned"]
    other = mixed(1)
    other[0].load_state_dict(states[0])
    with pytest.raises(ValueError, match="after a release OIALR's state too"):
        other[1].load_state_dict(states[2])
    other[2].load_state_dict(states[1])
    other[1].load_state_dict(states[2])
    for parts in ((model, optimizer, method), other):
        train(*parts, 6, first=14)
    assert all(map(torch.equal, other[0].parameters(), model.parameters()))


def test_a_state_that_is_refused_leaves_the_optimizer_as_it_was():
    model, optimizer, method = mixed()
    train(model, optimizer, method, 14)
    other = mixed(1, release=30)
    train(*other, 3)
    before = copy.deepcopy(other[1].state_dict())
    held = [[*group["params"]] for group in other[1].param_groups]
    with pytest.raises(ValueError, match="It was stored at other ranks"):
        other[1].load_state_dict(optimizer.state_dict())
    now = [[*group["params"]] for group in other[1].param_groups]
    assert [[*map(id, params)] for params in now] == [[*map(id, params)] for params in held]
    assert other[1].state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(
    ("stored", "now", "message"),
    [
        ({"release": 8}, {"release": 9}, "oialr.release: cannot change from 8 to 9 after step 8"),
        ({"release": 20}, {"release": 7}, "oialr.release: cannot change from 20 to 7 after step 8"),
        ({"release": 8}, {}, "oialr.release: cannot change from 8 to None"),
        ({}, {"release": 30}, "oialr.release: cannot change from None to 30"),
        (
            {"release": 20},
            {"release": 20, "frobenius_decay": 0.1},
            "oialr.frobenius_decay: cannot change from None to 0.1",
        ),
        (
            {"release": 20},
            {"release": 20, "factor_learning_rate_factor": 0.5},
            "oialr.factor_learning_rate_factor: cannot change from 1.0 to 0.5: the optimizer",
        ),
        (
            {"core_learning_rate_factor": 3.0},
            {},
            "oialr.core_learning_rate_factor: cannot change from 3.0 to 1.0: the optimizer",
        ),
    ],
)
def test_what_cannot_change_when_a_training_is_resumed(stored, now, message):
    model, optimizer, method = make("sgd", **stored)
    train(model, optimizer, method, 8)
    with pytest.raises(ValueError, match=message):
        make("sgd", **now)[2].load_state_dict(method.state_dict())


def test_what_is_not_used_may_change_when_a_training_is_resumed():
    model, optimizer, method = make("sgd")
    train(model, optimizer, method, 8)
    make("sgd", factor_learning_rate_factor=0.5)[2].load_state_dict(method.state_dict())


def test_a_release_that_is_not_over_may_be_moved():
    model, optimizer, method = make("sgd", release=20)
    train(model, optimizer, method, 8)
    make("sgd", release=30)[2].load_state_dict(method.state_dict())


@pytest.mark.slow
def test_a_network_is_given_back_what_a_release_has_made():
    model, optimizer, method = make("adamw", release=12, layer_fraction=1, **CUT)
    train(model, optimizer, method, 14)
    x = batch(0)[0]
    expected, stored = model(x), copy.deepcopy(model.state_dict())
    other = network(seed=1)
    prepare(other).load_state_dict(stored)
    torch.testing.assert_close(other(x), expected)


@pytest.mark.slow
def test_stability_after_a_release():
    model, optimizer, method = make("sgd", release=12, layer_fraction=1, **CUT)
    tracker = BasisTracker(survey(network()), Processes(), window=1)
    train(model, optimizer, method, 11)
    tracker.measure(model, 0)
    train(model, optimizer, method, 1, first=11)
    rows = {row.name: row for row in tracker.measure(model, 1)}
    for layer in method.layers:
        row, weight = rows[layer.name], get_layer(model, layer.name).form_weight()
        assert row.rank == method.ranks()[layer.name]
        assert row.stability > 0.9
        s = torch.linalg.svdvals(weight)[: row.rank].detach()
        torch.testing.assert_close(row.singular_values, s)
        assert math.isnan(row.orthonormality_error)
    # The same as of the weight as a whole.
    dense = {f"{i}.weight": model[i].form_weight().detach() for i in (0, 2)}
    train(model, optimizer, method, 3, first=12)
    rows = {row.name: row for row in tracker.measure(model, 2)}
    for i, (name, before) in zip((0, 2), dense.items(), strict=True):
        r = method.ranks()[name]
        B = []
        for W in (before, model[i].form_weight().detach()):
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            B.append(U[:, :r] @ Vh[:r])
        expected = (B[0] * B[1]).sum() / r
        assert rows[name].stability == pytest.approx(float(expected), abs=1e-7)


def test_what_is_refused():
    with pytest.raises(ValueError, match="release must be at least delay, 5, not 4"):
        make(release=4)
    with pytest.raises(ValueError, match="set release too"):
        make(frobenius_decay=0.1)


def test_second_moments_of_a_layer_that_is_dense_again_are_means_of_the_core_s():
    model, optimizer, _ = parts = make("adamw", release=9, cutoff=1e-9)
    twin, twin_optimizer, _ = twins = make("adamw", cutoff=1e-9)
    train(*parts, 9)
    train(*twins, 9)
    for i in (0, 2):
        rows = twin[i].U.square() / twin[i].U.square().sum(1, keepdim=True)
        columns = twin[i].Vh.square() / twin[i].Vh.square().sum(0)
        v = twin_optimizer.state[twin[i].core]["exp_avg_sq"]
        torch.testing.assert_close(
            optimizer.state[model[i].weight]["exp_avg_sq"], (rows @ v @ columns).detach()
        )


@pytest.mark.parametrize(("cutoff", "form"), [(0.6, "factors"), (1e-9, "dense")])
def test_what_somebody_froze_stays_frozen_at_a_release(cutoff, form):
    model, optimizer, method = make("sgd", release=9, **{**CUT, "cutoff": cutoff})
    train(model, optimizer, method, 6)
    model[0].core.requires_grad_(False)
    model[0].core.grad = None
    train(model, optimizer, method, 3, first=6)
    assert method.state_dict()["released"]["0.weight"] == form
    held = {name: p.requires_grad for name, p in model[0].named_parameters()}
    assert {name for name, is_trained in held.items() if is_trained} == {"bias"}


@pytest.mark.parametrize(("rank", "form"), [(11, "factors"), (12, None)])
def test_factors_that_store_as_much_as_the_weight_are_made_dense(rank, form):
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag((torch.arange(24) < rank).float()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"delay": 1, "release": 1, "update_interval": 1, "largest_cut": 0.9}
    method = OIALR(model, optimizer, rank_multiple=1, **options)
    model(torch.ones(1, 24)).sum().backward()
    optimizer.step()
    method.step()
    assert method.state_dict()["released"]["0.weight"] == form
