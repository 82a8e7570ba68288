"""What a logger is: a class that is told everything that metrics.h5 holds, as it comes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Values = Mapping[str, float | str]
"""Numbers by name, NaN where there is none; the only text is the kind of an event."""


class Logger(Protocol):
    """Of process 0 alone. What a method raises ends the logger, with a warning, and not the run."""

    def __init__(
        self, folder: Path, *, configuration: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Begin, or go on.

        Args:
            folder: of the run, where the logger may have a folder of its own.
            configuration: the resolved one, values by section and key.
            first_step: steps taken before this session: a killed session may have logged more, and
                all after this step comes again. None: the run begins, whatever was logged before.
        """

    def scalars(self, group: str, step: int, values: Values, *, layer: str | None = None) -> None:
        """Take a row.

        Args:
            group: train, validation, test, lowrank or stability; of a layer rank or stability.
            step: optimizer steps taken; it never falls within a group.
            values: by the names of the columns in metrics.h5.
            layer: dense parameter name, of a row about one layer.
        """

    def spectrum(self, layer: str, step: int, singular_values: np.ndarray) -> None:
        """Take a layer's singular values (k,), descending, in float32."""

    def flush(self) -> None:
        """Let others see everything; called when metrics.h5 is written, too."""

    def close(self) -> None:
        """End, after an error too."""


def tags(group: str, values: Values, layer: str | None = None) -> dict[str, float]:
    """Return the finite numbers of a row by one name each, for programs without tables.

    Args:
        group: as for :meth:`Logger.scalars`.
        values: of the row.
        layer: of which it tells.

    Returns:
        ``group/name``, or ``name/layer``.
    """
    return {
        f"{name}/{layer}" if layer else f"{group}/{name}": value
        for name, value in values.items()
        if not isinstance(value, str) and math.isfinite(value)
    }
