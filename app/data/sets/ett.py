"""The electricity transformer temperature series ETTh1, ETTh2 (hourly), ETTm1, ETTm2 (15 minutes).

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
AAAI 2021, section 5.1. The official layout below data.root: ETT-small/ETTh1.csv and so on.
"""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.data.data_set import LoadedSet
from app.errors import UserError

if TYPE_CHECKING:
    from app.config.settings import DataSection

VARIABLES = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
STEP_MINUTES = {"etth1": 60, "etth2": 60, "ettm1": 15, "ettm2": 15}
LARGEST_VALUE = math.sqrt(np.finfo(np.float32).max)
"""Beyond this a squared error is infinite in float32."""
LARGEST_DEVIATION = 1e6
"""Of a cell from the others of its column, in their median deviation."""
SPLIT_MONTHS = {"train": 12, "validation": 4, "test": 4}
"""Of 30 days each, one after the other; what comes later is not used."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A series, and which steps of it belong to which part."""

    stored: np.ndarray
    """(steps, variables) float64, in the units of the file."""
    mean: np.ndarray
    """(variables,) float64, of the training part, in the units of the file; so is ``deviation``."""
    deviation: np.ndarray
    calendar: np.ndarray
    """(steps, features) float32 in [-0.5, 0.5]; see :func:`calendar_features`."""
    parts: dict[str, slice]
    """Steps of train, validation and test; the last two begin with the input of their first
    forecast, so that the steps to be forecast are exactly those of the published split."""


def series_path(data: "DataSection") -> Path:
    """Return the path of the file of ``data.name``."""
    return Path(data.root, "ETT-small", f"ETT{data.name.removeprefix('ett')}.csv")


def load(data: "DataSection") -> Series:
    """Read a series, split it, and find mean and deviation of its training part.

    Raises:
        UserError: the file is missing or not what it should be, or a part is too short for
            ``data.input_length`` and ``data.horizon``.
    """
    minutes = STEP_MINUTES[data.name]
    parts = split(minutes, data.input_length)
    for name, part in parts.items():
        steps = part.stop - part.start
        if data.input_length + data.horizon > steps or part.start < 0:
            raise UserError(
                f"data.horizon: {data.input_length} known steps (data.input_length) and "
                f"{data.horizon} to be forecast do not fit into the {steps} steps of the {name} "
                f"part of {data.name}"
            )
    times, values = _read(data, minutes, steps=parts["test"].stop)
    train = values[parts["train"]]
    # A constant variable has the deviation 1: one cannot divide by 0, or what rounding makes of it.
    deviation = np.where(np.ptp(train, axis=0) > 0, train.std(axis=0), 1.0)
    return Series(
        stored=values,
        mean=train.mean(axis=0),
        deviation=deviation,
        calendar=calendar_features(times, minutes),
        parts=parts,
    )


