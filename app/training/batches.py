"""Batches of a task, and how what one process finds wrong with its data ends all of them alike."""

from collections.abc import Iterator
from dataclasses import replace

from app.data import Batch, Task
from app.data.sharding import global_batch
from app.errors import UserError
from app.runtime.stop_signal import StopRequest
from oialr.placement.processes import Processes

PROBLEM = 1_000
"""What is asked to stop for, in place of a signal's number, where data cannot be read."""


class AgreedBatches:
    """Hands batches out; a process that has none takes part in the others' steps until all know.

    A damaged image is met by one process, while the others wait for its gradients. So that process
    goes on with samples that count nothing, and asks for a stop as a signal does: the agreement
    that follows every step tells the others, and then all raise what it found. No checkpoint is
    written on the way.
    """

    def __init__(
        self, task: Task, batch_size: int, processes: Processes, signal: StopRequest
    ) -> None:
        """Prepare.

        Args:
            task: gives the batches.
            batch_size: samples of a global batch, but for the last one of an epoch.
            processes: who train together.
            signal: asks for a stop as well.
        """
        self._task = task
        self._batch_size = batch_size
        self._processes = processes
        self._signal = signal
        self._problem: str | None = None

    @property
    def number(self) -> int:
        """What this process asks to stop for: :data:`PROBLEM`, a signal's number, or 0."""
        return PROBLEM if self._problem else self._signal.number

    def of_epoch(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """Yield this process's batches of an epoch; see :meth:`app.data.Task.train_batches`.

        Raises:
            UserError: data cannot be read, and this process is alone.
        """
        batches = self._task.train_batches(epoch, first_batch)
        for batch in range(first_batch, self._task.steps_per_epoch):
            yield self._next(batches, batch)

    def check(self) -> None:
        """End all processes if one of them has found something. A collective call.

        Raises:
            AgreedUserError: the first process's, on every process.
        """
        self._processes.agree(self._raise_own)

    def _raise_own(self) -> None:
        if self._problem:
            raise UserError(self._problem)

    def _next(self, batches: Iterator[Batch], batch: int) -> Batch:
        if not self._problem:
            try:
                return next(batches)
            except UserError as error:
                if self._processes.count == 1:
                    raise
                self._problem = str(error)
        positions = global_batch(self._task.train_size, self._batch_size, batch)
        samples = positions.stop - positions.start  # by which all cut it into as many parts
        return replace(self._task.example_batch(), count=0, global_count=samples)
