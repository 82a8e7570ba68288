"""What loops and containers of others do with a low-rank network: nothing is lost in silence."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from support.low_rank import low_rank
from support.method_loop import CUT, make, network, of_timm, train
from torch import nn
from torch.utils._pytree import tree_leaves

import oialr
from oialr import OIALR, StabilityTracker
from oialr.convert import factorize_layer
from oialr.layers.attention import FactoredAttention
from oialr.linalg.precision import full_precision
from oialr.linalg.svd import Factors, balanced, economy_svd
from oialr.options import Options
from oialr.schedule import kept_rank


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def factorized() -> nn.Sequential:
    model = mlp()
    oialr.compress(model, target_size=0.6, release=False)
    return model


def step(model, optimizer, scale=1.0):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(1)
    (scale * model(torch.randn(16, 32, generator=generator)).square().mean()).backward()
    optimizer.step()


# Parameters


@pytest.mark.parametrize("order", [*itertools.permutations("qkv")])
def test_the_parameters_of_attention_have_one_order_in_whichever_they_are_factorized(order):
    """Processes factorize them in orders of their own, and DDP knows parameters by their order."""
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(16, 2, kdim=12, vdim=12))
    names = {"out_proj": "out_proj.weight", **{c: f"{c}_proj_weight" for c in "qkv"}}
    for part in (*order[:1], "out_proj", *order[1:]):
        key = f"attn.{names[part]}"
        U, s, Vh = economy_svd(
            model.get_submodule(key.rpartition(".")[0])
            .get_parameter(key.rpartition(".")[2])
            .detach()
        )
        factorize_layer(model, key, U, torch.diag(s), Vh)
    assert isinstance(model.attn, FactoredAttention)
    cores = [name for name, _ in model.named_parameters() if name.endswith("core")]
    assert cores == [f"attn.{part}_proj.core" for part in ("out", "q", "k", "v")]


def test_frozen_factors_take_no_gradient_where_all_parameters_are_let_take_one():
    """As networks are frozen and let go again, such as those of a GAN."""
    model, twin = factorized(), factorized()
    model.requires_grad_(False).requires_grad_(True)
    x = torch.randn(5, 32)
    for each in (model, twin):
        each(x).square().sum().backward()
    layer = model[2]
    assert layer.U.grad is None
    assert layer.Vh.grad is None
    assert torch.equal(layer.core.grad, twin[2].core.grad)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = OIALR(model, optimizer, delay=5, update_interval=5)
    before = method.trainable_percent()
    model.requires_grad_(True)
    assert method.trainable_percent() == before < 100


def test_a_dense_twin_is_trained_if_the_factors_are():
    for is_trained in (False, True):
        model = factorized().requires_grad_(is_trained)
        oialr.to_dense(model)
        assert {p.requires_grad for p in model.parameters()} == {is_trained}
    attention = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    U, s, Vh = economy_svd(attention[0].in_proj_weight.detach())
    factorize_layer(attention, "0.in_proj_weight", U, torch.diag(s), Vh)
    attention.requires_grad_(False)
    assert not oialr.to_dense(attention)[0].in_proj_weight.requires_grad


def test_hooks_of_a_low_rank_layer_stay_where_it_becomes_dense_and_where_a_method_begins():
    calls = []
    model = factorized()
    handle = model[2].register_forward_hook(lambda *_: calls.append(1))
    OIALR(model, torch.optim.SGD(model.parameters(), 0.1), delay=5, update_interval=5)
    x = torch.randn(2, 32)
    model(x)
    assert len(calls) == 1
    oialr.to_dense(model)
    model(x)
    assert len(calls) == 2
    handle.remove()
    model(x)
    assert len(calls) == 2
    # A release brings a layer back to dense that two factors would make no smaller.
    model, optimizer, method = make(release=8, cutoff=1e-9)
    train(model, optimizer, method, 6)
    assert method.converted
    model[2].register_forward_hook(lambda *_: calls.append(2))
    train(model, optimizer, method, 4, first=6)
    assert type(model[2]) is nn.Linear
    calls.clear()
    train(model, optimizer, method, 1, first=10)
    assert calls == [2]


@pytest.mark.parametrize("name", ["rank", "groups", "execution", "released", "operands"])
def test_a_layer_with_an_attribute_that_a_low_rank_one_has_stays_full_rank(name):
    model = mlp()
    setattr(model[2], name, 4)
    method = OIALR(model, torch.optim.SGD(model.parameters(), 0.1), delay=5, update_interval=5)
    (reason,) = [r.stays_dense for r in method.survey if r.name == "2.weight"]
    assert reason == f"its attribute {name} has the name of one that its replacement has"


# Files and enclosing modules


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.other = mlp(), nn.Linear(32, 32)


@pytest.mark.parametrize("release", [False, True])
def test_a_frozen_low_rank_layer_stays_what_it_is(release):
    model = low_rank(mlp(), released=release, dense=["2.weight"] if release else [])
    frozen = model[0].requires_grad_(False)
    factors, before = [*frozen.factors], copy.deepcopy(frozen.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    options = {"delay": 2, "update_interval": 2, "layer_fraction": 1.0, "target_size": 0.5}
    method = OIALR(model, optimizer, **options)
    assert [layer.name for layer in method.layers] == ["2.weight"]
    for _ in range(4):
        step(model, optimizer)
        method.step()
    assert model[2].rank < 64
    assert model[0] is frozen
    assert all(mine is old for mine, old in zip(frozen.factors, factors, strict=True))
    assert all(map(torch.equal, frozen.state_dict().values(), before.values()))
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    message = r"0\.weight is stored dense, and stays (low-rank|released) of rank \d+ here"
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(mlp().state_dict())
    optimizer = torch.optim.SGD(model[4].parameters(), 0.1)
    with pytest.raises(ValueError, match=r"factorized: low-rank already; not trained"):
        OIALR(low_rank(mlp()).requires_grad_(False), optimizer, **options)


def test_a_low_rank_layer_that_a_method_would_not_take_is_told_with_the_reason():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    oialr.compress(model, target_size=0.6, keep_last_layer=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reason = r"2\.weight is released of rank \d+, and OIALR would make it full-rank: {}"
    with pytest.raises(
        ValueError, match=reason.format(r"the network's last layer .keep_last_layer")
    ):
        OIALR(model, optimizer, delay=2, update_interval=2)
    model[2].half()
    with pytest.raises(ValueError, match=reason.format(r"torch\.float16; weights must be")):
        OIALR(model, optimizer, delay=2, update_interval=2)


def test_a_file_of_an_enclosing_module_takes_the_optimizer_of_its_part_along(tmp_path):
    stored = Outer()
    oialr.compress(stored.net, target_size=0.6, release=False)
    oialr.save(stored, tmp_path / "outer.safetensors")
    outer = Outer()
    optimizer = torch.optim.SGD(outer.net.parameters(), 0.1)
    method = OIALR(outer.net, optimizer, delay=50, update_interval=5)
    oialr.load(outer, tmp_path / "outer.safetensors")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(outer.net[2].core) in held
    assert method.converted
    assert torch.equal(outer.net[2].core, stored.net[2].core)


def test_an_event_finds_that_the_optimizer_does_not_hold_a_core():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = OIALR(model, optimizer, delay=2, update_interval=2, layer_fraction=1.0)
    oialr.compress(model, target_size=0.6, release=False)  # behind the method's back
    for _ in range(2):
        step(model, optimizer)
    with pytest.raises(ValueError, match=r"the core of 2\.weight is not among the optimizer's"):
        method.step()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(32, 32)
        self.b = self.a
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize("size", [0.7, 1.0])
def test_a_layer_with_two_names_is_stored_and_taken_back(tmp_path, size):
    x = torch.randn(4, 32)
    model = Twice()
    if size < 1:
        oialr.compress(model, target_size=size, release=False)
    oialr.save(model, tmp_path / "twice.safetensors")
    low_rank = Twice()
    oialr.compress(low_rank, target_size=0.6, release=False)
    for into in (Twice(), low_rank):
        loaded = oialr.load(into, tmp_path / "twice.safetensors")
        assert loaded.a is loaded.b
        torch.testing.assert_close(loaded(x), model(x))


def test_a_layer_with_two_names_is_exported_by_two_factors():
    from oialr.export.state import two_factors

    model = Twice()
    U, s, Vh = economy_svd(model.a.weight.detach())
    factorize_layer(model, "a.weight", U, torch.diag(s), Vh)  # whose factors store more
    x = torch.randn(4, 32)
    torch.testing.assert_close(two_factors(model)(x), model(x))


# Steps


def test_a_loop_that_gives_all_groups_one_rate_is_told():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    method = OIALR(model, optimizer, delay=4, update_interval=9, core_learning_rate_factor=10.0)
    for rate in (0.0, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(model, optimizer)
        if rate:
            with pytest.raises(ValueError, match=r"same rate .* multiply by them, too"):
                method.step()
        else:
            method.step()  # a warm-up may begin with 0
    for group, factor in zip(optimizer.param_groups, method.learning_rate_factors, strict=True):
        group["lr"] = 1e-3 * factor
    method.step()


ONE_GROUP = {"release": 8, "cutoff": 0.3, "release_warmup": 3, "factor_learning_rate_factor": 0.5}


def rate_at(step):
    return 1e-2 * (1 - step / 20) if step else 0.0


def loop(parts, steps, first=0, *, how):
    """Train in a loop that sets the rate of one group, or of all; return those after each step."""
    model, optimizer, method = parts
    rates = []
    for k in range(first, first + steps):
        factors = method.learning_rate_factors if how == "all" else [1.0]
        for group, factor in zip(optimizer.param_groups, factors, strict=False):
            group["lr"] = rate_at(k) * factor
        train(model, optimizer, method, 1, first=k)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("options", [{}, {"core_learning_rate_factor": 3.0}], ids=str)
@pytest.mark.parametrize("stop", [3, 7, 10])
def test_groups_follow_a_loop_that_sets_the_rate_of_the_first_one(options, stop):
    """The factors of a release went on at the rate of the start."""
    options = {**ONE_GROUP, **options}
    parts, others, late = make(**options), make(**options), make(seed=1, **options)
    expected = loop(others, 14, how="all")
    rates = loop(parts, stop, how="first")
    parts[1].param_groups[0]["lr"] = 0.5  # which is stored, and no step has been made with
    states = copy.deepcopy([part.state_dict() for part in parts])
    rates += loop(parts, 14 - stop, first=stop, how="first")
    assert rates == expected
    assert all(map(torch.equal, parts[0].parameters(), others[0].parameters()))
    for part, state in zip(late, states, strict=True):
        part.load_state_dict(state)
    assert loop(late, 14 - stop, first=stop, how="first") == expected[stop:]
    assert all(map(torch.equal, late[0].parameters(), others[0].parameters()))


def test_a_rate_that_somebody_sets_is_left_to_them(caplog):
    model, optimizer, method = make(**ONE_GROUP)
    optimizer.param_groups[1]["lr"] = 0.125
    rates = loop((model, optimizer, method), 4, how="first")
    assert [row[1] for row in rates] == [0.125] * 4
    assert [row[2] for row in rates] == [row[0] for row in rates]
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, method)])
    other = make(seed=1, **ONE_GROUP)
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    groups = other[1].param_groups
    groups[1]["lr"] = 0.5 * groups[0]["lr"]  # by chance
    rates = loop(other, 4, first=4, how="first")
    assert len({row[1] for row in rates}) == 1
    assert not caplog.records


def test_a_plateau_with_lowest_rates_is_left_alone():
    """It has no rate to begin with, by which schedules are known."""
    model, optimizer, method = make(**ONE_GROUP)
    lowest = [1e-3, 2.5e-3, 1e-3]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=0, min_lr=lowest
    )
    for k in range(5):
        train(model, optimizer, method, 1, first=k)
        plateau.step(float(k))
    assert [group["lr"] for group in optimizer.param_groups] == lowest


def test_a_group_of_an_earlier_state_that_stays_behind_is_told(caplog):
    model, optimizer, method = make(**ONE_GROUP)
    train(model, optimizer, method, 9)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, method)])
    states[1]["param_groups"][0]["lr"] = 0.007  # of a loop that has set no other
    del states[1]["oialr_following"]
    other = make(seed=1, **ONE_GROUP)
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    rates = loop(other, 3, first=9, how="first")
    assert {row[1] for row in rates} == {0.005}
    (record,) = caplog.records
    assert "dense again keeps the learning rate 0.01, which was not 1 times" in record.getMessage()


DECAYING = {**ONE_GROUP, "core_learning_rate_factor": 3.0, "frobenius_decay": 0.01}


def loop_of_options(parts, steps, first=0, *, groups):
    """Train in a loop that sets weight decay and betas of some groups."""
    for k in range(first, first + steps):
        for group in parts[1].param_groups[groups]:
            group["weight_decay"], group["betas"] = 0.2 + 0.1 * k, (0.9 - 0.02 * k, 0.99)
        train(*parts, 1, first=k)


@pytest.mark.parametrize("stop", [3, 7, 10])
def test_groups_follow_a_loop_that_sets_other_options_of_the_first_one(stop):
    """They had those of the start, but where a schedule was made before the method."""
    parts, all_set, late = make(**DECAYING), make(**DECAYING), make(seed=1, **DECAYING)
    momentary = make(has_schedule=True, **DECAYING)
    loop_of_options(all_set, 14, groups=slice(None))  # factors do not decay twice
    loop_of_options(momentary, 14, groups=slice(1))
    loop_of_options(parts, stop, groups=slice(1))
    parts[1].param_groups[0]["weight_decay"] = 0.7  # which is stored, and no step is made with it
    states = copy.deepcopy([part.state_dict() for part in parts])
    loop_of_options(parts, 14 - stop, first=stop, groups=slice(1))
    for part, state in zip(late, states, strict=True):
        part.load_state_dict(state)
    loop_of_options(late, 14 - stop, first=stop, groups=slice(1))
    for other in (all_set, momentary, late):
        assert all(map(torch.equal, parts[0].parameters(), other[0].parameters()))


def test_an_option_that_somebody_sets_is_left_to_them():
    parts, other = make(**ONE_GROUP), make(seed=1, **ONE_GROUP)
    dense, *twins = parts[1].param_groups
    twins[0]["weight_decay"] = 0.3
    dense["weight_decay"] = 0.5
    train(*parts, 2)
    assert [twin["weight_decay"] for twin in twins] == [0.3, 0.5]
    twins[0]["weight_decay"] = 0.5  # by chance
    for part, state in zip(other, [copy.deepcopy(x.state_dict()) for x in parts], strict=True):
        part.load_state_dict(state)
    for each in (parts, other):
        each[1].param_groups[0]["weight_decay"] = 0.6
        train(*each, 1, first=2)
        assert [group["weight_decay"] for group in each[1].param_groups] == [0.6, 0.5, 0.6]


def test_groups_of_an_earlier_state_follow_in_what_they_have_in_common():
    parts, other = make(**ONE_GROUP), make(seed=1, **ONE_GROUP)
    parts[1].param_groups[1]["betas"] = (0.8, 0.9)
    train(*parts, 2)
    states = copy.deepcopy([part.state_dict() for part in parts])
    del states[1]["oialr_common"]
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    other[1].param_groups[0] |= {"betas": (0.7, 0.9), "weight_decay": 0.6}
    train(*other, 1, first=2)
    assert [group["weight_decay"] for group in other[1].param_groups] == [0.6] * 3
    assert [group["betas"][0] for group in other[1].param_groups] == [0.7, 0.8, 0.7]


def test_options_in_tensors_are_not_looked_at():
    parts = make(core_learning_rate_factor=3.0)
    train(*parts, 1)
    looked = []

    class AskedError(Exception):
        pass

    def ask(*_):
        looked.append([group["weight_decay"].is_meta for group in parts[1].param_groups])
        raise AskedError

    for group in parts[1].param_groups:
        group["weight_decay"] = torch.tensor(0.1, device="meta")  # whose value nobody can ask for
    parts[1].register_step_pre_hook(ask)
    with pytest.raises(AskedError):
        parts[1].step()
    assert looked == [[True, True]]


def test_rates_in_tensors_are_not_looked_at():
    model = mlp()
    rate = torch.tensor(0.01)
    optimizer = torch.optim.AdamW(model.parameters(), rate, foreach=False)
    method = OIALR(model, optimizer, delay=2, update_interval=9, core_learning_rate_factor=3.0)
    for _ in range(4):
        step(model, optimizer)
        method.step()
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.01, 0.03])


@pytest.mark.parametrize("is_list", [False, True])
def test_a_schedule_of_swa_with_one_rate_is_told(is_list, caplog):
    model, optimizer, method = make(core_learning_rate_factor=3.0)
    train(model, optimizer, method, 1)
    rate = [0.05 * factor for factor in method.learning_rate_factors] if is_list else 0.05
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=rate, anneal_epochs=2)
    for k in range(1, 4):
        train(model, optimizer, method, 1, first=k)
        schedule.step()
    told = [r.getMessage() for r in caplog.records if "SWALR gives the group of cores" in r.message]
    assert len(told) == (0 if is_list else 1)


COPIED = {
    "core_learning_rate_factor": 3.0,
    "factor_learning_rate_factor": 0.5,
    "release": 8,
    "cutoff": 0.3,
    "frobenius_decay": 0.01,
}


def groups_of(model, optimizer):
    """Tell of each group its rate, and the names of what it holds."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (group["lr"], [names[id(parameter)] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("schedule", [None, "before", "after"])
