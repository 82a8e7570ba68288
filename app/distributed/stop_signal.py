"""A signal that asks the program to stop. Nothing heavy is imported: it is there at once."""

import signal
from types import FrameType
from typing import Any, Protocol, Self


class StopRequest(Protocol):
    """Whatever may ask a training to stop."""

    @property
    def number(self) -> int:
        """The number of the signal to stop for; 0: go on."""


class StopSignal:
    """Remembers a signal that asks the program to stop, instead of dying of it."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number = 0
        """The signal's number; 0 as long as there was none."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
