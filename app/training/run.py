"""One run from its configuration to its summary: built whole, then run.

A search calls :func:`train` too, with the processes that it gives to one evaluation.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.config.settings import Configuration
from app.errors import AgreedStorageError
from app.recording.log import Log
from app.runtime.latest import point_to
from app.runtime.processes import Runtime
from app.runtime.startup_check import check_nodes
from app.runtime.stop_signal import StopRequest
from app.runtime.watchdog import Watchdog
from app.training.build import Parts, build
from app.training.determinism import deterministic_algorithms
from app.training.early_stopping import SINCE_BEST
from app.training.folder import find_folder, finish, finished, mark_unfinished
from app.training.position import Stopped
from app.training.progress import EpochObserver, Progress
from app.training.storage import Ownership, open_storage
from app.training.tidying import tidy
from app.training.trainer import Trainer
from oialr.layer_survey import parameter_counts

logger = logging.getLogger(__name__)


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
    stop_given: bool = False,
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
        stop_given: run.stop_after was given with the resume, and must be a step to come; a stored
            one may have stopped the run already.
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
    if earlier and (summary := _finished(earlier, configuration, runtime)):
        return Outcome(folder=earlier, summary=summary, finished_before=True)
    watchdog = Watchdog(
        timeout=configuration.distributed.timeout,
        alone=runtime.process_count == 1,
        abort=runtime.abort,
        name=f"process {runtime.process_index} of {runtime.process_count}",
    )
    with (
        ExitStack() as held,
        watchdog,
        _own_random_state(configuration.run.seed, runtime),
        deterministic_algorithms(wanted=configuration.training.deterministic),
    ):
        ownership = Ownership(held, runtime)
        if earlier:
            ownership.take(earlier)
        nodes = check_nodes(configuration, runtime)
        parts = build(configuration, runtime, initial=earlier is None, tell=watchdog.progress)
        storage = open_storage(
            parts, watchdog, ownership, earlier=earlier, stop_given=stop_given, test=test
        )
        log.begin(storage.folder)
        if runtime.is_first:
            point_to(storage.folder)
        progress = Progress(
            log,
            steps=parts.steps,
            first_step=parts.position.step,
            epochs=configuration.training.epochs,
            quiet=not runtime.is_first or on_epoch is not None,
            on_epoch=on_epoch,
        )
        try:
            progress.say(nodes + _describe(parts, storage.folder))
            watchdog.progress("the network's replicas")
            trainer = Trainer(
                parts, storage, progress=progress, stop_signal=stop_signal, watchdog=watchdog
            )
            trainer.train()
            if parts.method and (missed := parts.method.missed_target()):
                progress.say(f"the run ends above its size: {missed}")
            figures = trainer.test() if test else {}
        except Stopped as stop:
            mark_unfinished(storage.folder, runtime, stopped=str(stop))
            raise
        finally:
            progress.close()
            with watchdog.guard("the end of metrics.h5"):
                storage.recorder.close()
        if problem := runtime.processes.from_first(storage.recorder.problem):
            raise AgreedStorageError(str(problem))
        summary = _summarize(parts, figures, tested_step=trainer.tested_step)
        if storage.early_stopping:
            summary[SINCE_BEST] = storage.early_stopping.epochs_since
        tidy(parts, storage.checkpoints, progress)
        if runtime.is_first:
            ownership.check()
            finish(storage.folder, summary)
    return Outcome(folder=storage.folder, summary=summary, finished_before=False)


@contextmanager
def _own_random_state(seed: int, runtime: Runtime) -> Iterator[None]:
    """Seed torch's generators for this process; they are what they were before afterwards."""
    sequence = np.random.SeedSequence([seed, runtime.process_index])
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        yield


def _finished(
    folder: Path, configuration: Configuration, runtime: Runtime
) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do, as the first process finds it."""
    summary = finished(folder, configuration) if runtime.is_first else None
    return runtime.processes.from_first(summary)


def _describe(parts: Parts, folder: Path) -> str:
    runtime, method = parts.runtime, parts.method
    step = parts.position.step
    start = f", from step {step} on" if step else ""
    processes = "1 process" if runtime.process_count == 1 else f"{runtime.process_count} processes"
    lines = [
        f"run {folder}{start}: {processes} on {runtime.device.type}, {parts.task.train_size} "
        f"training samples, {parts.task.steps_per_epoch} steps per epoch"
    ]
    if method:
        lines += parts.configuration.oialr.told_in_vain(parts.steps)
        dense = [layer for layer in method.survey if layer.stays_dense]
        release = method.options.release
        released = f", their factors are released after step {release}" if release else ""
        lines.append(
            f"{len(method.layers)} layers turn low-rank {method.options.conversion_in_words()}"
            f"{released}; {len(dense)} weights stay full-rank:"
        )
        lines += [f"  {layer.name} {layer.shape}: {layer.stays_dense}" for layer in dense]
        if runtime.process_count > 1:
            plan = method.plan()
            lines.append(
                f"all factorizations at once would take {plan.makespan:.2g} s by plan, "
                f"imbalance {plan.imbalance:.2f}, {len(plan.split)} layers split over processes"
            )
    return "\n".join(lines)


def _summarize(
    parts: Parts, figures: dict[str, float], *, tested_step: int | None
) -> dict[str, Any]:
    """Return the final figures; sizes and ranks are those of the tested weights."""
    method, stopwatch = parts.method, parts.stopwatch
    target = method.options.target_size if method else None
    trained, stored = parameter_counts(parts.model)
    tensors = [*parts.model.parameters(), *parts.model.buffers()]
    cpu_seconds = stopwatch.cpu_seconds
    summary: dict[str, Any] = {
        **{f"test_{name}": value for name, value in figures.items()},
        "trainable_percent": parts.trainable_percent,
        "compression_percent": parts.compression_percent,
        **({"target_size": target} if target else {}),
        "trained_parameters": trained,
        "stored_parameters": stored,
        "stored_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "epochs": parts.position.epoch,
        "steps": parts.position.step,
        "seconds": round(stopwatch.seconds, 3),
        "cpu_seconds": None if math.isnan(cpu_seconds) else round(cpu_seconds, 3),
        "processes": parts.runtime.process_count,
        "seed": parts.configuration.run.seed,
    }
    if tested_step is not None:
        if method and not method.converted:  # early stopping, or no rank that pays
            logger.warning("the tested weights, of step %d, are full-rank", tested_step)
        summary["tested_step"] = tested_step
        summary["tested_ranks"] = method.state_dict()["ranks"] if method else {}
    return summary
