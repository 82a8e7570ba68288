"""What a run has come to, compared with the run that nothing disturbed, bit for bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.recording.store import Follower

TIMINGS = {
    "samples_per_second",
    "step_seconds",
    "seconds",
    "factorization_seconds",
    "predicted_seconds",
    "imbalance",
    "peak_bytes",
}
"""Columns that no two runs have in common."""
_NOT_COMPARED = {"seconds", "cpu_seconds", "rows", "kept_rows", "configuration"}
"""Of a checkpoint: wall times, and the rows that are compared by themselves."""
_AGAINST_BASES = {
    "mean_stability",
    "mean_mixing_similarity",
    "stability",
    "mixing_similarity",
    "reference_rank",
}
"""Columns of what is measured against bases of before."""

Rows = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """The newest checkpoint, of all processes, and all rows but those that tell of sessions."""

    state: dict[str, Any]
    rows: dict[str, Rows]


def read_outcome(folder: Path) -> Outcome:
    """Read a finished run."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    # The same names whatever number of parts the first session wrote.
    state = {path.name: torch.load(path, weights_only=True) for path in newest.glob("*.pt")}
    groups = [group for group in state["state.pt"]["rows"] if group != "sessions"]
    return Outcome(state, read_rows(folder / "metrics.h5", groups))


def read_rows(path: Path, groups: list[str]) -> dict[str, Rows]:
    """Return all rows of some groups, without the timings."""
    reader = Follower(path)
    try:
        found = {group: reader.rows(group) for group in groups}
    finally:
        reader.close()
    return {
        group: {name: values for name, values in columns.items() if name not in TIMINGS}
        for group, columns in found.items()
    }


def difference(
    mine: Outcome,
    reference: Outcome,
    *,
    lost_rows: bool = False,
    lost_bases: bool = False,
    counts_changed: bool = False,
) -> str | None:
    """Return where two runs differ first; None if they do not, in any bit.

    Args:
        mine: of the disturbed run.
        reference: of the other.
        lost_rows: rows may be missing, but there must be no others.
        lost_bases: stabilities may be unknown, for want of bases that they are measured against.
        counts_changed: an evaluation may have been by another number of processes, and its means
            differ by rounding.
    """
    own, other = (
        {name: x for name, x in each.state.items() if not lost_bases or "-stability-" not in name}
        for each in (mine, reference)
    )
    if place := different(own, other):
        return f"checkpoint: {place}"
    if mine.rows.keys() != reference.rows.keys():
        return "metrics.h5: other groups"
    for group, columns in mine.rows.items():
        others = reference.rows[group]
        if lost_rows:
            rows = _rows(columns)
            if not set(rows) <= set(_rows(others)):
                return f"metrics.h5: {group} has rows that the undisturbed run has not"
            if len(set(rows)) < len(rows):
                return f"metrics.h5: {group} has rows twice"
            continue
        for name, values in columns.items():
            if lost_bases and name in _AGAINST_BASES:
                continue
            close = counts_changed and group == "eval" and values.dtype.kind == "f"
            same = (
                values.shape == others[name].shape
                and np.allclose(values, others[name], rtol=1e-6, equal_nan=True)
                if close
                else _bits(values) == _bits(others[name])
            )
            if not same:
                return f"metrics.h5: {group}/{name}"
    return None


def different(mine: Any, theirs: Any, place: str = "") -> str | None:
    """Return where two nested values with tensors differ first, in any bit; None: nowhere."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = mine.keys() - _NOT_COMPARED
        if keys != theirs.keys() - _NOT_COMPARED:
            return f"{place} has other keys: {sorted(map(str, keys ^ theirs.keys()))[:4]}"
        pairs = ((f"{place}/{key}", mine[key], theirs[key]) for key in keys)
    elif isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        if len(mine) != len(theirs):
            return place
        pairs = ((f"{place}/{i}", *both) for i, both in enumerate(zip(mine, theirs, strict=True)))
    elif isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        alike = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        return None if alike and _tensor_bits(mine) == _tensor_bits(theirs) else place
    else:
        both_nan = isinstance(mine, float) and isinstance(theirs, float) and isnan(mine + theirs)
        return None if mine == theirs or both_nan else place
    return next((found for name, a, b in pairs if (found := different(a, b, name))), None)


def _rows(columns: Rows) -> list[bytes]:
    """Return every row as bytes, the columns in the order of their names."""
    length = len(next(iter(columns.values())))
    return [b"|".join(_bits(columns[name][i]) for name in sorted(columns)) for i in range(length)]


def _bits(values: np.ndarray) -> bytes:
    return np.asarray(values).tobytes() + str(np.shape(values)).encode()


def _tensor_bits(values: torch.Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
