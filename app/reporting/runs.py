"""What metrics.h5 and summary.json say of a run, as arrays."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from app.config import parse
from app.errors import UserError
from app.recording.store import Follower, StoredLayer

METRICS = "metrics.h5"
"""Name of a run's own file; others are kept beside it, such as metrics-before-1.h5."""

Rows = dict[str, np.ndarray]
"""The columns of a group, all of the same length."""


@dataclass(frozen=True, kw_only=True)
class TimeAxis:
    """The axis on which the steps of a run are drawn."""

    label: str
    steps_per_unit: float

    def __call__(self, steps: ArrayLike) -> np.ndarray:
        """Turn steps into places on the axis, in float64."""
        return np.asarray(steps, float) / self.steps_per_unit


@dataclass(frozen=True, kw_only=True)
class LayerSeries:
    """One figure of all layers over time."""

    layers: Sequence[StoredLayer]
    """The L layers that it was measured for, in the order of the network."""
    steps: np.ndarray
    """(T,) ascending."""
    values: np.ndarray
    """(L, T) in float64; NaN where there is nothing."""

    def averaged(self) -> np.ndarray:
        """Return the rows of the layers that means take in."""
        return self.values[[layer.averaged for layer in self.layers]]

    def mean(self) -> np.ndarray:
        """Return the mean over the layers (T,), as far as they have a value; NaN if none has."""
        values = self.averaged()
        count = np.isfinite(values).sum(0)
        total = np.where(np.isfinite(values), values, 0.0).sum(0)
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything of a run but its spectra, which may be large: see :func:`read_spectra`."""

    path: Path
    """Its folder, or a file that is not called metrics.h5, such as metrics-before-1.h5."""
    metrics: Path
    """The file that was read."""
    name: str
    configuration: dict[str, Any]
    """Sections of the resolved configuration; of an analysis, the section analysis alone."""
    yaml: str
    """The same as text."""
    summary: dict[str, Any] | None
    """The final figures; None: not finished."""
    sessions: Rows
    train: Rows
    evaluation: Rows
    events: Rows
    """Of /lowrank."""
    measurements: Rows
    """Of /stability; empty where the program did not write it."""
    layers: Sequence[StoredLayer]
    stability: Sequence[Rows]
    """Of each layer."""
    rank: Sequence[Rows]
    """Of each layer."""
    by_steps: bool = False
    """Drawn by steps, also where epochs are known."""

    @cached_property
    def axis(self) -> TimeAxis:
        """Epochs where an evaluation tells how many steps they have and they are wanted, or steps.

        An analysis says itself what it counts.
        """
        if analysis := self.configuration.get("analysis"):
            return TimeAxis(label=str(analysis["position"]), steps_per_unit=1)
        finished = self.evaluation["epoch"] > 0
        if self.by_steps or not finished.any():
            return TimeAxis(label="optimizer step", steps_per_unit=1)
        steps = self.evaluation["step"][finished] / self.evaluation["epoch"][finished]
        return TimeAxis(label="epoch", steps_per_unit=float(steps[0]))

    @property
    def report_folder(self) -> Path:
        """Where its report lies: that of a file of another name takes nobody's place."""
        own = self.metrics.name == METRICS
        return self.metrics.parent / ("report" if own else f"report-{self.metrics.stem}")

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end; an analysis always has."""
        return self.summary is not None or "analysis" in self.configuration

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded yet that could be drawn."""
        return not len(self.train["step"]) and not any(len(rows["step"]) for rows in self.stability)

    def state(self) -> str:
        """Say how far the run has come."""
        if self.is_finished:
            return "finished"
        epochs = self.configuration.get("training", {}).get("epochs", "?")
        if not len(self.train["step"]):
            return "not finished: no step yet"
        return (
            f"not finished: in epoch {self.train['epoch'][-1]} of {epochs}, "
            f"step {self.train['step'][-1]}"
        )

    def span(self) -> tuple[float, float]:
        """Return the first and the last place on the axis at which a layer was measured."""
        ends = [
            rows["step"][place]
            for rows in (*self.stability, *self.rank)
            if len(rows["step"])
            for place in (0, -1)
        ]
        return (float(self.axis(min(ends))), float(self.axis(max(ends)))) if ends else (0.0, 0.0)

    def seconds_at(self, steps: np.ndarray) -> np.ndarray:
        """Return how long steps, events and measurements had taken, up to some steps, (T,)."""
        taken = [(self.train["step"], self.train["step_seconds"])]
        taken += [
            (rows["step"], rows["seconds"])
            for rows in (self.events, self.measurements)
            if {"step", "seconds"} <= rows.keys()
        ]
        total = np.zeros(len(steps))
        for when, seconds in taken:
            sums = np.concatenate([[0.0], np.cumsum(seconds)])
            total += sums[np.searchsorted(when, steps, side="right")]
        return total

    def conversions(self) -> np.ndarray:
        """Return the places on the axis at which layers turned low-rank or were released."""
        here = np.isin(self.events["event"], ["convert", "release"])
        return self.axis(self.events["step"][here])

    def columns(self) -> list[str]:
        """Return the names of what was measured of each layer, beside epoch and step."""
        found = dict.fromkeys(column for rows in self.stability for column in rows)
        return [column for column in found if column not in {"epoch", "step"}]

    def series(self, column: str) -> LayerSeries:
        """Return a column of /layers/NAME/stability, of all layers that have finite values in it.

        They reach from the first to the last finite value. Between them steps without any stay, and
        where measurements are missing some are put in: a gap is drawn as one.
        """
        tracks = [
            (layer, rows["step"], rows[column].astype(float))
            for layer, rows in zip(self.layers, self.stability, strict=True)
            if column in rows and np.isfinite(rows[column]).any()
        ]
        return _join(tracks)

    @cached_property
    def full_ranks(self) -> dict[str, float]:
        """Of each layer by name the rank that it can have; of older files the largest recorded."""
        return {
            layer.name: layer.full_rank
            or float(max(rows["rank"].max(initial=1) for rows in (stability, rank)))
            for layer, stability, rank in zip(self.layers, self.stability, self.rank, strict=True)
        }

    @property
    def full_rank_text(self) -> str:
        """What ranks are in percent of."""
        if any(layer.full_rank is None for layer in self.layers):
            return "the largest rank recorded, since this older file does not tell the full rank"
        return "the full rank"

    def relative_ranks(self) -> LayerSeries:
        """Return each layer's rank over the full rank, at every event and measurement."""
        tracks = []
        for layer, stability, rank in zip(self.layers, self.stability, self.rank, strict=True):
            steps = np.concatenate([stability["step"], rank["step"]])
            ranks = np.concatenate([stability["rank"], rank["rank"]]).astype(float)
            if len(steps):
                order = np.argsort(steps, kind="stable")
                tracks.append((layer, steps[order], ranks[order] / self.full_ranks[layer.name]))
        return _join(tracks, carry=True)