@pytest.mark.parametrize("steps", [3, 7, 10])
def test_a_copied_pair_of_network_and_optimizer_goes_on_as_the_first_one(steps, schedule):
    """Its cores were given the factor twice: the first method's groups were taken for others."""
    model, optimizer, method = make(has_schedule=schedule == "before", **COPIED)
    early = copy.deepcopy([part.state_dict() for part in (model, method, optimizer)])
    if schedule == "after":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(model, optimizer, method, steps)
    pair = copy.deepcopy((model, optimizer))
    other = OIALR(*pair, delay=5, update_interval=3, **COPIED)
    other.load_state_dict(method.state_dict())
    assert groups_of(*pair) == groups_of(model, optimizer)
    assert other.learning_rate_factors == method.learning_rate_factors
    assert not any("oialr" in key for group in early[2]["param_groups"] for key in group)
    train(model, optimizer, method, 4, first=steps)
    train(*pair, other, 4, first=steps)
    assert other.converted
    assert groups_of(*pair) == groups_of(model, optimizer)
    assert all(map(torch.equal, pair[0].parameters(), model.parameters()))
    if schedule != "after":  # which the early state is without
        again = copy.deepcopy(pair)
        third = OIALR(*again, delay=5, update_interval=3, **COPIED)
        for part, state in zip((again[0], third, again[1]), early, strict=True):
            part.load_state_dict(state)
        fourth = copy.deepcopy(again)  # the state that was loaded has not made it forget
        OIALR(*fourth, delay=5, update_interval=3, **COPIED)
        assert groups_of(*fourth) == groups_of(*again)
        train(*again, third, steps + 4)
        assert groups_of(*again) == groups_of(model, optimizer)
        assert all(map(torch.equal, again[0].parameters(), model.parameters()))


