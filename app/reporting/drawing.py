"""What all figures share: look, size, and how they become files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")

WIDTH = 6.0
"""Inches. Narrow, so that text stays readable where a phone scales the figure down."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart with any colour vision (Okabe and Ito, 2008)."""

LineStyle = Literal["-", "--", "-.", ":"]

LINE_STYLES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
"""A second difference, for print without colour."""

_LONGEST_NAME = 26  # characters

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.dpi": 150,
    "svg.hashsalt": "oialr",  # the same figure, the same file
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, and what stands beside it on the page."""

    name: str
    """Stem of its files."""
    title: str
    caption: str
    alt: str
    """What it shows, for those who do not see it."""
    figure: Figure


@contextmanager
def style() -> Iterator[None]:
    """Draw with the look of the report; matplotlib's settings are as they were afterwards."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def new_figure(
    heights: Sequence[float], *, columns: int = 1, share_x: bool = True
) -> tuple[Figure, list[list[Axes]]]:
    """Start a figure of panels, one above the other.

    Args:
        heights: of the rows of panels, in inches.
        columns: panels beside each other.
        share_x: all panels have the same horizontal axis.

    Returns:
        The figure and its panels, row by row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(heights)))
    panels = figure.subplots(
        len(heights), columns, sharex=share_x, squeeze=False, height_ratios=heights
    )
    return figure, [list(row) for row in panels]


def whole_numbers(axes: Axes, most: int = 8) -> None:
    """Put ticks of the horizontal axis at whole numbers: there is no half epoch or step."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def few_powers(axes: Axes) -> None:
    """Put the numbers of a logarithmic vertical axis, whose limits are set, where a panel has room.

    Below two decades matplotlib names up to six numbers between two powers of 10, and in a small
    panel these overlap.
    """
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 2, 3, 5))
        )
        axes.yaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(2, 2)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def colour_and_line(index: int) -> tuple[str, LineStyle]:
    """Return the look of the index-th line."""
    return COLOURS[index % len(COLOURS)], LINE_STYLES[index % len(LINE_STYLES)]


def marker_of(x: np.ndarray) -> str:
    """Return the marker of a line's points: none, unless a single point has no line."""
    return "o" if len(x) == 1 else ""


def dots(y: np.ndarray) -> dict[str, Any]:
    """Return the settings of a line that mark what would not be seen: values between two gaps."""
    import numpy as np

    known = np.isfinite(np.concatenate([[np.nan], y, [np.nan]]))
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
    return {"marker": "o", "markevery": alone.tolist()} if len(alone) else {}


def short_name(layer: str) -> str:
    """Return a layer's name as a label: without what is in its middle, if it is long."""
    name = layer.removesuffix(".weight")
    half = _LONGEST_NAME // 2
    return as_label(name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}")


def as_label(text: str) -> str:
    """Return a text of the user's so that matplotlib draws it as it stands, in one line.

    Between two dollar signs it would look for a formula, and fail where there is none.
    """
    return "".join(c if c.isprintable() else "�" for c in text).replace("$", r"\$")


def save(drawing: Drawing, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write a drawing's files.

    Raises:
        UserError: the folder cannot be written to.
    """
    paths = [folder / f"{drawing.name}.{format_}" for format_ in formats]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            drawing.figure.savefig(path)
    except OSError as error:
        raise UserError(f"--output: cannot write to {folder}: {error.strerror}") from None
    return paths


def to_svg(drawing: Drawing) -> bytes:
    """Return a drawing as the SVG document that the page holds."""
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
