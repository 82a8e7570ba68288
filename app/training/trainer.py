"""The training loop."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from app.config import to_yaml
from app.config.settings import Configuration
from app.data import Batch, Task
from app.errors import DivergedError
from app.runtime.processes import Runtime
from app.runtime.stop_signal import StopRequest
from app.runtime.stopping import StopAgreement
from app.runtime.watchdog import Watchdog
from app.training.average import WeightAverage
from app.training.batches import PROBLEM, AgreedBatches
from app.training.checkpoint import CHECKPOINT_KEYS, Checkpoints
from app.training.early_stopping import EarlyStopping
from app.training.evaluation import evaluate
from app.training.optimizer import Schedule
from app.training.position import Position, Stopped
from app.training.precision import Precision
from app.training.progress import Progress
from app.training.recorder import Recorder
from app.training.replicas import Replicas
from app.training.rescue import end_without_storage
from app.training.steps import Step, fetch
from app.training.stopwatch import Stopwatch
from app.training.tracking import Tracking
from oialr.method import OIALR, Event
from oialr.stability.tracker import StabilityTracker


class Trainer:
    """Trains a network: step by step, with the method asked after every step."""

    def __init__(
        self,
        *,
        configuration: Configuration,
        runtime: Runtime,
        folder: Path,
        task: Task,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        method: OIALR | None,
        tracker: StabilityTracker | None,
        recorder: Recorder,
        checkpoints: Checkpoints,
        average: WeightAverage | None,
        early_stopping: EarlyStopping | None,
        stop_signal: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        """Put the parts together; ``method`` is None for full-rank training."""
        self.configuration = configuration
        self.runtime = runtime
        self.folder = folder
        self.task = task
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.method = method
        self.tracker = tracker
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.precision = Precision(configuration.training.precision, runtime.device)
        self.average = average
        self.early_stopping = early_stopping
        self.watchdog = watchdog
        self.position = Position()
        self.stopwatch = Stopwatch()
        """Of the training, in all sessions."""
        self.tested_step: int | None = None
        """Step of which the tested weights are; None: nothing was tested."""
        self._unrecorded: list[Step] = []
        self._last_loss = math.nan
        self._batches = AgreedBatches(task, runtime.processes, stop_signal)
        self._agreement = StopAgreement(runtime.processes, self._batches)

    def train(self, progress: Progress) -> None:
        """Train from the present position to the last epoch. A collective call.

        Raises:
            Stopped: a signal or run.stop_after ended the run; a checkpoint was written.
            DivergedError: the loss or a weight is not finite.
            AgreedUserError: a process cannot read its data.
        """
        self.progress = progress
        # Made here and not before: shapes are those of the checkpoint by now.
        self.replicas = Replicas(
            self.model,
            self.runtime.processes,
            self.runtime.device,
            self._throw_away_loss,
            compiled=self.configuration.training.compile,
        )
        self.tracking = Tracking(
            self.tracker,
            self.configuration.stability,
            recorder=self.recorder,
            watchdog=self.watchdog,
            steps_per_epoch=self.task.steps_per_epoch,
        )
        self.stopwatch.start()
        if self.position.step == 0:
            self.tracking.measure(self.model, step=0, epoch=0)
        try:
            while not self._finished():
                self.watchdog.progress(f"the first batch of epoch {self.position.epoch + 1}")
                self._train_epoch()
            self._agreement.finish()
        finally:
            self.tracking.close()

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
                self.tracking.fetch()  # so that neither is slowed down by the other
            if self.method and self.method.conversion_due:
                self.replicas.release()
            event = self.method.step() if self.method else None
            if event:
                self._follow(event)
            self.tracking.fetch(at_step=position.step)
            self.tracking.measure(self.model, step=position.step)
            if position.step % self.configuration.run.log_interval == 0:
                self._record_steps(line_due=True)
            self._stop_if_asked()
            self.watchdog.progress(f"the end of step {position.step}")
            start = time.perf_counter()
        self._record_steps()
        self._finish_epoch()

    def _train_step(self, batch: Batch, start: float) -> None:
        """Forward, backward, clip, optimizer. Nothing here waits for the device.

        Args:
            batch: this process's share.
            start: time at which the wait for the batch began.
        """
        training = self.configuration.training
        learning_rate = self.schedule.set(self.position.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        parts = batch.split(training.accumulation)
        for part in parts:
            with self.replicas.synchronize(part is parts[-1]):
                with self.precision.autocast():
                    loss = self.task.loss(self.replicas.module, part)
                # Gradients are averaged over the processes; their sum is that of the mean loss.
                self.precision.backward(loss * self.runtime.process_count)
            losses.append(loss.detach())
        self.precision.step(self.optimizer, self.model, training.gradient_clip)
        self.position.step += 1
        if self.average:
            self.average.update(self.position.step)
        self.position.batch += 1
        self._unrecorded.append(
            Step(
                step=self.position.step,
                loss=torch.stack(losses).sum(),
                learning_rate=learning_rate,
                seconds=time.perf_counter() - start,
                samples=batch.global_count,
            )
        )

    def _throw_away_loss(self, module: nn.Module) -> Tensor:
        with self.precision.autocast():
            return self.task.loss(module, self.task.example_batch())

    def _follow(self, event: Event) -> None:
        """Let the replicas, the records and the user know what the method did."""
        assert self.method
        self.watchdog.progress(f"{event.kind} after step {event.step}")
        if event.shapes_changed:
            self.replicas.rebuild()
        if self.early_stopping and event.changed_form:
            self.early_stopping.begin_anew(self.position.step)
        percent = self.method.trainable_percent()
        self.recorder.event(
            event,
            model=self.model,
            trainable_percent=percent,
            compression_percent=self.method.compression_percent(),
            gradient_bytes=self.replicas.gradient_bytes(),
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
        for step, loss in zip(steps, fetched.losses, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} at step {step.step}")
            self._last_loss = loss
            self.recorder.step(
                step=step.step,
                epoch=self.position.epoch + 1,
                loss=loss,
                learning_rate=step.learning_rate,
                samples_per_second=step.samples / step.seconds,
                step_seconds=step.seconds,
            )
        self.recorder.flush()
        if fetched.problem:
            end_without_storage(self)
        self.progress.steps(
            self.position.step,
            epoch=self.position.epoch + 1,
            loss=self._last_loss,
            learning_rate=steps[-1].learning_rate,
            samples_per_second=fetched.samples_per_second,
            line_due=line_due,
        )

    def _finish_epoch(self) -> None:
        """Measure, evaluate, write a checkpoint."""
        self._batches.check()
        self.position.epoch += 1
        self.position.batch = 0
        # First, so that in the background it goes on beside the evaluation. By steps, the last
        # step's was made already.
        if self.configuration.stability.unit == "epochs":
            self.tracking.measure(self.model, step=self.position.step, epoch=self.position.epoch)
        with self._evaluated_weights():
            figures = self._evaluate("validation")
            step, stopping = self.position.step, self.early_stopping
            if figures and stopping and stopping.improves(step, figures["loss"]):
                stopping.keep(
                    step,
                    self.model,
                    self.method,
                    process_count=self.runtime.process_count,
                )
        if not figures:  # the epoch's batches are done, and its end is repeated
            self.position.epoch -= 1
            self.position.batch = self.task.steps_per_epoch
            self._stop(max(self.runtime.processes.gather(self._agreement.asked())))
        interval = self.configuration.run.checkpoint_epochs
        due = (interval and self.position.epoch % interval == 0) or self._finished()
        if due:
            self.tracking.fetch()
        self.progress.epoch(
            self.position.epoch,
            self.position.step,
            loss=self._last_loss,
            figures=figures,
            trainable_percent=self.method.trainable_percent() if self.method else 100.0,
            stability=self.tracking.mean_at(self.position.step),
        )
        if due:
            self.save_checkpoint()

    def test(self) -> dict[str, float]:
        """Evaluate on the test part and record it; nothing is trained after it. A collective call.

        With early stopping the network gets the weights of its best epoch.

        Raises:
            Stopped: by a signal; the checkpoint of the last epoch is there.
        """
        stopping = self.early_stopping
        best_step = stopping.restore_best(self.model, self.method) if stopping else None
        with self._evaluated_weights() if best_step is None else nullcontext():
            figures = self._evaluate("test")
        if not figures:
            raise Stopped(f"stopped by a signal in the test after step {self.position.step}")
        self.tested_step = self.position.step if best_step is None else best_step
        return figures

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """Return the context in which the network has the weights that count."""
        return self.average.applied() if self.average else nullcontext()

    def _evaluate(self, split: str) -> dict[str, float] | None:
        """Evaluate and record it; None on all processes if a signal came meanwhile."""
        self.watchdog.progress(f"evaluation ({split}) after step {self.position.step}")
        with self.precision.autocast():
            where = (self.runtime.processes, self.runtime.device)
            asked = self._agreement.asked
            figures = evaluate(self.model, self.task, split, *where, stop_asked=asked)
        position = {"step": self.position.step, "epoch": self.position.epoch}
        if figures:
            self.recorder.evaluation(**position, split=split, **figures)
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
        self.tracking.fetch()
        rows, kept = self.recorder.counts(), self.recorder.kept()
        if self.runtime.processes.from_first(self.recorder.problem):
            end_without_storage(self)
        self.watchdog.progress(f"checkpoint after step {self.position.step}")
        self.stopwatch.lap(self.runtime.processes)
        shared = {
            "configuration": to_yaml(self.configuration),
            "process_count": self.runtime.process_count,
            "position": vars(self.position),
            "last_loss": self._last_loss,
            "seconds": self.stopwatch.seconds,
            "method": self.method.state_dict() if self.method else None,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping else None,
            "rows": rows,
        }
        assert shared.keys() == {"process_count", *CHECKPOINT_KEYS}
        # Earlier checkpoints have none of these.
        shared |= {"kept_rows": kept, "cpu_seconds": self.stopwatch.cpu_seconds}
        own: dict[str, Any] = {"random_state": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            own["random_state_cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        parts = self.tracker.state_dicts() if self.tracker else {}
        self.checkpoints.save(self.position.step, shared, own, parts)

    def load_checkpoint(self, shared: dict[str, Any], own: list[dict[str, Any]]) -> None:
        """Continue where a checkpoint was written.

        Args:
            shared: what all processes share.
            own: the parts of the processes; with another process count than this run's, of all, and
                random states are not taken over.
        """
        if self.method and shared["method"]:
            self.method.load_state_dict(shared["method"])
        self.model.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.precision.load_state_dict(shared["precision"])
        if self.average and shared["average"]:
            self.average.load_state_dict(shared["average"])
        if self.early_stopping and shared["early_stopping"]:
            self.early_stopping.load_state_dict(shared["early_stopping"])
        self.position = Position(**shared["position"])
        self.stopwatch.seconds = shared["seconds"]
        # Checkpoints of earlier versions do not know it, and then nobody does.
        self.stopwatch.cpu_seconds = shared.get("cpu_seconds", math.nan)
        self._last_loss = shared["last_loss"]
        if self.tracker:
            self.tracker.load_state_dicts([part["parts"] for part in own])
        if shared["process_count"] == self.runtime.process_count:
            torch.set_rng_state(own[0]["random_state"])
            if self.runtime.device.type == "cuda":
                torch.cuda.set_rng_state(own[0]["random_state_cuda"], self.runtime.device)
