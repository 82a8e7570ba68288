"""Propulate's part: who breeds which candidate from what. All it sees are points and losses.

Propulate counts generations per worker, writes pickles that a kill can damage, and waits for ever
if a loss function raises. So the budget, the store and the faults are ours; from Propulate come the
propagators and the asynchronous exchange of individuals within and between islands.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from app.compatibility import import_propulate
from app.config.search_section import SearchSection
from app.errors import UserError
from app.runtime.workers import Workers, wait
from app.search.nelder_mead import build_nelder_mead

NELDER_MEAD_SCALE = 0.2
"""Standard deviation of the first simplex, in the unit cube."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A finished evaluation, of an earlier session."""

    position: np.ndarray
    """(n,) float64 in the unit cube."""
    loss: float
    worker: int
    island: int


class Evaluate(Protocol):
    """What a candidate is judged by, on all processes of a worker."""

    def __call__(self, position: np.ndarray) -> tuple[float, bool]:
        """Take a point (n,) of the unit cube; return its loss and whether it was the last."""


def check_islands(section: SearchSection, workers: int) -> int:
    """Return the number of islands.

    Raises:
        UserError: there are more than workers.
    """
    islands = section.islands or max(1, workers // 4)
    if islands > workers:
        raise UserError(f"search.islands: {islands} islands need {islands} workers, not {workers}")
    return islands


def island_sizes(workers: int, islands: int) -> np.ndarray:
    """Return the workers of each island, (islands,) int64, larger ones first."""
    sizes = np.full(islands, workers // islands)
    sizes[: workers % islands] += 1
    return sizes


def evolve(
    evaluate: Evaluate,
    *,
    section: SearchSection,
    keys: Sequence[str],
    workers: Workers,
    seed: Sequence[int],
    known: Sequence[Known],
    begin: bool,
    folder: Path,
) -> None:
    """Breed and evaluate candidates until an evaluation says that it was the last. Collective.

    Args:
        evaluate: called on all processes of a worker, with the same point.
        section: propagator, population, islands and the exchange between them.
        keys: names of the parameters.
        workers: this process among them.
        seed: of the candidates, beside the worker's index.
        known: evaluations that count as individuals already.
        begin: whether this worker evaluates anything at all.
        folder: of the search; Propulate wants one, and nothing is written there.
    """
    import_propulate()
    from propulate import Individual, Migrator, Pollinator

    logging.getLogger("propulate").setLevel(logging.WARNING)

    class Exchange(Pollinator if section.exchange == "pollination" else Migrator):  # type: ignore[misc]
        """The exchange between islands, without pickles: the store is ours."""

        def _dump_checkpoint(self) -> None:
            pass

        def _dump_final_checkpoint(self) -> None:
            pass

    place = _Place.of(workers, check_islands(section, workers.count))
    rng = random.Random(int(np.random.SeedSequence([*seed, workers.index]).generate_state(1)[0]))

    def loss(individual: Any, communicator: Any) -> float:
        """Called by Propulate; the individual is moved into the unit cube for good."""
        position = np.clip(individual.position, 0.0, 1.0)
        _slim(individual, position, pattern)
        value, last = evaluate(position)
        if last:
            exchange.generations = exchange.generation + 1
        return value

    islands = len(place.sizes)
    pattern = Individual(np.zeros(len(keys)), {key: (0.0, 1.0) for key in keys})
    exchange = Exchange(
        loss_fn=loss,
        propagator=build_propagator(section, keys, rng, workers=int(place.size), index=place.index),
        rng=rng,
        island_idx=place.island,
        island_comm=place.communicator,
        propulate_comm=_Patient(workers.firsts) if workers.firsts else None,
        worker_sub_comm=workers.own,
        generations=-1,  # until an evaluation is the last
        checkpoint_path=folder,
        migration_topology=np.ones((islands, islands), dtype=int) - np.eye(islands, dtype=int),
        migration_prob=section.migration_probability / place.size if islands > 1 else 0.0,
        island_displs=np.cumsum(place.sizes) - place.sizes,
        island_counts=place.sizes,
    )
    exchange.population = _individuals(known, keys, place, Individual)
    exchange.generation = len(known)  # above those of all individuals
    if not begin:
        exchange.generations = exchange.generation
    exchange.propulate(logging_interval=1, debug=0)


class _Patient:
    """A communicator whose barriers sleep: others may still train on the same cores."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communicator, name)

    def barrier(self) -> None:
        wait(self._communicator)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a worker lives."""

    sizes: np.ndarray
    """(islands,) int64: workers of each."""
    island: int
    index: int
    """Of the worker on its island."""
    communicator: Any
    """The first processes of the island's workers; None on all other processes."""

    @property
    def size(self) -> int:
        return int(self.sizes[self.island])

    @classmethod
    def of(cls, workers: Workers, islands: int) -> "_Place":
        """Divide the workers into islands of consecutive ones. A collective call."""
        sizes = island_sizes(workers.count, islands)
        island = island_of(workers.index, workers.count, islands)
        return cls(
            sizes=sizes,
            island=island,
            index=workers.index - int(sizes[:island].sum()),
            communicator=workers.firsts.Split(island, workers.index) if workers.firsts else None,
        )


def island_of(worker: int, workers: int, islands: int) -> int:
    """Return the island of a worker."""
    return int(np.searchsorted(np.cumsum(island_sizes(workers, islands)), worker, side="right"))


def build_propagator(
    section: SearchSection, keys: Sequence[str], rng: random.Random, *, workers: int, index: int
) -> Callable[..., Any]:
    """Build Propulate's propagator over the unit cube.

    Args:
        section: propagator and population.
        keys: names of the parameters.
        rng: of this worker.
        workers: workers of the island.
        index: of this worker on its island.
    """
    import_propulate()
    from propulate import propagators, utils
    from propulate.propagators.pso import InitUniformPSO

    limits = {key: (0.0, 1.0) for key in keys}
    population = section.population or max(4, 2 * workers)
    match section.propagator:
        case "genetic":
            return utils.get_default_propagator(population, limits, rng=rng)
        case "cma_es":
            return propagators.CMAPropagator(
                propagators.BasicCMA(), limits, pop_size=population, rng=rng
            )
        case "nelder_mead":
            return build_nelder_mead(limits, rng, scale=NELDER_MEAD_SCALE, index=index)
        case "particle_swarm":
            # Inertia and weights of the constriction by Clerc and Kennedy (2002).
            move = propagators.VelocityClampingPSO(
                0.7298, 1.49618, 1.49618, index, limits, rng, 0.6
            )
            initialize = InitUniformPSO(limits, rank=index, rng=rng)

            def swarm(individuals: list[Any]) -> Any:
                """Move this worker's particle, or make it: Propulate's own rule counts others'."""
                own = any(individual.rank == index for individual in individuals)
                return move(individuals) if own else initialize(individuals)

            return swarm


def _slim(individual: Any, position: np.ndarray, pattern: Any) -> None:
    """Give an individual a position, and let it share what all have alike.

    Each stays for ever, and comes out of a message with limits, types and offsets of its own, and
    with a position that is a view of the message.
    """
    individual.position = position
    individual.mapping = dict(zip(pattern.limits, map(float, position), strict=True))
    for name in ("limits", "types", "offsets"):
        setattr(individual, name, getattr(pattern, name))


def _individuals(
    known: Sequence[Known], keys: Sequence[str], place: _Place, individual_type: Any
) -> list[Any]:
    """Return the island's share of what is known, as individuals that Propulate can tell apart.

    Islands and workers may have been more or fewer: what has lost its place is dealt out anew.
    """
    individuals = []
    for generation, one in enumerate(known):
        if one.island % len(place.sizes) != place.island:
            continue
        position = {key: float(u) for key, u in zip(keys, one.position, strict=True)}
        individual = individual_type(
            position,
            {key: (0.0, 1.0) for key in keys},
            velocity=np.zeros(len(keys)),  # of a particle; nobody else looks at it
            generation=generation,
            rank=one.worker % place.size,
        )
        individual.loss = one.loss
        individual.island = place.island
        individual.current = individual.rank
        individual.migration_steps = 0
        individual.migration_history = str(place.island)
        individuals.append(individual)
    return individuals
