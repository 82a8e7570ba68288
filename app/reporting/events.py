"""What the method did in a run, event by event, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.reporting.runs import Run


@dataclass(frozen=True, kw_only=True)
class EventTable:
    """A row for each event."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def event_table(run: Run) -> EventTable | None:
    """Return the events of a run; None where there was none.

    Layers are those that the event factorized, and ranks are added up over all layers that an event
    has covered by then: those that are dense, still or again, count with their full rank.
    """
    steps = run.events["step"]
    if not len(steps):
        return None
    rows = []
    for place, step in enumerate(steps):
        known = [rank for rank in run.rank if len(rank["step"]) and rank["step"][0] <= step]
        taking_part = sum(bool(np.any(rank["step"] == step)) for rank in known)
        ranks = [
            int(rank["rank"][np.searchsorted(rank["step"], step, side="right") - 1])
            for rank in known
        ]
        rows.append(
            [
                str(step),
                f"{run.axis(step):g}",
                str(run.events["event"][place]),
                str(taking_part),
                str(sum(ranks)),
                f"{run.events['trainable_percent'][place]:.1f}",
                f"{run.events['compression_percent'][place]:.1f}",
                f"{run.events['seconds'][place]:.3g}",
            ]
        )
    columns = ["step", run.axis.label, "event", "layers", "sum of ranks"]
    columns += ["trainable, %", "stored, %", "seconds"]
    if run.axis.label == "optimizer step":
        columns.pop(1)
        for row in rows:
            row.pop(1)
    return EventTable(columns=columns, rows=rows)
