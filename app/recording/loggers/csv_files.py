"""Tables as text: RUN/csv/GROUP.csv, for spreadsheets and whatever reads nothing else."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from app.recording.loggers.protocol import Values


class CsvFiles:
    """A :class:`app.recording.loggers.protocol.Logger` that writes a file per group.

    Rows about layers lie in ``layers-GROUP.csv``, spectra in ``layers-spectrum.csv`` with a row per
    singular value. A cell is empty where there is no number.
    """

    def __init__(
        self, folder: Path, *, configuration: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Go on behind the rows up to a step."""
        self._folder = folder / "csv"
        self._folder.mkdir(exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        for path in self._folder.glob("*.csv"):
            _cut(path, first_step)

    def scalars(self, group: str, step: int, values: Values, *, layer: str | None = None) -> None:
        """Write a row."""
        if layer is None:
            self._write(group, ["step", *values], [step, *values.values()])
        else:
            self._write(
                f"layers-{group}", ["step", "layer", *values], [step, layer, *values.values()]
            )

    def spectrum(self, layer: str, step: int, singular_values: np.ndarray) -> None:
        """Write a row per singular value."""
        for index, value in enumerate(singular_values):
            self._write(
                "layers-spectrum",
                ["step", "layer", "index", "singular_value"],
                [step, layer, index, value],
            )

    def flush(self) -> None:
        """Bring all rows to the files."""
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _write(self, name: str, columns: Sequence[str], cells: Sequence[Any]) -> None:
        file = self._files.get(name)
        if file is None:
            path = self._folder / f"{name}.csv"
            file = self._files[name] = path.open("a", newline="", encoding="utf-8")
            if not file.tell():
                csv.writer(file).writerow(columns)
        csv.writer(file).writerow(
            "" if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells
        )


def _cut(path: Path, first_step: int | None) -> None:
    """Take the rows off that come again, and what a killed session left of its last one.

    A test comes after the last checkpoint, so that of the step itself comes again too.
    """
    if first_step is None:
        path.unlink()
        return
    end = first_step - (path.stem == "test")
    partial = path.with_suffix(".partial")
    with (
        path.open(newline="", encoding="utf-8") as old,
        partial.open("w", newline="", encoding="utf-8") as new,
    ):
        rows, kept = csv.reader(old), csv.writer(new)
        header = next(rows, None)
        if header:
            kept.writerow(header)
            kept.writerows(row for row in rows if len(row) == len(header) and _step_of(row) <= end)
        new.flush()
        os.fsync(new.fileno())
    os.replace(partial, path)


def _step_of(row: Sequence[str]) -> float:
    return int(row[0]) if row[0].isdecimal() else math.inf
