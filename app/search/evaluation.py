"""One evaluation: an ordinary training on a worker's processes, from which nothing escapes."""

import gc
import math
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from app.config import to_yaml
from app.config.settings import Configuration
from app.errors import AgreedUserError, DivergedError, StorageError, UserError, out_of_memory
from app.recording.store import read_rows
from app.runtime.stop_signal import StopRequest
from app.runtime.workers import Workers
from app.search import objective
from app.search.definition import Definition, evaluation_folder
from app.search.store import Evaluation
from app.training.folder import write_text
from app.training.position import Stopped
from app.training.run import train


class Hopeless(Exception):  # noqa: N818 - it is no error
    """The training is worse than the median of others at the same epoch."""


_RAISED_ALIKE = (Hopeless, Stopped, DivergedError, AgreedUserError)
"""By all processes of a training, after the same collective calls: they stay connected."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What ended a training early on one process."""

    status: str
    when: float
    """Seconds since the epoch: the first failure is the cause, the others follow from it."""
    traceback: str


class _Watch:
    """Follows a training on every process: its figures, its median rule, its time."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        medians: Sequence[float],
        stop_signal: StopRequest,
        stopped_elsewhere: Callable[[], bool],
    ) -> None:
        """Start the clock.

        Args:
            configuration: its section search is read.
            medians: see :func:`app.search.objective.medians`; the same on all processes.
            stop_signal: of the program.
            stopped_elsewhere: whether another worker has been asked to stop; asked every epoch.
        """
        self._section = configuration.search
        self._medians = medians
        self._signal = stop_signal
        self._stopped_elsewhere = stopped_elsewhere
        limit = self._section.evaluation_timeout
        self._end = math.inf if limit is None else time.monotonic() + limit
        self.interrupted = 0
        """Signal that another worker was stopped by; 0: none."""
        self._epochs: list[tuple[float, float]] = []
        """Error and trainable percent after every epoch."""
        self.curve: list[float] = []
        self.error = math.nan
        self.trainable_percent = 100.0

    @property
    def number(self) -> int:
        """The signal to stop for: the program's, or SIGALRM when the time is over; 0: go on."""
        if asked := self._signal.number or self.interrupted:
            return asked
        return signal.SIGALRM if time.monotonic() > self._end else 0

    def __call__(
        self,
        epoch: int,
        figures: dict[str, float],
        trainable_percent: float,
        *,
        tested_epoch: int,
        last: bool,
    ) -> None:
        """Take an epoch's figures, which are the same on all processes.

        What counts are those of the epoch whose weights would be tested. At its end a training is
        not given up any more: nothing would be saved, and its result would be lost.

        Raises:
            Hopeless: on all processes alike.
        """
        self._epochs.append((objective.error(figures), trainable_percent))
        self.error, self.trainable_percent = self._epochs[tested_epoch - 1]
        value = objective.priced_error(
            self._section, error=self.error, trainable_percent=self.trainable_percent
        )
        self.curve.append(value)
        if self._stopped_elsewhere():
            self.interrupted = signal.SIGTERM
        first = self._section.median_stop_epoch
        if first is None or last or epoch < first or epoch > len(self._medians):
            return
        if value > self._medians[epoch - 1]:
            raise Hopeless(
                f"{value:.4g} after epoch {epoch}: median {self._medians[epoch - 1]:.4g}"
            )


