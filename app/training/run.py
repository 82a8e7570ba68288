"""One run from its configuration to its summary: puts the parts together.

A search calls :func:`train` too, with the processes that it gives to one evaluation.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.config import parse, to_yaml
from app.config.settings import Configuration
from app.config.yaml_text import dump_value
from app.errors import AgreedStorageError, UserError
from app.recording.log import Log
from app.recording.loggers.chosen import Loggers, find_loggers
from app.recording.swmr import writing
from app.runtime.latest import point_to
from app.runtime.processes import Runtime
from app.runtime.startup_check import check_nodes
from app.runtime.stop_signal import StopRequest
from app.runtime.watchdog import Watchdog
from app.training.checkpoint import CHECKPOINT_KEYS, Checkpoints
from app.training.folder import (
    find_folder,
    finish,
    finished,
    hold_folder,
    mark_unfinished,
    prepare_folder,
    write_text,
)
from app.training.optimizer import Schedule, build_optimizer
from app.training.parts import (
    build_average,
    build_early_stopping,
    build_method,
    build_task_and_model,
    build_tracker,
)
from app.training.position import Stopped
from app.training.progress import EpochObserver, Progress
from app.training.recorder import Recorder
from app.training.trainer import Trainer
from oialr.layer_survey import parameter_counts, survey

logger = logging.getLogger(__name__)

_FIXED = ("optimizer", "momentum", "weight_decay")
"""Keys of the section training that are part of the optimizer's stored state."""
_EXPECTED_TO_CHANGE = ("run.dir", "run.stop_after")
"""Keys that a run is resumed with: they make no difference to its results."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has come to."""

    folder: Path
    summary: dict[str, Any]
    """As in summary.json."""
    finished_before: bool
    """Whether there was nothing left to do."""


def train(
    configuration: Configuration,
    runtime: Runtime,
    stop_signal: StopRequest,
    *,
    resume: bool,
    test: bool = True,
    log: Log | None = None,
    on_epoch: EpochObserver | None = None,
) -> Outcome:
    """Train as configured, in the folder run.dir. A collective call.

    The generators of torch are left as they were. A new run's folder is made when everything fits
    together.

    Args:
        configuration: checked; run.dir may be None in a new run.
        runtime: this process among those that train together.
        stop_signal: asks for a stop.
        resume: go on from the newest checkpoint in run.dir; from the start if there is none. So
            does a run that torchrun starts anew.
        test: evaluate the test part at the end; a search leaves it to the winner.
        log: of this process; told of the run's folder as soon as there is one, on every process.
        on_epoch: told of every epoch, on every process, in place of progress lines. It ends the
            training by an exception, which it must raise on all processes alike.

    Raises:
        UserError: data, model or folder are not what the configuration says.
        Stopped: after a checkpoint, before the end.
        DivergedError: a loss or a weight is not finite.
    """
    earlier = find_folder(configuration, runtime, resume=resume)
    log = log or Log(is_first=runtime.is_first and on_epoch is None)
    if earlier and (summary := finished(earlier, configuration)):
        return Outcome(folder=earlier, summary=summary, finished_before=True)
    watchdog = Watchdog(
        timeout=configuration.distributed.timeout,
        alone=runtime.process_count == 1,
        abort=runtime.abort,
        name=f"process {runtime.process_index} of {runtime.process_count}",
    )
    with ExitStack() as held, watchdog, _own_random_state(configuration.run.seed, runtime):
        ownership = _Ownership(held, runtime)
        if earlier:
            ownership.take(earlier)
        nodes = check_nodes(configuration, runtime)
        trainer, folder = _assemble(
            configuration, runtime, stop_signal, watchdog, earlier, ownership=ownership
        )
        log.begin(folder)
        if runtime.is_first:
            point_to(folder)
        progress = Progress(
            log,
            steps=configuration.training.epochs * trainer.task.steps_per_epoch,
            first_step=trainer.position.step,
            epochs=configuration.training.epochs,
            quiet=not runtime.is_first or on_epoch is not None,
            on_epoch=on_epoch,
        )
        try:
            progress.say(nodes + _describe(trainer, folder))
            trainer.train(progress)
            if trainer.method and (missed := trainer.method.missed_target()):
                progress.say(f"the run ends above its size: {missed}")
            figures = trainer.test() if test else {}
        except Stopped as stop:
            mark_unfinished(folder, runtime, stopped=str(stop))
            raise
        finally:
            progress.close()
            with watchdog.guard("the end of metrics.h5"):
                trainer.recorder.close()
        if problem := runtime.processes.from_first(trainer.recorder.problem):
            raise AgreedStorageError(str(problem))
        summary = _summarize(trainer, figures)
        if runtime.is_first:
            ownership.check()
            finish(folder, summary)
    return Outcome(folder=folder, summary=summary, finished_before=False)


