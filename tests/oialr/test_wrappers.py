"""What frameworks put around a network and its optimizer, its averages and its schedules."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from oialr import OIALR, WeightAverage
from oialr.compatibility import import_torchvision
from oialr.forms import form_of
from oialr.wrappers import renew_wrappers
from tests.support.method_loop import CUT, OPTIMIZERS, batch, make, network, train

SCHEDULE = {"delay": 5, "update_interval": 3}


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As of accelerate, by what it is known by: it has the optimizer, and passes on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.__dict__["optimizer"], name)

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()


@pytest.fixture
def group():
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_wrappers_of_network_and_optimizer_are_taken_off():
    plain = make(cutoff=0.4)
    train(*plain, 12)
    model = network()
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    optimizer.optimizer.param_groups[0]["weight_decay"] = 0.1
    method = OIALR(compiled, optimizer, cutoff=0.4, **SCHEDULE)
    assert method.model is model
    train(model, optimizer, method, 12)
    assert method.ranks() == plain[2].ranks()
    assert all(map(torch.equal, model.parameters(), plain[0].parameters()))


@pytest.mark.slow
def test_a_wrapper_from_before_an_event_says_so(group):
    model = network(0)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    old = DistributedDataParallel(model)
    method = OIALR(old, optimizer, **SCHEDULE)
    train(old, optimizer, method, 5)
    with torch.no_grad():
        old(batch(0)[0])
    with pytest.raises(RuntimeError, match=r"Make it anew.*DistributedDataParallel\(model\.module"):
        train(old, optimizer, method, 1)
    new = DistributedDataParallel(method.model)
    train(new, optimizer, method, 2)

    state = new.state_dict()
    other = DistributedDataParallel(network(1))
    OIALR(other, torch.optim.SGD(other.parameters()), **SCHEDULE)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Make it anew"):
        other(batch(0)[0])


@pytest.mark.parametrize("outside", [True, False])
def test_a_wrapper_around_more_or_less_than_the_network_says_so_too(group, outside):
    """Its new cores would be averaged by nobody, without a word if unused parameters are found."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(whole[0].parameters(), lr=0.1)
    other = whole[1] = DistributedDataParallel(whole[1])  # which is to stay as it is
    if outside:
        model = DistributedDataParallel(whole, find_unused_parameters=True)
        method, wrapper = OIALR(whole[0], optimizer, delay=1, update_interval=1), model
    else:
        model = whole
        wrapper = model[0] = DistributedDataParallel(model[0], find_unused_parameters=True)
        method = OIALR(model, optimizer, delay=1, update_interval=1)
    x = torch.randn(3, 16)
    model(x).sum().backward()
    optimizer.step()
    method.step()
    assert method.converted
    with pytest.raises(RuntimeError, match="Make it anew"):
        model(x)
    reducer = other.reducer
    renew_wrappers(method.model)
    assert other.reducer is reducer
    model(x).sum().backward()
    core = next(p for name, p in model.named_parameters() if name.endswith("0.core"))
    assert any(p is core for p in wrapper._module_parameters)
    assert other(x).shape == (3, 4)


def test_what_a_wrapper_hangs_on_parameters_keeps_no_layer(group, caplog):
    model, optimizer, method = make(release=11, layer_fraction=1, **CUT)
    wrapper, kinds = DistributedDataParallel(model), []
    for k in range(12):
        optimizer.zero_grad()
        wrapper(batch(k)[0]).square().mean().backward()
        optimizer.step()
        if (event := method.step()) and event.layers:
            kinds.append(event.kind)
            wrapper = DistributedDataParallel(method.model) if event.shapes_changed else wrapper
    assert kinds == ["convert", "cut", "release"]
    assert "has hooks" not in caplog.text


def count_calls(state, bucket):
    state.append(bucket.index())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.slow
def test_a_wrapper_may_be_renewed_in_its_place(group):
    """With what it was made with; replaced parameters are held by it no longer."""
    model = network(0)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    wrapper, calls = DistributedDataParallel(model, find_unused_parameters=True), []
    wrapper.register_comm_hook(calls, count_calls)
    method = OIALR(wrapper, optimizer, cutoff=0.4, **SCHEDULE)
    weight = weakref.ref(model[0].weight)
    plain = make(cutoff=0.4)
    for step in range(12):
        before = len(calls)
        events = train(wrapper, optimizer, method, 1, first=step)
        assert len(calls) > before
        for event in events:
            if event.shapes_changed:
                renew_wrappers(wrapper)
    train(*plain, 12)
    assert method.ranks() == plain[2].ranks()
    assert all(map(torch.equal, model.parameters(), plain[0].parameters()))
    assert wrapper.find_unused_parameters
    gc.collect()
    assert weight() is None


