"""The loggers of a run, by their names in run.loggers."""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from app.config.run_section import LOGGERS
from app.errors import UserError, one_line, typed_line
from app.import_path import import_by_path
from app.recording.loggers.protocol import Logger, Values

logger = logging.getLogger(__name__)

_OURS = dict(
    zip(
        LOGGERS,
        (
            "app.recording.loggers.tensorboard:TensorBoard",
            "app.recording.loggers.csv_files:CsvFiles",
        ),
        strict=True,
    )
)
_NEEDS = {"tensorboard": "torch.utils.tensorboard"}


def find_loggers(names: Sequence[str]) -> dict[str, Callable[..., Logger]]:
    """Import the classes of loggers.

    Args:
        names: of ours, or ``package.module:Class``.

    Raises:
        UserError: one cannot be imported.
    """
    return {name: _find(name) for name in names}


def _find(name: str) -> Callable[..., Logger]:
    if name in _NEEDS:
        try:
            import_module(_NEEDS[name])
        except Exception as error:  # a package may raise anything
            raise UserError(f"run.loggers: {name} cannot be imported ({one_line(error)})") from None
    found: Callable[..., Logger] = import_by_path("run.loggers", _OURS.get(name, name))
    missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise UserError(
            f"run.loggers: {name} is no logger: it lacks {', '.join(missing)} (docs/loggers.md)"
        )
    return found


_METHODS = ("scalars", "spectrum", "flush", "close")


class Loggers:
    """Hands everything to several loggers; one that fails gets nothing more."""

    def __init__(self, loggers: Mapping[str, Logger] | None = None) -> None:
        """Take loggers, by name."""
        self._loggers = dict(loggers or {})

    @classmethod
    def begin(
        cls,
        found: Mapping[str, Callable[..., Logger]],
        folder: Path,
        *,
        configuration: Mapping[str, Any],
        first_step: int | None,
    ) -> "Loggers":
        """Begin each, see :class:`Logger`.

        Raises:
            UserError: one cannot begin.
        """
        loggers: dict[str, Logger] = {}
        for name, kind in found.items():
            try:
                loggers[name] = kind(folder, configuration=configuration, first_step=first_step)
            except Exception as error:
                Loggers(loggers).close()
                raise UserError(f"run.loggers: {name} cannot begin: {typed_line(error)}") from None
        return cls(loggers)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._loggers)

    def scalars(self, group: str, step: int, values: Values, *, layer: str | None = None) -> None:
        """Hand on a row."""
        self._tell(lambda one: one.scalars(group, step, values, layer=layer))

    def spectrum(self, layer: str, step: int, singular_values: np.ndarray) -> None:
        """Hand on a spectrum."""
        self._tell(lambda one: one.spectrum(layer, step, singular_values))

    def flush(self) -> None:
        """Flush all."""
        self._tell(lambda one: one.flush())

    def close(self) -> None:
        """Close all; may be called again."""
        self._tell(lambda one: one.close())
        self._loggers.clear()

    def _tell(self, act: Callable[[Logger], None]) -> None:
        for name, one in list(self._loggers.items()):
            try:
                act(one)
            except Exception as error:
                del self._loggers[name]
                logger.warning(
                    "run.loggers: %s failed and gets nothing more: %s",
                    name,
                    typed_line(error),
                )
