"""The store of a search: what became of every evaluation, in HDF5 files that are only appended to.

Every worker of every session has a file of its own, so that nobody waits for anybody, and a search
that is resumed by other workers leaves the old files alone. A row is one element of one dataset: it
is there whole or not at all. Files are in single-writer, multiple-reader mode; after kill -9 they
are read as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from app.errors import StorageError, UserError
from app.recording.copying import keep_aside, readable_prefix
from app.recording.swmr import (
    abandon,
    close,
    create_dataset,
    is_same_file,
    new_file,
    open_swmr,
    patiently,
    reading,
    writing,
)
from app.search.objective import FAILED

SCHEMA_VERSION = 1
STORE = "store"
"""Name of the store's folder in a search's."""
_COLUMNS = {
    "number": "i8",
    "loss": "f8",
    "status": "S16",
    "error": "f8",
    "trainable_percent": "f8",
    "step_seconds": "f8",
    "epochs": "i8",
    "seconds": "f8",
    "started": "S32",
    "seed": "i8",
    "processes": "i8",
    "worker": "i8",
    "island": "i8",
    "folder": "S256",
    "traceback": "S4096",
}
_FILES = "session-*-worker-?????.h5"
_CURVE = {"number": "i8", "epoch": "i8", "value": "f8"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One training of a search and what became of it."""

    number: int
    """From 0; names the folder."""
    parameters: Mapping[str, Any]
    """Values by key of the configuration."""
    loss: float
    """What is minimized; always finite."""
    status: str
    """finished, hopeless (stopped early), diverged, out of memory, timeout or failed."""
    error: float
    """On the validation part; NaN without a result."""
    trainable_percent: float
    step_seconds: float
    """Mean wall time of a step, as in the training's metrics.h5; NaN without a result."""
    epochs: int
    """Epochs that were evaluated."""
    seconds: float
    """Wall time, start and end included."""
    started: str
    """ISO 8601, UTC."""
    seed: int
    processes: int
    worker: int
    island: int
    folder: str
    """Of the run, below the search's."""
    traceback: str
    """Empty where nothing was raised; its end where it is long."""
    curve: tuple[float, ...]
    """Priced error after every epoch, of the weights that would be tested then."""

    @property
    def succeeded(self) -> bool:
        """Whether the training reached its end with a result."""
        return self.status == "finished" and self.loss < FAILED


class Store:
    """The writer's side: one file of one worker of one session."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        """Take over a complete file in SWMR mode, and its path."""
        self._file, self._path = file, path

    @classmethod
    def create(
        cls, folder: Path, *, session: int, worker: int, parameters: Mapping[str, str]
    ) -> Self:
        """Start the file of a worker.

        Args:
            folder: of all files of the search.
            session: number of this start of the search.
            worker: index of the worker.
            parameters: key and numpy dtype of every parameter.

        Raises:
            StorageError: it cannot be written.
        """
        path = folder / f"session-{session:04d}-worker-{worker:05d}.h5"
        nothing = {name: np.empty(0, dtype) for name, dtype in _dtypes(parameters).items()}
        return cls(_create(path, nothing), path)

    def append(self, evaluation: Evaluation) -> None:
        """Write an evaluation, to the disk.

        Its curve comes first: where there is a row, there is all of it.

        Raises:
            StorageError: it cannot be written, and is closed then, or is not there any more.
        """
        if not is_same_file(self._file, self._path):
            raise StorageError(f"run.dir: {self._path} was removed, moved or replaced meanwhile")
        try:
            with writing(self._path):
                curve = self._file["curves"]
                values = enumerate(evaluation.curve, 1)
                rows = [(evaluation.number, i, value) for i, value in values]
                _extend(curve, np.array(rows, curve.dtype))
                _extend(*self._as_row(evaluation))
        except StorageError:
            abandon(self._file)
            raise

    def _as_row(self, evaluation: Evaluation) -> tuple[h5py.Dataset, np.ndarray]:
        dataset = self._file["evaluations"]
        values = {**asdict(evaluation), **evaluation.parameters}
        row = [_as_element(name, values[name], dataset.dtype[name]) for name in dataset.dtype.names]
        return dataset, np.array([tuple(row)], dataset.dtype)

    def close(self) -> None:
        """Close the file; may be called again.

        Raises:
            StorageError: it cannot be written; it is closed all the same.
        """
        if self._file:
            close(self._file, self._path)


def sessions(folder: Path) -> int:
    """Return the number of sessions that have written into a folder."""
    names = {path.name.split("-worker-")[0] for path in folder.glob(_FILES)}
    return len(names)


def seconds_spent(folder: Path) -> float:
    """Return the seconds of all sessions, each from its first evaluation to the end of its last.

    What was under way when a session was stopped or killed does not count.

    Raises:
        UserError: a file is damaged.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for path in folder.glob(_FILES):
        rows, _ = _read(path)
        for row in rows[rows["status"] != b""]:
            start = datetime.fromisoformat(row["started"].decode()).timestamp()
            session = path.name.split("-worker-")[0]
            spans.setdefault(session, []).append((start, start + row["seconds"].item()))
    return sum(max(end for _, end in s) - min(start for start, _ in s) for s in spans.values())


