"""Which runs are the same but for their seed, what others differ in, and their final figures."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.reporting.runs import Run

IGNORED_KEYS = {"run.seed", "run.dir", "run.name"}
"""Keys of the configuration that do not make another configuration."""

BEST: Mapping[str, Callable[[np.ndarray], np.intp]] = {
    "accuracy": np.nanargmax,
    "loss": np.nanargmin,
    "mse": np.nanargmin,
    "mae": np.nanargmin,
}
"""Where the best value of a figure is; of others nobody knows whether they are to rise or fall."""

LONGEST_LABEL = 44  # characters; longer ones do not fit into a legend
ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Runs of one configuration."""

    label: str
    """What tells it from the others, for legends."""
    differing: Mapping[str, str]
    """The keys in which groups differ, with this one's values."""
    runs: Sequence[Run]


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Put runs together whose configurations differ in seed, folder and name alone.

    A group is named by the keys in which it differs from the others, or, where that is too long for
    a legend, by run.name or by the folders of its runs.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        keys = _flatten(run.configuration)
        groups.setdefault(tuple(sorted(keys.items())), []).append(run)
    configurations = [dict(key) for key in groups]
    differing = [
        key
        for key in dict.fromkeys(key for keys in configurations for key in keys)
        if len({keys.get(key, ABSENT) for keys in configurations}) > 1
    ]
    parts = [{key: keys.get(key, ABSENT) for key in differing} for keys in configurations]
    labels = [", ".join(f"{key}={value}" for key, value in part.items()) for part in parts]
    if len(groups) == 1:
        labels = [str(runs[0].configuration.get("run", {}).get("name", runs[0].name))]
    elif max(map(len, labels)) > LONGEST_LABEL:
        labels = _names(list(groups.values()))
    return [
        RunGroup(label=label, differing=part, runs=members)
        for label, part, members in zip(labels, parts, groups.values(), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class FinalFigures:
    """A table: one row for the finished runs of a group, and one for the others."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[str]]]
    """Label, which runs, and one cell per column: mean ± sample deviation."""


def final_figures(groups: Sequence[RunGroup]) -> FinalFigures:
    """Compare what the runs ended with, or have reached so far."""
    parts = [
        (group, [run for run in group.runs if run.is_finished == finished], finished)
        for group in groups
        for finished in (True, False)
    ]
    parts = [part for part in parts if part[1]]
    figures = [[_figures(run) for run in members] for _, members, _ in parts]
    columns = list(dict.fromkeys(key for part in figures for run in part for key in run))
    rows = []
    for (group, members, finished), values in zip(parts, figures, strict=True):
        count = f"{len(members)} run" + "s" * (len(members) > 1)
        which = f"{count}, finished" if finished else f"{count}, {members[0].state()}"
        if not finished and len(members) > 1:
            which = f"{count}, not finished"
        cells = [_cell([run[key] for run in values if key in run], key) for key in columns]
        rows.append((group.label, which, cells))
    return FinalFigures(columns=columns, rows=rows)


def merits(run: Run) -> list[str]:
    """Return the figures of merit of a run's evaluations, such as accuracy."""
    return [key for key in run.evaluation if key not in {"step", "epoch", "split", "loss"}]


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return short names of groups, no two of them alike."""
    for name in (_common_name, _common_folder):
        names = [_shortened(name(runs)) for runs in groups]
        if all(names) and len(set(names)) == len(names):
            return names
    return [f"configuration {number}" for number in range(1, len(groups) + 1)]


def _common_name(runs: Sequence[Run]) -> str:
    """Return the run.name of all runs; nothing where they have several."""
    names = {str(run.configuration.get("run", {}).get("name", "")) for run in runs}
    return names.pop() if len(names) == 1 else ""


def _common_folder(runs: Sequence[Run]) -> str:
    """Return the name of the runs' folders, of run-0 and run-1 "run"; nothing without one."""
    names = {run.name for run in runs}
    if len(names) > 1:
        names = {re.sub(r"[-_. ]*\d+$", "", name) for name in names}
    return names.pop() if len(names) == 1 else ""


def _shortened(name: str) -> str:
    """Leave out the middle of a name that is too long for a legend."""
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[: half - 1]}…{name[-half:]}"


def _figures(run: Run) -> dict[str, float]:
    """The numbers of one run, by the heading of their column."""
    found: dict[str, float] = {}
    summary = run.summary or {}
    for key, value in summary.items():
        if key.startswith("test_"):
            found[key.replace("_", " ")] = value
    validation = run.evaluation["split"] == "validation"
    for key in merits(run) or ["loss"]:
        values = run.evaluation[key][validation]
        if key in BEST and np.isfinite(values).any():
            place = BEST[key](values)
            found[f"best validation {key}"] = float(values[place])
            found[f"epoch of the best validation {key}"] = float(
                run.evaluation["epoch"][validation][place]
            )
        if len(values):
            found[f"last validation {key}"] = float(values[-1])
    for key in ("trainable_percent", "compression_percent"):
        if key in summary:  # of the weights that were tested, which may be those of an earlier step
            found[key.replace("_percent", ", %")] = summary[key]
        elif len(run.events["step"]):
            found[key.replace("_percent", ", %")] = float(run.events[key][-1])
        elif len(run.train["step"]):
            found[key.replace("_percent", ", %")] = 100.0
    mean = run.series("stability").mean()
    if len(mean):
        found["last mean stability"] = float(mean[-1])
    for key in ("epochs", "steps", "seconds"):
        if key in summary:
            found[key] = summary[key]
    if not summary and len(run.train["step"]):
        found["epochs"] = float(run.evaluation["epoch"].max(initial=0))
        found["steps"] = float(run.train["step"][-1])
    return found


def _cell(values: Sequence[float], column: str) -> str:
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "-"
    whole = column in {"epochs", "steps"} or column.startswith("epoch of ")
    digits = 0 if whole else 1 if column.endswith(("%", "seconds")) else 4
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1 or (digits == 0 and np.ptp(values) == 0):
        return text
    return f"{text} ± {statistics.stdev(values):.{digits}f}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}.")
        elif name not in IGNORED_KEYS:
            flat[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return flat