def evaluate(
    definition: Definition,
    *,
    number: int,
    values: Mapping[str, Any],
    island: int,
    folder: Path,
    workers: Workers,
    medians: Sequence[float],
    stop_signal: StopRequest,
    stopped_elsewhere: Callable[[], bool],
) -> Evaluation | None:
    """Train a candidate and judge it; whatever is raised in it is a result. Collective in a worker.

    Args:
        definition: of the search.
        number: of the evaluation.
        values: of the parameters, by key.
        island: that the candidate was bred on.
        folder: of the search.
        workers: this process among them.
        medians: see :func:`app.search.objective.medians`.
        stop_signal: of the program.
        stopped_elsewhere: whether another worker has been asked to stop.

    Returns:
        What became of it, the same on all processes; None if the search is to stop.

    Raises:
        StorageError: a file system failed; on this process, or on all of the worker.
        TimeoutError: a process of the worker does not come back from the training.
    """
    run_folder = evaluation_folder(folder, number)
    started, start = datetime.now(UTC), time.perf_counter()
    place = {
        "number": number,
        "started": started.isoformat(timespec="milliseconds"),
        "seed": definition.seed(number),
        "processes": workers.own.Get_size(),
        "worker": workers.index,
        "island": island,
        "folder": str(run_folder.relative_to(folder)),
    }
    try:
        configuration = definition.candidate(number, values, run_folder)
    except UserError as error:  # keys contradict each other that no two ends of the space do
        return _refused(dict(values), _as_failure(error), place)
    watch = _Watch(
        configuration,
        medians=medians,
        stop_signal=stop_signal,
        stopped_elsewhere=stopped_elsewhere,
    )
    timeout = configuration.distributed.timeout
    failure: _Failure | None = None
    step_seconds = math.nan
    try:
        with workers.join(timeout=timeout) as runtime:
            if runtime.is_first:
                _prepare(run_folder, configuration)
            try:
                train(configuration, runtime, watch, resume=False, test=False, on_epoch=watch)
            except _RAISED_ALIKE as error:
                failure = _as_failure(error)
        if workers.is_first and not failure:
            rows = read_rows(run_folder / "metrics.h5", "train")
            step_seconds = float(rows["step_seconds"].mean())
    except StorageError:  # no fault of the candidate, and the next would meet it too
        raise
    except Exception as error:
        failure = _as_failure(error)
    gc.collect()  # of the network and of what the traceback held
    if workers.device.type == "cuda":
        torch.cuda.empty_cache()
    report = (failure, stop_signal.number or watch.interrupted, step_seconds)
    reports = workers.gather(report, timeout=timeout)
    failures = [failure for failure, _, _ in reports if failure]
    if failures and any(number for _, number, _ in reports):
        return None
    cause = min(failures, key=lambda failure: failure.when, default=None)
    step_seconds = math.nan if cause else reports[0][2]
    return Evaluation(
        **place,
        parameters=definition.space.values_of(configuration),
        loss=_loss(configuration, watch, cause, step_seconds),
        status=cause.status if cause else "finished" if math.isfinite(watch.error) else "diverged",
        error=watch.error,
        trainable_percent=watch.trainable_percent,
        step_seconds=step_seconds,
        epochs=len(watch.curve),
        seconds=time.perf_counter() - start,
        traceback=cause.traceback if cause else "",
        curve=tuple(watch.curve),
    )


def leave_sign(folder: Path) -> None:
    """Leave in an evaluation's folder that it is in the store, for slurm/job.sh."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recorded").touch()
    except OSError as error:
        raise StorageError(f"cannot write {folder / 'recorded'}: {error.strerror}") from error


def _refused(parameters: dict[str, Any], failure: _Failure, place: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation of a candidate that is no configuration; nothing was trained."""
    return Evaluation(
        **place,
        parameters=parameters,
        loss=objective.FAILED,
        status=failure.status,
        error=math.nan,
        trainable_percent=100.0,
        step_seconds=math.nan,
        epochs=0,
        seconds=0.0,
        traceback=failure.traceback,
        curve=(),
    )


def _loss(
    configuration: Configuration, watch: _Watch, cause: _Failure | None, step_seconds: float
) -> float:
    if cause is None:
        return objective.loss(
            configuration.search,
            error=watch.error,
            trainable_percent=watch.trainable_percent,
            step_seconds=step_seconds,
        )
    if cause.status == "hopeless":
        return objective.loss_of_hopeless(watch.curve[-1])
    return objective.FAILED


def _as_failure(error: Exception) -> _Failure:
    return _Failure(status=_status(error), when=time.time(), traceback=_describe(error))


def _status(error: Exception) -> str:
    match error:
        case Hopeless():
            return "hopeless"
        case Stopped():
            return "timeout"
        case DivergedError():
            return "diverged"
        case _ if out_of_memory(error):
            return "out of memory"
        case _:
            return "failed"


def _describe(error: Exception) -> str:
    """Return the traceback with what was raised in its last line, below what was noted of it."""
    notes = getattr(error, "__notes__", [])
    error.__notes__ = []
    return "".join([*(f"{note}\n" for note in notes), *traceback.format_exception(error)])


def _prepare(folder: Path, configuration: Configuration) -> None:
    """Clear what a killed session left in the folder, and say what is trained there."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"run.dir: cannot write to {folder}: {error.strerror}") from None
    write_text(folder / "config.yaml", to_yaml(configuration))
