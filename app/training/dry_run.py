"""A run before it runs: everything is built, a few steps are taken, and nothing is left of it."""

import io
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import IO, Any, cast

import torch

from app.config.settings import Configuration
from app.data import Batch
from app.errors import DivergedError
from app.recording.loggers.chosen import find_loggers
from app.runtime.processes import Runtime
from app.runtime.startup_check import check_nodes
from app.training.batches import AgreedBatches
from app.training.build import Parts, build
from app.training.determinism import deterministic_algorithms
from app.training.folder import find_folder
from app.training.state import own_state, shared_state
from app.training.steps import fetch
from app.training.training_step import TrainingStep
from oialr.layer_survey import parameter_counts

MEASURED = 3
"""Steps of which the time is taken, after one that allocates and compiles."""


def dry_run(
    configuration: Configuration,
    runtime: Runtime,
    *,
    tell: Callable[[str], None] = lambda what: None,
) -> str:
    """Build a new run, take some of its steps, and tell what it will need. A collective call.

    No folder is made; data are downloaded and staged where the configuration says so.

    Args:
        configuration: checked.
        runtime: this process among those that would train together.
        tell: told of what begins now, such as :meth:`app.runtime.watchdog.Watchdog.progress`.

    Returns:
        Parameters, memory, size of a checkpoint, steps, and their time, in lines.

    Raises:
        UserError: as :func:`app.training.run.train`.
        DivergedError: the loss of a step is not finite.
    """
    find_folder(configuration, runtime, resume=False)
    nodes = check_nodes(configuration, runtime)
    parts = build(configuration, runtime, tell=tell)
    runtime.processes.agree(
        lambda: find_loggers(configuration.run.loggers if runtime.is_first else [])
    )
    tell("the bases")
    bases = _bases(parts)
    with deterministic_algorithms(wanted=configuration.training.deterministic):
        measured = _measure(parts, tell)
    tell("the figures")
    lines = [
        f"dry run: nothing is trained or written; {runtime.process_count} "
        f"{'process' if runtime.process_count == 1 else 'processes'} on {runtime.device.type}",
        f"data: {parts.task.train_size} training samples, {parts.task.steps_per_epoch} steps per "
        f"epoch, {parts.steps} steps",
        *_network(parts),
        f"memory: {_memory(parts)}",
        _checkpoint(parts),
        *bases,
        *_time(parts.steps, measured),
    ]
    return nodes + "\n".join(lines)


def _measure(parts: Parts, tell: Callable[[str], None]) -> list[tuple[float, int]]:
    """Return wall time, of the process that took longest, and samples of each measured step."""
    runtime = parts.runtime
    batch_size = parts.configuration.training.batch_size
    batches = AgreedBatches(parts.task, batch_size, runtime.processes, _NeverAsked())
    tell("the network's replicas")
    step = TrainingStep(parts)
    stream = _batches(batches, parts)
    measured = []
    for number in range(1, 2 + MEASURED):
        tell(f"step {number}")
        runtime.processes.barrier()
        start = time.perf_counter()
        taken = step.take(next(stream), start=start)
        (loss,) = fetch([taken], runtime.processes, problem=False).losses  # waits for the device
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {taken.step}")
        seconds = max(runtime.processes.gather(time.perf_counter() - start))
        measured.append((seconds, taken.samples))
    batches.check()
    return measured[1:]


class _NeverAsked:
    """Asks for no stop."""

    number = 0


def _batches(batches: AgreedBatches, parts: Parts) -> Iterator[Batch]:
    """Yield batches for ever: an epoch may have fewer than are wanted."""
    epoch = 0
    while True:
        yield from batches.of_epoch(epoch, 0)
        epoch += 1


def _network(parts: Parts) -> list[str]:
    _, count = parameter_counts(parts.model)
    size = sum(p.numel() * p.element_size() for p in parts.model.parameters())
    lines = [f"network: {parts.configuration.model.name}, {count:,} parameters, {_mebibytes(size)}"]
    if method := parts.method:
        lines += parts.configuration.oialr.told_in_vain(parts.steps)
        dense = sum(layer.stays_dense is not None for layer in method.survey)
        lines.append(
            f"method: {len(method.layers)} layers turn low-rank "
            f"{method.options.conversion_in_words()}, {dense} weights stay full-rank (--explain "
            f"names them); all factorizations at once take {method.plan().makespan:.2g} s by plan"
        )
    return lines


def _memory(parts: Parts) -> str:
    """Say how much a process needs, of those the one that needs most."""
    device, processes = parts.runtime.device, parts.runtime.processes
    if device.type == "cuda":
        peak = max(processes.gather(torch.cuda.max_memory_allocated(device)))
        whole = torch.cuda.get_device_properties(device).total_memory
        return f"{_mebibytes(peak)} of {_mebibytes(whole)} on a GPU at the peak of a full-rank step"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, getrusage(2)
    peak = max(processes.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))
    return f"{_mebibytes(peak)} resident in a process at its peak"


def _checkpoint(parts: Parts) -> str:
    size = _size(shared_state(parts, None))
    size += sum(parts.runtime.processes.gather(_size(own_state(parts))))
    kept = parts.configuration.run.keep_checkpoints
    return f"checkpoint: {_mebibytes(size)} at full rank; {kept} are kept while it trains"


def _bases(parts: Parts) -> list[str]:
    """Measure the bases once, as at the start of the run, and tell what that takes."""
    if not parts.tracker:
        return []
    settings = parts.configuration.stability
    start = time.perf_counter()
    parts.tracker.measure(parts.model, 0)
    seconds = max(parts.runtime.processes.gather(time.perf_counter() - start))
    size = sum(parts.runtime.processes.gather(_size(parts.tracker.state_dicts())))
    return [
        f"stability: {seconds:.2g} s for a measurement, every {settings.interval} {settings.unit}; "
        f"{settings.window // settings.interval} times {_mebibytes(size)} of bases in host memory "
        f"over all processes, and in the checkpoints"
    ]


def _time(steps: int, measured: list[tuple[float, int]]) -> list[str]:
    """Tell the time of so many steps; the last batch of an epoch may have fewer samples."""
    seconds = [one for one, _ in measured]
    each = statistics.median(seconds)
    rate = sum(samples for _, samples in measured) / sum(seconds)
    all_of_them = ", ".join(f"{one:.4f}" for one in seconds)
    return [
        f"step: {each:.4f} s ({all_of_them}), {rate:.0f} samples/s, full-rank",
        f"time: {timedelta(seconds=round(each * steps))} for {steps} such steps; "
        f"evaluations, events and checkpoints come on top",
    ]


def _size(content: Any) -> int:
    """Return the bytes of a file that torch would write, without writing one."""
    counter = _Counter()
    torch.save(content, cast("IO[bytes]", counter))
    return counter.count


class _Counter(io.RawIOBase):
    """A file that only counts what is written into it."""

    count = 0

    def writable(self) -> bool:
        """Whether it can be written to."""
        return True

    def write(self, content: Any) -> int:
        """Count."""
        size = memoryview(content).nbytes
        self.count += size
        return size


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