class _Ownership:
    """Of the run's folder, from when it is known to the end of the run."""

    def __init__(self, held: ExitStack, runtime: Runtime) -> None:
        self._held, self._runtime = held, runtime
        self._check: Callable[[], None] | None = None

    def take(self, folder: Path) -> None:
        """Own the folder if it is not owned already. A collective call.

        Raises:
            AgreedUserError: another program owns it.
        """
        if self._check is None:
            self._check = self._held.enter_context(hold_folder(folder, self._runtime))

    def check(self) -> None:
        """Make sure, before something is written, that no other program has taken over.

        Raises:
            StorageError: one has.
        """
        assert self._check
        self._check()


def _assemble(
    configuration: Configuration,
    runtime: Runtime,
    stop_signal: StopRequest,
    watchdog: Watchdog,
    earlier: Path | None,
    *,
    ownership: _Ownership,
) -> tuple[Trainer, Path]:
    """Build the parts in the one order that is right and bring them to the checkpoint's state.

    Args:
        configuration: checked.
        runtime: this process among those that train together.
        stop_signal: asks for a stop.
        watchdog: told of the progress.
        earlier: folder of a run that goes on; None: a new one is made.
        ownership: of the folder, which is taken as soon as there is one.

    Returns:
        The trainer, and the run's folder.
    """
    processes = runtime.processes
    watchdog.progress("data and network")
    task, model = build_task_and_model(configuration, runtime)
    watchdog.progress("method, optimizer and stored state")
    steps = configuration.training.epochs * task.steps_per_epoch
    processes.agree(lambda: configuration.check_steps(steps))
    optimizer = build_optimizer(model, configuration.training)
    method = processes.agree(
        lambda: build_method(configuration, model, optimizer, processes, steps=steps)
    )
    layers = method.survey if method else survey(model)
    # After the method, which may have added parameter groups.
    schedule = Schedule(
        optimizer,
        configuration.training,
        steps=steps,
        steps_per_epoch=task.steps_per_epoch,
        conversion=method.options.delay if method else None,
    )
    loggers = processes.agree(
        lambda: find_loggers(configuration.run.loggers if runtime.is_first else [])
    )
    tracker = processes.agree(lambda: build_tracker(configuration.stability, layers, processes))
    average = build_average(configuration, model, optimizer)
    watchdog.progress("the run's folder")
    folder = prepare_folder(configuration, runtime, earlier=earlier)
    ownership.take(folder)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        processes,
        keep=configuration.run.keep_checkpoints,
        keys=CHECKPOINT_KEYS,
        check_owner=ownership.check,
    )
    metrics = folder / "metrics.h5"
    with watchdog.guard("the stored state"):
        state = checkpoints.load() if earlier else None

    trainer = Trainer(
        configuration=configuration,
        runtime=runtime,
        folder=folder,
        task=task,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        method=method,
        tracker=tracker,
        recorder=Recorder(None),
        checkpoints=checkpoints,
        average=average,
        early_stopping=build_early_stopping(configuration, folder, processes, ownership.check),
        stop_signal=stop_signal,
        watchdog=watchdog,
    )
    if state:
        processes.agree(lambda: _load(trainer, *state))

    def open_recorder() -> Recorder:
        """Write to the run's folder, now that everything fits together."""
        ownership.check()
        write_text(folder / "config.yaml", to_yaml(configuration))
        schema: dict[str, Any] = {
            "configuration": to_yaml(configuration),
            "layers": layers,
            "figures": task.figures,
        }
        if state:
            shared, _ = state
            return Recorder.resume(metrics, shared["rows"], shared.get("kept_rows", {}), **schema)
        return Recorder.create(metrics, **schema)

    mark_unfinished(folder, runtime)
    with watchdog.guard("metrics.h5"):
        if runtime.is_first:
            with writing(metrics):
                trainer.recorder = open_recorder()
            trainer.recorder.loggers = Loggers.begin(
                loggers,
                folder,
                configuration=configuration.model_dump(),
                first_step=trainer.position.step if state else None,
            )
        processes.barrier()
    trainer.recorder.session(process_count=runtime.process_count, first_step=trainer.position.step)
    return trainer, folder


