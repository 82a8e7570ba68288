"""The one builder of a run: everything that is trained with, whole and in memory.

A training, ``--explain`` and the check before a search build by :func:`build`; what is built knows
nothing of files. What a training writes is opened after it, see :mod:`app.training.storage`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from app import models
from app.config.settings import Configuration, StabilitySection
from app.data import Task, build_task, download
from app.data.staging import stage, staged_root
from app.errors import UserError
from app.runtime.calibration import read_costs
from app.runtime.processes import Runtime
from app.training.batch_norm import check_batch_norm
from app.training.initial import load_initial
from app.training.memory_layout import lay_channels_last
from app.training.optimizer import Schedule, build_optimizer, warmup_steps
from app.training.position import Position
from app.training.precision import Precision
from app.training.replicas import check_replicas, synchronize_batch_norm
from app.training.same_data import check_same_data, describe_data
from app.training.stopwatch import Stopwatch
from oialr.layer_survey import LayerReport, survey
from oialr.method import OIALR
from oialr.options import READINGS
from oialr.placement.processes import Processes
from oialr.stability.tracker import BasisTracker, select_weights
from oialr.weight_average import WeightAverage


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run on one process, at its start or at the state of a checkpoint."""

    configuration: Configuration
    runtime: Runtime
    task: Task
    steps: int
    """Optimizer steps of the whole run."""
    model: nn.Module
    """On the device, not wrapped."""
    optimizer: Optimizer
    schedule: Schedule
    method: OIALR | None
    """None: full-rank training."""
    layers: Sequence[LayerReport]
    """The multidimensional weights of the full-rank network."""
    tracker: BasisTracker | None
    """None: basis stability is not measured."""
    average: WeightAverage | None
    precision: Precision
    position: Position = field(default_factory=Position)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    """Of the training, in all sessions."""

    @cached_property
    def data(self) -> dict[str, Any]:
        """What tells the data from others, see :func:`describe_data`; found out once."""
        return describe_data(self.task)

    @property
    def trainable_percent(self) -> float:
        """Trained parameters over those of the full-rank network, in percent."""
        return self.method.trainable_percent() if self.method else 100.0

    @property
    def compression_percent(self) -> float:
        """Stored parameters over those of the full-rank network, in percent."""
        return self.method.compression_percent() if self.method else 100.0


