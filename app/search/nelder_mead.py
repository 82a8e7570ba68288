"""Nelder and Mead's simplex (1965) among all points that the workers of an island have evaluated.

Propulate's own (1.2.2) never expands, since its count of generations is one ahead of the newest
individual; its two contractions are the same point, its vertices shrink away from the best one, and
so it soon does nothing but draw points around the best, always as far from it. As its simplex are
the best points, wherever they lie, it would be flat besides: a shrunken vertex lies on an edge.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_VARIATION = 0.1
"""Share by which the length of a move varies: no point is taken twice, by two workers or by one."""
_LEAST_SINE = 0.3
"""Of the angle between an edge of the simplex and what the better vertices span."""
_AFTER_REJECTED = {"reflect": "innercontract", "innercontract": "shrink", "shrink": "sample"}
"""Moves by the one whose point is no vertex; a reflection follows all others."""


def build_nelder_mead(
    limits: Mapping[str, tuple[float, float]], rng: random.Random, *, scale: float, index: int
) -> Any:
    """Build the propagator; Propulate must have been imported.

    Args:
        limits: of the parameters, all numbers.
        rng: of this worker.
        scale: standard deviation of the first points, around the middle of the unit cube.
        index: of this worker on its island.
    """
    from propulate import Individual
    from propulate.propagators import ParallelNelderMead

    class NelderMead(ParallelNelderMead):
        """Breeds one point after the other, each by what has become of the one before."""

        def __call__(self, individuals: list[Any]) -> Any:
            """Return the next individual; those given have been evaluated."""
            self.simplex = best_simplex(individuals, self.problem_dimension + 1)
            if len(self.simplex) <= self.problem_dimension:
                self.step = "init"
                return self.init([Individual(self.start, self.limits)])
            own = [one for one in individuals if one.rank == index and not one.migration_steps]
            self.step = self._following(max(own, key=lambda one: one.generation, default=None))
            return getattr(self, self.step)()

        def _following(self, newest: Any) -> str:
            """Name the move that follows the newest individual of this worker."""
            place = next((i for i, one in enumerate(self.simplex) if one is newest), None)
            if place is None:
                return _AFTER_REJECTED.get(self.step, "reflect")
            if place == 0 and self.step == "reflect":
                return "expand"
            # A reflection of what came out worst would lead back to where it was reflected from.
            return "innercontract" if place == self.problem_dimension else "reflect"

        def reflect(self) -> Any:
            """Return the point that lies beyond the others as the worst does on this side."""
            return self._towards(self.compute_centroid(), self.simplex[-1].position, -self.alpha)

        def expand(self) -> Any:
            """Return the point beyond the best, as seen from the side that it was reflected at."""
            best, *others = (one.position for one in self.simplex)
            return self._towards(np.mean(others, axis=0), best, self.gamma)

        def innercontract(self) -> Any:
            """Return the point between the worst and the others.

            Where a reflected point has become the worst, it is the contraction on the outside.
            """
            return self._towards(self.compute_centroid(), self.simplex[-1].position, self.rho)

        def shrink(self) -> Any:
            """Return a vertex that has come closer to the best; which one is chance."""
            best, *others = (one.position for one in self.simplex)
            return self._towards(best, self.rng.choice(others), self.sigma)

        def sample(self) -> Any:
            """Return a point around the best: nothing that the simplex suggests is any better."""
            return self.init([self.simplex[0]])

        def _towards(self, start: np.ndarray, end: np.ndarray, share: float) -> Any:
            share *= self.rng.uniform(1 - _VARIATION, 1 + _VARIATION)
            return Individual(start + share * (end - start), self.limits)

    return NelderMead(dict(limits), rng, np.full(len(limits), 0.5), scale=scale)


def best_simplex(individuals: Sequence[Any], count: int) -> list[Any]:
    """Return the best individuals that span a simplex, the best first.

    Those that do not lead well out of what better ones span are left out: in a flat simplex all
    moves stay, and of two that lie at the same place the worse one counts for nothing.

    Args:
        individuals: with position (n,) and loss.
        count: of vertices, n + 1; there are fewer if no more such individuals are known.
    """
    simplex: list[Any] = []
    directions: list[np.ndarray] = []
    for one in sorted(individuals, key=lambda one: float(one.loss)):
        if simplex:
            edge = one.position - simplex[0].position
            rest = edge - sum((edge @ direction) * direction for direction in directions)
            height = np.linalg.norm(rest)
            if height == 0 or height < _LEAST_SINE * np.linalg.norm(edge):
                continue
            directions.append(rest / height)
        simplex.append(one)
        if len(simplex) == count:
            break
    return simplex
