"""Finished cells in one file: to go on with on another machine, and to lie beside a document.

A line is a cell, in JSON: its folder below that of all cells, cell.json, summary.json, and the
validation figure by which learning rates are chosen. Checkpoints and metrics.h5 stay where they
are, so a cell that comes from a file can be read, and not resumed.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.errors import UserError
from benchmarks.study.cell import read_record, validation_figure, write_record, write_summary


def unpack(path: Path, cells: Path) -> None:
    """Make folders of the cells in a file, but for those that there are already.

    Args:
        path: the file; nothing happens where there is none yet.
        cells: folder of all cells.

    Raises:
        UserError: a line is no cell.
    """
    for name, line in _lines(path).items():
        place = cells / name
        if place.exists():
            continue
        write_record(place, line["cell"])
        if line["summary"] is not None:
            write_summary(place, line["summary"])


def pack(path: Path, cells: Path, places: Iterable[Path]) -> None:
    """Put finished cells into a file, which keeps those that it has already.

    Args:
        path: the file.
        cells: folder of all cells.
        places: folders of finished ones, or of ones that diverged, below it.

    Raises:
        UserError: a line of it is no cell.
    """
    lines = _lines(path)
    for place in places:
        name = place.relative_to(cells.resolve()).as_posix()
        record, summary = read_record(place), None
        if (place / "summary.json").exists():
            summary = json.loads((place / "summary.json").read_text())
            figures = {**summary, "cell": record, "place": str(place)}
            record["validation"] = validation_figure(figures)
        lines[name] = {"place": name, "cell": record, "summary": summary}
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text("".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)))
    os.replace(temporary, path)


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """Read the cells of a file, by their folders."""
    if not path.exists():
        return {}
    lines = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            lines[line["place"]] = {key: line[key] for key in ("place", "cell", "summary")}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--archive {path}: line {number} is no cell") from None
    return lines
