"""The parts of a recipe: learning-rate schedule, average of the weights, early stopping."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launching import train
from support.tiny_run import TINY, assert_same_run, last_checkpoint
from torch import Tensor, nn

from app import OIALR, config, models
from app.config.settings import TrainingSection
from app.data import build_task
from app.errors import UserError
from app.recording.store import read_rows
from app.training.checkpoint import Checkpoints
from app.training.early_stopping import EarlyStopping
from app.training.evaluation import evaluate
from app.training.optimizer import Schedule
from app.training.replicas import synchronize_batch_norm
from oialr import prepare
from oialr.layer_survey import parameter_counts
from oialr.optimizer_state import WEIGHT_AVERAGE
from oialr.placement.processes import Processes
from oialr.weight_average import WeightAverage


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def rates(steps: int, *, conversion: int | None = None, **options: Any) -> list[float]:
    """Learning rates of all steps, of two groups; the second has half of the first's peak."""
    section = TrainingSection(epochs=10, learning_rate=1.0, **options)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    optimizer.param_groups[1]["lr"] = 0.5
    schedule = Schedule(
        optimizer, section, steps=steps, steps_per_epoch=steps // 10, conversion=conversion
    )
    result = []
    for step in range(steps):
        result.append(schedule.set(step))
        assert optimizer.param_groups[1]["lr"] == pytest.approx(result[-1] / 2, abs=1e-12)
    return result


def test_one_cosine_by_default() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * t / 99)) for t in range(100)]
    assert rates(100) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30)
