"""What a search keeps of all of its evaluations while it goes on."""

from collections.abc import Sequence

from app.search.objective import OUT_OF_BOUNDS
from app.search.store import Evaluation


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the evaluation of the least loss that came to an end; None if there is none."""
    succeeded = [one for one in evaluations if one.succeeded]
    return min(succeeded, key=lambda one: (one.loss, one.number), default=None)


def best_first(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return all evaluations, those that came to an end before the others, by their losses."""
    return sorted(evaluations, key=lambda one: (not one.succeeded, one.loss, one.number))


class Tally:
    """Their number, the best one, and what medians are taken of."""

    def __init__(self) -> None:
        self.count = 0
        self.best: Evaluation | None = None
        """As :func:`best_of` tells."""
        self.curves: list[tuple[float, ...]] = []
        """Of those that have finished within bounds: larger networks are no measure of others."""

    def add(self, evaluations: Sequence[Evaluation]) -> None:
        """Count more evaluations."""
        self.count += len(evaluations)
        self.best = best_of([*evaluations, *([self.best] if self.best else [])])
        self.curves += [
            one.curve
            for one in evaluations
            if one.status == "finished" and one.loss < OUT_OF_BOUNDS
        ]
