"""The figures of a search, for its report: losses, parameters, importance, Pareto front."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from app.reporting.drawing import COLOURS, Drawing, as_label, new_figure
from app.search import objective
from app.search.importance import Importance
from app.search.space import Parameter, Space
from app.search.store import Evaluation

_ROW = 0.52
"""Inches between two parallel axes: two lines of their labels."""
_CHARACTERS = 40
"""That have room along an axis."""
_GOOD, _BAD = np.array([0.0, 0.28, 0.55]), np.array([0.88, 0.88, 0.84])


def losses(evaluations: Sequence[Evaluation]) -> Drawing:
    """Draw the loss of every evaluation in the order of their starts, and the best so far."""
    figure, [[axes]] = new_figure([3.2])
    ordered = sorted(evaluations, key=lambda one: (one.started, one.number))
    shown = [_is_comparable(one) for one in ordered]
    x = np.arange(1, len(ordered) + 1)
    y = np.array([one.loss for one in ordered])
    axes.plot(x[shown], y[shown], "o", color=COLOURS[0], label="finished", markersize=4)
    best = np.minimum.accumulate(np.where(shown, y, np.inf))
    known = np.isfinite(best)
    axes.step(x[known], best[known], where="post", color=COLOURS[1], label="best so far")
    others = np.logical_not(shown)
    axes.plot(
        x[others],
        np.full(others.sum(), 0.98),
        "x",
        color=COLOURS[6],
        label="failed, stopped or out of bounds",
        transform=axes.get_xaxis_transform(),
    )
    axes.set(xlabel="evaluation, in the order of their starts", ylabel="loss")
    axes.legend()
    return Drawing(
        name="search-losses",
        title="Loss over evaluations",
        caption=f"{len(ordered)} evaluations; {others.sum()} of them have no loss to compare.",
        alt="Loss of each evaluation and the least loss so far",
        figure=figure,
    )


def parallel_coordinates(evaluations: Sequence[Evaluation], space: Space) -> Drawing:
    """Draw every evaluation as a line over the parameters, the better the darker.

    The axes lie one below the other, so that keys and ranges have room however many there are.
    """
    count = len(space.keys)
    figure, [[axes]] = new_figure([0.8 + _ROW * count])
    ordered = sorted(evaluations, key=lambda one: one.loss, reverse=True)
    y = np.arange(count)
    for place, one in enumerate(ordered):
        share = place / max(1, len(ordered) - 1)
        axes.plot(
            space.encode(one.parameters),
            y,
            color=tuple(_BAD + share * (_GOOD - _BAD)),
            linewidth=0.8 + 1.2 * share**4,
            marker="o" if count == 1 else "",
        )
    axes.set_yticks(y, [_in_two_lines(key) for key in space.keys], fontsize=8.5)
    for place, parameter in enumerate(space.parameters):
        for at, alignment, text in _levels(parameter):
            axes.annotate(
                as_label(text),
                (at, place),
                textcoords="offset points",
                xytext=(0, -4),
                va="top",
                ha=alignment,
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            )
    axes.set(xlim=(-0.03, 1.03), ylim=(count - 0.4, -0.4), xlabel="place in the range")
    axes.grid(visible=False, axis="x")
    return Drawing(
        name="search-parameters",
        title="Parallel coordinates",
        caption="One line per evaluation, the less its loss the darker. Each axis is a parameter, "
        "with its range from left to right; log ranges by their exponent.",
        alt="Parameters of all evaluations as lines over parallel axes",
        figure=figure,
    )


def importances(importance: Importance, space: Space) -> Drawing:
    """Draw the importance of every parameter."""
    figure, [[axes]] = new_figure([0.9 + 0.35 * len(space.keys)])
    order = np.argsort(importance.mean)
    axes.barh(
        [space.keys[i] for i in order],
        importance.mean[order],
        xerr=importance.deviation[order],
        color=COLOURS[0],
    )
    axes.set(xlabel="what the model's R² loses without it")
    return Drawing(
        name="search-importance",
        title="Importance of each parameter",
        caption="Permutation importance in a random forest of the losses' ranks, on evaluations it "
        f"was not fitted to; bars: deviation. R² of the forest: {importance.score:.2f}"
        + (
            " - it predicts too little for the rest to mean much."
            if importance.score < 0.2
            else "."
        ),
        alt="Bars of the importance of each parameter",
        figure=figure,
    )


def pareto(evaluations: Sequence[Evaluation]) -> Drawing | None:
    """Draw error against trainable parameters, with the front that nothing dominates."""
    finished = [one for one in evaluations if one.succeeded]
    if not finished:
        return None
    figure, [[axes]] = new_figure([3.4])
    points = np.array([(one.trainable_percent, one.error) for one in finished])
    front = objective.pareto_front(points)
    axes.plot(*points.T, "o", color=COLOURS[5], markersize=4, label="finished")
    axes.plot(*points[front].T, "o-", color=COLOURS[1], label="Pareto front")
    for i in front:
        axes.annotate(
            str(finished[i].number),
            points[i],
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=8,
        )
    axes.set(xlabel="trainable parameters, %", ylabel="validation error")
    axes.legend()
    return Drawing(
        name="search-pareto",
        title="Pareto front",
        caption="Numbers of the evaluations of which none is better in both error and size.",
        alt="Validation error against trainable parameters with the Pareto front",
        figure=figure,
    )


def _is_comparable(one: Evaluation) -> bool:
    return one.status == "finished" and one.loss < objective.OUT_OF_BOUNDS


def _in_two_lines(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"{as_label(section)}.\n{as_label(name)}"


def _levels(parameter: Parameter) -> list[tuple[float, Literal["left", "center", "right"], str]]:
    """Return what is written at an axis: places, alignments and texts of its ends or choices."""
    levels = parameter.levels()
    if not parameter.choices:
        return [(0.0, "left", f"{levels[0]:.3g}"), (1.0, "right", f"{levels[-1]:.3g}")]
    found: list[tuple[float, Literal["left", "center", "right"], str]] = []
    longest = max(3, _CHARACTERS // len(levels))
    for level in levels:
        text = str(level)
        text = text if len(text) <= longest else f"{text[: longest - 1]}…"
        found.append((parameter.encode(level), "center", text))
    return found
