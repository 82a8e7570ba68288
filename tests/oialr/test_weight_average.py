"""The moving average of the weights, through changes of their rank."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oialr
from oialr import OIALR, WeightAverage
from oialr.averages import WEIGHT_AVERAGE

pytestmark = pytest.mark.usefixtures("own_random_state")


class Network(nn.Module):
    """A convolution, a normalization and three linear layers, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 12, 3, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.wide = nn.Linear(12, 30)
        self.square = nn.Linear(30, 30)
        self.head = nn.Linear(30, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x)).mean(dim=-1)
        return self.head(torch.tanh(self.square(torch.tanh(self.wide(x)))))


class Signs(torch.optim.Optimizer):
    """A step by the signs of the gradient, without any state."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())


oialr.register_optimizer(Signs, oialr.OptimizerRule())

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),  # without a rule
    "signs": lambda p: Signs(p, lr=1e-2),
}


def parts(
    kind: str = "adamw", *, decay: float = 0.9, **options: Any
) -> tuple[Network, torch.optim.Optimizer, OIALR, WeightAverage]:
    model = Network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    options = {"delay": 5, "update_interval": 4, "layer_fraction": 1, "cutoff": 0.01, **options}
    if kind == "adadelta":
        options["unknown_optimizer_state"] = "reset"
    method = OIALR(model, optimizer, rank_multiple=1, **options)
    return model, optimizer, method, WeightAverage(model, optimizer, decay=decay)


def take_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: OIALR,
    average: WeightAverage,
    steps: range,
) -> list[dict[str, Tensor]]:
    """Train; return the dense weights after every step."""
    history = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 3, 8, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().sum(dim=1).sub(1).square().mean().backward()
        optimizer.step()
        average.update(step + 1)
        history.append(dense_weights(model))
        method.step()
    return history


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    layers = ("convolution", "wide", "square", "head")
    found = {name: getattr(model, name).weight.detach().clone() for name in layers}
    return found | {
        f"bias of {name}": getattr(model, name).bias.detach().clone() for name in layers[1:]
    }


def expected_average(history: list[dict[str, Tensor]], name: str, decay: float) -> Tensor:
    average = history[0][name]
    for step, weights in enumerate(history[1:], start=2):
        share = min(decay, (1 + step) / (10 + step))
        average = share * average + (1 - share) * weights[name]
    return average


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_average_of_a_full_rank_network(kind: str) -> None:
    model, optimizer, method, average = parts(kind, delay=1000)
    reference = copy.deepcopy(model)
    reference_optimizer = OPTIMIZERS[kind](reference.parameters())
    history = take_steps(model, optimizer, method, average, range(8))
    before = dense_weights(model)
    with average.applied():
        for name, weight in dense_weights(model).items():
            torch.testing.assert_close(weight, expected_average(history, name, 0.9))
    for name, weight in dense_weights(model).items():
        assert torch.equal(weight, before[name])
    # The optimizer itself does the same as without an average.
    idle = OIALR(
        reference,
        reference_optimizer,
        delay=1000,
        update_interval=1,
        rank_multiple=1,
        unknown_optimizer_state="reset",
    )
    silent = WeightAverage(nn.Module(), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), decay=0.5)
    take_steps(reference, reference_optimizer, idle, silent, range(8))
    for name, weight in dense_weights(reference).items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_average_follows_a_conversion_and_rotations(kind: str) -> None:
    """Square weights lie in their bases: their average is that of the dense weights, exactly."""
    model, optimizer, method, average = parts(kind, cutoff=1e-12)
    history = take_steps(model, optimizer, method, average, range(18))
    assert method.converted
    assert method.ranks()["square.weight"] == 30
    with average.applied():
        averaged = dense_weights(model)
    for name in ("square", "head", "bias of wide"):
        torch.testing.assert_close(averaged[name], expected_average(history, name, 0.9))
    # Of a tall weight the part outside the bases is lost, and no more than that.
    U = model.wide.U
    wide = expected_average(history, "wide", 0.9)
    torch.testing.assert_close(averaged["wide"], U @ U.T @ wide)


@pytest.mark.slow
def test_average_is_cut_to_the_kept_directions() -> None:
    model, optimizer, method, average = parts(cutoff=0.3)
    take_steps(model, optimizer, method, average, range(8))
    assert method.ranks()["square.weight"] == 30
    seen = []
    method.step = lambda: None  # type: ignore[method-assign]  # look at it before the cut
    take_steps(model, optimizer, method, average, range(8, 9))
    with average.applied():
        seen.append(dense_weights(model)["square"])
    del method.step
    event = method.step()
    assert event
    assert event.kind == "cut"
    U, V = model.square.U, model.square.Vh.T
    assert U.shape[1] < 30
    with average.applied():
        seen.append(dense_weights(model)["square"])
    torch.testing.assert_close(seen[1], U @ U.T @ seen[0] @ V @ V.T)
    assert not torch.allclose(seen[1], seen[0])


@pytest.mark.parametrize("stop", [3, 5, 7, 9])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_stored_average_goes_on(kind: str, stop: int) -> None:
    """Stored before the conversion, right after it or an update, and in between."""
    mine, theirs = parts(kind, cutoff=0.2), parts(kind, cutoff=0.2)
    take_steps(*mine, range(stop))
    states = copy.deepcopy([part.state_dict() for part in mine])
    for part, state in zip(theirs, states, strict=True):
        part.load_state_dict(state)
    for model, optimizer, method, average in (mine, theirs):
        take_steps(model, optimizer, method, average, range(stop, 15))
    with mine[3].applied(), theirs[3].applied():
        assert all(map(torch.equal, mine[0].parameters(), theirs[0].parameters()))
        averaged = dense_weights(mine[0])["square"]
    assert not torch.equal(dense_weights(mine[0])["square"], averaged)


def test_stored_averages_of_other_ranks_are_refused() -> None:
    model, optimizer, method, average = parts("signs", cutoff=0.2)
    take_steps(model, optimizer, method, average, range(7))
    with pytest.raises(ValueError, match="averages do not fit the optimizer"):
        parts("signs")[3].load_state_dict(average.state_dict())
    other = parts("signs")
    other[3].load_state_dict({"buffers": average.state_dict()["buffers"]})  # from before


def test_averages_of_running_statistics() -> None:
    model, optimizer, method, average = parts(delay=1000)
    seen = []
    for step in range(5):
        take_steps(model, optimizer, method, average, range(step, step + 1))
        seen.append({"mean": model.norm.running_mean.clone()})
    count = model.norm.num_batches_tracked.clone()
    with average.applied():
        torch.testing.assert_close(model.norm.running_mean, expected_average(seen, "mean", 0.9))
        assert model.norm.num_batches_tracked == count
    assert torch.equal(model.norm.running_mean, seen[-1]["mean"])


def test_other_buffers_are_left_as_they_are() -> None:
    """A mask of infinities became NaN, and one that grew with its samples ended the training."""
    model, optimizer, method, average = parts(delay=1000)
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    take_steps(model, optimizer, method, average, range(2))
    model.mask = mask = torch.full((4, 4), -torch.inf).triu(1)
    take_steps(model, optimizer, method, average, range(2, 4))
    with average.applied():
        assert torch.equal(model.mask, mask)
    state = average.state_dict()
    assert set(state["buffers"]) == {"norm.running_mean", "norm.running_var"}
    # Those of earlier versions had all of them.
    average.load_state_dict({**state, "buffers": {**state["buffers"], "gone": mask}})


@pytest.mark.parametrize("kind", ["adamw", "signs"])
def test_a_state_that_was_loaded_stays_what_it_is(kind: str) -> None:
    mine = parts(kind, delay=1000)
    take_steps(*mine, range(3))
    state = copy.deepcopy(mine[3].state_dict())
    kept = copy.deepcopy(state)
    mine[3].load_state_dict(state)
    take_steps(*mine, range(3, 5))
    for name, buffer in kept["buffers"].items():
        assert torch.equal(state["buffers"][name], buffer)
    assert len(kept["aside"]) == (9 if kind == "signs" else 0)
    for i, one in kept["aside"].items():
        assert torch.equal(state["aside"][i]["average"], one["average"])


def test_parameter_without_a_gradient_keeps_the_optimizer_whole() -> None:
    """An optimizer fills the state of a parameter only where it is empty."""
    model, optimizer, method, average = parts(delay=1000)
    model.norm.weight.requires_grad_(False)
    take_steps(model, optimizer, method, average, range(3))
    model.norm.weight.requires_grad_(True)
    take_steps(model, optimizer, method, average, range(3, 6))
    assert {"exp_avg", WEIGHT_AVERAGE} <= set(optimizer.state[model.norm.weight])


@pytest.mark.slow
def test_stored_ranks_are_restored() -> None:
    model, optimizer, method, average = parts(cutoff=0.3)
    inputs = torch.randn(4, 3, 8, dtype=torch.float64)
    snapshots = []
    for first, last in ((0, 3), (3, 6), (6, 18)):
        take_steps(model, optimizer, method, average, range(first, last))
        state = copy.deepcopy(model.state_dict())
        ranks = method.state_dict()["ranks"]
        model.eval()
        snapshots.append((ranks, state, model(inputs), method.trainable_percent()))
        model.train()
    assert snapshots[0][0]["square.weight"] is None
    assert snapshots[1][0]["square.weight"] > snapshots[2][0]["square.weight"]
    for _, state, outputs, percent in (snapshots[1], snapshots[2], snapshots[0]):
        model.load_state_dict(state)
        torch.testing.assert_close(model.eval()(inputs), outputs)
        assert method.trainable_percent() == percent


def test_stored_averages_of_running_statistics_are_restored() -> None:
    mine, theirs = parts(delay=1000), parts(delay=1000)
    take_steps(*mine, range(5))
    for one, other in ((0, 0), (1, 1), (3, 3)):
        theirs[other].load_state_dict(copy.deepcopy(mine[one].state_dict()))
    for model, _, _, average in (mine, theirs):
        with average.applied():
            means = model.norm.running_mean.clone()
        assert not torch.equal(means, model.norm.running_mean)
    with mine[3].applied():
        assert torch.equal(means, mine[0].norm.running_mean)
