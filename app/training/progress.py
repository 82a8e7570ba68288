"""Progress of a run: a bar on a terminal, plain lines otherwise."""

import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from tqdm import tqdm

from app.recording.log import Log
from app.runtime.streams import is_terminal
from oialr.method import Event


class EpochObserver(Protocol):
    """What is told of every epoch, on every process."""

    def __call__(
        self,
        epoch: int,
        figures: dict[str, float],
        trainable_percent: float,
        *,
        tested_epoch: int,
        last: bool,
    ) -> None:
        """Take an epoch and what it brought.

        Args:
            epoch: counted from 1.
            figures: on the validation part.
            trainable_percent: of the network, after it.
            tested_epoch: the one whose weights were tested if the training ended here: this one, or
                the best so far with early stopping.
            last: whether the training ends here.
        """


class Progress:
    """Says what is worth a look while a network is trained."""

    def __init__(
        self,
        log: Log,
        *,
        steps: int,
        first_step: int,
        epochs: int,
        quiet: bool,
        on_epoch: EpochObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start at a step.

        Args:
            log: where lines go.
            steps: optimizer steps of the whole run.
            first_step: steps taken already.
            epochs: epochs of the whole run.
            quiet: say nothing (all processes but the first).
            on_epoch: told of every epoch.
            clock: gives seconds.
        """
        self.log = log
        self._quiet = quiet
        self._on_epoch = on_epoch
        self._epochs = epochs
        self._steps, self._first_step = steps, first_step
        self._clock, self._start = clock, clock()
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0,  # the time left by the pace of the whole session, as in the lines
            file=sys.stdout,
            disable=quiet or not is_terminal(sys.stdout),
        )

    def steps(
        self,
        step: int,
        *,
        epoch: int,
        loss: float,
        learning_rate: float,
        samples_per_second: float,
        line_due: bool,
    ) -> None:
        """Tell how far the training has come.

        Args:
            step: optimizer steps taken.
            epoch: the present one, from 1.
            loss: of the last step.
            learning_rate: of the last step.
            samples_per_second: over the steps since the last call.
            line_due: write a line, if there is no bar.
        """
        self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {samples_per_second:.0f} samples/s",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)
        if not line_due:
            return
        line = (
            f"epoch {epoch}/{self._epochs}  step {step}/{self._steps}  loss {loss:.4f}  "
            f"lr {learning_rate:.2e}  {samples_per_second:.0f} samples/s  {self._left(step)} left"
        )
        if self._bar.disable:
            self.say(line)
        elif not self._quiet:
            self.log.note(line)

    def _left(self, step: int) -> timedelta:
        """Return the time left by the mean pace of this session, evaluations and all included."""
        taken = max(1, step - self._first_step)
        return timedelta(
            seconds=round((self._clock() - self._start) / taken * (self._steps - step))
        )

    def epoch(
        self,
        epoch: int,
        step: int,
        *,
        loss: float,
        figures: dict[str, float],
        trainable_percent: float,
        stability: float,
        tested_epoch: int,
        last: bool,
    ) -> None:
        """Tell what an epoch brought: training loss, validation figures, size, mean stability.

        The last two, see :class:`EpochObserver`, are for who observes epochs.
        """
        if self._on_epoch:
            self._on_epoch(epoch, figures, trainable_percent, tested_epoch=tested_epoch, last=last)
        parts = [f"epoch {epoch}/{self._epochs}", f"step {step}", f"loss {loss:.4f}"]
        parts += [f"validation {name} {value:.4f}" for name, value in figures.items()]
        parts.append(f"trainable {trainable_percent:.1f} %")
        if not math.isnan(stability):
            parts.append(f"stability {stability:.4f}")
        self.say("  ".join(parts))

    def event(self, event: Event, trainable_percent: float) -> None:
        """Tell what the method did."""
        before = sum(layer.previous_rank for layer in event.layers)
        after = sum(layer.rank for layer in event.layers)
        balance = f", imbalance {event.imbalance:.2f}" if len(event.predicted_seconds) > 1 else ""
        peak = f", peak {event.peak_bytes / 2**20:.1f} MiB" if event.peak_bytes is not None else ""
        self.say(
            f"step {event.step}: {event.kind} of {len(event.layers)} layers, "
            f"sum of ranks {before} -> {after}, trainable {trainable_percent:.1f} %, "
            f"{event.seconds:.2f} s{peak}{balance}"
        )

    def say(self, line: str) -> None:
        """Write a line, above the bar if there is one."""
        if not self._quiet:
            self.log.say(line)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