def read_run(path: Path | str) -> Run:
    """Read a run that goes on, was stopped, or has ended.

    Args:
        path: its folder, or the metrics.h5 in it; or a file of another name, to which the summary
            in its folder does not belong.

    Raises:
        UserError: no metrics there, or no metrics of a run.
    """
    path = Path(path)
    metrics = path if path.is_file() else path / METRICS
    folder, is_own = metrics.parent, metrics.name == METRICS
    if not metrics.exists() and (folder / "search.yaml").exists():
        raise UserError(f"{folder}: a search is reported alone: python -m app.report {folder}")
    reader = Follower(metrics)
    try:
        layers = reader.layers()
        yaml = reader.configuration()
        return Run(
            path=folder if is_own else metrics,
            metrics=metrics,
            name=folder.resolve().name + ("" if is_own else f"-{metrics.stem}"),
            configuration=parse(yaml, source=f"{metrics}: config"),
            yaml=yaml,
            # One that is trained on for more epochs has that of the epochs before.
            summary=None
            if not is_own or (folder / "unfinished.json").exists()
            else _read_summary(folder / "summary.json"),
            sessions=reader.rows("sessions"),
            train=reader.rows("train"),
            evaluation=reader.rows("eval"),
            events=reader.rows("lowrank"),
            measurements=reader.rows("stability") if "stability" in reader else {},
            layers=layers,
            stability=[reader.rows(f"layers/{layer.name}/stability") for layer in layers],
            rank=[reader.rows(f"layers/{layer.name}/rank") for layer in layers],
        )
    finally:
        reader.close()