def test_a_copied_pair_with_other_options_is_refused_and_left_as_it_is():
    model, optimizer, method = make(**COPIED)
    train(model, optimizer, method, 7)
    pair = copy.deepcopy((model, optimizer))
    before = groups_of(*pair)
    for options in ({}, {"core_learning_rate_factor": 3.0}, {**COPIED, "frobenius_decay": None}):
        with pytest.raises(ValueError, match=r"copy of that of another OIALR, .* were others"):
            OIALR(*pair, delay=5, update_interval=3, **options)
        assert groups_of(*pair) == before
    OIALR(*pair, delay=5, update_interval=3, **COPIED)


@pytest.mark.parametrize("has_schedule", [False, True])
@pytest.mark.parametrize("fails", ["hook", "step"])
def test_a_step_that_fails_leaves_nothing_behind(has_schedule, fails):
    """A schedule lowered the rates of a warm-up for good, or met groups that it does not know."""
    options = {"release": 4, "delay": 4, "frobenius_decay": 0.01, **CUT}
    model, optimizer, method = make("adam", has_schedule=has_schedule, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, method, 6)
    schedule.step()
    before = groups_of(model, optimizer)
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    state = optimizer.state[model[4].weight]
    average = state["exp_avg"]
    if fails == "step":
        state["exp_avg"] = average.new_zeros(3)
    else:
        hook = optimizer.register_step_pre_hook(lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    assert groups_of(model, optimizer) == before
    for parameter, (gradient, values) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)
    state["exp_avg"] = average
    if fails == "hook":
        hook.remove()
    schedule.step()
    train(model, optimizer, method, 2, first=6)
    assert groups_of(model, optimizer) == [(rate / 2, names) for rate, names in before]


