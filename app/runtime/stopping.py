"""Agreement on the step at which a run stops, without a synchronization in the step."""

from collections import deque

import torch
import torch.distributed as dist

from app.runtime.stop_signal import StopRequest
from oialr.placement.processes import Processes


class StopAgreement:
    """Lets all processes stop after the same step, though a signal reaches them at different ones.

    After every step each process starts a reduction (maximum) of its own flag in the background, in
    host memory, and looks at the one that it started ``LAG`` steps before. By then every process
    has taken part in the gradients' reduction of a later step, so that one is complete and nothing
    is waited for. All processes look at the same reduction after the same step and so decide alike.
    """

    LAG = 2

    def __init__(self, processes: Processes, stop_signal: StopRequest) -> None:
        self._processes = processes
        self._signal = stop_signal
        self._pending: deque[tuple[torch.Tensor, dist.Work]] = deque()

    def asked(self) -> int:
        """The signal that reached this process; 0: none. Nothing is exchanged."""
        return self._signal.number

    def after_step(self) -> int:
        """Exchange the flags; return the number of the signal to stop for, or 0 to go on."""
        if not self._processes.host_group:
            return self._signal.number
        flag = torch.tensor([self._signal.number], dtype=torch.int32)
        work = dist.all_reduce(
            flag, dist.ReduceOp.MAX, group=self._processes.host_group, async_op=True
        )
        self._pending.append((flag, work))
        return self._take() if len(self._pending) > self.LAG else 0

    def finish(self) -> None:
        """Wait for the exchanges that are still under way."""
        while self._pending:
            self._take()

    def _take(self) -> int:
        flag, work = self._pending.popleft()
        work.wait()
        return int(flag)
