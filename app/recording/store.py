"""metrics.h5: everything that a run measures, in one HDF5 file that can be read while it grows.

The file is written by one process in HDF5's single-writer, multiple-reader mode (SWMR). A reader
that is there already never sees objects made after that mode was switched on, so the whole schema
exists from the start. Readers use ``swmr=True``, also for the file of a process that was killed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from app.errors import StorageError, UserError
from app.recording.columns import append, as_array, create_group
from app.recording.copying import Rows, copy
from app.recording.schema import SCHEMA_VERSION, full_rank_of, layer_groups, run_groups
from app.recording.swmr import (
    abandon,
    close,
    is_same_file,
    new_file,
    open_swmr,
    patiently,
    reading,
    sync,
    writing,
)


class LostFileError(StorageError):
    """The file that is being written is not where it was any more; it can still be read."""


class MetricsStore:
    """The writer's side. Rows are kept in memory until :meth:`flush`."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        """Take over a complete file that is open for writing, in SWMR mode, and its path."""
        self._file, self._path = file, path
        self._groups: dict[str, dict[str, h5py.Dataset]] = {}
        file.visititems(self._register)
        self._rows = {group: _length(columns) for group, columns in self._groups.items()}
        self._buffer: dict[str, list[dict[str, Any]]] = {}

    def _register(self, name: str, node: h5py.Group | h5py.Dataset) -> None:
        if isinstance(node, h5py.Dataset):
            group, _, column = name.rpartition("/")
            self._groups.setdefault(group, {})[column] = node

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        configuration: str,
        layers: Mapping[str, tuple[int, ...]],
        figures: Sequence[str] = ("accuracy",),
        not_averaged: Collection[str] = (),
        full_ranks: Mapping[str, int] | None = None,
        groups: Mapping[str, int] | None = None,
        rows: Mapping[str, Rows] | None = None,
    ) -> Self:
        """Start a new file.

        Args:
            path: an existing file is replaced.
            configuration: the resolved configuration as YAML.
            layers: dense parameter name and shape of each layer, in the order of the network.
            figures: figures of merit of an evaluation, beside the loss.
            not_averaged: layers that means over the layers leave out.
            full_ranks: numbers of singular values, of layers that are not read by the rule.
            groups: numbers of matrices, of layers that are read as a stack of several.
            rows: with which groups begin.
        """
        path = Path(path)
        rows, full_ranks, groups = rows or {}, full_ranks or {}, groups or {}
        with new_file(path) as file:
            file.attrs["schema_version"] = SCHEMA_VERSION
            # Of fixed length: SWMR excludes variable-length strings.
            file.attrs["config"] = np.bytes_(configuration.encode())
            for name, columns in run_groups(figures).items():
                create_group(file, name, columns, rows.get(name))
            file.create_group("layers")
            for index, (layer, shape) in enumerate(layers.items()):
                attributes = file.create_group(f"layers/{layer}").attrs
                attributes["shape"] = shape
                attributes["index"] = index  # HDF5 lists groups by name
                attributes["averaged"] = layer not in not_averaged
                full_rank = full_ranks.get(layer)
                attributes["full_rank"] = full_rank or full_rank_of(shape, groups.get(layer, 1))
                for name, columns in layer_groups(shape, full_rank).items():
                    path_in_file = f"layers/{layer}/{name}"
                    create_group(file, path_in_file, columns, rows.get(path_in_file))
        return cls(file, path)

    @classmethod
    def resume(
        cls, path: Path | str, *, counts: Mapping[str, int], configuration: str | None = None
    ) -> Self:
        """Go on after a number of rows of each group.

        The rows are copied into a new file, which then takes the old one's place atomically: a
        reader may still hold the old one, or its writer may have been killed.

        Args:
            path: the file.
            counts: rows to keep of each group; a group that is not named keeps none.
            configuration: that it goes on with, as YAML; None: that of the file.

        Raises:
            UnreadableFileError: the file is damaged.
            UserError: it is another one, or has fewer rows.
        """
        path = Path(path)
        with open_for_reading(path) as old, new_file(path) as new:
            copy(old, new, counts, path)
            if configuration is not None:
                new.attrs["config"] = np.bytes_(configuration.encode())
        return cls(new, path)

    def append(self, group: str, **values: Any) -> None:
        """Add a row.

        Args:
            group: "train", "layers/NAME/rank" and so on.
            values: one for each of the group's columns, and no other. Longer text is cut; a
                spectrum may be shorter than its row.
        """
        assert values.keys() == self._groups[group].keys(), (group, sorted(values))
        self._buffer.setdefault(group, []).append(values)

    def length(self, group: str) -> int:
        """Return the number of a group's rows, those in memory included."""
        return self._rows[group] + len(self._buffer.get(group, ()))

    def flush(self) -> None:
        """Write all rows, so that readers see them.

        Raises:
            LostFileError: the path leads to no file any more, or to another one.
            StorageError: the disk is full, or failed. Rows that are not written are kept.
        """
        if not is_same_file(self._file, self._path):
            raise LostFileError(f"run.dir: {self._path} was removed, moved or replaced meanwhile")
        with writing(self._path):
            for group, rows in list(self._buffer.items()):
                start = self._rows[group]
                end = start + len(rows)
                for name, dataset in self._groups[group].items():
                    append(dataset, as_array([row[name] for row in rows], dataset), start)
                self._rows[group] = end
                del self._buffer[group]  # the next group may fail, and another flush come

    def counts(self) -> dict[str, int]:
        """Return the rows of each group, after they have reached the disk.

        So a checkpoint that holds these numbers finds its rows after a failure of the machine too.

        Raises:
            StorageError: as :meth:`flush`.
        """
        self.flush()
        with writing(self._path):
            sync(self._file)
        return dict(self._rows)

    def move_to(self, path: Path) -> Self:
        """Close this file, whose path is lost, and go on with a copy and what is unwritten.

        Raises:
            StorageError: the copy cannot be written.
        """
        with writing(path), new_file(path) as new:
            copy(self._file, new, self._rows, self._path)
        moved = type(self)(new, path)
        moved._buffer = self._buffer
        self._file.close()
        moved.flush()
        return moved

    def rows(self, group: str) -> dict[str, np.ndarray]:
        """Return all rows of a group that are in the file, by column; text as bytes.

        Raises:
            StorageError: the disk failed.
        """
        with writing(self._path):
            return {name: dataset[:] for name, dataset in self._groups[group].items()}

    def close(self) -> None:
        """Write all rows and close the file; may be called again.

        Raises:
            StorageError: as :meth:`flush`; the file is closed all the same.
        """
        if not self._file:
            return
        try:
            self.flush()
        except StorageError:
            abandon(self._file)
            raise
        close(self._file, self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_for_reading(path: Path | str) -> h5py.File:
    """Open the file of a run that goes on, has ended or was killed.

    Raises:
        UnreadableFileError: it is damaged.
        UserError: there is no such file, or it is no metrics.h5.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; a run's metrics are in its folder, in metrics.h5")
    file = open_swmr(path)
    with reading(path):
        version = file.attrs.get("schema_version")
    if not np.array_equal(version, SCHEMA_VERSION):
        file.close()
        raise UserError(
            f"{path}: an HDF5 file, but not the metrics of a run "
            f"(schema_version is {version}, not {SCHEMA_VERSION})"
        )
    return file


def read_rows(path: Path | str, group: str) -> dict[str, np.ndarray]:
    """Return all rows of a group, by column; text as str.

    While a run is writing, the columns may differ in length for a moment: the shortest counts.

    Raises:
        UserError: no such file, or no such group in it, or one without columns, or it is damaged.
    """
    with open_for_reading(path) as file, reading(Path(path)):
        if not _exists(file, group):
            raise UserError(f"{path}: no group {group}")
        return _read(file[group], 0)


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """What the file says of a layer, beside its rows."""

    name: str
    """Dense parameter name."""
    shape: tuple[int, ...]
    """Of the dense weight."""
    averaged: bool
    """Whether means over the layers take it in."""
    full_rank: int | None
    """Rank that it can have at most; None: an older file, which does not tell."""


class Follower:
    """Reads the rows of a run as they come, also when a resumed run has replaced the file.

    A row has the same index before and after a resume: who asks from the number of rows that it
    has gets none twice.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the file.

        Raises:
            UserError: there is no such file, or it is no metrics.h5.
        """
        self._path = Path(path)
        self._file = open_for_reading(self._path)

    def configuration(self) -> str:
        """Return the resolved configuration as YAML."""
        with reading(self._path):
            return bytes(self._file.attrs["config"]).decode()

    def layers(self) -> list[StoredLayer]:
        """Return all layers, in the order of the network."""
        with reading(self._path):
            nodes = self._file["layers"]
            found = [
                StoredLayer(
                    name=name,
                    shape=tuple(int(size) for size in nodes[name].attrs["shape"]),
                    averaged=bool(nodes[name].attrs.get("averaged", True)),
                    full_rank=int(nodes[name].attrs.get("full_rank", 0)) or None,
                )
                for name in _layer_names(nodes)
            ]
            return sorted(found, key=lambda layer: int(nodes[layer.name].attrs.get("index", 0)))

    def __contains__(self, group: str) -> bool:
        """Whether there is such a group: not every program writes all of them."""
        with reading(self._path):
            return _exists(self._file, group)

    def rows(self, group: str, start: int = 0) -> dict[str, np.ndarray]:
        """Return the rows of a group from index ``start`` on, as :func:`read_rows` does.

        Raises:
            UserError: the file is gone or damaged, or something else has taken its place.
        """
        if not self._is_current():
            new = open_for_reading(self._path)
            self._file.close()
            self._file = new
        with reading(self._path):
            return _read(self._file[group], start)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _is_current(self) -> bool:
        return is_same_file(self._file, self._path)


def _exists(node: h5py.Group, name: str) -> bool:
    """Whether there is a group; h5py's ``in`` says no of one that is damaged, too."""
    for part in name.split("/"):
        if not isinstance(node, h5py.Group) or not node.id.links.exists(part.encode()):
            return False
        node = node[part]
    return isinstance(node, h5py.Group)


def _layer_names(node: h5py.Group, prefix: str = "") -> Iterator[str]:
    """List the layers below a group; a name with a slash lies in groups within groups."""
    for key in node:  # items() would pass over what is damaged
        child = node[key]
        if "shape" in child.attrs:
            yield f"{prefix}{key}"
        else:
            yield from _layer_names(child, f"{prefix}{key}/")


def _read(group: h5py.Group, start: int) -> dict[str, np.ndarray]:
    def read() -> dict[str, np.ndarray]:
        nodes = {name: group[name] for name in group}  # items() would pass over what is damaged
        columns = {name: node for name, node in nodes.items() if isinstance(node, h5py.Dataset)}
        if not columns:
            raise _without_columns(group, list(nodes))
        for dataset in columns.values():
            dataset.refresh()
        end = _length(columns)
        return {name: dataset[min(start, end) : end] for name, dataset in columns.items()}

    return {
        name: np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
        for name, values in patiently(read).items()
    }


def _without_columns(group: h5py.Group, below: Sequence[str]) -> UserError:
    """Return the error of who asks for rows of what holds groups alone, such as a layer."""
    path, name = group.file.filename, group.name.strip("/")
    some = ", ".join(f"{name}/{part}" for part in below[:3])
    more = ", ..." if len(below) > 3 else ""
    cure = f"; read one of {some}{more}" if below else ""
    return UserError(f"{path}: {name} has no columns of its own{cure}")


def _length(columns: Mapping[str, h5py.Dataset]) -> int:
    return min(len(dataset) for dataset in columns.values())
