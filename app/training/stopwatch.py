"""What a training has cost in time, over all sessions of a run."""

import time

from oialr.placement.processes import Processes


class Stopwatch:
    """Wall-clock seconds of this process, and CPU seconds of all processes together.

    CPU seconds are those of all threads. They depend less than the wall clock on what else the
    machine does, and are what a training costs where no accelerator works.
    """

    def __init__(self) -> None:
        """Stand still at zero."""
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._clocks = _clocks()

    def start(self) -> None:
        """Count from here on."""
        self._clocks = _clocks()

    def lap(self, processes: Processes) -> None:
        """Bring both figures up to now. A collective call."""
        clocks = _clocks()
        wall, cpu = (now - before for now, before in zip(clocks, self._clocks, strict=True))
        self._clocks = clocks
        self.seconds += wall
        self.cpu_seconds += sum(processes.gather(cpu))


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
