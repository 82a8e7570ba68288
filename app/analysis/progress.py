"""How far an analysis is: a bar on a terminal, and otherwise a line now and then."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from tqdm import tqdm

from app.analysis.estimate import Estimate
from app.runtime.streams import is_terminal, show

_PAUSE = 60.0
"""Seconds between two lines, at least."""


class Progress:
    """Counts weights, and knows the time left from the estimate and from what it took so far."""

    def __init__(self, total: int, done: int, expected: Estimate, *, shown: bool) -> None:
        """Say what is to come.

        Args:
            total: weights; done: those that were measured before.
            expected: of the weights that are left.
            shown: whether this process shows anything.
        """
        self._total, self._done = total, done
        self._expected, self._past = expected.seconds, 0.0
        self._start = self._last = time.monotonic()
        self._lines = shown and not is_terminal(sys.stderr)
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="weight",
            dynamic_ncols=True,
            disable=not shown or self._lines,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} weights [{elapsed}{postfix}]",
        )
        if shown:
            before = f", {done} of them measured before" if done else ""
            show(f"{total} weights{before}: {expected}")

    def advance(self, weights: int, seconds: float) -> None:
        """Note that weights are measured, for which so many seconds were expected."""
        self._done += weights
        self._past += seconds
        now = time.monotonic()
        pace = (now - self._start) / self._past
        left = timedelta(seconds=round(max(0.0, self._expected - self._past) * pace))
        self._bar.set_postfix_str(f"{left} left", refresh=False)
        self._bar.update(weights)
        if self._lines and now - self._last >= _PAUSE:
            self._last = now
            elapsed = timedelta(seconds=round(now - self._start))
            show(f"weight {self._done}/{self._total}  {elapsed}  {left} left")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