def build(
    configuration: Configuration,
    runtime: Runtime,
    *,
    check_steps: bool = True,
    initial: bool = True,
    trains: bool = True,
    steps: int | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Parts:
    """Build the parts of a run in the one order that is right. A collective call.

    Nothing is written, but for data that are downloaded or staged where the configuration says so.

    Args:
        configuration: checked.
        runtime: this process among those that train together.
        check_steps: refuse a delay or release that the run would never reach; a search sets them
            for each candidate.
        initial: read the weights of model.initial; a run that goes on has its own.
        trains: whether there will be steps; of a network that is only read nothing is asked that
            training alone needs, neither of its delay and release nor of its batches.
        steps: of a run that is read, perhaps with other data or batches than its own: a share of
            the run is one of that run. None: as the configuration and the data say.
        tell: told of what begins now, such as :meth:`app.runtime.watchdog.Watchdog.progress`.

    Raises:
        UserError: data or network are not what the configuration says; alike on all processes.
    """
    processes, training = runtime.processes, configuration.training
    tell("data and network")
    task, model = _build_task_and_model(configuration, runtime, trains=trains)
    if initial:
        processes.agree(lambda: read_initial(configuration, model))
        check_replicas(model, processes)
    tell("method and optimizer")
    steps = steps or training.epochs * task.steps_per_epoch
    if check_steps and trains:
        processes.agree(lambda: configuration.check_steps(steps))
    optimizer = build_optimizer(model, training)
    method = processes.agree(
        lambda: _build_method(
            configuration,
            model,
            optimizer,
            processes,
            steps=steps,
            warmup=warmup_steps(training, task.steps_per_epoch),
        )
    )
    layers = method.survey if method else survey(model, **readings_of(configuration))
    # After the method, which may have added parameter groups.
    schedule = Schedule(
        optimizer,
        training,
        steps=steps,
        steps_per_epoch=task.steps_per_epoch,
        since_conversion=(lambda: method.steps_since_conversion) if method else lambda: None,
    )
    decay = training.ema_decay
    return Parts(
        configuration=configuration,
        runtime=runtime,
        task=task,
        steps=steps,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        method=method,
        layers=layers,
        tracker=processes.agree(lambda: _build_tracker(configuration.stability, layers, processes)),
        average=None if decay is None else WeightAverage(model, optimizer, decay=decay),
        precision=Precision(training.precision, runtime.device),
    )


def readings_of(configuration: Configuration) -> dict[str, Any]:
    """Return the options that say which matrices a weight is read as, full-rank or not."""
    return {name: getattr(configuration.oialr, name) for name in READINGS}


def read_initial(configuration: Configuration, model: nn.Module) -> None:
    """Give the network the weights of model.initial, if there are to be any."""
    if configuration.model.initial is not None:
        load_initial(model, configuration.model.initial)


def _build_task_and_model(
    configuration: Configuration, runtime: Runtime, *, trains: bool
) -> tuple[Task, torch.nn.Module]:
    """Read the data and build the network on the device. A collective call."""
    processes = runtime.processes
    if configuration.data.download:
        _download(configuration, runtime)
    data = configuration.data
    if data.stage_to:
        processes.agree(lambda: stage(data) if runtime.local_index == 0 else None)
    read = configuration.model_copy(
        update={"data": data.model_copy(update={"root": staged_root(data)})}
    )
    task = processes.agree(
        lambda: build_task(
            read,
            process_index=runtime.process_index,
            process_count=runtime.process_count,
            device=runtime.device,
        )
    )
    check_same_data(task, processes)
    model = processes.agree(lambda: _build_model(configuration, task, runtime.device))
    if trains and configuration.training.synchronize_batch_norm:
        dense = model
        model = processes.agree(lambda: synchronize_batch_norm(dense, processes, runtime.device))
    model = model.to(runtime.device)
    if configuration.training.channels_last:
        processes.agree(lambda: lay_channels_last(model, task.example_batch().inputs))
    if trains:
        count = runtime.process_count
        processes.agree(lambda: check_batch_norm(model, task, configuration, count))
    return task, model


def _download(configuration: Configuration, runtime: Runtime) -> None:
    """Download what is missing: process 0, and then one of each other node. A collective call.

    Nodes may share data.root: nothing is missing there any more when process 0 is done.
    """
    first = runtime.is_first
    elsewhere = runtime.local_index == 0 and not first
    for turn in (first, elsewhere):
        runtime.processes.agree(partial(download, configuration) if turn else lambda: None)


def _build_method(
    configuration: Configuration,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    *,
    steps: int,
    warmup: int,
) -> OIALR | None:
    """Build the method for a run of so many steps and of warm-up; None for the baseline."""
    if not configuration.oialr.enabled:
        return None
    calibration = configuration.distributed.calibration
    try:
        return OIALR(
            model,
            optimizer,
            configuration.oialr.options(steps, warmup=warmup),
            factorization=configuration.distributed.factorization,
            processes=processes,
            costs=read_costs(calibration) if calibration else None,
            measure_memory=True,
        )
    except ValueError as error:
        raise UserError(f"oialr: {error}") from None


def _build_model(configuration: Configuration, task: Task, device: torch.device) -> torch.nn.Module:
    """Build the full-rank network, with the same bits on all processes."""
    models.check(
        configuration.model,
        input_shape=task.input_shape,
        outputs=task.outputs,
        dtype=task.example_batch().inputs.dtype,
        device=device,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(configuration.run.seed)
        return models.build(
            configuration.model.name,
            configuration.model.arguments,
            input_shape=task.input_shape,
            outputs=task.outputs,
        )


def _build_tracker(
    settings: StabilitySection, layers: Sequence[LayerReport], processes: Processes
) -> BasisTracker | None:
    """Build the tracker of a configuration; None if nothing is to be measured.

    Raises:
        UserError: as :func:`select_weights`.
    """
    if not settings.enabled:
        return None
    return BasisTracker(
        select_weights(
            layers, include=settings.include, exclude=settings.exclude, section="stability."
        ),
        processes,
        window=settings.window,
        unit=settings.unit,
        reference_dtype=getattr(torch, settings.reference_dtype),
    )
