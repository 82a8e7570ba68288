"""An end to every hang: a process that stands still says where, and ends the program."""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

from app.runtime.launch import node_name

LONGEST_BEAT = 0.5
"""Seconds: less than an abort waits, so that every process that stands still says so before."""
LAST_RESORT = 30.0
"""Seconds after which a process leaves that could not end the others."""


class Watchdog:
    """Watches the main thread from another one, and ends the program if it stands still.

    Collectives of torch.distributed have a timeout, those of MPI have none, and a process that is
    stuck elsewhere keeps all others waiting. Every process has its own watchdog, so the log holds
    one line of each that stands still: most of them in a collective, the culprit elsewhere.

    A process that is alone keeps nobody waiting and takes as long as it takes for a step: it is
    watched only where it says so, by :meth:`guard`, such as at what it reads at its start.

    Waiting is counted in beats of the watching thread, so a program that Slurm suspends and resumes
    does not count as one that stands still.
    """

    def __init__(
        self,
        *,
        timeout: float | None,
        abort: Callable[[int], None],
        name: str,
        alone: bool = False,
    ) -> None:
        """Prepare; the watch begins and ends with the context, on the thread that enters it.

        Args:
            timeout: seconds without :meth:`progress` after which the program ends; None: never.
            abort: ends all processes, given the exit code.
            name: of this process, for the log.
            alone: watch only within :meth:`guard`.
        """
        self._timeout = timeout
        self._abort = abort
        self._name = name
        self._what = ["start"]
        self._watched = not alone
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self, what: str) -> None:
        """Say what begins now. Cheap enough for every step."""
        self._what = [what]  # a new object, also for the same words

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Watch what is done in the block also where this process is alone."""
        before, self._watched = (self._watched, self._what[0]), True
        self.progress(what)
        try:
            yield
        finally:
            self._watched, words = before
            self.progress(words)

    def __enter__(self) -> Self:
        if self._timeout is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        if self._timeout is not None:
            self._thread.join()
        if error is not None:
            error.add_note(f"{self._name}: at {self._what[0]}")

    def _watch(self) -> None:
        assert self._timeout is not None
        beat = min(LONGEST_BEAT, self._timeout / 10)
        seen, beats = self._what, 0
        while not self._ended.wait(beat):
            beats = beats + 1 if self._watched and self._what is seen else 0
            seen = self._what
            if beats * beat >= self._timeout:
                self._end()
                return

    def _end(self) -> None:
        frame = sys._current_frames()[self._main]
        # Not show(), whose lock the main thread may hold.
        with suppress(OSError, ValueError):
            print(
                f"{self._name} on {node_name()}: no progress in {self._timeout:g} s "
                f"(distributed.timeout) at {self._what[0]}, in {call_chain(frame)}\n"
                + "".join(traceback.format_stack(frame)[-6:]),
                file=sys.stderr,
                flush=True,
            )
        # The main thread may be inside MPI, which then may not answer this one.
        threading.Thread(target=self._leave, daemon=True).start()
        self._abort(1)

    def _leave(self) -> None:
        if not self._ended.wait(LAST_RESORT):
            os._exit(1)


def call_chain(frame: FrameType) -> str:
    """Return the names of the functions that a thread is in, the innermost first."""
    names = [summary.name for summary in reversed(traceback.extract_stack(frame))]
    return " < ".join([name for name in names if name not in ("<module>", "wrapper")][:6])
