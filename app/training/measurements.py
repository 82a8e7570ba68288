"""Basis stability during a training: when it is measured, and where the results go."""

import math
import time
from collections.abc import Callable

from torch import nn

from app.config.settings import StabilitySection
from app.errors import DivergedError
from app.runtime.watchdog import Watchdog
from app.training.recorder import Recorder
from oialr.stability.measurement import LayerStability
from oialr.stability.tracker import BasisTracker, mean_stability


class Measurements:
    """Asks the library's tracker every so many epochs or steps, at once or beside the training."""

    def __init__(
        self,
        tracker: BasisTracker | None,
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
        self._started_step = 0
        """Of the measurement in the background, as are the seconds for which training waited."""
        self._started_seconds = 0.0
        self._last_step, self._last_mean = 0, math.nan

    def mean_at(self, step: int) -> float:
        """Return the mean stability after a step; NaN if the last known is of another one."""
        return self._last_mean if step == self._last_step else math.nan

    def measure(self, model: nn.Module, *, step: int, epoch: int | None = None) -> None:
        """Measure the bases if it is time to, or begin to. A collective call.

        A run that was stopped in the evaluation at an epoch's end has measured there already.

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
        if self._tracker.has_measured(now):
            return
        self._watchdog.progress(f"measurement of stability after step {step}")
        start = time.perf_counter()
        if settings.background_steps:
            self._tracker.start(model, now)
            self._started_step, self._started_seconds = step, time.perf_counter() - start
            return
        tracker = self._tracker
        rows = _naming_step(step, lambda: tracker.measure(model, now))
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
        step = self._started_step
        if at_step is not None and at_step < step + self._settings.background_steps:
            return
        self._watchdog.progress(f"measurement of stability after step {step}")
        start = time.perf_counter()
        rows = _naming_step(step, self._tracker.finish)
        self._record(rows, step, self._started_seconds + time.perf_counter() - start)

    def close(self) -> None:
        """Let a measurement end that is still under way, after an error, and forget it."""
        if self._tracker:
            self._tracker.close()

    def _record(self, rows: list[LayerStability], step: int, seconds: float) -> None:
        epoch = step // self._steps_per_epoch
        self._recorder.stability(rows, epoch=epoch, step=step, seconds=seconds)
        self._last_step, self._last_mean = step, mean_stability(rows)


def _naming_step(step: int, measure: Callable[[], list[LayerStability]]) -> list[LayerStability]:
    """Measure; the tracker itself may count in epochs."""
    try:
        return measure()
    except DivergedError as error:
        raise DivergedError(f"{error} (step {step})") from None
