"""The method in a training loop that is not ours, on one process."""

import copy
import weakref

import pytest
import torch
from support.method_loop import OPTIMIZERS, batch, make, network, train, weights
from torch import nn

from app import OIALR
from app.errors import DivergedError
from oialr import StabilityTracker, compress, to_dense
from oialr.convert import get_layer
from oialr.layers.base import FactoredLayer
from oialr.transitions import Transitions

NO_CUT = {"cutoff": 1e-9}


@pytest.mark.slow
def test_the_way_of_a_run():
    model, optimizer, method = make(cutoff=0.3, layer_fraction=0.5)
    assert [layer.name for layer in method.layers] == ["0.weight", "2.weight"]
    events = train(model, optimizer, method, 4)
    assert not events
    assert not method.converted
    assert method.trainable_percent() == 100
    (event,) = train(model, optimizer, method, 1, first=4)
    assert (event.kind, event.step, event.shapes_changed) == ("convert", 5, True)
    # The first cut is not at the conversion itself.
    assert method.ranks() == {"0.weight": 20, "2.weight": 32}
    assert isinstance(model[4], nn.Linear)
    event, second = train(model, optimizer, method, 6, first=5)
    assert event.step == 8
    assert [layer.name for layer in event.layers] == ["2.weight"]
    assert [layer.name for layer in second.layers] == ["0.weight", "2.weight"]
    train(model, optimizer, method, 30, first=11)
    assert method.ranks()["2.weight"] < 32
    assert method.trainable_percent() < method.compression_percent()
    cores = [get_layer(model, layer.name).core for layer in method.layers]
    others = [model[0].bias, model[2].bias, model[4].weight, model[4].bias]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in [*cores, *others]}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_conversion_leaves_function_biases_and_their_state(kind):
    model, optimizer, method = make(kind)
    dense, dense_optimizer, _ = make(kind)
    bias = model[0].bias
    train(model, optimizer, method, 5)
    train(dense, dense_optimizer, None, 5)
    assert method.converted
    for mine, theirs in zip(weights(model), weights(dense), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert model[0].bias is bias
    expected = dict(dense_optimizer.state[dense[0].bias])
    torch.testing.assert_close(dict(optimizer.state[bias]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_trains_across_conversion_and_cuts(kind):
    model, optimizer, method = make(kind, cutoff=0.4, layer_fraction=1)
    events = train(model, optimizer, method, 40)
    assert any(event.kind == "cut" for event in events)
    assert all(torch.isfinite(w).all() for w in weights(model))
    for layer in method.layers:
        core = get_layer(model, layer.name).core
        for key, value in optimizer.state[core].items():
            if isinstance(value, torch.Tensor) and value.dim():
                assert value.shape == core.shape, key


# Without RAdam, whose first steps are those of gradient descent: it is where gradients are alike
# from step to step, and the step after is up to 1.15 times as large.
@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "radam"])
@pytest.mark.parametrize("seed", range(3))
def test_first_step_after_conversion_is_no_larger_than_the_full_rank_step(kind, seed):
    """Zeroed moments with a kept step count, or moments of another basis, make it larger."""
    model, optimizer, method = make(kind, seed=seed, delay=20)
    dense, dense_optimizer, _ = make(kind, seed=seed)
    train(dense, dense_optimizer, None, 20)
    train(model, optimizer, method, 20)
    assert method.converted
    before = weights(dense)
    train(dense, dense_optimizer, None, 1, first=20)
    train(model, optimizer, None, 1, first=20)
    for i in (0, 1):
        full = torch.linalg.norm(weights(dense)[i] - before[i])
        low = torch.linalg.norm(weights(model)[i] - before[i])
        assert 0 < low <= full * 1.0001


def test_transported_moments_are_those_of_the_cores_gradient():
    model, optimizer, method = make("adam", delay=7)
    dense, dense_optimizer, _ = make("adam")
    train(dense, dense_optimizer, None, 7)
    train(model, optimizer, method, 7)
    layer, state = model[0], dense_optimizer.state[dense[0].weight]
    mine = optimizer.state[layer.core]
    torch.testing.assert_close(mine["exp_avg"], layer.U.T @ state["exp_avg"] @ layer.Vh.T)
    squared = (layer.U**2).T @ state["exp_avg_sq"] @ (layer.Vh**2).T
    torch.testing.assert_close(mine["exp_avg_sq"], squared)
    assert mine["step"] == state["step"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_sgd_is_unchanged_by_updates_that_cut_nothing(kind):
    """An update rotates the basis of the core; without a cut SGD cannot notice."""
    model, optimizer, method = make(kind, layer_fraction=1, **NO_CUT)
    other, other_optimizer, other_method = make(kind, update_interval=10**6)
    events = train(model, optimizer, method, 25)
    train(other, other_optimizer, other_method, 25)
    assert [event.kind for event in events] == ["convert"] + ["update"] * 6
    for mine, theirs in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_sgd_momentum_of_a_cut_core_is_rotated_before_it_is_cut():
    model, optimizer, method = make("momentum", cutoff=0.4, layer_fraction=1)
    uncut, uncut_optimizer, uncut_method = make("momentum", update_interval=10**6)
    train(model, optimizer, method, 8)
    train(uncut, uncut_optimizer, uncut_method, 8)
    mine, full = model[2], uncut[2]
    assert mine.rank < full.rank
    momentum = full.U @ uncut_optimizer.state[full.core]["momentum_buffer"] @ full.Vh
    expected = mine.U.T @ momentum @ mine.Vh.T
    torch.testing.assert_close(optimizer.state[mine.core]["momentum_buffer"], expected)


def test_update_without_cut_keeps_the_parameter_objects():
    model, optimizer, method = make(layer_fraction=1, **NO_CUT)
    train(model, optimizer, method, 7)
    before = list(model.parameters())
    (event,) = train(model, optimizer, method, 1, first=7)
    assert event.kind == "update"
    assert not event.shapes_changed
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    core = model[0].core.detach()
    torch.testing.assert_close(core, torch.diag(core.diagonal()))


@pytest.mark.slow
def test_cut_discards_exactly_the_small_singular_values():
    model, optimizer, method = make(cutoff=0.4, layer_fraction=1)
    train(model, optimizer, method, 7)
    clone, clone_optimizer, clone_method = make(update_interval=10**6)
    train(clone, clone_optimizer, clone_method, 8)
    (event,) = train(model, optimizer, method, 1, first=7)
    assert event.kind == "cut"
    for i, layer in zip((0, 2), event.layers, strict=True):
        discarded = layer.singular_values[layer.rank :]
        assert len(layer.singular_values) == layer.previous_rank
        change = torch.linalg.norm(model[i].weight - clone[i].weight)
        torch.testing.assert_close(change, torch.linalg.norm(discarded))


def test_cut_at_conversion_on_request():
    model, optimizer, method = make(cutoff=0.5, cut_at_conversion=True)
    (event,) = train(model, optimizer, method, 5)
    assert event.kind == "convert"
    assert method.ranks()["2.weight"] < 32


def test_an_event_computes_in_full_precision_whatever_the_program_allows(monkeypatch):
    model, optimizer, method = make(delay=1, update_interval=1)
    seen, apply = [], Transitions.apply

    def look(self, report, factors, **options):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return apply(self, report, factors, **options)

    monkeypatch.setattr(Transitions, "apply", look)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        train(model, optimizer, method, 2)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}


@pytest.mark.slow
def test_gradient_accumulation_counts_optimizer_steps_and_loses_nothing():
    model, optimizer, method = make("momentum", delay=2, layer_fraction=1, **NO_CUT)
    other, other_optimizer, other_method = make("momentum", delay=2, layer_fraction=1, **NO_CUT)
    for step in range(8):
        x, y = batch(step)
        optimizer.zero_grad()
        for part in range(4):
            rows = slice(16 * part, 16 * part + 16)
            (nn.functional.cross_entropy(model(x[rows]), y[rows]) / 4).backward()
            if part == 3:
                optimizer.step()
            event = method.step()  # after every backward pass
            assert part == 3 or event is None
    train(other, other_optimizer, other_method, 8)
    assert method.step_count == other_method.step_count == 8
    for mine, theirs in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_pending_gradient_follows_its_parameter():
    model, optimizer, method = make("sgd", delay=1)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    G = model[0].weight.grad.clone()
    method.step()
    layer = model[0]
    torch.testing.assert_close(layer.core.grad, layer.U.T @ G @ layer.Vh.T)


@pytest.mark.slow
def test_a_list_of_parameters_from_before_clips_by_no_norm_of_replaced_ones():
    model, optimizer, method = make("sgd", delay=1, cutoff=0.4, layer_fraction=1, update_interval=1)
    cached = list(model.parameters())
    for step in range(2):  # a conversion and a cut
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert method.step().shapes_changed
        present = {id(parameter) for parameter in model.parameters()}
        assert all(p.grad is None for p in cached if id(p) not in present)
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])
            for some in (cached, [p for p in cached if id(p) in present])
        ]
        assert norms[0] == norms[1]
        cached += model.parameters()