def read_spectra(run: Run, names: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read the singular values of some layers.

    Returns:
        For each layer the steps (T,), ascending and each once, and the values (T, k), descending
        and padded with NaN.
    """
    spectra = []
    reader = Follower(run.metrics)
    try:
        for name in names:
            rows = reader.rows(f"layers/{name}/spectrum")
            # The last of the rows of a step: after an event comes the epoch's measurement.
            steps, last = np.unique(rows["step"][::-1], return_index=True)
            spectra.append((steps, rows["singular_values"][::-1][last]))
    finally:
        reader.close()
    return spectra


def percentiles(values: np.ndarray, wanted: Sequence[float]) -> np.ndarray:
    """Return percentiles of values (L, T) over the layers, (len(wanted), T); NaN without any."""
    found = np.full((len(wanted), values.shape[1]), np.nan)
    measured = np.isfinite(values).any(0)
    if measured.any():
        found[:, measured] = np.nanpercentile(values[:, measured], wanted, axis=0)
    return found


def check_patterns(runs: Sequence[Run], patterns: Sequence[str]) -> None:
    """Reject a pattern that matches no layer with a spectrum, in any run: it is misspelt.

    Raises:
        UserError: there is one.
    """
    names = [name for run in runs for name in _measured_layers(run)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"--layers: {pattern!r} matches no measured layer "
                f"(such as {names[0] if names else 'none'})"
            )


def choose_layers(run: Run, patterns: Sequence[str], *, count: int) -> list[str]:
    """Choose the layers whose spectra are drawn, in the order of the network.

    Args:
        run: the run.
        patterns: shell-style, of layer names. None given: some at even distances, of those that
            means take in, if there are any: a token has a single singular value.
        count: how many at most.
    """
    names = _measured_layers(run)
    if patterns:
        names = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
    else:
        averaged = {layer.name for layer in run.layers if layer.averaged}
        names = [name for name in names if name in averaged] or names
    if len(names) <= count:
        return names
    places = np.linspace(0, len(names) - 1, count).round().astype(int)
    return [names[place] for place in places]


def _measured_layers(run: Run) -> list[str]:
    return [
        layer.name
        for layer, stability, rank in zip(run.layers, run.stability, run.rank, strict=True)
        if len(stability["step"]) or len(rank["step"])
    ]


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); remove it") from None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: not the summary of a run; remove it")
    return summary


def _join(
    tracks: Sequence[tuple[StoredLayer, np.ndarray, np.ndarray]], *, carry: bool = False
) -> LayerSeries:
    """Bring the layers' values onto common steps.

    Args:
        tracks: layer, steps and values.
        carry: a value holds until the layer's next one.
    """
    seen = [steps[np.isfinite(values)] for _, steps, values in tracks]
    common = np.unique(np.concatenate(seen)) if seen else np.empty(0)
    if len(common) and not carry:
        measured = np.unique(np.concatenate([steps for _, steps, _ in tracks]))
        within = (measured >= common[0]) & (measured <= common[-1])
        common = np.unique(np.concatenate([measured[within], _in_gaps(measured[within])]))
    table = np.full((len(tracks), len(common)), np.nan)
    for row, (_, steps, values) in zip(table, tracks, strict=True):
        if carry:
            last = np.searchsorted(steps, common, side="right") - 1
            row[last >= 0] = values[last[last >= 0]]
        else:
            finite = np.isfinite(values)
            row[np.searchsorted(common, steps[finite])] = values[finite]
    return LayerSeries(layers=[layer for layer, *_ in tracks], steps=common, values=table)


def _in_gaps(steps: np.ndarray) -> np.ndarray:
    """Return the steps at which measurements are missing, where most are at one distance.

    Of a long gap these are its first and its last one.
    """
    if len(steps) < 3:
        return steps[:0]
    distances = np.diff(steps)
    found, counts = np.unique(distances, return_counts=True)
    usual = found[counts.argmax()]
    if 2 * counts.max() < len(distances):
        return steps[:0]
    long = distances > 1.5 * usual
    before, after = steps[:-1][long], steps[1:][long]
    middle = (before + after) // 2
    ends = [np.minimum(before + usual, middle), np.maximum(after - usual, middle)]
    return np.concatenate(ends)