@pytest.mark.parametrize("has_schedule", [False, True])
def test_a_step_that_is_watched_looks_as_before(has_schedule):
    """GradScaler reads its signature, and a schedule takes it apart."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    expected = inspect.signature(optimizer.step)
    if has_schedule:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    OIALR(model, optimizer, delay=4, update_interval=3, release=8)
    assert inspect.signature(optimizer.step) == expected
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched") == has_schedule
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert optimizer.step(lambda: 3.0) == 3.0
    pickle.loads(pickle.dumps(optimizer)).step()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_gradscaler_skips_are_not_counted(fused):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    method = OIALR(model, optimizer, delay=2, update_interval=9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale in (float("inf"), float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(scale * model(torch.ones(3, 32)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        method.step()
    assert method.step_count == 1
    assert not method.converted


@pytest.mark.parametrize("has_schedule", [False, True])
def test_a_corrected_weight_decay_is_that_of_the_rate_times_its_factor(has_schedule):
    """timm's divides the square of the rate by the largest one, which has the factor, too."""
    model = mlp()
    options = {"lr": 1e-3, "weight_decay": 0.1, "corrected_weight_decay": True, "foreach": False}
    optimizer = of_timm("Lion", model.parameters(), **options)
    if has_schedule:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    method = OIALR(model, optimizer, delay=1, update_interval=9, core_learning_rate_factor=10.0)
    for _ in range(2):
        core = model[2].core.detach().clone() if method.converted else None
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        method.step()
    torch.testing.assert_close(model[2].core.detach(), core * (1 - 10 * 1e-3 * 0.1))


