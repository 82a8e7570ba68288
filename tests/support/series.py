"""Series in the official layout, made of waves that can be forecast."""

from pathlib import Path

import numpy as np

HEADER = "date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"


def write_ett(root: Path, name: str, steps: int, *, minutes: int = 60) -> np.ndarray:
    """Write ETT-small/NAME.csv and return its values (steps, 7), to four digits as in the file."""
    t = np.arange(steps)
    times = np.datetime64("2016-07-01T00:00:00") + t * np.timedelta64(minutes, "m")
    waves = [np.sin(2 * np.pi * t / (24 * 60 / minutes) + i) for i in range(7)]
    noise = np.random.default_rng(0).normal(scale=0.2, size=(steps, 7))
    values = np.round((np.stack(waves, axis=1) + noise) * np.arange(1, 8) + 5, 4)
    folder = root / "ETT-small"
    folder.mkdir(exist_ok=True)
    lines = [
        f"{str(time).replace('T', ' ')},{','.join(map(str, row))}"
        for time, row in zip(times, values, strict=True)
    ]
    (folder / f"{name}.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return values
