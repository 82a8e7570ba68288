"""The parts of a run, each built from the configuration."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from app import models
from app.config.settings import Configuration, StabilitySection
from app.data import Task, build_task, download
from app.data.staging import stage, staged_root
from app.errors import UserError
from app.runtime.calibration import read_costs
from app.runtime.processes import Runtime
from app.training.average import WeightAverage
from app.training.batch_norm import check_batch_norm
from app.training.checkpoint import Checkpoints
from app.training.early_stopping import BEST_KEYS, EarlyStopping
from app.training.replicas import synchronize_batch_norm
from oialr.layer_survey import LayerReport
from oialr.method import OIALR
from oialr.placement.processes import Processes
from oialr.stability.tracker import StabilityTracker, select_weights


def build_task_and_model(
    configuration: Configuration, runtime: Runtime
) -> tuple[Task, torch.nn.Module]:
    """Read the data and build the network on the device. A collective call."""
    processes = runtime.processes
    if configuration.data.download:
        processes.agree(lambda: download(configuration) if runtime.local_index == 0 else None)
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
    model = processes.agree(lambda: _build_model(configuration, task))
    if configuration.training.synchronize_batch_norm:
        dense = model
        model = processes.agree(lambda: synchronize_batch_norm(dense, processes, runtime.device))
    model = model.to(runtime.device)
    processes.agree(lambda: check_batch_norm(model, task, configuration, runtime.process_count))
    return task, model


def build_method(
    configuration: Configuration,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    *,
    steps: int,
) -> OIALR | None:
    """Build the method for a run of so many steps; None for the full-rank baseline."""
    if not configuration.oialr.enabled:
        return None
    calibration = configuration.distributed.calibration
    try:
        return OIALR(
            model,
            optimizer,
            configuration.oialr.options(steps),
            factorization=configuration.distributed.factorization,
            processes=processes,
            costs=read_costs(calibration) if calibration else None,
            measure_memory=True,
        )
    except ValueError as error:
        raise UserError(f"oialr: {error}") from None


def build_average(
    configuration: Configuration, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> WeightAverage | None:
    """Build the moving average of the weights; None without training.ema_decay."""
    decay = configuration.training.ema_decay
    return None if decay is None else WeightAverage(model, optimizer, decay=decay)


def build_early_stopping(
    configuration: Configuration,
    folder: Path,
    processes: Processes,
    check_owner: Callable[[], None],
) -> EarlyStopping | None:
    """Build what ends a training early; None without training.early_stopping."""
    patience = configuration.training.early_stopping
    if patience is None:
        return None
    best = Checkpoints(
        folder / "checkpoints" / "best",
        processes,
        keep=1,
        keys=BEST_KEYS,
        check_owner=check_owner,
    )
    return EarlyStopping(best, patience=patience)


def _build_model(configuration: Configuration, task: Task) -> torch.nn.Module:
    """Build the full-rank network, with the same bits on all processes."""
    models.check(configuration.model, input_shape=task.input_shape, outputs=task.outputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(configuration.run.seed)
        return models.build(
            configuration.model.name,
            configuration.model.arguments,
            input_shape=task.input_shape,
            outputs=task.outputs,
        )


def build_tracker(
    settings: StabilitySection, layers: Sequence[LayerReport], processes: Processes
) -> StabilityTracker | None:
    """Build the tracker of a configuration; None if nothing is to be measured.

    Raises:
        UserError: as :func:`select_weights`.
    """
    if not settings.enabled:
        return None
    return StabilityTracker(
        select_weights(layers, include=settings.include, exclude=settings.exclude),
        processes,
        window=settings.window,
        unit=settings.unit,
        reference_dtype=getattr(torch, settings.reference_dtype),
    )
