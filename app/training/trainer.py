"""The training loop."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NoReturn

from app.data import Batch
from app.errors import DivergedError
from app.runtime.stop_signal import StopRequest
from app.runtime.stopping import StopAgreement
from app.runtime.watchdog import Watchdog
from app.training.batches import PROBLEM, AgreedBatches
from app.training.build import Parts
from app.training.checkpoint import CHECKPOINT_KEYS
from app.training.evaluation import evaluate
from app.training.measurements import Measurements
from app.training.position import Stopped
from app.training.progress import Progress
from app.training.rescue import end_without_storage
from app.training.state import own_state, shared_state
from app.training.steps import Step, fetch
from app.training.storage import Storage
from app.training.training_step import TrainingStep
from oialr.method import Event


class Trainer:
    """Trains a network: step by step, with the method asked after every step."""

    def __init__(
        self,
        parts: Parts,
        storage: Storage,
        *,
        progress: Progress,
        stop_signal: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        """Stand where the parts stand. A collective call.

        Args:
            parts: at the start, or at the state of a checkpoint.
            storage: where records and checkpoints go.
            progress: what the user sees meanwhile.
            stop_signal: asks for a stop.
            watchdog: told of the progress.
        """
        self.parts = parts
        self.configuration, self.runtime = parts.configuration, parts.runtime
        self.task, self.model, self.method = parts.task, parts.model, parts.method
        self.position = parts.position
        self.storage = storage
        self.recorder, self.early_stopping = storage.recorder, storage.early_stopping
        self.progress = progress
        self.watchdog = watchdog
        self.measurements = Measurements(
            parts.tracker,
            self.configuration.stability,
            recorder=self.recorder,
            watchdog=watchdog,
            steps_per_epoch=self.task.steps_per_epoch,
        )
        self.step = TrainingStep(parts)
        self.tested_step: int | None = None
        """Step of which the tested weights are; None: nothing was tested."""
        self._unrecorded: list[Step] = []
        batch_size = parts.configuration.training.batch_size
        self._batches = AgreedBatches(self.task, batch_size, self.runtime.processes, stop_signal)
        self._agreement = StopAgreement(self.runtime.processes, self._batches)

    def train(self) -> None:
        """Train from the present position to the last epoch. A collective call.

        Raises:
            Stopped: a signal or run.stop_after ended the run; a checkpoint was written.
            DivergedError: the loss or a weight is not finite.
            AgreedUserError: a process cannot read its data.
        """
        self.parts.stopwatch.start()
        if self.position.step == 0:
            self.measurements.measure(self.model, step=0, epoch=0)
        try:
            while not self._finished():
                self.watchdog.progress(f"the first batch of epoch {self.position.epoch + 1}")
                self._train_epoch()
            self._agreement.finish()
        finally:
            self.measurements.close()

    def _finished(self) -> bool:
        stopping = self.early_stopping
        early = stopping is not None and stopping.exhausted
        return early or self.position.epoch >= self.configuration.training.epochs

    def _train_epoch(self) -> None:
        position = self.position
        start = time.perf_counter()
        for batch in self._batches.of_epoch(position.epoch, position.batch):
            self.watchdog.progress(f"step {position.step + 1}")
            self._train_step(batch, start)
            if self.method and self.method.event_due:
                self.measurements.fetch()  # so that neither is slowed down by the other
            let_go = self.method is not None and self.method.conversion_due
            if let_go:
                self.step.replicas.release()
            event = self.method.step() if self.method else None
            # A conversion may leave every layer as it is, and the wrapper is gone all the same.
            if let_go or (event and event.shapes_changed):
                self.step.replicas.rebuild()
            if event:
                self._follow(event)
            self.measurements.fetch(at_step=position.step)
            self.measurements.measure(self.model, step=position.step)
            if position.step % self.configuration.run.log_interval == 0:
                self._record_steps(line_due=True)
            self._stop_if_asked()
            self.watchdog.progress(f"the end of step {position.step}")
            start = time.perf_counter()
        self._record_steps()
        self._finish_epoch()

    def _train_step(self, batch: Batch, start: float) -> None:
        """Take a step, which is recorded later; ``start`` is when the wait for the batch began."""
        self._unrecorded.append(self.step.take(batch, start=start))

    def _follow(self, event: Event) -> None:
        """Let the records and the user know what the method did."""
        # The run's count: the method's is behind by the steps that a scaled loss has skipped.
        event = replace(event, step=self.position.step)
        self.watchdog.progress(f"{event.kind} after step {event.step}")
        if self.early_stopping and event.changed_form:
            self.early_stopping.begin_anew(self.position.step)
        percent = self.parts.trainable_percent
        self.recorder.event(
            event,
            model=self.model,
            trainable_percent=percent,
            compression_percent=self.parts.compression_percent,
            gradient_bytes=self.step.replicas.gradient_bytes(),
        )
        self.progress.event(event, percent)

    def _record_steps(self, *, line_due: bool = False) -> None:
        """Fetch the losses since the last time from the device and record them. Collective.

        Args:
            line_due: tell of it in a line.

        Raises:
            DivergedError: a loss is not finite.
        """
        steps, self._unrecorded = self._unrecorded, []
        if not steps:
            return
        # All must know whether the first process can still write.
        can_write = self.recorder.problem is None
        fetched = fetch(steps, self.runtime.processes, problem=not can_write)
        rows = zip(steps, fetched.losses, fetched.seconds, strict=True)
        for step, loss, seconds in rows:
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} at step {step.step}")
            self.position.loss = loss
            self.recorder.step(
                step=step.step,
                epoch=self.position.epoch + 1,
                loss=loss,
                learning_rate=step.learning_rate,
                samples_per_second=step.samples / seconds,
                step_seconds=seconds,
            )
        self.recorder.flush()
        if fetched.problem:
            end_without_storage(self)
        self.progress.steps(
            self.position.step,
            epoch=self.position.epoch + 1,
            loss=self.position.loss,
            learning_rate=steps[-1].learning_rate,
            samples_per_second=fetched.samples_per_second,
            line_due=line_due,
        )

    def _finish_epoch(self) -> None:
        """Measure, evaluate, write a checkpoint."""
        position = self.position
        self._batches.check()
        position.epoch += 1
        position.batch = 0
        # First, so that in the background it goes on beside the evaluation. By steps, the last
        # step's was made already.
        if self.configuration.stability.unit == "epochs":
            self.measurements.measure(self.model, step=position.step, epoch=position.epoch)
        with self._evaluated_weights():
            figures = self._evaluate("validation")
            stopping = self.early_stopping
            if figures and stopping and stopping.improves(position.step, figures["loss"]):
                stopping.keep(
                    position.step,
                    self.model,
                    self.method,
                    process_count=self.runtime.process_count,
                )
        if not figures:  # the epoch's batches are done, and its end is repeated
            position.epoch -= 1
            position.batch = self.task.steps_per_epoch
            self._stop(max(self.runtime.processes.gather(self._agreement.asked())))
        interval = self.configuration.run.checkpoint_epochs
        due = (interval and position.epoch % interval == 0) or self._finished()
        if due:
            self.measurements.fetch()
        self.progress.epoch(
            position.epoch,
            position.step,
            loss=position.loss,
            figures=figures,
            trainable_percent=self.parts.trainable_percent,
            stability=self.measurements.mean_at(position.step),
            tested_epoch=position.epoch - (stopping.epochs_since if stopping else 0),
            last=self._finished(),
        )
        if due:
            self.save_checkpoint()

    def test(self) -> dict[str, float]:
        """Evaluate on the test part and record it; nothing is trained after it. A collective call.

        With early stopping the network gets the weights of its best epoch.

        Raises:
            Stopped: by a signal; the checkpoint of the last epoch is there.
            AgreedStorageError: the run's folder or metrics.h5 is gone; what was in memory is saved.
        """
        self._end_if_lost()
        stopping = self.early_stopping
        best_step = stopping.restore_best(self.model) if stopping else None
        with self._evaluated_weights() if best_step is None else nullcontext():
            figures = self._evaluate("test")
        if not figures:
            raise Stopped(f"stopped by a signal in the test after step {self.position.step}")
        if best_step is None:  # otherwise the network is not that of the optimizer any more
            self._end_if_lost()
        self.tested_step = self.position.step if best_step is None else best_step
        return figures

    def _end_if_lost(self) -> None:
        """End on all processes alike if the first cannot write any more. A collective call."""
        self.recorder.flush()
        if self.runtime.processes.from_first(self.recorder.problem):
            end_without_storage(self)

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """Return the context in which the network has the weights that count."""
        average = self.parts.average
        return average.applied() if average else nullcontext()

    def _evaluate(self, split: str) -> dict[str, float] | None:
        """Evaluate and record it; None on all processes if a signal came meanwhile.

        Raises:
            DivergedError: the loss is not finite: the last step may have made the weights so.
        """
        self.watchdog.progress(f"evaluation ({split}) after step {self.position.step}")
        with self.parts.precision.autocast():
            where = (self.runtime.processes, self.runtime.device)
            asked = self._agreement.asked
            figures = evaluate(self.model, self.task, split, *where, stop_asked=asked)
        position = {"step": self.position.step, "epoch": self.position.epoch}
        if figures:
            self.recorder.evaluation(**position, split=split, **figures)
            if not math.isfinite(loss := figures["loss"]):
                self.measurements.fetch()  # which names the weight, if it has looked at it
                raise DivergedError(
                    f"the loss is {loss} on {split} data after step {position['step']}"
                )
        return figures

    def _stop_if_asked(self) -> None:
        number = self._agreement.after_step()
        if number == PROBLEM:
            self._agreement.finish()
            self._batches.check()
        if number or self.position.step == self.configuration.run.stop_after:
            self._stop(number)

    def _stop(self, number: int) -> NoReturn:
        self._agreement.finish()
        self._record_steps()
        self.save_checkpoint()
        reason = f"signal {number}" if number else "run.stop_after"
        raise Stopped(f"stopped by {reason} after step {self.position.step}")

    def save_checkpoint(self) -> None:
        """Write everything that the rest of the run depends on. A collective call.

        Raises:
            AgreedStorageError: it cannot be written.
        """
        self._batches.check()
        self.measurements.fetch()
        rows, kept = self.recorder.counts(), self.recorder.kept()
        if self.runtime.processes.from_first(self.recorder.problem):
            end_without_storage(self)
        self.watchdog.progress(f"checkpoint after step {self.position.step}")
        self.parts.stopwatch.lap(self.runtime.processes)
        shared = shared_state(self.parts, self.early_stopping) | {"rows": rows, "kept_rows": kept}
        assert shared.keys() >= {"process_count", *CHECKPOINT_KEYS}
        tracker = self.parts.tracker
        self.storage.checkpoints.save(
            self.position.step,
            shared,
            own_state(self.parts),
            tracker.state_dicts() if tracker else {},
        )
