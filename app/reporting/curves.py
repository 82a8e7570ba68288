"""Curves of one or more runs over time: accuracy, size, means over the layers, seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from app.reporting.comparison import RunGroup, merits
from app.reporting.drawing import (
    Drawing,
    LineStyle,
    as_label,
    colour_and_line,
    marker_of,
    new_figure,
)
from app.reporting.layer_maps import draw_reference
from app.reporting.reference import ReferenceCurve
from app.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[np.ndarray, np.ndarray]
"""Places on the axis (T,), and values (T,)."""

_EVENT_MARKERS = {"convert": "o", "cut": "s", "update": "^", "release": "D"}
_PANEL_HEIGHT = 2.0  # inches
_LONGEST_LABEL = 16  # characters


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """What is drawn of every run in one panel."""

    label: str
    curve: Callable[[Run], Curve]
    kinds: Callable[[Run], np.ndarray] | None = None
    """What happened at each place, drawn as a marker; None: a line."""
    from_zero: bool = False


def learning(groups: Sequence[RunGroup]) -> Drawing | None:
    """Draw figures of merit, loss and trained parameters; None for an analysis, which has none."""
    runs = [run for group in groups for run in group.runs]
    keys = list(dict.fromkeys(key for run in runs for key in [*merits(run), "loss"]))
    panels = [
        _Panel(label=f"validation {key}", curve=partial(_validation, key=key)) for key in keys
    ]
    panels.append(_Panel(label="trainable, %", curve=_trainable, from_zero=True))
    drawn = _panels(groups, panels)
    if drawn is None:
        return None
    figure, shown = drawn
    ends = [
        f"{run.name}: {key} {curve[1][-1]:.4g}"
        for run in runs
        for key in keys
        if len((curve := _validation(run, key))[1])
    ]
    return Drawing(
        name="learning",
        title="Learning and size",
        caption="On the validation part, after each epoch; and the trained parameters in percent "
        "of the full-rank network's.",
        alt=f"Curves by {_axis_label(groups)} of {', '.join(shown)}. Last: {'; '.join(ends)}.",
        figure=figure,
    )


def means(groups: Sequence[RunGroup], reference: ReferenceCurve | None) -> Drawing | None:
    """Draw the mean stability and mixing similarity of all runs; None where there is none."""
    panels = [
        _Panel(label=f"mean {column.replace('_', ' ')}", curve=partial(_mean, column=column))
        for column in ("stability", "mixing_similarity")
    ]
    drawn = _panels(groups, panels)
    if drawn is None:
        return None
    figure, shown = drawn
    if reference and "mean stability" in shown and _axis_label(groups) == "epoch":
        axes = figure.axes[shown.index("mean stability")]
        limits = axes.get_xlim()
        draw_reference(axes, reference)
        axes.set_xlim(limits)
        axes.legend(loc="best")
    ends = [
        f"{run.name} {curve[1][-1]:.4g}"
        for group in groups
        for run in group.runs
        if len((curve := _mean(run, "stability"))[1])
    ]
    return Drawing(
        name="means",
        title="Mean basis stability and mixing similarity",
        caption="Means over the layers, against the time the configuration's window before.",
        alt=f"Curves by {_axis_label(groups)} of {', '.join(shown)}. Last mean stability: "
        f"{', '.join(ends)}.",
        figure=figure,
    )


def other_measures(run: Run, name: str) -> Drawing | None:
    """Draw what else was measured of the layers; None where nothing was."""
    percent = ("numerical_rank", "effective_rank", "stable_rank")
    known = {"stability", "mixing_similarity", "rank", "reference_rank"}
    found = {
        column: series
        for column in run.columns()
        if column not in known and (series := run.series(column)).averaged().size
    }
    if not found:
        return None
    figure, panels = new_figure([_PANEL_HEIGHT] * len(found))
    ranks = {
        layer.name: rows["rank"].max(initial=1)
        for layer, rows in zip(run.layers, run.stability, strict=True)
    }
    for [axes], (column, series) in zip(panels, found.items(), strict=True):
        values = series.averaged()
        if column in percent:
            full = [ranks[layer.name] for layer in series.layers if layer.averaged]
            values = 100 * values / np.array(full)[:, None]
        x = run.axis(series.steps)
        low, middle, high = np.nanpercentile(values, [10, 50, 90], axis=0)
        axes.fill_between(x, low, high, color=colour_and_line(0)[0], alpha=0.2, linewidth=0)
        axes.plot(x, middle, color=colour_and_line(0)[0], marker=marker_of(x))
        axes.set_ylabel(_wrapped(as_label(column).replace("_", " ") + ", %" * (column in percent)))
        if column == "orthonormality_error" and np.nanmin(low) > 0:
            axes.set_yscale("log")
    panels[-1][0].set_xlabel(run.axis.label)
    return Drawing(
        name=name,
        title="Ranks and further measures",
        caption="Median over the layers and the range of the middle 80 % of them; ranks in percent "
        "of the full rank.",
        alt=f"Curves by {run.axis.label} of the median over the layers of {', '.join(found)}.",
        figure=figure,
    )


def seconds(groups: Sequence[RunGroup]) -> Drawing | None:
    """Draw what steps, events and measurements took; None for an analysis."""
    panels = [
        _Panel(label="step, ms", curve=_step_milliseconds),
        _Panel(
            label="event, s",
            curve=_event_seconds,
            kinds=lambda run: run.events["event"],
            from_zero=True,
        ),
        _Panel(label="measurement, s", curve=_measurement_seconds),
    ]
    drawn = _panels(groups, panels)
    if drawn is None:
        return None
    figure, shown = drawn
    total = sum(float(run.events["seconds"].sum()) for group in groups for run in group.runs)
    count = sum(len(run.events["seconds"]) for group in groups for run in group.runs)
    markers = "circle: conversion, square: cut, triangle: update without a cut, diamond: release"
    return Drawing(
        name="seconds",
        title="Time",
        caption="Median time of a step in each epoch"
        + (f"; time of each event of the method ({markers})" if count else "")
        + ("; time of each measurement of the bases" if "measurement, s" in shown else "")
        + ".",
        alt=f"Curves by {_axis_label(groups)} of {', '.join(shown)}. {count} events took "
        f"{total:.3g} s in all.",
        figure=figure,
    )


def _panels(
    groups: Sequence[RunGroup], panels: Sequence[_Panel]
) -> tuple[Figure, list[str]] | None:
    """Draw the panels that have data; all runs of a group look the same.

    Returns:
        The figure and the labels of its panels; None without any.
    """
    runs = [run for group in groups for run in group.runs]
    shown = [panel for panel in panels if any(len(panel.curve(run)[0]) for run in runs)]
    if not shown:
        return None
    figure, rows = new_figure([_PANEL_HEIGHT] * len(shown))
    for [axes], panel in zip(rows, shown, strict=True):
        for index, group in enumerate(groups):
            for run in group.runs:
                _draw(axes, panel, run, *colour_and_line(index))
        axes.set_ylabel(_wrapped(panel.label))
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    rows[-1][0].set_xlabel(_axis_label(groups))
    _legend(figure, groups)
    return figure, [panel.label for panel in shown]


def _draw(axes: Axes, panel: _Panel, run: Run, colour: str, line: LineStyle) -> None:
    x, y = panel.curve(run)
    if panel.kinds is None:
        axes.plot(x, y, color=colour, linestyle=line, marker=marker_of(x), alpha=0.85)
        return
    kinds = panel.kinds(run)
    for kind, marker in _EVENT_MARKERS.items():
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


def _axis_label(groups: Sequence[RunGroup]) -> str:
    return " or ".join(dict.fromkeys(run.axis.label for group in groups for run in group.runs))


def _validation(run: Run, key: str) -> Curve:
    chosen = run.evaluation["split"] == "validation"
    values = run.evaluation.get(key, np.full(len(chosen), np.nan))
    return run.axis(run.evaluation["step"][chosen]), values[chosen]


def _trainable(run: Run) -> Curve:
    """Trained parameters in percent, as steps: at the start, at each event, now."""
    if not len(run.train["step"]):
        return np.empty(0), np.empty(0)
    before = np.concatenate([[100.0], run.events["trainable_percent"]])
    places = np.concatenate([[0], run.events["step"], [run.train["step"][-1]]])
    return run.axis(np.repeat(places, 2)[1:-1]), np.repeat(before, 2)


def _mean(run: Run, column: str) -> Curve:
    series = run.series(column)
    return run.axis(series.steps), series.mean()


def _event_seconds(run: Run) -> Curve:
    return run.axis(run.events["step"]), run.events["seconds"]


def _step_milliseconds(run: Run) -> Curve:
    epochs = np.unique(run.train["epoch"])
    chosen = [run.train["epoch"] == epoch for epoch in epochs]
    median = [1000 * np.median(run.train["step_seconds"][here]) for here in chosen]
    last = [run.train["step"][here][-1] for here in chosen]
    return run.axis(np.array(last)), np.array(median)


def _measurement_seconds(run: Run) -> Curve:
    rows = run.measurements
    if not {"step", "seconds"} <= rows.keys():
        return np.empty(0), np.empty(0)
    return run.axis(rows["step"]), rows["seconds"]


def _wrapped(label: str) -> str:
    """Break a long label in two, so that it fits beside its panel."""
    if len(label) <= _LONGEST_LABEL:
        return label
    first, _, rest = label.partition(" ")
    return f"{first}\n{rest}"
