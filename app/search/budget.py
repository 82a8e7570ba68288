"""The budget: which evaluation a worker does next, counted over all workers of the search."""

import time
from collections.abc import Collection

import torch.distributed as dist


class Budget:
    """Hands out the numbers of evaluations, each once, and the news that the search stops.

    The count is kept by a thread of process 0 (torch's key-value store), which answers while that
    process trains: asking takes no longer than a message.
    """

    def __init__(
        self,
        counts: dist.Store,
        *,
        finished: Collection[int],
        limit: int | None,
        deadline: float,
    ) -> None:
        """Take the counter, new for this session.

        Args:
            counts: the key-value store that all workers reach.
            finished: numbers of evaluations that are done already; what lies between is not.
            limit: evaluations in total; None: any number.
            deadline: value of time.monotonic() after which nothing is begun.
        """
        self._counts = counts
        last = max(finished, default=-1)
        self._holes = [number for number in range(last) if number not in finished]
        self._next = last + 1
        self._open = None if limit is None else max(0, limit - len(finished))
        self._deadline = deadline

    def claim(self) -> int | None:
        """Return the number of an evaluation to do, or None if there is none any more."""
        if time.monotonic() >= self._deadline or self.stopped():
            return None
        ticket = self._counts.add("claimed", 1) - 1
        if self._open is not None and ticket >= self._open:
            return None
        if ticket < len(self._holes):
            return self._holes[ticket]
        return self._next + ticket - len(self._holes)

    def stop(self) -> None:
        """Tell all workers to end what they do."""
        self._counts.add("stopped", 1)

    def stopped(self) -> bool:
        """Whether somebody has asked all to stop."""
        return self._counts.add("stopped", 0) > 0
