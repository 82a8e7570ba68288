"""A signal that asks the program to stop. Nothing heavy is imported: it is there at once."""

import os
import signal
import threading
from types import FrameType
from typing import Protocol, Self

from app.runtime.launch import read_launch

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""What a shell gives for a program that Ctrl-C ended."""


class StopRequest(Protocol):
    """Whatever may ask a training to stop."""

    @property
    def number(self) -> int:
        """The number of the signal to stop for; 0: go on."""


class StopSignal:
    """Remembers a signal that asks the program to stop, instead of dying of it.

    A terminal that closes (SIGHUP) sends such a signal, too; a program that was started to outlive
    it (nohup) ignores that.

    A second Ctrl-C ends the program at once, wherever it is: a process that waits in a library for
    another one never comes to its handlers, so that a thread of its own counts them.

    After the block the program is on its way out with an exit code that is settled. A signal that
    comes then, as a second one does or one that another process was stopped by, is ignored until
    the process is gone: the exit code remains what it is. Processes started after the block inherit
    that.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.number = 0
        """The signal's number; 0 as long as there was none."""
        self._process = os.getpid()

    def __enter__(self) -> Self:
        came, told = os.pipe()  # the interpreter writes the number of each signal into it
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        # The terminal sends Ctrl-C to a process and those that it forked: those do not count.
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=_count, args=(came,), name="Ctrl-C", daemon=True).start()
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        # Not a handler that does nothing: the interpreter takes handlers off before its end.
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT and os.getpid() == self._process and _is_first():
            # Not print(), which the signal may have come in the middle of.
            os.write(2, b"\nCtrl-C: stops after a checkpoint; press it again to end at once\n")


def _count(came: int) -> None:
    """End the process at its second SIGINT."""
    interrupts = 0
    while numbers := os.read(came, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            os._exit(EXIT_INTERRUPTED)


def _forget() -> None:
    signal.set_wakeup_fd(-1)


def _is_first() -> bool:
    return read_launch().process_index == 0
