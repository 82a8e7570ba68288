"""Finished cells in one file: to go on with on another machine, and to lie beside a document.

A line is a cell, in JSON: its folder below that of all cells, cell.json, summary.json, and the
validation figure by which learning rates are chosen. Checkpoints and metrics.h5 stay where they
are, so a cell that comes from a file can be read, and not resumed.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError, field_validator

from app.config.section import Section
from app.errors import UserError
from benchmarks.study.cell import read_record, validation_figure, write_record, write_summary


class Line(Section):
    """A cell that is finished, or that diverged and has no summary."""

    place: str
    cell: dict[str, Any]
    summary: dict[str, Any] | None

    @field_validator("place")
    @classmethod
    def _lies_below(cls, place: str) -> str:
        path = PurePosixPath(place)
        if path.is_absolute() or not path.parts or ".." in path.parts:
            raise ValueError("no folder below that of all cells")
        return place


def check(path: Path) -> Path:
    """Return where a file of cells is, or will be.

    Raises:
        UserError: it cannot be there, is no file, or has a line that is no cell.
    """
    path = path.resolve()
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"--archive {path}: is no file, or would lie in no folder")
    _lines(path)
    return path


def unpack(path: Path, cells: Path) -> None:
    """Make folders of the cells in a file, but for those that are finished there already.

    Args:
        path: the file; nothing happens where there is none yet.
        cells: folder of all cells.

    Raises:
        UserError: a line is no cell.
    """
    for name, line in _lines(path).items():
        place = cells / name
        if (place / "summary.json").exists():
            _add_fingerprints(place, line)
            continue
        if line.summary is None and place.exists():
            continue
        made = place.with_name(f"{place.name}.partial")
        shutil.rmtree(made, ignore_errors=True)
        write_record(made, line.cell)
        if line.summary is not None:
            write_summary(made, line.summary)
        shutil.rmtree(place, ignore_errors=True)  # begun here, and finished elsewhere
        made.rename(place)


def pack(path: Path, cells: Path, places: Iterable[Path]) -> None:
    """Put finished cells into a file, which keeps those that it has already.

    Args:
        path: the file.
        cells: folder of all cells.
        places: folders of finished ones, or of ones that diverged, below it.

    Raises:
        UserError: a line of it is no cell.
    """
    from app.training.folder import write_text

    lines = _lines(path)
    for place in places:
        name = place.relative_to(cells.resolve()).as_posix()
        record, summary = read_record(place), None
        if (place / "summary.json").exists():
            summary = json.loads((place / "summary.json").read_text())
            if (place / "metrics.h5").exists():
                record["validation"] = validation_figure(
                    {**summary, "cell": record, "place": str(place)}
                )
        elif name in lines:
            continue  # what another machine has finished counts more than that it failed here
        lines[name] = Line(place=name, cell=record, summary=summary)
    text = "".join(json.dumps(lines[name].model_dump()) + "\n" for name in sorted(lines))
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


def _add_fingerprints(place: Path, line: Line) -> None:
    """Learn from a file which other codes take the first steps of a cell that is finished here."""
    record = read_record(place)
    if line.summary is not None and record.get("digest") == line.cell.get("digest"):
        known = {**line.cell.get("fingerprints", {}), **record["fingerprints"]}
        if known != record["fingerprints"]:
            write_record(place, {**record, "fingerprints": known})


def _lines(path: Path) -> dict[str, Line]:
    """Read the cells of a file, by their folders."""
    if not path.exists():
        return {}
    lines = {}
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--archive {path}: cannot be read: {error}") from None
    for number, text in enumerate(texts, 1):
        try:
            line = Line.model_validate_json(text)
        except ValidationError:
            raise UserError(f"--archive {path}: line {number} is no cell") from None
        lines[line.place] = line
    return lines
