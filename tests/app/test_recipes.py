"""The parts of a recipe: learning-rate schedule, early stopping."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launching import train
from support.tiny_run import TINY, assert_same_run, last_checkpoint
from torch import nn

from app import config, models
from app.config.settings import TrainingSection
from app.data import build_task
from app.errors import UserError
from app.recording.store import read_rows
from app.runtime.processes import start_runtime
from app.training import run
from app.training.build import build
from app.training.checkpoint import Checkpoints
from app.training.early_stopping import EarlyStopping
from app.training.evaluation import evaluate
from app.training.optimizer import Schedule
from app.training.replicas import synchronize_batch_norm
from app.training.training_step import TrainingStep
from oialr import prepare
from oialr.layer_survey import parameter_counts
from oialr.placement.processes import Processes

pytestmark = pytest.mark.usefixtures("own_random_state")


def rates(steps: int, *, conversion: int | None = None, **options: Any) -> list[float]:
    """Learning rates of all steps, of two groups; the second has half of the first's peak."""
    section = TrainingSection(epochs=10, learning_rate=1.0, **options)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    optimizer.param_groups[1]["lr"] = 0.5
    step = 0
    schedule = Schedule(
        optimizer,
        section,
        steps=steps,
        steps_per_epoch=steps // 10,
        since_conversion=lambda: (
            None if conversion is None or step < conversion else step - conversion
        ),
    )
    result = []
    for step in range(steps):
        result.append(schedule.set(step))
        assert optimizer.param_groups[1]["lr"] == pytest.approx(result[-1] / 2, abs=1e-12)
    return result


def test_one_cosine_by_default() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * t / 99)) for t in range(100)]
    assert rates(100) == pytest.approx(expected, abs=1e-12)


def test_a_skipped_step_does_not_shift_the_warm_up_after_the_conversion() -> None:
    """Of float16, whose scaled gradients overflow now and then: the method counts one step less."""
    keys = ["training.precision=float16", "training.warmup_after_conversion=4", "training.epochs=9"]
    configuration = config.load(None, [*TINY, *keys, "oialr.delay=3"])
    with start_runtime(device="cpu") as runtime:
        parts = build(configuration, runtime)
        steps, rates, converted = TrainingStep(parts), [], None
        for number, batch in enumerate(parts.task.train_batches(0)):
            bad = replace(batch, inputs=batch.inputs * math.inf)
            rates.append(steps.take(bad if number == 1 else batch, start=0.0).learning_rate)
            if parts.method.step():
                converted = parts.position.step
    assert (converted, parts.position.step, parts.method.step_count) == (4, 8, 7)
    warmup = [1e-6 + number / 8 * (3e-3 - 1e-6) for number in range(8)]
    expected = [rate * min(1, (i - 3) / 4) if i >= 4 else rate for i, rate in enumerate(warmup)]
    assert rates == pytest.approx(expected)


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


def test_batch_norm_is_synchronized_on_gpus_only() -> None:
    model = nn.Sequential(nn.BatchNorm1d(12))
    cpu = torch.device("cpu")
    assert synchronize_batch_norm(model, Processes(), cpu) is model

    class Two(Processes):
        group = object()

        def __init__(self) -> None:
            pass

    with pytest.raises(UserError, match=r"^training\.synchronize_batch_norm: .* GPUs only"):
        synchronize_batch_norm(model, Two(), cpu)
    converted = synchronize_batch_norm(model, Two(), torch.device("cuda"))
    assert isinstance(converted[0], nn.SyncBatchNorm)


