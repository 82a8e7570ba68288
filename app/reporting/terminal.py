"""Curves in a terminal, of Braille dots; where its encoding lacks them, of asterisks."""

from collections.abc import Iterator, Mapping

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.text import Text

_HEIGHT = 8  # lines
_MOST_COLUMNS = 100
_COLORS = ("cyan", "yellow")
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""Bit of each of a character's 4 x 2 dots in its code point (Unicode, chapter 21.1)."""
_FIRST = 0x2800


class Curves:
    """One or two curves over a common axis, as wide as the terminal."""

    def __init__(
        self, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, axis: str, label: str
    ) -> None:
        """Take the curves.

        Args:
            curves: places on the axis and values (n,) of each, by name; what is not finite is left
                out.
            axis: name of the axis.
            label: name of the values.
        """
        self._curves = {}
        for name, (places, values) in curves.items():
            finite = np.isfinite(values)
            if finite.any():
                self._curves[name] = (np.asarray(places, float)[finite], values[finite])
        self._axis, self._label = axis, label

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw: a line per row of characters, between the values' ends and the axis' ends."""
        if not self._curves:
            return
        places = np.concatenate([places for places, _ in self._curves.values()])
        values = np.concatenate([values for _, values in self._curves.values()])
        top, bottom = f"{values.max():.4g}", f"{values.min():.4g}"
        margin = max(len(top), len(bottom))
        columns = max(8, min(_MOST_COLUMNS, options.max_width - margin - 2))
        cells = np.full((_HEIGHT, columns), 0)
        colors = np.full((_HEIGHT, columns), -1)
        for number, (x, y) in enumerate(self._curves.values()):
            dots = rasterize(
                x,
                y,
                shape=(4 * _HEIGHT, 2 * columns),
                extent=(places.min(), places.max(), values.min(), values.max()),
            )
            drawn = (dots.reshape(_HEIGHT, 4, columns, 2) * _DOTS[:, None, :]).sum((1, 3))
            cells |= drawn
            colors[drawn > 0] = number
        heading = Text(f"{self._label} over {self._axis}s: ")
        for number, name in enumerate(self._curves):
            heading.append(("  " if number else "") + name, style=_COLORS[number])
        yield heading
        for row in range(_HEIGHT):
            side = top if row == 0 else bottom if row == _HEIGHT - 1 else ""
            line = Text(f"{side:>{margin}} |")
            for cell, color in zip(cells[row].tolist(), colors[row].tolist(), strict=True):
                shown = " " if not cell else "*" if options.ascii_only else chr(_FIRST + cell)
                line.append(shown, style=_COLORS[color] if cell else "")
            line.rstrip()
            yield line
        first, last = f"{places.min():.4g}", f"{places.max():.4g}"
        yield Text(f"{'':{margin}} |{first}{last:>{columns - len(first)}}")


def rasterize(
    x: np.ndarray,
    y: np.ndarray,
    *,
    shape: tuple[int, int],
    extent: tuple[float, float, float, float],
) -> np.ndarray:
    """Draw a curve into a raster: the mean of what falls into a column, joined by lines.

    Args:
        x: places (n,), in any order.
        y: values (n,).
        shape: rows and columns.
        extent: least and largest place, least and largest value of the raster.

    Returns:
        Whether a dot is set (rows, columns), the largest value first.
    """
    rows, columns = shape
    left, right, bottom, top = extent
    column = np.rint((x - left) / ((right - left) or 1) * (columns - 1)).astype(int)
    counts = np.bincount(column, minlength=columns)
    sums = np.bincount(column, weights=y, minlength=columns)
    hit = np.flatnonzero(counts)
    means = np.interp(np.arange(columns), hit, sums[hit] / counts[hit])
    row = np.rint((top - means) / ((top - bottom) or 1) * (rows - 1)).astype(int)
    dots = np.zeros(shape, bool)
    for place in range(hit[0], hit[-1] + 1):
        before = row[place - 1] if place > hit[0] else row[place]
        low, high = sorted((before, row[place]))
        # From the dot beside the last one's on, so that a steep line is no thicker than a flat one.
        dots[low + (low == before < high) : high + 1 - (high == before > low), place] = True
    return dots
