"""Curves of one or more runs: accuracy, loss, size and cost, means over the layers, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from app.reporting.comparison import RunGroup, merits
from app.reporting.drawing import (
    Drawing,
    as_label,
    colour_and_line,
    dots,
    new_figure,
    whole_numbers,
)
from app.reporting.layer_maps import draw_reference
from app.reporting.panels import HEIGHT, Curve, Panel, axis_label, draw_panels, wrapped
from app.reporting.reference import ReferenceCurve
from app.reporting.runs import Run, percentiles

_POINTS = 1000  # of a curve with a value for each step: more than a figure has dots


def learning(groups: Sequence[RunGroup]) -> Drawing | None:
    """Draw what is learned, how, and at which size; None for an analysis, which has none."""
    runs = [run for group in groups for run in group.runs]
    keys = list(dict.fromkeys(key for run in runs for key in [*merits(run), "loss"]))
    panels = [Panel(label=f"validation {key}", curve=partial(_validation, key=key)) for key in keys]
    panels += [
        Panel(label="training loss", curve=_training_loss),
        Panel(label="learning rate", curve=_learning_rate, from_zero=True),
        Panel(
            label="trainable, %", curve=partial(_size, column="trainable_percent"), from_zero=True
        ),
        Panel(
            label="stored, %", curve=partial(_size, column="compression_percent"), from_zero=True
        ),
    ]
    drawn = draw_panels(groups, panels)
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
        caption="On the validation part, after each epoch; the mean training loss of each epoch, "
        "and the learning rate; trained and stored parameters in percent of the full-rank "
        "network's.",
        alt=f"Curves by {axis_label(groups)} of {', '.join(shown)}. Last: {'; '.join(ends)}.",
        figure=figure,
    )


def costs(groups: Sequence[RunGroup]) -> Drawing | None:
    """Draw what is learned over what it costs: seconds, and stored parameters; None without it."""
    runs = [run for group in groups for run in group.runs]
    keys = list(dict.fromkeys(key for run in runs for key in (merits(run) or ["loss"])[:1]))
    panels = [
        Panel(
            label=f"validation {key}",
            curve=partial(curve, key=key),
            over=over,
            marks_end=True,
        )
        for key in keys
        for curve, over in (
            (_over_seconds, "seconds of training"),
            (_over_size, "stored parameters, % of the full-rank network's"),
        )
    ]
    drawn = draw_panels(groups, panels)
    if drawn is None:
        return None
    figure, _ = drawn
    ends = [
        f"{run.name}: {key} {y[-1]:.4g} after {x[-1]:.4g} s, {_over_size(run, key)[0][-1]:.3g} % "
        f"stored"
        for run in runs
        for key in keys
        for x, y in [_over_seconds(run, key)]
        if len(x)
    ]
    return Drawing(
        name="costs",
        title="What it costs",
        caption="On the validation part, over the time that steps, events of the method and "
        "measurements of the bases took (evaluations and checkpoints are left out), and over the "
        "stored parameters. A dot: where the run ended, or is now.",
        alt=f"Curves of {' and '.join(keys)} on the validation part over seconds, and over stored "
        f"parameters. Last: {'; '.join(ends)}.",
        figure=figure,
    )


def means(groups: Sequence[RunGroup], reference: ReferenceCurve | None) -> Drawing | None:
    """Draw the mean stability and mixing similarity of all runs; None where there is none."""
    panels = [
        Panel(label=f"mean {column.replace('_', ' ')}", curve=partial(_mean, column=column))
        for column in ("stability", "mixing_similarity")
    ]
    drawn = draw_panels(groups, panels)
    if drawn is None:
        return None
    figure, shown = drawn
    if reference and "mean stability" in shown and axis_label(groups) == "epoch":
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
        alt=f"Curves by {axis_label(groups)} of {', '.join(shown)}. Last mean stability: "
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
    figure, panels = new_figure([HEIGHT] * len(found))
    for [axes], (column, series) in zip(panels, found.items(), strict=True):
        values = series.averaged()
        if column in percent:
            full = [run.full_ranks[layer.name] for layer in series.layers if layer.averaged]
            values = 100 * values / np.array(full)[:, None]
        x = run.axis(series.steps)
        low, middle, high = percentiles(values, [10, 50, 90])
        axes.fill_between(x, low, high, color=colour_and_line(0)[0], alpha=0.2, linewidth=0)
        axes.plot(x, middle, color=colour_and_line(0)[0], **dots(middle))
        axes.set_ylabel(wrapped(as_label(column).replace("_", " ") + ", %" * (column in percent)))
        if column == "orthonormality_error" and np.nanmin(low) > 0:
            axes.set_yscale("log")
        whole_numbers(axes)
    panels[-1][0].set_xlabel(run.axis.label)
    return Drawing(
        name=name,
        title="Ranks and further measures",
        caption="Median over the layers and the range of the middle 80 % of them; ranks in percent "
        f"of {run.full_rank_text}.",
        alt=f"Curves by {run.axis.label} of the median over the layers of {', '.join(found)}.",
        figure=figure,
    )


def seconds(groups: Sequence[RunGroup]) -> Drawing | None:
    """Draw what steps, events and measurements took; None for an analysis."""
    panels = [
        Panel(
            label="samples per second",
            curve=partial(_per_epoch, column="samples_per_second"),
            from_zero=True,
        ),
        Panel(label="step, ms", curve=partial(_per_epoch, column="step_seconds", scale=1000)),
        Panel(
            label="event, s",
            curve=_event_seconds,
            kinds=lambda run: run.events["event"],
            from_zero=True,
        ),
        Panel(label="measurement, s", curve=_measurement_seconds),
    ]
    drawn = draw_panels(groups, panels)
    if drawn is None:
        return None
    figure, shown = drawn
    total = sum(float(run.events["seconds"].sum()) for group in groups for run in group.runs)
    count = sum(len(run.events["seconds"]) for group in groups for run in group.runs)
    markers = "circle: conversion, square: cut, triangle: update without a cut, diamond: release"
    return Drawing(
        name="seconds",
        title="Time",
        caption="Median throughput and time of a step in each epoch"
        + (f"; time of each event of the method ({markers})" if count else "")
        + ("; time of each measurement of the bases" if "measurement, s" in shown else "")
        + ".",
        alt=f"Curves by {axis_label(groups)} of {', '.join(shown)}. {count} events took "
        f"{total:.3g} s in all.",
        figure=figure,
    )


def _evaluations(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a figure of the validation part."""
    chosen = run.evaluation["split"] == "validation"
    values = run.evaluation.get(key, np.full(len(chosen), np.nan))[chosen]
    known = np.isfinite(values)
    return run.evaluation["step"][chosen][known], values[known]


