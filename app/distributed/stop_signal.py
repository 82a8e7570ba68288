"""A signal that asks the program to stop. Nothing heavy is imported: it is there at once."""

import signal
from types import FrameType
from typing import Protocol, Self


class StopRequest(Protocol):
    """Whatever may ask a training to stop."""

    @property
    def number(self) -> int:
        """The number of the signal to stop for; 0: go on."""


class StopSignal:
    """Remembers a signal that asks the program to stop, instead of dying of it.

    After the block the program is on its way out with an exit code that is settled. A signal that
    comes then, as a second one does or one that another process was stopped by, is ignored until
    the process is gone: the exit code remains what it is. Processes started after the block inherit
    that.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number = 0
        """The signal's number; 0 as long as there was none."""

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        # Not a handler that does nothing: the interpreter takes handlers off before its end.
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