def test_zero_weights_are_trained_after_a_release():
    """Where both factors were 0, so would be both gradients, for ever."""
    model = mlp()
    nn.init.zeros_(model[2].weight)
    x = torch.randn(3, 32)
    before = model(x)
    oialr.compress(model, target_size=0.6)
    torch.testing.assert_close(model(x), before)
    layer = model[2]
    torch.testing.assert_close(layer.B @ layer.B.mT, torch.eye(layer.rank), atol=1e-5, rtol=0)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert layer.form_weight().norm() > 0


def test_balanced_factors_have_the_product_and_no_dead_direction():
    generator = torch.Generator().manual_seed(0)
    U, s, Vh = economy_svd(torch.randn(6, 9, generator=generator, dtype=torch.float64))
    s[4:] = 0
    A, B = balanced(Factors(U, s, Vh))
    torch.testing.assert_close(A @ B, U @ torch.diag(s) @ Vh)
    torch.testing.assert_close(A[:, :4].norm(dim=0), s[:4].sqrt())
    torch.testing.assert_close(B.norm(dim=1), torch.cat([s[:4], s[:1], s[:1]]).sqrt())
    stack = [torch.stack([each, other]) for each, other in ((U, U), (s, 0 * s), (Vh, Vh))]
    A, B = balanced(Factors(*stack))
    assert A[1].count_nonzero() == 0
    torch.testing.assert_close(B[1].norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_a_zero_matrix_does_not_keep_the_rank_of_the_stack_that_it_is_in():
    s = torch.zeros(2, 32)
    s[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    rule = Options(
        delay=1,
        update_interval=1,
        cutoff=0.1,
        largest_cut=0.99,
        largest_energy_cut=1.0,
        minimum_rank_fraction=0.01,
    )
    assert kept_rank(s, rule, full_rank=32) == 3
    assert kept_rank(0 * s, rule, full_rank=32) == 32


def test_a_mask_of_integers_is_refused_by_attention_as_by_torch_s():
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True))
    U, s, Vh = economy_svd(model[0].in_proj_weight.detach())
    x, mask = torch.randn(2, 4, 16), torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(AssertionError):
        model[0](x, x, x, key_padding_mask=mask)
    factorize_layer(model, "0.in_proj_weight", U, torch.diag(s), Vh)
    with pytest.raises(TypeError, match=r"boolean or floating, and not torch\.uint8"):
        model[0](x, x, x, key_padding_mask=mask)