@pytest.mark.slow
def test_a_compiled_network_is_told_when_it_is_compiled_no_more(caplog):
    import torch._dynamo

    model, optimizer, method = make(cutoff=0.5, layer_fraction=1)
    compiled = torch.compile(model, backend="eager")
    # Not by monkeypatch, whose end deletes what a module gives by its __getattr__.
    limit = torch._dynamo.config.patch(recompile_limit=2)
    with limit, caplog.at_level(logging.WARNING, "oialr"):
        changes = 0
        for step in range(12):
            events = train(model, optimizer, method, 1, first=step)
            changes += sum(event.shapes_changed for event in events)
            told = [r for r in caplog.records if "torch.compiler.reset()" in r.getMessage()]
            assert len(told) == (changes >= 2)
    assert changes >= 2
    assert compiled is not None


def constant_average(average, weight, _):
    return average.lerp(weight, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"cutoff": 0.4}, {**CUT, "release": 12, "layer_fraction": 1}])
@pytest.mark.parametrize("first", [0, 6])
def test_averaged_copies_follow_as_the_average_does(options, first):
    import_torchvision()
    from timm.utils import ModelEmaV3

    model, optimizer, method = make(**options)
    train(model, optimizer, method, first)
    average = WeightAverage(model, optimizer, decay=0.8)
    copies = AveragedModel(model, avg_fn=constant_average), ModelEmaV3(model, decay=0.8)
    for averaged in copies:
        method.follow(averaged)
    for step in range(first, 20):
        train(model, optimizer, method, 1, first=step)
        average.update(10**9)
        copies[0].update_parameters(model)
        if step == first:
            copies[1].set(model)
        else:
            copies[1].update(model)
    assert list(copies[0].module.state_dict()) == list(model.state_dict())
    with average.applied():
        for averaged in copies:
            for mine, theirs in zip(model.parameters(), averaged.module.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs)
    copies[0].load_state_dict(copy.deepcopy(copies[0].state_dict()))


def test_what_holds_no_copy_of_the_network_does_not_follow():
    model, optimizer, method = make()
    averaged = AveragedModel(model)
    for wrong in (model, nn.Linear(2, 2), AveragedModel(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="holds no copy of the network"):
            method.follow(wrong)
    train(model, optimizer, method, 5)
    with pytest.raises(
        ValueError, match=r"0\.weight is low-rank of rank 20 .* dense in its average"
    ):
        method.follow(averaged)
    averaged.load_state_dict({f"module.{k}": v for k, v in model.state_dict().items()}, False)
    method.follow(averaged)
    assert form_of(averaged.module, "0.weight").rank == 20
    averaged.load_state_dict({f"module.{k}": v for k, v in network().state_dict().items()}, False)
    with pytest.raises(ValueError, match="load its own state too"):
        train(model, optimizer, method, 3)
    assert method.ranks()["0.weight"] == 20


def timm_cosine(optimizer, _):
    import_torchvision()
    from timm.scheduler import CosineLRScheduler

    schedule = CosineLRScheduler(optimizer, 20, warmup_t=2, t_in_epochs=False)
    return lambda step: schedule.step_update(step + 1)


def one_cycle(optimizer, method):
    rates = [0.01 * factor for factor in method.learning_rate_factors]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=20)
    return lambda _: schedule.step()


def cosine(optimizer, _):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return lambda _: schedule.step()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [cosine, one_cycle, timm_cosine])
def test_schedules_made_after_keep_the_factor_of_the_cores(schedule):
    model, optimizer, method = make(core_learning_rate_factor=3.0)
    advance = schedule(optimizer, method)
    rates = set()
    for step in range(10):
        train(model, optimizer, method, 1, first=step)
        advance(step)
        dense, cores = (group["lr"] for group in optimizer.param_groups)
        assert cores == pytest.approx(3 * dense)
        rates.add(dense)
    assert len(rates) > 5
    assert len(optimizer.param_groups[1]["params"]) == 2


@pytest.mark.parametrize("has_schedule", [False, True])
def test_a_step_that_fails_leaves_nothing_in_a_stored_state(has_schedule):
    """Its closure is Lightning's whole batch; a checkpoint after it could not be resumed."""
    options = {**CUT, "release": 5, "core_learning_rate_factor": 3.0, "has_schedule": has_schedule}
    model, optimizer, method = make(**options)
    train(model, optimizer, method, 7)
    groups = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    stored = optimizer.state_dict()["param_groups"]
    assert [(group["lr"], len(group["params"])) for group in stored] == groups
    optimizer.load_state_dict(optimizer.state_dict())


def fails():
    raise KeyboardInterrupt


@pytest.mark.parametrize("has_schedule", [False, True])
@pytest.mark.parametrize("how", ["load", "schedule"])
def test_training_goes_on_after_a_step_that_failed(has_schedule, how):
    """Where the batch before was too large, for instance; within the warm-up after a release."""
    options = {
        **CUT,
        "release": 5,
        "factor_learning_rate_factor": 0.5,
        "has_schedule": has_schedule,
    }
    parts = [make("sgd", **options) for _ in range(2)]
    for number, (model, optimizer, method) in enumerate(parts):
        train(model, optimizer, method, 7)
        saved = copy.deepcopy(optimizer.state_dict())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if number:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(fails)
        if how == "load":
            optimizer.load_state_dict(saved)
        else:
            schedule.step()
        train(model, optimizer, method, 3, first=7)
    for mine, other in zip(parts[0][0].parameters(), parts[1][0].parameters(), strict=True):
        assert torch.equal(mine, other)
    rates = [[group["lr"] for group in optimizer.param_groups] for _, optimizer, _ in parts]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("has_schedule", [False, True])