def mend(folder: Path, parameters: Mapping[str, str]) -> list[str]:
    """Set damaged files aside, and write new ones with the evaluations that are left of them.

    What is lost of a search is done again. To be called while nobody else writes.

    Args:
        folder: of all files of the search.
        parameters: key and numpy dtype of every parameter.

    Returns:
        A line for each file that was damaged.

    Raises:
        StorageError: a new file cannot be written.
    """
    lines = []
    for path in sorted(folder.glob(_FILES)):
        try:
            _read(path)
        except UserError as damage:
            rows, curves = _readable(path, parameters)
            with writing(path):
                aside = keep_aside(path)
            _create(path, {"evaluations": rows, "curves": curves}).close()
            lines.append(
                f"WARNING: {damage}; it stays as {aside.name}, and {len(rows)} evaluations of it "
                f"are left: what is lost is done again"
            )
    return lines


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return the evaluations of all files, by number, each once. Workers may be writing meanwhile.

    Raises:
        UserError: a file is damaged.
    """
    return sorted(Additions(folder).read(), key=lambda one: one.number)


class Additions:
    """The evaluations of all files that have come since the last look, each once.

    What was read is neither kept nor read again.
    """

    def __init__(self, folder: Path) -> None:
        """Begin before the first evaluation of a folder."""
        self._folder = folder
        self._seen: dict[Path, tuple[int, int]] = {}
        """Evaluations and rows of curves that were read of each file."""
        self._numbers: set[int] = set()

    def read(self) -> list[Evaluation]:
        """Return what is new, file by file. Workers may be writing meanwhile.

        Raises:
            UserError: a file is damaged.
        """
        found = []
        for path in sorted(self._folder.glob(_FILES)):
            seen, seen_curves = self._seen.get(path, (0, 0))
            rows, curves = _read(path, seen, seen_curves)
            # The file grew, and the row has not reached it yet, or never will.
            while len(rows) and not rows[-1]["status"]:
                rows = rows[:-1]
            # The curve of an evaluation comes before its row, and after the curves of earlier ones.
            used = np.flatnonzero(np.isin(curves["number"], rows["number"]))
            read_curves = int(used[-1]) + 1 if len(used) else 0
            self._seen[path] = seen + len(rows), seen_curves + read_curves
            for row in rows:
                if row["status"] and int(row["number"]) not in self._numbers:
                    self._numbers.add(int(row["number"]))
                    found.append(_as_evaluation(row, curves[curves["number"] == row["number"]]))
        return found


def _read(path: Path, first: int = 0, first_of_curves: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a file from some on, and those of its curves."""
    with open_swmr(path) as file, reading(path):

        def read() -> tuple[np.ndarray, np.ndarray]:
            datasets = file["evaluations"], file["curves"]
            datasets[0].refresh()
            # Rows before their curves: what is written in between is not missed.
            rows = datasets[0][first:]
            datasets[1].refresh()
            return rows, datasets[1][first_of_curves:]

        return patiently(read)


def _dtypes(parameters: Mapping[str, str]) -> dict[str, np.dtype]:
    evaluations = {**_COLUMNS, **parameters}
    return {
        "evaluations": np.dtype(list(evaluations.items())),
        "curves": np.dtype(list(_CURVE.items())),
    }


def _create(path: Path, content: Mapping[str, np.ndarray]) -> h5py.File:
    """Create a file with these datasets, in place of what is there."""
    with writing(path), new_file(path) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        for name, rows in content.items():
            dataset = create_dataset(
                file, name, rows=len(rows), width=(), dtype=rows.dtype, chunk_rows=16
            )
            if len(rows):
                dataset[:] = rows
    return file


def _readable(path: Path, parameters: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return what is left of a damaged file: the first evaluations, and their whole curves."""
    dtypes = _dtypes(parameters)
    try:
        file = open_swmr(path)
    except UserError:
        return np.empty(0, dtypes["evaluations"]), np.empty(0, dtypes["curves"])
    with file:
        rows = readable_prefix(file, "evaluations", dtypes["evaluations"])
        curves = readable_prefix(file, "curves", dtypes["curves"])
    lengths = {number: int((curves["number"] == number).sum()) for number in rows["number"]}
    whole = [lengths[row["number"]] == row["epochs"] for row in rows]
    return rows[whole], curves


def _extend(dataset: h5py.Dataset, rows: np.ndarray) -> None:
    start = len(dataset)
    dataset.resize(start + len(rows), axis=0)
    dataset[start:] = rows
    dataset.flush()


def _as_element(name: str, value: Any, dtype: np.dtype) -> Any:
    if dtype.kind != "S":
        return value
    if name not in _COLUMNS:
        text = json.dumps(value).encode()
        if len(text) > dtype.itemsize:  # cut, nobody could read it
            raise ValueError(
                f"{name}: {value!r} is none of the choices that the store was made for"
            )
        return text
    return value.encode(errors="replace")[-dtype.itemsize :]


def _as_evaluation(row: np.void, curve: np.ndarray) -> Evaluation:
    values: dict[str, Any] = {}
    names = row.dtype.names
    assert names
    for name in names:
        value = row[name].item()
        values[name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    parameters = {name: values.pop(name) for name in names if name not in _COLUMNS}
    for name, value in parameters.items():
        if row.dtype[name].kind == "S":
            try:
                parameters[name] = json.loads(value)
            except ValueError:  # earlier versions cut 1.0 to "1."
                parameters[name] = json.loads(f"{value}0")
    known = {field.name for field in fields(Evaluation)} - {"parameters", "curve"}
    assert values.keys() == known
    return Evaluation(
        parameters=parameters,
        curve=tuple(map(float, np.sort(curve, order="epoch")["value"])),
        **values,
    )
