"""The electricity transformer temperature series ETTh1, ETTh2 (hourly), ETTm1, ETTm2 (15 minutes).

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
AAAI 2021, section 5.1. The official layout below data.root: ETT-small/ETTh1.csv and so on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.errors import UserError

if TYPE_CHECKING:
    from app.settings import DataSection

VARIABLES = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
STEP_MINUTES = {"etth1": 60, "etth2": 60, "ettm1": 15, "ettm2": 15}
SPLIT_MONTHS = {"train": 12, "validation": 4, "test": 4}
"""Of 30 days each, one after the other; what comes later is not used."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A series, and which steps of it belong to which part."""

    values: np.ndarray
    """(steps, variables) float32, of mean 0 and deviation 1 over the training part."""
    calendar: np.ndarray
    """(steps, features) float32 in [-0.5, 0.5]; see :func:`calendar_features`."""
    parts: dict[str, slice]
    """Steps of train, validation and test; the last two begin with the input of their first
    forecast, so that the steps to be forecast are exactly those of the published split."""


def is_series(name: str) -> bool:
    """Tell whether a data set is one of these."""
    return name in STEP_MINUTES


def series_path(data: "DataSection") -> Path:
    """Return the path of the file of ``data.name``."""
    return Path(data.root, "ETT-small", f"ETT{data.name.removeprefix('ett')}.csv")


def load(data: "DataSection") -> Series:
    """Read a series, split it, and standardize it by its training part.

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
    standardized = (values - train.mean(axis=0)) / deviation
    return Series(
        values=standardized.astype(np.float32),
        calendar=calendar_features(times, minutes),
        parts=parts,
    )


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
    """Return times (steps,) datetime64[s] and values (steps, variables) float64."""
    path = series_path(data)
    try:
        with path.open() as file:
            header = file.readline().strip()
        if header != ",".join(("date", *VARIABLES)):
            raise UserError(
                f"data.root: {path} has the columns {header!r}, expected date,{','.join(VARIABLES)}"
            )
        dates = np.loadtxt(path, delimiter=",", skiprows=1, usecols=0, dtype="U19", max_rows=steps)
        times = dates.astype("datetime64[s]")
        columns = range(1, len(VARIABLES) + 1)
        values = np.loadtxt(path, delimiter=",", skiprows=1, usecols=columns, max_rows=steps)
    except OSError as error:
        raise UserError(
            f"data.root: cannot read {path} ({error.strerror or error}); put the file there, from "
            f"the ETDataset of Zhou et al."
        ) from None
    except ValueError as error:
        raise UserError(f"data.root: {path} is damaged: {' '.join(str(error).split())}") from None
    if len(values) < steps:
        raise UserError(f"data.root: {path} holds {len(values)} steps, expected {steps} or more")
    if (np.diff(times) != np.timedelta64(minutes, "m")).any() or not np.isfinite(values).all():
        raise UserError(f"data.root: {path} has gaps: expected a row every {minutes} minutes")
    return times, values
