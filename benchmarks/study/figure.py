"""The fronts of a study, drawn: test figure over stored size, and over CPU time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.table import Row, Table, front


def draw(tables: Sequence[Table], path: Path) -> None:
    """Draw a row of two fronts for every network that has a finished cell.

    Args:
        tables: what is drawn.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    tables = [table for table in tables if any(row.figures for row in table.rows)]
    if not tables:
        return
    figure = Figure(figsize=(11, 4 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), 2, squeeze=False)
    for table, (size, time) in zip(tables, axes, strict=True):
        done = [row for row in table.rows if row.figures]
        timed = [row for row in done if row.time is not None]
        _front(size, table, [(row, row.stored) for row in done])
        _front(time, table, [(row, row.time) for row in timed if row.time is not None])
        size.set_xlabel("stored parameters, % of full-rank")
        time.set_xlabel("CPU seconds over full-rank's")
        unit = "accuracy, %" if table.figure == "accuracy" else "MSE"
        size.set_ylabel(f"{table.network}: test {unit}")
    figure.savefig(path, dpi=120)


def _front(axes: Any, table: Table, points: Sequence[tuple[Row, float]]) -> None:
    """Draw points with their names and deviations, and a line through those that none beats."""
    for row, cost in points:
        values = list(row.figures.values())
        # A mean of equal values may be off by the last bit.
        low, high = max(0.0, row.mean - min(values)), max(0.0, max(values) - row.mean)
        axes.errorbar([cost], [row.mean], yerr=[[low], [high]], fmt="o", markersize=4, capsize=2)
        axes.annotate(
            row.method, (cost, row.mean), textcoords="offset points", xytext=(5, 4), fontsize=7
        )
    best = front([(cost, row.mean) for row, cost in points], better=table.better)
    if best:
        axes.plot(*zip(*best, strict=True), "k--", linewidth=0.8)
    else:
        axes.text(0.5, 0.5, "run with --time", ha="center", transform=axes.transAxes)