@given(
    cycles=st.integers(1, 4),
    mul=st.sampled_from([1.0, 1.5, 2.0]),
    decay=st.sampled_from([0.5, 1.0]),
    k=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_cycles_fill_the_run(cycles: int, mul: float, decay: float, k: float) -> None:
    """The formula of timm's CosineLRScheduler, with the first cycle's length that fits."""
    floor, steps, warmup = 0.01, 400, 40
    actual = rates(
        steps,
        cycle_limit=cycles,
        cycle_mul=mul,
        cycle_decay=decay,
        k_decay=k,
        minimum_learning_rate=floor,
        warmup_epochs=1,
    )
    lengths = [mul**i for i in range(cycles)]
    unit = (steps - warmup - 1) / sum(lengths)
    assert actual[0] == pytest.approx(1e-6)
    for step in range(warmup, steps):
        t, cycle = float(step - warmup), 0
        while cycle < cycles - 1 and t >= lengths[cycle] * unit - 1e-9:
            t -= lengths[cycle] * unit
            cycle += 1
        cosine = math.cos(math.pi * min(1, max(t, 0) / (lengths[cycle] * unit)) ** k)
        expected = floor + 0.5 * (decay**cycle - floor) * (1 + cosine)
        at_a_boundary = min(abs(t), abs(t - lengths[cycle] * unit)) < 1e-6
        if not at_a_boundary or cycle == 0:
            assert actual[step] == pytest.approx(expected, abs=1e-9)
    assert actual[-1] == pytest.approx(floor, abs=1e-6)


def test_warm_up_after_the_conversion() -> None:
    plain = rates(100)
    warmed = rates(100, conversion=50, warmup_after_conversion=4)
    ratios = [warm / rate for warm, rate in zip(warmed[:-1], plain[:-1], strict=True)]
    assert ratios == pytest.approx([1.0] * 50 + [0.25, 0.5, 0.75, 1.0] + [1.0] * 45)
    assert rates(100, warmup_after_conversion=4) == plain  # full-rank training


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


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def parts(
    kind: str = "adamw", *, decay: float = 0.9, **options: Any
) -> tuple[Network, torch.optim.Optimizer, OIALR, WeightAverage]:
    model = Network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    options = {"delay": 5, "update_interval": 4, "layer_fraction": 1, "cutoff": 0.01, **options}
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
    idle = OIALR(reference, reference_optimizer, delay=1000, update_interval=1, rank_multiple=1)
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


def test_parameter_without_a_gradient_keeps_the_optimizer_whole() -> None:
    """An optimizer fills the state of a parameter only where it is empty."""
    model, optimizer, method, average = parts(delay=1000)
    model.norm.weight.requires_grad_(False)
    take_steps(model, optimizer, method, average, range(3))
    model.norm.weight.requires_grad_(True)
    take_steps(model, optimizer, method, average, range(3, 6))
    assert {"exp_avg", WEIGHT_AVERAGE} <= set(optimizer.state[model.norm.weight])


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


def test_batch_norm_is_synchronized_on_gpus_only() -> None:
    model = Network()
    cpu = torch.device("cpu")
    assert synchronize_batch_norm(model, Processes(), cpu) is model

    class Two(Processes):
        group = object()

        def __init__(self) -> None:
            pass

    with pytest.raises(UserError, match=r"^training\.synchronize_batch_norm: .* GPUs only"):
        synchronize_batch_norm(model, Two(), cpu)
    converted = synchronize_batch_norm(model, Two(), torch.device("cuda"))
    assert isinstance(converted.norm, nn.SyncBatchNorm)


AVERAGED = [*TINY, "training.ema_decay=0.9", "training.warmup_after_conversion=3"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_with_an_average_is_the_uninterrupted_run(
    tmp_path: Path, processes: int
) -> None:
    train(processes, *AVERAGED, f"run.dir={tmp_path / 'whole'}")
    arguments = [*AVERAGED, f"run.dir={tmp_path / 'parts'}"]
    for step in (14, 22):  # before the conversion, and after a cut
        train(processes, *arguments, f"run.stop_after={step}", code=75)
        arguments = ["--resume", str(tmp_path / "parts")]
    train(processes, *arguments, "run.stop_after=null")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    rates = read_rows(tmp_path / "whole" / "metrics.h5", "train")["learning_rate"]
    assert rates[15] < rates[16] < rates[17]


def test_early_stopping_goes_on_after_a_kill(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A killed session leaves better weights than its last checkpoint knows: nothing is lost."""

    def start() -> EarlyStopping:
        return EarlyStopping(Checkpoints(tmp_path, Processes(), keep=1), patience=3)

    model = nn.Linear(2, 2)
    first = start()
    nothing_yet = first.state_dict()
    assert first.improves(10, 1.0)
    first.keep(10, model, None, process_count=1)
    assert not first.improves(20, 2.0)
    state = first.state_dict()
    resumed = start()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state

    first.improves(30, 0.5)
    with torch.no_grad():
        model.weight.fill_(7)
    first.keep(30, model, None, process_count=1)  # after the last checkpoint; then it is killed
    for stored in (state, nothing_yet):
        resumed = start()
        resumed.load_state_dict(stored)
        assert resumed.state_dict() == stored
    assert not caplog.messages
    resumed.load_state_dict(state)
    assert not resumed.improves(20, 1.5)
    model.reset_parameters()
    assert resumed.restore_best(model) == 30
    assert (model.weight == 7).all()

    # Without its weights a loss is worth nothing.
    shutil.rmtree(tmp_path / "step-00000030")
    resumed = start()
    resumed.load_state_dict(state)
    assert resumed.improves(20, 1.5)
    assert caplog.messages == [
        "early stopping begins anew: the best weights are damaged or not there any more"
    ]


def test_early_stopping_begins_anew_where_the_network_turns_into_another_one(
    tmp_path: Path,
) -> None:
    """As good as the full-rank weights were, they do not count any more."""
    model = nn.Linear(2, 2)
    stopping = EarlyStopping(Checkpoints(tmp_path, Processes(), keep=1), patience=2)
    assert stopping.improves(10, 1.0)
    stopping.keep(10, model, None, process_count=1)
    assert not stopping.improves(20, 1.5)
    stopping.begin_anew(30)
    # The epoch that ends with the conversion tests the dense weights once more.
    assert not stopping.improves(30, 0.5)
    assert not stopping.exhausted

    resumed = EarlyStopping(Checkpoints(tmp_path, Processes(), keep=1), patience=2)
    resumed.load_state_dict(stopping.state_dict())
    assert resumed.state_dict() == stopping.state_dict()
    before = model.weight.clone()
    for one in (stopping, resumed):
        assert not one.improves(30, 0.4)
        assert one.restore_best(model) is None  # not those of step 10
        assert one.improves(40, 2.0)
    with torch.no_grad():
        model.weight.fill_(7)
    resumed.keep(40, model, None, process_count=1)
    model.weight = nn.Parameter(before)
    assert not resumed.improves(50, 2.5)
    assert not resumed.exhausted
    assert not resumed.improves(60, 2.5)
    assert resumed.exhausted
    assert resumed.restore_best(model) == 40
    assert (model.weight == 7).all()


def test_early_stopping_tests_the_best_low_rank_weights(tmp_path: Path) -> None:
    """Cores learn far too fast, so that it gets worse from the conversion on.

    The layers turn low-rank with the last step of the second epoch, whose weights do not count.
    """
    options = [
        *TINY,
        "oialr.delay=16",
        "training.epochs=12",
        "training.early_stopping=2",
        "training.schedule=constant",
        "oialr.core_learning_rate_factor=300",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(0, *options, f"run.dir={parts}", "run.stop_after=20", code=75)
    train(0, "--resume", parts, "run.stop_after=null")
    train(0, *options, f"run.dir={whole}")
    assert_same_run(parts, whole)

    rows = read_rows(whole / "metrics.h5", "eval")
    losses = rows["loss"][rows["split"] == "validation"].tolist()
    counted = losses[2:]
    assert min(losses) < min(counted)
    best = losses.index(min(counted))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["epochs"] == len(losses) == best + 3 < 12
    assert summary["tested_step"] == rows["step"][best] > 16
    last = last_checkpoint(whole)
    assert last["position"]["epoch"] == summary["epochs"]

    (folder,) = (whole / "checkpoints" / "best").glob("step-*")
    kept = torch.load(folder / "state.pt", weights_only=True)
    assert folder.name == f"step-{rows['step'][best]:08d}"
    assert kept["ranks"] != last["method"]["ranks"]  # it was cut since
    configuration = config.load(whole / "config.yaml")
    task = build_task(configuration, process_index=0, process_count=1, device=torch.device("cpu"))
    section = configuration.model
    sizes = {"input_shape": task.input_shape, "outputs": task.outputs}
    model = models.build(section.name, section.arguments, **sizes)
    prepare(model).load_state_dict(kept["model"])
    assert summary["tested_ranks"] == kept["ranks"]
    assert None not in kept["ranks"].values()
    assert summary["stored_parameters"] == parameter_counts(model)[1]
    assert summary["trained_parameters"] == parameter_counts(model)[0]
    assert summary["stored_bytes"] == 4 * summary["stored_parameters"]
    figures = evaluate(model, task, "test", Processes(), torch.device("cpu"))
    assert summary["test_loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert summary["test_loss"] == rows["loss"][-1]
