"""Ranks for a given size, against brute force and by hand."""

import itertools
import random

import pytest

from oialr.allocation import (
    Choice,
    allocate,
    layer_choices,
    stored_parameters,
    useful_steps,
)

PLAIN = {"minimum_rank_fraction": 0.01, "multiple": 1, "has_core": False, "can_be_dense": True}


def network(seed, **options):
    """Return the choices of a few small layers with random spectra."""
    draw = random.Random(seed)
    layers = []
    for _ in range(draw.randint(2, 4)):
        shape = (draw.randint(2, 7), draw.randint(2, 7))
        if draw.random() < 0.3:
            shape = (2, *shape)
        decay = draw.choice([0.3, 0.7, 0.95, 1.0])
        energies = [decay**i * draw.uniform(0.5, 1) for i in range(min(shape[-2:]))]
        energies.sort(reverse=True)
        layers.append(layer_choices(energies, shape, **{**PLAIN, **options}))
    return layers


def sizes(choices):
    return sum(choice.parameters for choice in choices), sum(choice.lost for choice in choices)


@pytest.mark.parametrize("options", [{}, {"has_core": True}, {"can_be_dense": False}], ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_within_the_largest_single_gain_of_brute_force(seed, options):
    layers = network(seed, **options)
    every = sorted(sizes(choices) for choices in itertools.product(*layers))
    gains = [x[i].lost - x[j].lost for x in layers for i, j in useful_steps(x)]
    smallest, largest = every[0][0], every[-1][0]
    for budget in range(smallest, largest + 1):
        best = min(lost for size, lost in every if size <= budget)
        size, lost = sizes(allocate(layers, budget))
        assert size <= budget
        assert best - 1e-12 <= lost <= best + max(gains, default=0) + 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_exact_where_the_steps_hit_the_size(seed):
    layers = network(seed)
    every = [sizes(choices) for choices in itertools.product(*layers)]
    steps = sorted(
        (
            ((x[i].lost - x[j].lost) / (x[j].parameters - x[i].parameters), x[i], x[j])
            for x in layers
            for i, j in useful_steps(x)
        ),
        key=lambda step: -step[0],
    )
    budget = sum(x[0].parameters for x in layers)
    for _, before, after in steps:
        budget += after.parameters - before.parameters
        size, lost = sizes(allocate(layers, budget))
        assert size == budget
        assert lost == pytest.approx(min(lost for size, lost in every if size <= budget))


def test_a_step_to_the_dense_weight_that_is_worth_more_is_taken_with_the_one_before():
    # (4, 4): rank 1 stores 8 numbers, rank 2 as many as the dense weight.
    choices = layer_choices([4, 3, 2, 1], (4, 4), **PLAIN)
    assert choices == [Choice(1, 8, 0.6), Choice(None, 16, 0.0)]
    # (5, 6): ranks 1 and 2 store 11 and 22, and dense 30: eight more for half of the energy.
    every = layer_choices([4, 3, 2, 1], (8, 8), **PLAIN)
    assert [choice.rank for choice in every] == [1, 2, 3, None]
    some = layer_choices([4, 3, 2, 1], (8, 8), **PLAIN, pays=lambda rank: rank < 3)
    assert some == [*every[:2], Choice(None, 64, 0.0)]
    none = layer_choices([4, 3, 2, 1], (8, 8), **PLAIN, pays=lambda rank: False)
    assert none == every  # a size that can be met stays one
    choices = layer_choices([1.0] * 5, (5, 6), **PLAIN)
    assert [c.rank for c in choices] == [1, 2, None]
    assert useful_steps(choices) == [(0, 2)]
    # There is no room for both steps, and the smaller one is not left out for that.
    assert allocate([choices], 29) == [choices[1]]
    assert allocate([choices], 30) == [choices[2]]


def test_ranks_are_multiples_within_minimum_and_present_rank():
    energies = [2.0**-i for i in range(150)]
    choices = layer_choices(energies, (192, 400), **{**PLAIN, "multiple": 16})
    assert [c.rank for c in choices] == [16, 32, 48, 64, 80, 96, 112, 128, None]
    minimum = {"minimum_rank_fraction": 0.2, "multiple": 16}
    choices = layer_choices(energies, (192, 400), **{**PLAIN, **minimum})
    assert choices[0].rank == 48
    core = {"multiple": 16, "has_core": True, "can_be_dense": False}
    choices = layer_choices(energies, (192, 400), **{**PLAIN, **core})
    assert choices[-1] == Choice(150, 150 * 592 + 150**2, 0.0)
    assert choices[1].parameters == stored_parameters((192, 400), 32, has_core=True)


def test_the_smallest_choices_where_nothing_fits():
    layers = network(3)
    assert allocate(layers, 0) == [choices[0] for choices in layers]


def test_directions_without_energy_are_not_paid_for():
    layers = [layer_choices(e, (6, 9), **PLAIN) for e in ([1, 1, 0, 0, 0, 0], [0.0] * 6)]
    assert [c.rank for c in allocate(layers, 10**6)] == [2, 1]