# Settings


def test_precision_that_is_set_for_everything_is_followed_after_an_event():
    backends = torch.backends
    settings = backends, backends.cuda.matmul, backends.mkldnn.matmul
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:  # set by nobody, whatever another test has left
            each.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        with full_precision():
            assert backends.cuda.matmul.fp32_precision == "ieee"
        assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value


def test_weights_that_share_memory_are_tied_as_far_as_it_matters():
    """The transpose of another weight, as of an autoencoder, and parts of one flat buffer."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    model[1].weight = nn.Parameter(model[0].weight.T)
    flat = torch.randn(2 * 16 * 16)
    model[2].weight = nn.Parameter(flat[: 16 * 16].view(16, 16))
    model[2].bias = nn.Parameter(flat[16 * 16 : 16 * 17])
    reasons = {report.name: report.stays_dense for report in oialr.survey(model)}
    assert reasons["0.weight"] == reasons["1.weight"] == "shares memory with another parameter"
    assert reasons["2.weight"] is None


@pytest.mark.parametrize("attention", [False, True])
def test_what_compile_hangs_on_a_layer_stays_with_it(attention):
    """A copy called the original's weights, and a dense network what had been taken out of it."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(24, 2, batch_first=True) if attention else nn.Linear(24, 24)
    model = low_rank(nn.ModuleList([layer, nn.Linear(24, 24)]), 0.2)
    x = torch.randn(2, 3, 24)
    inputs = (x, x, x) if attention else (x,)
    expected = tree_leaves(model[0](*inputs))[0]
    model[0].compile(backend="eager")
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not tree_leaves(copied[0](*inputs))[0].any()
    plain = oialr.for_inference(model)
    torch.testing.assert_close(tree_leaves(plain[0](*inputs))[0], expected, rtol=1e-4, atol=1e-5)
    dense = oialr.to_dense(model)
    torch.testing.assert_close(tree_leaves(dense[0](*inputs))[0], expected, rtol=1e-4, atol=1e-5)


def test_complex_weights_are_not_measured():
    model = mlp()
    model.add_module("complex", nn.Linear(4, 4, dtype=torch.complex64))
    rows = StabilityTracker(model).measure()
    assert [row.name for row in rows] == ["0.weight", "2.weight", "4.weight"]
    copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match="no linear layer"):
        StabilityTracker(nn.Sequential(copied.complex))
