"""A running search in the terminal: how many evaluations came to what, and the best of them."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from app.reporting.follow import Shown, tabulate, watch
from app.reporting.terminal import Curves
from app.search.definition import STORED, load
from app.search.report import columns, row
from app.search.store import STORE, Evaluation, read_evaluations
from app.search.tally import best_first

_SHOWN = 10
_RECENT = 20
"""Evaluations, at least, of which the pace is taken; of many workers two of each."""


def follow_search(folder: Path, *, interval: float) -> None:
    """Show a search until it has finished or Ctrl-C is pressed.

    Args:
        folder: of the search.
        interval: seconds between two looks.

    Raises:
        UserError: the search cannot be read.
    """
    definition = load(folder / STORED)
    space, limit = definition.space, definition.base.search.evaluations

    def look() -> tuple[Shown, bool]:
        finished = (folder / "summary.json").exists()  # before the evaluations: these are all then
        evaluations = read_evaluations(folder / STORE)
        counts = Counter(one.status for one in evaluations).most_common()
        came_to = ", ".join(f"{count} {status}" for status, count in counts) or "none yet"
        state = "finished" if finished else "not finished"
        best = best_first(evaluations)[:_SHOWN]
        headline = f"{folder}: a search, {state}; evaluations: {came_to}"
        if not finished and (left := time_left(evaluations, limit)) is not None:
            headline += f"; {left} left at this pace"
        rows = [row(one) for one in best]
        return tabulate(headline, columns(space), rows, _losses(evaluations)), finished

    watch(look, interval=interval)


def time_left(evaluations: Sequence[Evaluation], limit: int | None) -> timedelta | None:
    """Return the time that a search needs at the pace of its last evaluations.

    That is their mean time, shared by the workers that they were of. The span that they cover is no
    measure: of many workers it is that of a whole evaluation, however few of a round they are.

    Args:
        evaluations: that have finished.
        limit: search.evaluations; None: it ends otherwise.

    Returns:
        None: nothing tells.
    """
    if limit is None or not evaluations:
        return None
    recent = sorted(evaluations, key=_end)[-max(_RECENT, 2 * _workers(evaluations)) :]
    each = sum(one.seconds for one in recent) / len(recent) / _workers(recent)
    return timedelta(seconds=max(0, round((limit - len(evaluations)) * each)))


def _workers(evaluations: Sequence[Evaluation]) -> int:
    return len({one.worker for one in evaluations})


def _end(one: Evaluation) -> float:
    return datetime.fromisoformat(one.started).timestamp() + one.seconds


def _losses(evaluations: Sequence[Evaluation]) -> Curves:
    """The losses of those that came to a result, by number, and the least so far."""
    ones = sorted((one for one in evaluations if one.succeeded), key=lambda one: one.number)
    numbers = np.array([one.number for one in ones])
    losses = np.array([one.loss for one in ones])
    return Curves(
        {
            "of each": (numbers, losses),
            "least so far": (numbers, np.minimum.accumulate(losses) if ones else losses),
        },
        axis="evaluation",
        label="loss",
    )
