"""Propulate's propagators and islands under our budget, on a quadratic function."""

import json
import statistics

import numpy as np
import pytest
from support.launching import ROOT, launch

EVOLUTION = ROOT / "tests" / "support" / "workers" / "evolution.py"


def case(propagator, evaluations, known=0, seed=1, **section):
    section = {"propagator": propagator, "islands": 1, **section}
    return {"section": section, "evaluations": evaluations, "known": known, "seed": seed}


PROPAGATORS = [case(name, 300) for name in ("genetic", "cma_es", "particle_swarm", "nelder_mead")]
ISLANDS = [case("genetic", 1000, islands=2, exchange=name) for name in ("pollination", "migration")]
RESUMED = [
    case("genetic", 60, known=20, islands=2, exchange="migration"),
    case("particle_swarm", 60, known=20),
    case("genetic", 22, known=20, islands=2),  # fewer left than workers
    case("genetic", 20, known=20),
]
CASES = [*PROPAGATORS, *ISLANDS, *RESUMED]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    """What three workers make of every case, in one start."""
    lines = launch(3, EVOLUTION, json.dumps(CASES)).stdout.splitlines()
    return list(zip(CASES, json.loads(lines[-1]), strict=True))


def losses(result):
    return [loss for _, _, loss in result["taken"]]


def test_every_number_is_evaluated_once_in_the_unit_cube(results):
    for case, result in results:
        numbers = [number for number, _, _ in result["taken"]]
        assert numbers == list(range(case["known"], case["evaluations"]))
        for _, position, _ in result["taken"]:
            assert all(0 <= coordinate <= 1 for coordinate in position)


def test_no_pickles_are_written(results):
    assert all(result["files"] == [] for _, result in results)


def test_candidates_come_closer(results):
    """Which worker is when how far is chance, so one candidate proves nothing, but a share does.

    A loss below 0.1 is half a ball of radius 0.32: of uniform candidates, 6.6 % fall into it. In 25
    runs of every propagator and 60 of every exchange, the least share of a second half was 54 %.
    """
    for case, result in results:
        if case in PROPAGATORS + ISLANDS:
            found = losses(result)
            later = found[len(found) // 2 :]
            assert sum(loss < 0.1 for loss in later) / len(later) > 0.25, case


@pytest.mark.parametrize("known", [0, 20], ids=["new", "resumed"])
def test_one_worker_of_nelder_mead_closes_in(known):
    """It ended in points at a distance of 0.2 from the best, in each coordinate, for ever.

    The least losses of 20 seeds, new and resumed, had the medians 9e-11 and 3e-11 and the largest
    4e-7; without what is mended the medians 8e-4 and 2e-4 and the smallest 9e-7.
    """
    cases = [case("nelder_mead", known + 150, known, seed) for seed in range(5)]
    lines = launch(0, EVOLUTION, json.dumps(cases)).stdout.splitlines()
    least = [min(losses(result)) for result in json.loads(lines[-1])]
    assert statistics.median(least) < 1e-7, least


def test_known_evaluations_are_built_on(results):
    """Candidates inherit coordinates of known ones, where uniform ones would share none."""
    known = set(np.random.default_rng(0).random((20, 3)).ravel())  # as the workers draw them
    for case, result in results:
        if case["known"] and case["section"]["propagator"] == "genetic":
            first = result["taken"][:10]
            heirs = [bool(known & set(position)) for _, position, _ in first]
            assert sum(heirs) >= len(heirs) / 4, case
