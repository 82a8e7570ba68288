"""Singular values of some layers over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.reporting.drawing import (
    Drawing,
    few_powers,
    marker_of,
    new_figure,
    short_name,
    whole_numbers,
)
from app.reporting.runs import Run, read_spectra

_TIMES = 10  # lines in a panel
_DECADES = 5  # below the largest singular value


def spectra(
    run: Run, layers: Sequence[str], name: str, ends: tuple[float, float]
) -> Drawing | None:
    """Draw the singular values of layers, a panel each, a line for each of some times.

    Args:
        run: the run.
        layers: names, in order.
        name: stem of the files.
        ends: of the colours, as times on the runs' axis: the same for all runs of a page.

    Returns:
        None where nothing was recorded of them.
    """
    found = [
        (layer, run.axis(steps), values)
        for layer, (steps, values) in zip(layers, read_spectra(run, layers), strict=True)
        if len(steps)
    ]
    if not found:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, panels = new_figure([2.3] * rows, columns=columns, share_x=False)
    flat = [axes for row in panels for axes in row]
    # Without the light end, which a white ground swallows.
    map_ = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
    colours = ScalarMappable(Normalize(*ends), map_)
    for axes, (layer, x, values) in zip(flat, found, strict=False):
        places = np.unique(np.linspace(0, len(x) - 1, min(_TIMES, len(x))).round().astype(int))
        largest = np.nanmax(values, initial=0.0) or 1.0
        for place in places:
            s = np.where(values[place] > 0, values[place], np.nan)
            axes.plot(
                np.arange(1, len(s) + 1),
                s,
                color=colours.to_rgba(x[place]),
                linewidth=1.1,
                marker=marker_of(s[np.isfinite(s)]),
            )
        axes.set_yscale("log")
        lowest = np.nanmin(np.where(values > 0, values, np.nan), initial=largest)
        axes.set_ylim(max(lowest, largest * 10.0**-_DECADES) / 1.5, largest * 1.5)
        whole_numbers(axes, most=5)
        few_powers(axes)
        axes.set_title(short_name(layer), fontsize=9.5)
    for axes in flat[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("number of the singular value", fontsize=11)
    figure.supylabel("singular value", fontsize=11)
    figure.colorbar(colours, ax=flat, label=run.axis.label, aspect=40)
    return Drawing(
        name=name,
        title="Singular values",
        caption=f"Spectra of {len(found)} of {len(run.layers)} weights, at up to {_TIMES} times "
        f"from dark to light. A line that ends early is one of a cut layer. Values below "
        f"10^-{_DECADES} of the largest are outside.",
        alt=f"Singular values in descending order, on a logarithmic axis, of the layers "
        f"{', '.join(layer for layer, *_ in found)}, from {run.axis.label} "
        f"{min(x[0] for _, x, _ in found):g} to {max(x[-1] for _, x, _ in found):g}.",
        figure=figure,
    )
