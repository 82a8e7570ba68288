"""What an analysis has measured so far, on the disk: after a kill it goes on from there.

The folder ``unfinished`` beside the coming metrics.h5 holds plan.json, what is measured, and a file
for each portion of the weights that is, of a suffix that no checkpoint has, since the folder may
lie among those. It is gone with the end of the analysis.
"""

import io
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import StorageError, UserError
from app.training.archive import DamagedFileError, load_verified
from oialr.stability.measurement import LayerStability

logger = logging.getLogger(__name__)

_DIFFERENCES = {
    "checkpoints": "the checkpoints are others, or were changed since",
    "window": "--window is another one",
    "weights": "--include, --exclude or --not-averaged choose other weights",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What came of a portion of the weights."""

    rows: Mapping[str, list[LayerStability]]
    """Of each weight, by name, a row for each checkpoint."""
    seconds: list[float]
    """Of each checkpoint, what the measurement of the portion took."""


class Unfinished:
    """The folder of an analysis that is not done; used by the first process alone."""

    def __init__(self, output: Path) -> None:
        """Look into the folder ``unfinished`` of an analysis' folder, which need not be there."""
        self.folder = output / "unfinished"
        self._plan = self.folder / "plan.json"
        self._number = 0

    def begin(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Make the folder, or compare with what was begun there.

        Args:
            plan: plain values that say what is measured, as json gives them back.

        Returns:
            What was noted beside an equal plan; nothing for a new one.

        Raises:
            UserError: something else was begun there, or it cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = json.loads(self._plan.read_text()) if self._plan.exists() else None
        except OSError as error:
            raise UserError(
                f"--output: cannot write to {self.folder.parent}: {error.strerror}"
            ) from None
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.keys() != {"plan", "notes"}:
            self._clear()  # nothing is relied on of which nobody knows what it was measured on
            return {}
        for key, value in plan.items():
            if content["plan"].get(key) != value:
                what = _DIFFERENCES.get(key, key)
                raise UserError(
                    f"--output: in {self.folder} another analysis was begun ({what}): choose "
                    f"another folder, or remove that one"
                )
        return content["notes"]

    def note(self, plan: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Write the plan, and what need not be found out again.

        Raises:
            StorageError: the disk is full, or failed.
        """
        self._write(self._plan, json.dumps({"plan": plan, "notes": notes}).encode())

    def parts(self) -> list[Part]:
        """Read what is measured; a damaged file is told, removed, and its weights come again."""
        found = []
        for path in sorted(self.folder.glob("part-*.rows")):
            self._number = int(path.stem.rpartition("-")[2]) + 1
            try:
                content = load_verified(path)
            except DamagedFileError as error:
                logger.warning("%s: its weights are measured again", error)
                path.unlink()
                continue
            rows = {
                name: [LayerStability(**row) for row in rows]
                for name, rows in content["rows"].items()
            }
            found.append(Part(rows=rows, seconds=content["seconds"]))
        return found

    def add(self, part: Part) -> None:
        """Keep what came of a portion.

        Raises:
            StorageError: the disk is full, or failed.
        """
        buffer = io.BytesIO()
        rows = {name: [vars(row) for row in rows] for name, rows in part.rows.items()}
        torch.save({"rows": rows, "seconds": part.seconds}, buffer)
        self._write(self.folder / f"part-{self._number:06d}.rows", buffer.getvalue())
        self._number += 1

    def remove(self) -> None:
        """Remove what is there: everything is in metrics.h5."""
        self._clear()
        with suppress(OSError):  # somebody's own files lie there
            self.folder.rmdir()

    def _clear(self) -> None:
        """Remove our own files."""
        for pattern in ("plan.json*", "part-*.rows*", "metrics.h5*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file whole and to the disk, or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise StorageError(
                f"--output: cannot write {path}: {error.strerror}; once that is mended, the same "
                f"command goes on"
            ) from None
