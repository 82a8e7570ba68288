"""Maps of layers by time, the first layers at the top, with the mean over the layers below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.reporting.drawing import COLOURS, Drawing, dots, new_figure, short_name, whole_numbers
from app.reporting.reference import ReferenceCurve
from app.reporting.runs import LayerSeries, Run, percentiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_HEIGHT = 0.13  # inches that a layer's name takes
_CURVE_HEIGHT = 2.1


def floor(runs: Sequence[Run], measured: str) -> float:
    """Return the lower end of the colours of a map, so that those of all runs compare.

    Args:
        runs: those that are drawn.
        measured: "stability" or "mixing_similarity".

    Returns:
        0.8, as in the paper's figure, or the tenth below 98 % of a run's values.
    """
    return min(_floor(run.series(measured).values, 0.8) for run in runs)


def stability_map(
    run: Run, name: str, low: float, reference: ReferenceCurve | None
) -> Drawing | None:
    """Draw the basis stability of every layer (arXiv 2401.08505, figure 2).

    Args:
        run: the run.
        name: stem of the files.
        low: lower end of the colours, of :func:`floor`.
        reference: a published mean to be drawn beside the run's own.

    Returns:
        None where there is nothing to draw yet.
    """
    window = window_of(run)
    return _map(
        run,
        run.series("stability"),
        name=name,
        title="Basis stability",
        quantity="stability",
        low=low,
        colours="viridis",
        reference=reference,
        caption=f"Similarity of each layer's orthogonal basis U Vh to its own {window}: 1 where it "
        f"stands still. Darkest: {low:.1f} or less.",
    )


def mixing_map(run: Run, name: str, low: float) -> Drawing | None:
    """Draw the mixing similarity of every layer; None where there is nothing to draw yet.

    Args:
        run: the run.
        name: stem of the files.
        low: lower end of the colours, of :func:`floor`.
    """
    series = run.series("mixing_similarity")
    return _map(
        run,
        series,
        name=name,
        title="Mixing similarity",
        quantity="similarity of R",
        low=low,
        colours="cividis",
        caption=f"Similarity of R in W = Q R to its own {window_of(run)}: how much the mixing of "
        "the basis still changes.",
    )


def rank_map(run: Run, name: str) -> Drawing | None:
    """Draw the rank of every layer over the full rank; None where all are full-rank."""
    series = run.relative_ranks()
    if not len(series.steps) or np.nanmin(series.values) == 1:
        return None
    percent = LayerSeries(layers=series.layers, steps=series.steps, values=100 * series.values)
    return _map(
        run,
        percent,
        name=name,
        title="Rank",
        quantity="rank, %",
        low=0,
        high=100,
        colours="cividis",
        caption=f"Rank of each layer's weight, in percent of {run.full_rank_text}.",
    )


def _map(
    run: Run,
    series: LayerSeries,
    *,
    name: str,
    title: str,
    quantity: str,
    low: float,
    colours: str,
    caption: str,
    high: float = 1,
    reference: ReferenceCurve | None = None,
) -> Drawing | None:
    if not len(series.steps):
        return None
    count = len(series.layers)
    height = float(np.clip(0.19 * count + 0.5, 1.6, 7.4))
    figure, [[top], [bottom]] = new_figure([height, _CURVE_HEIGHT])
    x = run.axis(series.steps)
    edges = _edges(x)
    below = bool(np.nanmin(series.values) < low)
    image = top.pcolormesh(
        edges,
        np.arange(count + 1) - 0.5,
        series.values,
        cmap=colours,
        vmin=low,
        vmax=high,
        rasterized=True,
    )
    top.set_facecolor("#bbbbbb")
    top.invert_yaxis()
    top.grid(False)
    _label_layers(top, [layer.name for layer in series.layers], height)
    extend = "min" if below else "neither"
    figure.colorbar(image, ax=top, label=quantity, pad=0.02, aspect=40, extend=extend)
    _draw_mean(bottom, x, series)
    bottom.set_ylabel(f"mean {quantity}")
    for place in run.conversions():
        bottom.axvline(place, color="black", linewidth=0.9, linestyle=":")
    if reference and run.axis.label == "epoch":
        draw_reference(bottom, reference)
        figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    bottom.set_ylim(top=high + 0.02 * (high - bottom.get_ylim()[0]))
    bottom.set_xlabel(run.axis.label)
    whole_numbers(bottom)
    top.set_xlim(edges[0], edges[-1])
    lowest, last = _lowest(series), series.mean()[-1]
    left_out = count - len(series.averaged())
    return Drawing(
        name=name,
        title=title,
        caption=caption
        + " Below: the mean over the layers, and the range of the middle 80 % of them."
        + (f" {left_out} recorded weights are not averaged." if left_out else "")
        + (" Dotted: the layers turn low-rank, or are released." if len(run.conversions()) else ""),
        alt=f"{title} of {count} layers by {run.axis.label}, {x[0]:g} to {x[-1]:g}. The last mean "
        f"over the layers is {last:.4g}; its lowest is {lowest[1]:.4g}, at {run.axis.label} "
        f"{run.axis(np.array(lowest[0])):g}.",
        figure=figure,
    )


def draw_reference(axes: Axes, curve: ReferenceCurve) -> None:
    """Draw a published curve."""
    axes.plot(
        curve.epochs, curve.stability, color="black", linestyle="--", marker="o", label=curve.label
    )


def _draw_mean(axes: Axes, x: np.ndarray, series: LayerSeries) -> None:
    values = series.averaged()
    low, high = percentiles(values, [10, 90])
    mean = series.mean()
    axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=COLOURS[0], label="mean over the layers", **dots(mean))


def _label_layers(axes: Axes, names: Sequence[str], height: float) -> None:
    """Name as many layers as there is room for, at even distances."""
    every = max(1, int(np.ceil(len(names) * _LABEL_HEIGHT / height)))
    places = range(0, len(names), every)
    size = 7.5 if every > 1 else 9
    axes.set_yticks(list(places), [short_name(names[place]) for place in places], fontsize=size)


def _edges(x: np.ndarray) -> np.ndarray:
    """Borders between measurements: halfway."""
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _floor(values: np.ndarray, highest: float) -> float:
    """Lower end of a colour range: a tenth below nearly all values, at most ``highest``."""
    if not np.isfinite(values).any():
        return highest
    return float(min(highest, np.floor(10 * np.nanpercentile(values, 2)) / 10))


def _lowest(series: LayerSeries) -> tuple[float, float]:
    mean = series.mean()
    if not np.isfinite(mean).any():
        return float(series.steps[0]), float("nan")
    place = int(np.nanargmin(mean))
    return float(series.steps[place]), float(mean[place])


def window_of(run: Run) -> str:
    """Say what is compared with."""
    if analysis := run.configuration.get("analysis"):
        if run.axis.label == "epoch" and (span := analysis.get("span")):  # older files lack it
            return f"{span} epoch{'s' * (span > 1)} before"
        window, unit = analysis["window"], "checkpoint"
    else:
        section = run.configuration.get("stability", {})
        window, unit = section.get("window", 1), section.get("unit", "epochs").removesuffix("s")
    return f"{window} {unit}{'s' * (window > 1)} before"