def _validation(run: Run, key: str) -> Curve:
    steps, values = _evaluations(run, key)
    return run.axis(steps), values


def _over_seconds(run: Run, key: str) -> Curve:
    steps, values = _evaluations(run, key)
    return run.seconds_at(steps), values


def _over_size(run: Run, key: str) -> Curve:
    steps, values = _evaluations(run, key)
    stored = np.concatenate([[100.0], run.events["compression_percent"]])
    return stored[np.searchsorted(run.events["step"], steps, side="right")], values


def _size(run: Run, column: str) -> Curve:
    """Parameters in percent, as steps: at the start, at each event, now."""
    if not len(run.train["step"]):
        return np.empty(0), np.empty(0)
    before = np.concatenate([[100.0], run.events[column]])
    places = np.concatenate([[0], run.events["step"], [run.train["step"][-1]]])
    return run.axis(np.repeat(places, 2)[1:-1]), np.repeat(before, 2)


def _mean(run: Run, column: str) -> Curve:
    series = run.series(column)
    return run.axis(series.steps), series.mean()


def _learning_rate(run: Run) -> Curve:
    """Return some of its values at even distances, the last one among them."""
    count = len(run.train["step"])
    places = np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(int))
    return run.axis(run.train["step"][places]), run.train["learning_rate"][places]


def _training_loss(run: Run) -> Curve:
    return _per_epoch(run, "loss", mean=True)


def _per_epoch(run: Run, column: str, *, scale: float = 1.0, mean: bool = False) -> Curve:
    """Return the mean or median over the steps of each epoch, at its last step."""
    steps = run.train["step"]
    if not len(steps):
        return np.empty(0), np.empty(0)
    _, first = np.unique(run.train["epoch"], return_index=True)
    parts = np.split(scale * run.train[column], first[1:])
    last = steps[np.append(first[1:], len(steps)) - 1]
    return run.axis(last), np.array([np.mean(p) if mean else np.median(p) for p in parts])


def _event_seconds(run: Run) -> Curve:
    return run.axis(run.events["step"]), run.events["seconds"]


def _measurement_seconds(run: Run) -> Curve:
    rows = run.measurements
    if not {"step", "seconds"} <= rows.keys():
        return np.empty(0), np.empty(0)
    return run.axis(rows["step"]), rows["seconds"]