@pytest.mark.slow
def test_parameter_groups_with_their_own_options_survive():
    model = network()
    weight_group = {"params": [m.weight for m in model if hasattr(m, "weight")]}
    bias_group = {"params": [m.bias for m in model if hasattr(m, "bias")], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([weight_group, bias_group], lr=1e-2, weight_decay=0.5)
    method = OIALR(model, optimizer, delay=2, update_interval=2, core_learning_rate_factor=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    train(model, optimizer, method, 6)
    schedule.step()
    dense, biases, cores = optimizer.param_groups
    assert [id(p) for p in dense["params"]] == [id(model[4].weight)]
    assert [id(p) for p in cores["params"]] == [id(model[0].core), id(model[2].core)]
    assert biases["weight_decay"] == 0
    assert cores["weight_decay"] == 0.5
    assert (dense["lr"], cores["lr"]) == (0.5e-2, 1.5e-2)


@pytest.mark.slow
def test_core_learning_rate_factor_scales_the_step():
    moves = {}
    for factor in (1, 3):
        model, optimizer, method = make("sgd", core_learning_rate_factor=factor)
        train(model, optimizer, method, 5)
        before = weights(model)
        train(model, optimizer, method, 1, first=5)
        moves[factor] = [a - b for a, b in zip(weights(model), before, strict=True)]
    torch.testing.assert_close(moves[3][0], 3 * moves[1][0])
    torch.testing.assert_close(moves[3][2], moves[1][2])  # the dense head


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 5, 6, 9, 20])
@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_state_dict_rebuilds_shapes_and_continues_alike(steps, factor, kind):
    options = {"cutoff": 0.4, "layer_fraction": 0.5, "core_learning_rate_factor": factor}
    model, optimizer, method = make(kind, **options)
    train(model, optimizer, method, steps)
    saved = copy.deepcopy((method.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, method, 12, first=steps)

    other, other_optimizer, other_method = make(kind, seed=9, **options)
    other_method.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    train(other, other_optimizer, other_method, 12, first=steps)
    assert other_method.ranks() == method.ranks()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_another_network_is_refused():
    model, optimizer, method = make(delay=1)
    train(model, optimizer, method, 1)
    state = method.state_dict()
    method.load_state_dict(state)  # as it is
    ranks = {**state["ranks"], "2.weight": 3}
    with pytest.raises(ValueError, match=r"full-rank network.*2\.weight is low-rank of rank 32"):
        method.load_state_dict({**state, "ranks": ranks})
    other = nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 5))
    other_optimizer = torch.optim.SGD(other.parameters())
    other_method = OIALR(other, other_optimizer, delay=1, update_interval=1)
    with pytest.raises(ValueError, match=r"another network: 2\.weight"):
        other_method.load_state_dict(state)