AVERAGED = [*TINY, "training.ema_decay=0.9", "training.warmup_after_conversion=3"]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["oialr.delay=16", "oialr.core_learning_rate_factor=300"],
        ["oialr.delay=8", "oialr.release=16", "oialr.factor_learning_rate_factor=300"],
    ],
    ids=["conversion", "release"],
)
def test_early_stopping_tests_the_best_weights_of_the_last_form(
    method: list[str], tmp_path: Path
) -> None:
    """Cores or factors learn far too fast, so that it gets worse from the event on.

    That comes with the last step of the second epoch, whose weights do not count.
    """
    options = [
        *TINY,
        *method,
        "training.epochs=12",
        "training.early_stopping=2",
        "training.schedule=constant",
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
    converts = "oialr.delay=16" in method
    assert not converts or kept["ranks"] != last["method"]["ranks"]  # it was cut since
    configuration = config.load(whole / "config.yaml")
    task = build_task(configuration, process_index=0, process_count=1, device=torch.device("cpu"))
    section = configuration.model
    sizes = {"input_shape": task.input_shape, "outputs": task.outputs}
    model = models.build(section.name, section.arguments, **sizes)
    prepare(model).load_state_dict(kept["model"])
    assert summary["tested_ranks"] == kept["ranks"]
    assert any(kept["ranks"].values())
    assert not converts or None not in kept["ranks"].values()
    assert summary["stored_parameters"] == parameter_counts(model)[1]
    assert summary["trained_parameters"] == parameter_counts(model)[0]
    assert summary["stored_bytes"] == 4 * summary["stored_parameters"]
    figures = evaluate(model, task, "test", Processes(), torch.device("cpu"))
    assert summary["test_loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert summary["test_loss"] == rows["loss"][-1]


@pytest.mark.slow
def test_who_observes_epochs_learns_which_would_be_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search judges that one, and gives up nothing at the last one."""
    losses = iter([0.1, 0.9, 0.5, 0.7, 0.8, 0.0])  # layers turn low-rank in the second epoch

    def scripted(*arguments: Any, **options: Any) -> dict[str, float]:
        return {**evaluate(*arguments, **options), "loss": next(losses)}

    monkeypatch.setattr("app.training.trainer.evaluate", scripted)
    seen = []

    def observe(epoch: int, *_: Any, tested_epoch: int, last: bool) -> None:
        seen.append((epoch, tested_epoch, last))

    options = [*TINY, "training.early_stopping=2", "training.epochs=9", f"run.dir={tmp_path}"]
    configuration = config.load(None, [*options, "stability.enabled=false"])
    with start_runtime(device="cpu") as runtime:
        stop = SimpleNamespace(number=0)
        outcome = run.train(configuration, runtime, stop, resume=False, on_epoch=observe)
    assert seen == [(1, 1, False), (2, 2, False), (3, 3, False), (4, 3, False), (5, 3, True)]
    assert outcome.summary["tested_step"] == 3 / 5 * outcome.summary["steps"]


def test_an_equal_loss_is_no_smaller_one(tmp_path: Path) -> None:
    stopping = EarlyStopping(Checkpoints(tmp_path, Processes(), keep=1), patience=1)
    assert stopping.improves(10, 1.0)
    assert not stopping.improves(20, 1.0)
    assert stopping.exhausted


@pytest.mark.slow
def test_a_run_that_stopped_early_says_so_and_goes_on_where_it_may(tmp_path: Path) -> None:
    run = f"run.dir={tmp_path}"
    off = ["oialr.enabled=false", "stability.enabled=false", "data.train_samples=200"]
    rate = ["training.epochs=20", "training.warmup_epochs=0", "training.learning_rate=0.3"]
    result = train(0, *TINY, *off, *rate, "training.early_stopping=1", run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["epochs_since_best"] == 1
    ended = summary["epochs"]
    assert ended < 20
    line = f"stopped early, after epoch {ended} of {{}}: no smaller validation loss in 1 epoch; a "
    assert line.format(20) in result.stdout
    again = train(0, "--resume", tmp_path, "training.epochs=30")
    assert line.format(30) in again.stdout
    assert "was finished before: nothing was trained now" in again.stdout
    train(0, "--resume", tmp_path, f"training.epochs={ended + 1}", "training.early_stopping=9")
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == ended + 1


def test_a_run_clips_its_gradients() -> None:
    configuration = config.load(None, [*TINY, "training.gradient_clip=0.001"])
    with start_runtime(device="cpu") as runtime:
        parts = build(configuration, runtime)
        TrainingStep(parts).take(next(parts.task.train_batches(0)), start=0.0)
    gradients = [p.grad for p in parts.model.parameters() if p.grad is not None]
    assert float(nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
def test_with_an_average_the_best_weights_are_those_of_the_average(tmp_path: Path) -> None:
    """And not averaged once more, by the last one, when they are tested."""
    options = ["training.ema_decay=0.5", "training.early_stopping=1", "training.learning_rate=0.05"]
    off = ["oialr.enabled=false", "stability.enabled=false", "training.epochs=12"]
    train(0, *TINY, *off, *options, f"run.dir={tmp_path / 'run'}")
    rows = read_rows(tmp_path / "run" / "metrics.h5", "eval")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tested_step"] < summary["steps"]
    (path,) = (tmp_path / "run" / "checkpoints" / "best").glob("step-*/state.pt")
    configuration = config.load(tmp_path / "run" / "config.yaml")
    with start_runtime(device="cpu") as runtime:
        parts = build(configuration, runtime)
        parts.model.load_state_dict(torch.load(path, weights_only=True)["model"])
        for split in ("validation", "test"):
            mine = evaluate(parts.model, parts.task, split, Processes(), torch.device("cpu"))
            of_split = rows["split"] == split
            at_best = of_split & ((rows["step"] == summary["tested_step"]) | (split == "test"))
            assert rows["loss"][at_best].tolist() == pytest.approx([mine["loss"]], rel=1e-5)
