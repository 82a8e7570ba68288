"""The datasets of a group, one for each column: created, filled, and their values made to fit."""

from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from app.recording.schema import Column
from app.recording.swmr import create_dataset

_CHUNK_BYTES = 2048
"""Small, since most groups get few rows and there may be a thousand of them."""


def create_group(
    file: h5py.File, name: str, columns: Sequence[Column], rows: Mapping[str, np.ndarray] | None
) -> None:
    """Create a group with its columns, and rows to begin with (of each column one array)."""
    group = file.create_group(name)
    for column in columns:
        dtype = np.dtype(column.dtype)
        values = rows[column.name] if rows else ()
        dataset = create_dataset(
            group,
            column.name,
            rows=len(values),
            width=(column.width,) if column.width else (),
            dtype=dtype,
            chunk_rows=max(1, _CHUNK_BYTES // (dtype.itemsize * max(1, column.width))),
        )
        if len(values):
            dataset[:] = values
        dataset.attrs["unit"] = np.bytes_(column.unit)
        dataset.attrs["description"] = np.bytes_(column.description)


def as_array(values: list[Any], dataset: h5py.Dataset) -> np.ndarray:
    """Bring the values of a column into its dtype and width."""
    if dataset.dtype.kind == "S":
        return np.array([_cut(value, dataset.dtype.itemsize) for value in values], dataset.dtype)
    if dataset.ndim == 1:
        # Not 1.7 as the integer 1.
        return np.array(values).astype(dataset.dtype, casting="same_kind")
    rows = np.full((len(values), dataset.shape[1]), np.nan, dataset.dtype)
    for row, value in zip(rows, values, strict=True):
        row[: len(value)] = value
    return rows


def append(dataset: h5py.Dataset, values: np.ndarray, start: int) -> None:
    """Write rows from index ``start`` on, the end of the dataset.

    By h5py's low-level interface, in a third of the time: a measurement of 20 layers writes into
    200 datasets.
    """
    node = dataset.id
    node.set_extent((start + len(values), *values.shape[1:]))
    space = node.get_space()
    space.select_hyperslab((start, *(0 for _ in values.shape[1:])), values.shape)
    node.write(h5py.h5s.create_simple(values.shape), space, values)
    node.flush()


def _cut(text: str, size: int) -> bytes:
    """Encode text in at most ``size`` bytes of UTF-8, with dots where something is missing."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= size:
        return encoded
    return encoded[: size - 3].decode(errors="ignore").encode() + b"..."
