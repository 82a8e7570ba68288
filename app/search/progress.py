"""Progress of a search: one line per evaluation, from the process that finished it."""

import time
from datetime import timedelta

from app.runtime.streams import show
from app.search.store import Evaluation


class Progress:
    """Writes to stdout how a search comes along, and warnings to stderr."""

    def __init__(self, *, finished: int, total: int | None, deadline: float) -> None:
        """Start the clock of this session.

        Args:
            finished: evaluations of earlier sessions.
            total: evaluations to be done; None: as many as there is time for.
            deadline: value of time.monotonic() at which nothing is begun any more.
        """
        self._earlier = finished
        self._total = total
        self._deadline = deadline
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        """Write a line, whole: others write to the same terminal."""
        show(line)

    def warn(self, line: str) -> None:
        """Write a warning, on stderr."""
        show(line, error=True)

    def evaluation(self, one: Evaluation, done: int, best: Evaluation | None) -> None:
        """Tell of a finished evaluation.

        Args:
            one: the evaluation.
            done: number of all that have finished, it included.
            best: the best of them.
        """
        now = time.monotonic()
        seconds_each = (now - self._start) / max(1, done - self._earlier)
        left = self._deadline - now
        if self._total is not None:
            left = min(left, (self._total - done) * seconds_each)
        figures = f"error {one.error:.4f}  trainable {one.trainable_percent:.1f} %"
        if one.status == "finished":
            result = f"loss {one.loss:.4f}  {figures}"
        elif one.status == "hopeless":
            result = f"{figures}  (stopped: hopeless)"
        else:
            result = f"{one.status}: {(one.traceback.strip().splitlines() or [''])[-1][:160]}"
        best_so_far = f"best {best.loss:.4f} (number {best.number})" if best else "no result yet"
        total = "" if self._total is None else f"/{self._total}"
        self.say(
            f"{done}{total}  number {one.number}, worker {one.worker}, {one.seconds:.1f} s: "
            f"{result}  {best_so_far}  {3600 / seconds_each:.0f} per hour  "
            f"{timedelta(seconds=max(0, round(left)))} left"
        )