@pytest.mark.parametrize(
    ("steps", "delay", "fits"), [(2, 3, True), (2, 1, False), (4, 9, False), (6, 9, False)]
)
def test_the_delay_is_open_until_either_is_over(steps, delay, fits):
    model, optimizer, method = make(delay=4)
    train(model, optimizer, method, steps)
    _, _, other = make(delay=delay)
    if fits:
        other.load_state_dict(method.state_dict())
    else:
        with pytest.raises(ValueError, match=f"delay: cannot change from 4 to {delay} after step"):
            other.load_state_dict(method.state_dict())


FUSED = {"adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), **OPTIMIZERS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["momentum", "adamw", "centered"])
@pytest.mark.parametrize(("stored_at", "loaded_at"), [(12, 0), (12, 6), (2, 6)])
def test_optimizer_state_of_other_ranks_is_refused_before_any_step(kind, stored_at, loaded_at):
    """torch takes it, and a fused step then ends the process with a segmentation fault."""
    made = []
    for steps in (stored_at, loaded_at):
        model = network(dtype=torch.float32)
        optimizer = FUSED[kind](model.parameters())
        method = OIALR(model, optimizer, delay=5, update_interval=3, cutoff=0.4)
        train(model, optimizer, method, steps)
        made.append((model, optimizer, method))
    (_, stored, of_stored), (_, optimizer, method) = made
    assert of_stored.state_dict()["ranks"] != method.state_dict()["ranks"]
    with pytest.raises(ValueError, match=r"(exp_avg|momentum_buffer|square_avg) \(.* of [02]\."):
        optimizer.load_state_dict(stored.state_dict())


class Lion(torch.optim.Optimizer):
    """An optimizer whose state has names that nobody knows."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("mystery", torch.zeros_like(p))
                m.lerp_(p.grad, 0.1)
                p.data.sub_(m.sign(), alpha=group["lr"])


@pytest.mark.slow
def test_unknown_optimizer_gets_a_clear_error_or_a_reset():
    model = network()
    optimizer = Lion(model.parameters())
    with pytest.raises(ValueError, match=r"Lion.*unknown_optimizer_state='reset'"):
        OIALR(model, optimizer, delay=2, update_interval=2)
    method = OIALR(
        model, optimizer, delay=2, update_interval=2, unknown_optimizer_state="reset", cutoff=0.4
    )
    train(model, optimizer, method, 2)
    assert model[0].core not in optimizer.state
    assert optimizer.state[model[0].bias]
    train(model, optimizer, method, 10, first=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": 0}, "delay must be at least 1"),
        ({"cutoff": 1.0}, r"cutoff must be in \(0, 1\)"),
        ({"layer_fraction": 0}, "layer_fraction"),
        ({"largest_cut": 1}, "largest_cut"),
        ({"minimum_rank_fraction": 2}, "minimum_rank_fraction"),
        ({"core_learning_rate_factor": 0}, "core_learning_rate_factor"),
        ({"update_interval": 0}, "update_interval"),
        ({"rank_multiple": 0}, "rank_multiple"),
        ({"retained_energy": 1}, r"retained_energy must be in \(0, 1\), or None"),
        ({"largest_energy_cut": 0}, "largest_energy_cut"),
        (
            {"factorization": "replcated"},
            "factorization must be one of auto, owner, heat, replicated",
        ),
        ({"execution": "fast"}, "execution must be one of"),
        ({"unknown_optimizer_state": "rest"}, "unknown_optimizer_state must be one of"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_what_cannot_work_is_refused_at_once():
    model = network()
    with pytest.raises(ValueError, match=r"0\.weight is not among the optimizer's parameters"):
        OIALR(model, torch.optim.SGD(model[4].parameters()), delay=1, update_interval=1)
    small = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"no layer can be factorized: .*too small"):
        OIALR(
            small,
            torch.optim.SGD(small.parameters()),
            delay=1,
            update_interval=1,
            keep_last_layer=False,
        )


@pytest.mark.parametrize("step", [5, 8])
def test_a_diverged_weight_is_named(step):
    model, optimizer, method = make(layer_fraction=1)
    train(model, optimizer, method, step - 1)
    train(model, optimizer, None, 1, first=step - 1)
    layer = model[2]
    with torch.no_grad():
        (layer.core if isinstance(layer, FactoredLayer) else layer.weight)[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=rf"2\.weight holds NaN or infinity at step {step}"):
        method.step()


@pytest.mark.slow
def test_random_state_is_left_alone():
    model, optimizer, method = make(layer_fraction=1)
    state = torch.get_rng_state()
    train(model, optimizer, method, 12)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("factor", [1, 3])
def test_full_rank_weights_are_given_up_one_by_one(factor, monkeypatch):
    model, optimizer, method = make(delay=2, core_learning_rate_factor=factor)
    train(model, optimizer, None, 2)
    optimizer.zero_grad()
    dense = [weakref.ref(model[0].weight), weakref.ref(model[2].weight)]
    alive = []
    real = Transitions.matrix

    def count(self, report):
        alive.append(sum(weight() is not None for weight in dense))
        return real(self, report)

    monkeypatch.setattr(Transitions, "matrix", count)
    assert method.conversion_due
    method.step()
    assert not method.conversion_due
    # Twice to look at all of them; then each is factorized when the one before is gone.
    assert alive == [2, 2, 2, 1]
    assert [weight() for weight in dense] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("interval", [2, 3])
def test_no_event_is_lost_when_step_is_called_rarely(interval):
    model, optimizer, method = make(delay=3, update_interval=interval, layer_fraction=1)
    kinds = []
    for step in range(0, 12, 2):
        train(model, optimizer, None, 2, first=step)
        due = method.event_due
        event = method.step()
        assert due == (event is not None)
        kinds.append(event and event.kind)
    assert kinds[:2] == [None, "convert"]
    assert sum(kind in ("update", "cut") for kind in kinds) >= 2


def test_an_event_that_is_due_survives_a_checkpoint():
    model, optimizer, method = make()
    train(model, optimizer, None, 5)
    saved = method.state_dict(), model.state_dict(), optimizer.state_dict()
    other, other_optimizer, other_method = make(seed=3)
    other_method.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    assert other_method.conversion_due
    assert other_method.step().kind == "convert"


def test_lbfgs_is_refused():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        OIALR(model, optimizer, delay=1, update_interval=1, unknown_optimizer_state="reset")


def test_names_of_parameters_move_along_with_cores():
    model = network()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    method = OIALR(model, optimizer, delay=1, update_interval=9, core_learning_rate_factor=3)
    train(model, optimizer, method, 1)
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["param_names"])
    assert optimizer.param_groups[1]["param_names"] == ["0.weight", "2.weight"]


@pytest.mark.slow
def test_a_compiled_network_is_trained_across_conversion_and_cuts():
    options = {"cutoff": 0.4, "layer_fraction": 1, "delay": 2}
    model, optimizer, method = make("momentum", **options)
    other, other_optimizer, other_method = make("momentum", **options)
    compiled = torch.compile(other, backend="eager")
    train(model, optimizer, method, 8)
    for step in range(8):
        other_optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(compiled(x), y).backward()
        other_optimizer.step()
        other_method.step()
    assert other_method.ranks() == method.ranks()
    assert method.ranks()["2.weight"] < 32
    for mine, theirs in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_optimizer_has_one_method():
    """Two would move its parameters to and fro until it has none."""
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match="the optimizer is that of another OIALR"):
        OIALR(model, optimizer, delay=1, update_interval=1)
    OIALR(model, torch.optim.SGD(model.parameters(), lr=0.1), delay=1, update_interval=1)


REFUSED = {
    "size": ({"target_size": 0.01}, "target_size 0.01 cannot be reached"),
    "pattern": ({"exclude": ["nothing.*"]}, "nothing"),
    "decay": ({"frobenius_decay": 0.1}, "it is not known how weights decay by"),
}


class Unknown(torch.optim.SGD):
    """An optimizer without a rule."""


@pytest.mark.parametrize("low_rank", [None, "factors", "cores"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_method_leaves_network_and_optimizer_as_they_were(case, low_rank):
    options, message = REFUSED[case]
    model = network()
    if low_rank:
        release = {"release": None} if low_rank == "cores" else {}
        compress(model, target_size=0.7, rank_multiple=1, execution="folded", **release)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert (len(trained) < len(before)) == (low_rank == "cores")
    optimizer = Unknown(trained, lr=0.1, momentum=0.9)
    groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
    groups[0]["param_names"] = [*groups[0]["param_names"]]
    x, y = batch(0)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    state = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    common = {"delay": 4, "update_interval": 3, "release": 4, "core_learning_rate_factor": 3.0}
    with pytest.raises(ValueError, match=message):
        OIALR(model, optimizer, unknown_optimizer_state="reset", **common, **options)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(before[name][0] is p for name, p in model.named_parameters())
    assert str(optimizer.param_groups) == str(groups)
    held = optimizer.param_groups[0]["params"]
    assert all(mine is theirs for mine, theirs in zip(held, groups[0]["params"], strict=True))
    assert all(optimizer.state[p] == state[p] for p in held)
    layers = [layer for layer in model.modules() if isinstance(layer, FactoredLayer)]
    assert bool(layers) == bool(low_rank)
    assert all(layer.execution == "folded" for layer in layers)
    step()
    method = OIALR(model, optimizer, unknown_optimizer_state="reset", delay=4, update_interval=3)
    for _ in range(3):
        step()
        method.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"release": 7, "frobenius_decay": 0.1},
        {"delay": "stability", "stability_threshold": 0.97, "latest_delay": 8},
    ],
)
def test_events_may_be_within_autocast(kind, options):
    """Bases were of bfloat16's precision then, or the optimizer's state of its dtype."""
    made = [make(kind, cutoff=0.6, update_interval=2, **options) for _ in range(2)]
    for model, *_ in made:
        model.float()
    for step in range(9):
        x, y = (tensor.float() if tensor.is_floating_point() else tensor for tensor in batch(step))
        for is_within, (model, optimizer, method) in enumerate(made):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(is_within)):
                optimizer.step()
                method.step()
    states = [model.state_dict() for model, *_ in made]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_the_way_back_and_a_new_beginning_may_be_within_autocast():
    """Weights became bfloat16 ones, for good."""
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.Linear(24, 4))
    compress(model, target_size=0.7, rank_multiple=1)
    exact = to_dense(copy.deepcopy(model)).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        dense = to_dense(copy.deepcopy(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"delay": 1, "release": 1, "update_interval": 1}
        method = OIALR(model, optimizer, rank_multiple=1, **options)
        stability = StabilityTracker(model, window=1)
        stability.measure()
        rows = stability.measure()
    assert method.converted
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, exact[name]), name
    assert all(row.stability == pytest.approx(1, abs=1e-5) for row in rows)


def test_an_event_has_its_own_device_whatever_the_default():
    """torch.set_default_device("cuda") made the first event a crash; "meta" tells without one."""
    model, optimizer, method = make(cutoff=0.6, update_interval=2)
    for step in range(9):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.device("meta"):
            method.step()
    assert min(method.ranks().values()) < 20
    with torch.device("meta"):
        rows = StabilityTracker(model).measure()
    assert all(row.numerical_rank > 0 for row in rows)


@pytest.mark.slow
def test_bfloat16_autocast_keeps_master_factors_in_float32():
    model = network(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = OIALR(model, optimizer, delay=4, update_interval=2, cutoff=0.4, layer_fraction=1)
    losses = []
    for step in range(30):
        x, y = batch(step, torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        method.step()
        losses.append(float(loss.detach()))
    assert method.ranks()["2.weight"] < 32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for U in (model[0].U, model[2].U):
        identity = torch.eye(U.shape[1])
        assert torch.linalg.matrix_norm(U.T @ U - identity, 2) < 1e-4
    assert losses[-1] < losses[0]


def test_a_pending_gradient_follows_a_rotation():
    model, optimizer, method = make("sgd", delay=1, update_interval=1, cutoff=1e-9)
    train(model, optimizer, method, 1)
    optimizer.zero_grad()
    x, y = batch(1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    layer = model[2]
    core, G = layer.core.clone(), layer.U @ layer.core.grad @ layer.Vh
    assert not method.step().shapes_changed
    assert not torch.allclose(layer.core, core)
    torch.testing.assert_close(layer.U @ layer.core.grad @ layer.Vh, G)


def test_sizes_are_shares_of_what_is_trained_and_of_what_is_stored():
    model = network()
    model[4].requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"](p for p in model.parameters() if p.requires_grad)
    method = OIALR(model, optimizer, delay=1, update_interval=1)
    assert method.trainable_percent() == method.compression_percent() == 100
    train(model, optimizer, method, 1)
    trained = 20 * 20 + 32 + 32 * 32 + 48  # of cores and biases
    assert method.trainable_percent() == pytest.approx(100 * trained / (21 * 32 + 33 * 48))
