"""A running job in the terminal: its curve, its last epochs, and what its layers are like."""

import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from app.reporting.comparison import merits
from app.reporting.runs import Run, read_run
from app.reporting.terminal import Curves

Shown = RenderableType
"""What can be shown in the terminal."""
_EPOCHS = 12  # rows of the first table
_LAYERS = 6  # rows of the second


def follow(
    path: Path,
    *,
    interval: float,
    console: Console | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until it has finished or Ctrl-C is pressed; wait for one that has not begun.

    Args:
        path: its folder, which need not be there yet.
        interval: seconds between two looks.
        console: see :func:`watch`.
        wait: see :func:`watch`.

    Raises:
        UserError: the run cannot be read.
    """
    metrics = path if path.is_file() else path / "metrics.h5"

    def look() -> tuple[Shown, bool]:
        if not metrics.exists():
            return Text(f"waiting for {metrics}, which a run writes when it begins"), False
        written = metrics.stat().st_mtime
        run = read_run(path)
        return show(run, written=written), run.is_finished

    watch(look, interval=interval, console=console, wait=wait)


def watch(
    look: Callable[[], tuple[Shown, bool]],
    *,
    interval: float,
    console: Console | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Show what changes until it has come to its end or Ctrl-C is pressed.

    Args:
        look: returns what to show, and whether that is the end.
        interval: seconds between two looks.
        console: where to write; None: stdout. What is no terminal gets the last state alone.
        wait: called with the interval after each look.
    """
    with Live(console=console or _Stdout(), auto_refresh=False) as live:
        try:
            while True:
                shown, is_last = look()
                live.update(shown, refresh=True)
                if is_last:
                    return
                wait(interval)
        except KeyboardInterrupt:
            return


class _Stdout(Console):
    """A console that leaves it to the program what becomes of one that nobody reads."""

    def on_broken_pipe(self) -> None:
        """Raise it as any other error; rich itself would end the program by exit code 1.

        Raises:
            BrokenPipeError: always.
        """
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def tabulate(
    headline: str, columns: Sequence[str], rows: Sequence[Sequence[str]], curves: Curves
) -> Group:
    """Return curves and a table below a headline, as it is shown."""
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return Group(Text(headline, style="bold"), curves, table)


def show(run: Run, *, written: float) -> RenderableType:
    """Return the state of a run as it is shown.

    Args:
        run: the run.
        written: when its metrics.h5 was last written to, in seconds since 1970.
    """
    parts: list[RenderableType] = [_headline(run, written), _losses(run), _epochs(run)]
    if len(run.series("stability").steps):
        parts.append(_layers(run))
    if len(run.events["step"]):
        last = {column: values[-1] for column, values in run.events.items()}
        parts.append(
            Text(
                f"last event: {last['event']} at step {last['step']}, "
                f"trainable {last['trainable_percent']:.1f} %, {last['seconds']:.2f} s"
            )
        )
    return Group(*parts)


def time_left(run: Run, *, written: float) -> timedelta | None:
    """Return the time that a run needs from its last row on, at its last session's mean pace.

    Args:
        run: the run.
        written: when its metrics.h5 was last written to, in seconds since 1970.

    Returns:
        None: it has finished, or has not come far enough to tell.
    """
    taken = run.evaluation["epoch"] > 0
    # A file that was damaged may have lost rows of one group and not of another.
    needed = taken.any(), len(run.sessions["started"]), len(run.train["step"])
    if run.is_finished or not all(needed):
        return None
    started = datetime.fromisoformat(run.sessions["started"][-1]).timestamp()
    step = run.train["step"][-1]
    steps = step - run.sessions["first_step"][-1]
    if steps <= 0:
        return None
    per_epoch = run.evaluation["step"][taken][0] / run.evaluation["epoch"][taken][0]
    total = run.configuration["training"]["epochs"] * per_epoch
    return timedelta(seconds=round(max(0.0, (total - step) * (written - started) / steps)))


def _losses(run: Run) -> Curves:
    """The losses of training and validation."""
    validation = run.evaluation["split"] == "validation"
    return Curves(
        {
            "training": (run.axis(run.train["step"]), run.train["loss"]),
            "validation": (
                run.axis(run.evaluation["step"][validation]),
                run.evaluation["loss"][validation],
            ),
        },
        axis=run.axis.label,
        label="loss",
    )


def _headline(run: Run, written: float) -> Text:
    text = Text(f"{run.path}: {run.state()}", style="bold")
    if len(run.train["step"]):
        recent = slice(-50, None)
        text.append(
            f"; loss {run.train['loss'][-1]:.4f}, "
            f"{np.median(run.train['samples_per_second'][recent]):.0f} samples/s",
            style="not bold",
        )
    if (left := time_left(run, written=written)) is not None:
        text.append(f", {left} left at this pace", style="not bold")
    return text


def _epochs(run: Run) -> Table:
    """The last epochs: loss, figures of merit, size, mean stability and mixing similarity."""
    table = Table(box=None, pad_edge=False)
    keys = ["loss", *merits(run)]
    for heading in ("epoch", "step", *(f"validation {key}" for key in keys), "trainable, %"):
        table.add_column(heading, justify="right")
    means = {}
    for column in ("stability", "mixing_similarity"):
        table.add_column(f"mean {column.replace('_', ' ')}", justify="right")
        series = run.series(column)
        means[column] = dict(zip(series.steps.tolist(), series.mean().tolist(), strict=True))
    validation = np.flatnonzero(run.evaluation["split"] == "validation")
    for row in validation[-_EPOCHS:]:
        step = run.evaluation["step"][row]
        before = run.events["trainable_percent"][run.events["step"] <= step]
        table.add_row(
            str(run.evaluation["epoch"][row]),
            str(step),
            *(f"{run.evaluation[key][row]:.4f}" for key in keys),
            f"{before[-1] if len(before) else 100.0:.1f}",
            *(_number(means[column].get(step, math.nan)) for column in means),
        )
    return table


def _layers(run: Run) -> Table:
    """The layers that are least stable."""
    series = run.series("stability")
    ranks = {
        layer.name: rows["rank"] for layer, rows in zip(run.layers, run.stability, strict=True)
    }
    last = series.values[:, -1]
    table = Table(box=None, pad_edge=False)
    table.add_column("least stable layers")
    for heading in ("stability", "rank", "of"):
        table.add_column(heading, justify="right")
    for place in np.argsort(last)[:_LAYERS]:
        name = series.layers[place].name
        rank = ranks[name]
        table.add_row(name, _number(last[place]), str(rank[-1]), f"{run.full_ranks[name]:g}")
    return table


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