@pytest.mark.parametrize("steps", [4, 7])
def test_a_state_that_is_stored_within_a_step_is_that_between_steps(has_schedule, steps):
    """As by a checkpoint from Lightning's training_step; and the step goes on as it would.

    Of cores, and in the warm-up of factors.
    """
    options = {**CUT, "delay": 2, "release": 5, "release_warmup": 9, "has_schedule": has_schedule}
    options |= {"core_learning_rate_factor": 100.0, "factor_learning_rate_factor": 0.1}
    x, y = batch(steps)
    ends = []
    for does_store in (False, True):
        model, optimizer, method = make("sgd", **options)
        train(model, optimizer, method, steps)
        between, stored = optimizer.state_dict()["param_groups"], []

        def closure(parts=(model, optimizer, stored), does_store=does_store):
            model, optimizer, stored = parts
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if does_store:
                stored.append(optimizer.state_dict()["param_groups"])
            return loss

        optimizer.step(closure)
        assert stored == [between] * does_store
        assert optimizer.state_dict()["param_groups"] == between
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


def test_a_state_that_could_not_be_stored_within_a_step_is_forgotten():
    options = {**CUT, "delay": 2, "core_learning_rate_factor": 3.0, "has_schedule": True}
    model, optimizer, method = make("sgd", **options)
    train(model, optimizer, method, 4)
    groups = len(optimizer.param_groups)

    def closure():
        hook = optimizer.register_state_dict_post_hook(lambda *_: fails(), prepend=True)
        with pytest.raises(KeyboardInterrupt):
            optimizer.state_dict()
        hook.remove()
        return model(batch(4)[0]).square().sum()

    optimizer.step(closure)
    optimizer.state_dict()
    assert len(optimizer.param_groups) == groups


def test_schedules_that_would_pass_over_the_factor_are_refused():
    model, optimizer, method = make(core_learning_rate_factor=3.0)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    with pytest.raises(ValueError, match=r"not at 3 times it.*max_lr=\[rate \* factor for"):
        train(model, optimizer, method, 1)


FACTORS = {"core_learning_rate_factor": 3.0, "cutoff": 0.4}
RELEASE = {
    "cutoff": 0.4,  # it leaves factors with AdamW, and dense weights with SGD
    "release": 8,
    "release_warmup": 4,
    "factor_learning_rate_factor": 0.5,
    "frobenius_decay": 0.1,
}


def scheduled(schedule, *, before, kind="adamw", **options):
    """Train, and return all parts and, of each step, its groups' rates by size of their lists."""
    model = network()
    groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters(), "lr": 0.003}]
    optimizer = OPTIMIZERS[kind](groups)
    if before:
        advance = schedule(optimizer, None)
        method = OIALR(model, optimizer, **SCHEDULE, **options)
    else:
        method = OIALR(model, optimizer, **SCHEDULE, **options)
        advance = schedule(optimizer, method)
    rates = []

    def look(*_):
        found = [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        rates.append({rate for size, rate in found if size})

    optimizer.register_step_pre_hook(look)
    for step in range(14):
        train(model, optimizer, method, 1, first=step)
        advance(step)
    return model, optimizer, method, rates


def several_rates(optimizer, method):
    rates = [0.01, 0.003]
    if method and len(optimizer.param_groups) > 2:
        factors = method.learning_rate_factors[2:]
        rates += [rate * factor for rate, factor in zip(rates[:1] * 4, factors, strict=False)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=20)
    return lambda _: schedule.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "options", "kind"),
    [
        (cosine, {}, "adamw"),
        (several_rates, FACTORS, "adamw"),
        (timm_cosine, FACTORS, "momentum"),
        (cosine, RELEASE, "adamw"),
        (several_rates, RELEASE, "momentum"),
        (cosine, {**RELEASE, **FACTORS}, "adamw"),
    ],
)
def test_schedules_made_before_are_as_those_made_after(schedule, options, kind):
    """There the twins are in the optimizer while it steps alone, and schedules do not see them."""
    model, optimizer, method, rates = scheduled(schedule, before=True, kind=kind, **options)
    other, _, other_method, expected = scheduled(schedule, before=False, kind=kind, **options)
    assert len(optimizer.param_groups) == 2
    assert len(set(map(frozenset, rates))) > 10
    for step, found in enumerate(rates):
        assert sorted(found) == pytest.approx(sorted(expected[step]))
    assert method.ranks() == other_method.ranks()
    released = method.state_dict()["released"]
    assert released == other_method.state_dict()["released"]
    form = {"adamw": "factors", "momentum": "dense"}[kind]
    assert {*released.values()} == ({form} if "release" in options else {None})
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
