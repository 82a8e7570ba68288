"""Panels of curves, one above the other, of all runs in the colours of their configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from app.reporting.comparison import RunGroup
from app.reporting.drawing import (
    LineStyle,
    as_label,
    colour_and_line,
    dots,
    new_figure,
    whole_numbers,
)
from app.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[np.ndarray, np.ndarray]
"""Places on the axis (T,), and values (T,)."""

EVENT_MARKERS = {"convert": "o", "cut": "s", "update": "^", "release": "D"}
HEIGHT = 2.0
"""Of a panel, in inches."""
_LONGEST_LABEL = 16  # characters


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What is drawn of every run in one panel."""

    label: str
    curve: Callable[[Run], Curve]
    kinds: Callable[[Run], np.ndarray] | None = None
    """What happened at each place, drawn as a marker; None: a line."""
    from_zero: bool = False
    over: str = ""
    """What the horizontal axis counts, where it is the panel's own; empty: the time of the runs."""
    marks_end: bool = False
    """Whether the end of each line is marked, since it need not be at the right."""


def draw_panels(
    groups: Sequence[RunGroup], panels: Sequence[Panel]
) -> tuple[Figure, list[str]] | None:
    """Draw the panels that have data; all runs of a group look the same.

    Returns:
        The figure and the labels of its panels; None without any.
    """
    runs = [run for group in groups for run in group.runs]
    shown = [panel for panel in panels if any(len(panel.curve(run)[0]) for run in runs)]
    if not shown:
        return None
    share_x = not any(panel.over for panel in shown)
    heights = [HEIGHT if share_x else HEIGHT + 0.5] * len(shown)
    figure, rows = new_figure(heights, share_x=share_x)
    for [axes], panel in zip(rows, shown, strict=True):
        for index, group in enumerate(groups):
            for run in group.runs:
                _draw(axes, panel, run, *colour_and_line(index))
        axes.set_ylabel(wrapped(panel.label))
        if panel.over:
            axes.set_xlabel(panel.over)
        else:
            whole_numbers(axes)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    if share_x:
        rows[-1][0].set_xlabel(axis_label(groups))
    _legend(figure, groups)
    return figure, [panel.label for panel in shown]


def axis_label(groups: Sequence[RunGroup]) -> str:
    """Return what the runs' time is counted in: the same for all that are drawn together."""
    (label,) = {run.axis.label for group in groups for run in group.runs}
    return label


def wrapped(label: str) -> str:
    """Break a long label in two, so that it fits beside its panel."""
    if len(label) <= _LONGEST_LABEL:
        return label
    first, _, rest = label.partition(" ")
    return f"{first}\n{rest}"


def _draw(axes: Axes, panel: Panel, run: Run, colour: str, line: LineStyle) -> None:
    x, y = panel.curve(run)
    if panel.kinds is None:
        axes.plot(x, y, color=colour, linestyle=line, alpha=0.85, **dots(y))
        if panel.marks_end and len(x):
            axes.plot(x[-1:], y[-1:], "o", color=colour)
        return
    kinds = panel.kinds(run)
    for kind, marker in EVENT_MARKERS.items():
        here = kinds == kind
        axes.plot(x[here], y[here], marker, color=colour, fillstyle="none")


def _legend(figure: Figure, groups: Sequence[RunGroup]) -> None:
    """Explain the colours above the panels, where there is more than one."""
    if len(groups) < 2:
        return
    from matplotlib.lines import Line2D

    entries = []
    for index, group in enumerate(groups):
        colour, line = colour_and_line(index)
        count = f" ({len(group.runs)} runs)" if len(group.runs) > 1 else ""
        label = as_label(group.label) + count
        entries.append(Line2D([], [], color=colour, linestyle=line, label=label))
    figure.legend(handles=entries, loc="outside upper left")
