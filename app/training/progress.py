"""Progress of a run: a bar on a terminal, plain lines otherwise. Process 0 alone."""

import math
import sys
from typing import Protocol

from tqdm import tqdm

from oialr.method import Event


class EpochObserver(Protocol):
    """What is told of every epoch, on every process."""

    def __call__(self, epoch: int, figures: dict[str, float], trainable_percent: float) -> None:
        """Take the validation figures after an epoch, counted from 1."""


class Progress:
    """Writes to stderr what is worth a look while a network is trained."""

    def __init__(
        self,
        *,
        steps: int,
        first_step: int,
        epochs: int,
        quiet: bool,
        on_epoch: EpochObserver | None = None,
    ) -> None:
        """Start at a step.

        Args:
            steps: optimizer steps of the whole run.
            first_step: steps taken already.
            epochs: epochs of the whole run.
            quiet: say nothing (all processes but the first).
            on_epoch: told of every epoch.
        """
        self._quiet = quiet
        self._on_epoch = on_epoch
        self._epochs = epochs
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=quiet or not sys.stderr.isatty(),
        )

    def steps(self, count: int, *, loss: float, learning_rate: float) -> None:
        """Tell that some steps were taken, with the loss and learning rate of the last."""
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        self._bar.update(count)

    def epoch(
        self,
        epoch: int,
        step: int,
        *,
        loss: float,
        figures: dict[str, float],
        trainable_percent: float,
        stability: float,
    ) -> None:
        """Tell what an epoch brought: training loss, validation figures, size, mean stability."""
        if self._on_epoch:
            self._on_epoch(epoch, figures, trainable_percent)
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
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