def standardized(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return values (steps, variables) in the units of their deviation from the mean, float32."""
    return ((values - mean) / deviation).astype(np.float32)


def split(step_minutes: int, input_length: int) -> dict[str, slice]:
    """Return the steps of each part, with the input of the first forecast."""
    month = 30 * 24 * 60 // step_minutes
    parts, end = {}, 0
    for name, months in SPLIT_MONTHS.items():
        reach_back = input_length if end else 0
        parts[name] = slice(end - reach_back, end + months * month)
        end += months * month
    return parts


def calendar_features(times: np.ndarray, step_minutes: int) -> np.ndarray:
    """Return where in the hour, day, week, month and year each time lies.

    The features of GluonTS and of the Informer's "timeF" encoding.

    Args:
        times: (steps,) datetime64[s].
        step_minutes: with steps of an hour there is no minute of the hour.

    Returns:
        (steps, 5) float32, or (steps, 4) for steps of an hour, each in [-0.5, 0.5].
    """
    day, month, year = (times.astype(f"datetime64[{unit}]") for unit in "DMY")
    minute = (times - times.astype("datetime64[h]")).astype("timedelta64[m]").astype(int)
    hour = (times - day).astype("timedelta64[h]").astype(int)
    weekday = (day.astype(int) + 3) % 7  # 1 January 1970 was a Thursday; Monday is 0
    day_of_month = (day - month).astype(int)
    day_of_year = (day - year).astype(int)
    features = [minute / 59, hour / 23, weekday / 6, day_of_month / 30, day_of_year / 365]
    first = 0 if step_minutes < 60 else 1
    return np.stack(features[first:], axis=1).astype(np.float32) - np.float32(0.5)


def _read(data: "DataSection", minutes: int, *, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return times (steps,) datetime64[s] and values (steps, variables) float64.

    What comes after these steps is not looked at.
    """
    path = series_path(data)
    times: list[datetime] = []
    values: list[list[float]] = []
    lines: list[int] = []
    step = timedelta(minutes=minutes)
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline().strip()
            if header != ",".join(("date", *VARIABLES)):
                raise UserError(
                    f"data.root: {path} has the columns {header[:200]!r}, expected "
                    f"date,{','.join(VARIABLES)}"
                )
            for number, line in enumerate(file, start=2):
                if len(values) == steps:
                    break
                if not line.strip():
                    continue
                date, row = _parse_row(line.strip())
                if times and date - times[-1] != step:
                    raise ValueError(
                        f"{date} follows {times[-1]} of line {lines[-1]}, expected a row every "
                        f"{minutes} minutes"
                    )
                times.append(date)
                values.append(row)
                lines.append(number)
    except OSError as error:
        raise UserError(
            f"data.root: cannot read {path} ({error.strerror or error}); put the file there, from "
            f"the ETDataset of Zhou et al."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"data.root: {path} is damaged: it is no text") from None
    except ValueError as error:
        raise UserError(f"data.root: {path} is damaged: line {number}: {error}") from None
    if len(values) < steps:
        raise UserError(f"data.root: {path} holds {len(values)} steps, expected {steps} or more")
    table = np.array(values)
    if outlier := _outlier(table):
        place, column = outlier
        raise UserError(
            f"data.root: {path} is damaged: line {lines[place]}: {VARIABLES[column]} is "
            f"{table[place, column]:g}, more than {LARGEST_DEVIATION:.0e} deviations away"
        )
    return np.array(times, dtype="datetime64[s]"), table


def _parse_row(line: str) -> tuple[datetime, list[float]]:
    """Return time and values of a row.

    Raises:
        ValueError: says in one line what is wrong with it.
    """
    date, *fields = line.split(",")
    if len(fields) != len(VARIABLES):
        raise ValueError(
            f"it has {len(fields) + 1} fields and not {len(VARIABLES) + 1}: {line[:100]!r}"
        )
    try:
        time = datetime.fromisoformat(date.strip()).replace(tzinfo=None)
    except ValueError:
        raise ValueError(f"{date[:100]!r} is no date") from None
    values = []
    for name, field in zip(VARIABLES, fields, strict=True):
        try:
            value = float(field.replace("_", "?"))  # Python alone reads 1_000 as a number
        except ValueError:
            raise ValueError(f"{name} is {field[:100]!r}, which is no number") from None
        if not abs(value) <= LARGEST_VALUE:
            raise ValueError(f"{name} is {field[:100]!r}, expected a value that can be squared")
        values.append(value)
    return time, values


def _outlier(values: np.ndarray) -> tuple[int, int] | None:
    """Return row and column of a cell that would flatten all others of its column.

    Deviations are judged by their median, which such a cell does not move.
    """
    distance = np.abs(values - np.median(values, axis=0))
    typical = np.median(distance, axis=0)
    # A variable that is mostly constant has none: there the mean has to do.
    typical = np.where(typical > 0, typical, distance.mean(axis=0))
    outliers = np.argwhere(distance > LARGEST_DEVIATION * typical)
    return (int(outliers[0][0]), int(outliers[0][1])) if len(outliers) else None


class ETT(LoadedSet):
    """One of the series; there is no official place to download from."""

    def load(self, data: "DataSection") -> Series:
        """Read the series."""
        return load(data)

    def download(self, data: "DataSection") -> None:
        """Say that there is no official place."""
        raise UserError(
            f"data.download: {data.name} has no official place to download from; put "
            f"{series_path(data).name} into {series_path(data).parent}"
        )


DATA_SETS = tuple(
    ETT(
        name=name,
        task="app.data.forecasting:Forecasting",
        keys=frozenset({"input_length", "horizon"}),
        has_classes=False,
    )
    for name in STEP_MINUTES
)
