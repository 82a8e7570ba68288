"""Basis stability during a training: when it is measured, and where the results go."""

import math
import time

from torch import nn

from app.distributed.watchdog import Watchdog
from app.metrics.measurement import LayerStability
from app.metrics.stability import StabilityTracker, mean_stability
from app.settings import StabilitySection
from app.training.recorder import Recorder


class Tracking:
    """Measures every so many epochs or steps, at once or beside the training."""

    def __init__(
        self,
        tracker: StabilityTracker | None,
        settings: StabilitySection,
        *,
        recorder: Recorder,
        watchdog: Watchdog,
        steps_per_epoch: int,
    ) -> None:
        """Put the parts together; without a tracker nothing is measured."""
        self._tracker = tracker
        self._settings = settings
        self._recorder = recorder
        self._watchdog = watchdog
        self._steps_per_epoch = steps_per_epoch
        self._started = 0, 0.0
        """Of the measurement in the background: its step, seconds for which training waited."""
        self._last_mean = math.nan

    def take_last_mean(self) -> float:
        """Return the mean stability of the last measurement, once; NaN if it was taken before."""
        mean, self._last_mean = self._last_mean, math.nan
        return mean

    def measure(self, model: nn.Module, *, step: int, epoch: int | None = None) -> None:
        """Measure the bases if it is time to, or begin to. A collective call.

        Args:
            model: the network.
            step: optimizer steps taken.
            epoch: epochs finished, if one has just ended (or none has begun); else None.

        Raises:
            DivergedError: a weight is not finite.
        """
        settings = self._settings
        now = step if settings.unit == "steps" else epoch
        if not self._tracker or now is None or now % settings.interval:
            return
        self.fetch()
        self._watchdog.progress(f"measurement of stability after step {step}")
        start = time.perf_counter()
        if settings.background_steps:
            self._tracker.start(model, now)
            self._started = step, time.perf_counter() - start
            return
        rows = self._tracker.measure(model, now)
        self._record(rows, step, time.perf_counter() - start)

    def fetch(self, *, at_step: int | None = None) -> None:
        """Wait for a measurement in the background, if there is one. A collective call.

        Args:
            at_step: only if it was begun stability.background_steps before this step.

        Raises:
            DivergedError: a weight was not finite.
        """
        if not self._tracker or not self._tracker.under_way:
            return
        step, seconds = self._started
        if at_step is not None and at_step < step + self._settings.background_steps:
            return
        start = time.perf_counter()
        rows = self._tracker.finish()
        self._record(rows, step, seconds + time.perf_counter() - start)

    def _record(self, rows: list[LayerStability], step: int, seconds: float) -> None:
        epoch = step // self._steps_per_epoch
        self._recorder.stability(rows, epoch=epoch, step=step, seconds=seconds)
        self._last_mean = mean_stability(rows)
