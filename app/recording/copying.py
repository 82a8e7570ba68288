"""What a new metrics.h5 takes over from an earlier one: the rows asked for, or what is left."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np

from app.errors import UserError
from app.recording.swmr import READ_ERRORS, create_dataset, open_swmr, reading

Rows = Mapping[str, np.ndarray]
"""The columns of a group, all of the same length."""


def copy(old: h5py.File, new: h5py.File, counts: Mapping[str, int], path: Path) -> None:
    """Copy the schema and the first rows of each group.

    Args:
        old: open for reading; nobody writes into it.
        new: empty.
        counts: rows of each group; a group that is not named gets none.
        path: of the old file, for errors.

    Raises:
        UnreadableFileError: the old file is damaged.
        UserError: it has fewer rows.
    """
    nodes: list[tuple[str, h5py.Group | h5py.Dataset]] = []
    with reading(path):
        old.visititems(lambda name, node: nodes.append((name, node)))
        new.attrs.update(old.attrs)
    _check_counts(nodes, counts, path)
    for name, node in nodes:
        with reading(path):
            attributes = dict(node.attrs)
        if isinstance(node, h5py.Dataset):
            count = counts.get(name.rpartition("/")[0], 0)
            with reading(path):
                values = node[:count]
            made = create_dataset(
                new,
                name,
                rows=count,
                width=node.shape[1:],
                dtype=node.dtype,
                chunk_rows=node.chunks[0],
            )
            made[:] = values
        else:
            made = new.create_group(name)
        made.attrs.update(attributes)


def readable_rows(
    path: Path, counts: Mapping[str, int], columns: Callable[[str], Mapping[str, np.dtype]]
) -> dict[str, Rows]:
    """Read what can be read of a damaged file: the first rows of each group, up to the damage.

    Args:
        path: of the file; nobody writes into it.
        counts: rows that each group had.
        columns: gives the columns that a group should have, with the type of their elements;
            raises KeyError where there is no such group.

    Returns:
        The rows of the groups that have any left.
    """
    found: dict[str, Rows] = {}
    try:
        file = open_swmr(path)
    except UserError:
        return found
    with file:
        for group, count in counts.items():
            try:
                wanted = columns(group)
            except KeyError:
                continue
            parts = {
                name: readable_prefix(file, f"{group}/{name}", dtype)[:count]
                for name, dtype in wanted.items()
            }
            length = min(len(values) for values in parts.values())
            if length:
                found[group] = {name: values[:length] for name, values in parts.items()}
    return found


def readable_prefix(file: h5py.File, name: str, dtype: np.dtype) -> np.ndarray:
    """Return the rows of a dataset before the first chunk that cannot be read.

    Args:
        file: damaged.
        name: of the dataset.
        dtype: that it should have; one that has another has no rows.
    """
    parts: list[np.ndarray] = []
    nothing = np.empty(0, dtype)
    try:
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype != dtype:
            return nothing
        step = dataset.chunks[0]
        for start in range(0, len(dataset), step):
            parts.append(dataset[start : start + step])
    except READ_ERRORS:
        pass
    return np.concatenate(parts) if parts else nothing


def keep_aside(path: Path) -> Path:
    """Give a file a second name, under which it stays when the first is taken over; return it."""
    aside, number = path.with_name(f"{path.stem}-damaged{path.suffix}"), 1
    while aside.exists():
        aside = path.with_name(f"{path.stem}-damaged-{number}{path.suffix}")
        number += 1
    try:
        os.link(path, aside)
    except OSError:  # a file system without links
        shutil.copy2(path, aside)
    return aside


def _check_counts(
    nodes: list[tuple[str, h5py.Group | h5py.Dataset]], counts: Mapping[str, int], path: Path
) -> None:
    available: dict[str, int] = {}
    for name, node in nodes:
        if isinstance(node, h5py.Dataset):
            group = name.rpartition("/")[0]
            with reading(path):
                available[group] = min(len(node), available.get(group, len(node)))
    for group, count in counts.items():
        if count > available.get(group, 0):
            raise UserError(
                f"{path}: {group} has {available.get(group, 0)} rows, but the checkpoint knows of "
                f"{count}; resume from the run's own folder"
            )