def _load(trainer: Trainer, shared: dict[str, Any], own: list[dict[str, Any]]) -> None:
    stored = parse(shared["configuration"], source="the checkpoint's configuration")
    current = parse(to_yaml(trainer.configuration), source="the configuration")
    for key in _FIXED:
        if (was := stored["training"][key]) != current["training"][key]:
            raise UserError(f"training.{key}: cannot change when a run is resumed: it was {was}")
    if changes := _changes(stored, current):
        # On purpose by whoever resumes; but config.yaml may also have been damaged or mixed up.
        logger.warning(
            "the configuration differs from the checkpoint's: %s", ", ".join(sorted(changes))
        )
    try:
        trainer.load_checkpoint(shared, own)
    except (ValueError, RuntimeError, KeyError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"the checkpoint does not fit the configuration (was it changed?): {message}"
        ) from None


def _changes(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name the keys that have other values than in the checkpoint, but for where and how long."""
    return [
        f"{section}.{key} is {dump_value(value)} and was {dump_value(was)}"
        for section, values in current.items()
        for key, value in values.items()
        if (was := stored.get(section, {}).get(key, value)) != value
        and f"{section}.{key}" not in _EXPECTED_TO_CHANGE
    ]


class _own_random_state:  # noqa: N801 - a context manager
    """torch's generators seeded for this process, and as they were before afterwards."""

    def __init__(self, seed: int, runtime: Runtime) -> None:
        devices = [runtime.device] if runtime.device.type == "cuda" else []
        self._scope = torch.random.fork_rng(devices)
        sequence = np.random.SeedSequence([seed, runtime.process_index])
        self._seed = int(sequence.generate_state(1, np.uint64)[0])

    def __enter__(self) -> None:
        self._scope.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._scope.__exit__(*error)


def _describe(trainer: Trainer, folder: Path) -> str:
    runtime = trainer.runtime
    step = trainer.position.step
    start = f", from step {step} on" if step else ""
    processes = "1 process" if runtime.process_count == 1 else f"{runtime.process_count} processes"
    lines = [
        f"run {folder}{start}: {processes} on {runtime.device.type}, {trainer.task.train_size} "
        f"training samples, {trainer.task.steps_per_epoch} steps per epoch"
    ]
    if trainer.method:
        dense = [layer for layer in trainer.method.survey if layer.stays_dense]
        release = trainer.method.options.release
        released = f", their factors are released after step {release}" if release else ""
        lines.append(
            f"{len(trainer.method.layers)} layers turn low-rank after step "
            f"{trainer.method.options.delay}{released}; {len(dense)} weights stay full-rank:"
        )
        lines += [f"  {layer.name} {layer.shape}: {layer.stays_dense}" for layer in dense]
        if runtime.process_count > 1:
            plan = trainer.method.plan()
            lines.append(
                f"all factorizations at once would take {plan.makespan:.2g} s by plan, "
                f"imbalance {plan.imbalance:.2f}, {len(plan.split)} layers split over processes"
            )
    return "\n".join(lines)


def _summarize(trainer: Trainer, figures: dict[str, float]) -> dict[str, Any]:
    """Return the final figures; sizes and ranks are those of the tested weights."""
    method, stopwatch = trainer.method, trainer.stopwatch
    target = method.options.target_size if method else None
    trained, stored = parameter_counts(trainer.model)
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    cpu_seconds = stopwatch.cpu_seconds
    summary: dict[str, Any] = {
        **{f"test_{name}": value for name, value in figures.items()},
        "trainable_percent": method.trainable_percent() if method else 100.0,
        "compression_percent": method.compression_percent() if method else 100.0,
        **({"target_size": target} if target else {}),
        "trained_parameters": trained,
        "stored_parameters": stored,
        "stored_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "epochs": trainer.position.epoch,
        "steps": trainer.position.step,
        "seconds": round(stopwatch.seconds, 3),
        "cpu_seconds": None if math.isnan(cpu_seconds) else round(cpu_seconds, 3),
        "processes": trainer.runtime.process_count,
        "seed": trainer.configuration.run.seed,
    }
    if trainer.tested_step is not None:
        if method and not method.converted:  # early stopping, or no rank that pays
            logger.warning("the tested weights, of step %d, are full-rank", trainer.tested_step)
        summary["tested_step"] = trainer.tested_step
        summary["tested_ranks"] = method.state_dict()["ranks"] if method else {}
    return summary
