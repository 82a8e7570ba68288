"""Signals that ask a program to stop, as the processes that load its data meet them.

Launchers and batch systems send them to all processes of a program, or to its process group. Those
that load data must live on until the program has stopped after a checkpoint: torch ends a program
of which one dies. So they hold the signals back, and end when the program that started them says so
or is gone.
"""

import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import parent_process
from typing import Any

from torch.utils.data import DataLoader

# As app.runtime.stop_signal has them. macOS does not tell who sent a signal.
_HELD_BACK = (
    (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    if hasattr(signal, "sigwaitinfo")
    else ()
)


def start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return a loader's batches; its processes hold such signals back from their start.

    Args:
        loader: with :func:`end_with_the_program` as worker_init_fn.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)  # they inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_the_program(worker: int) -> None:
    """Let this process, which loads data, end when its parent asks it to.

    Ignored, SIGTERM would be ignored from the parent as well. At the end of Python it sends that to
    those that it has left over, and waits for them without an end.

    Args:
        worker: number of this process among those of the loader.
    """
    if _HELD_BACK:
        threading.Thread(target=_wait_for_parent, name="signals", daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        pass
    os._exit(0)  # as torch's own handler does
