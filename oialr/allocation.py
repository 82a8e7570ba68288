"""Ranks for a given size: which of all layers' directions are worth their parameters.

This is ours and not the paper's (arXiv 2401.08505). Of every layer the share of its spectral energy
that a rank discards is known (Eckart and Young, 1936), and so is what the rank costs in stored
parameters. The sum of the shares is minimized under a bound on the sum of the costs. Pure functions
on numbers.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oialr.schedule import minimum_rank, rounded_up


@dataclass(frozen=True)
class Choice:
    """One size that a layer can have."""

    rank: int | None
    """None: the layer is dense."""
    parameters: int
    """Stored numbers of the layer's weight."""
    lost: float
    """Share of the layer's spectral energy that is discarded, in [0, 1]."""


def stored_parameters(shape: Sequence[int], rank: int, *, has_core: bool) -> int:
    """Count the numbers that a factorized weight stores.

    Args:
        shape: (m, n) of its matrix, or (g, m, n) of a stack.
        rank: of each matrix.
        has_core: U core Vh, r (m + n) + r^2; otherwise A B, r (m + n).
    """
    *groups, m, n = shape
    return math.prod(groups) * (rank * (m + n) + (rank * rank if has_core else 0))


def layer_choices(
    energies: Sequence[float],
    shape: Sequence[int],
    *,
    minimum_rank_fraction: float,
    multiple: int,
    alignment: int = 1,
    has_core: bool,
    can_be_dense: bool,
    pays: Callable[[int], bool] = lambda rank: True,
) -> list[Choice]:
    """List the sizes that a layer can have, the smallest first; each discards less than the last.

    Args:
        energies: squared singular values at the present rank, descending; of a stack, their sums
            over the matrices.
        shape: (m, n) of the layer's matrix, or (g, m, n) of a stack.
        minimum_rank_fraction: share of min(m, n) below which no rank falls.
        multiple, alignment: see :func:`oialr.schedule.rounded_up`.
        has_core: whether a core is stored between the factors.
        can_be_dense: the dense weight takes the place of all ranks that store as much as it, or do
            not pay while others do.
        pays: whether a rank is worth its while, beside what it stores.
    """
    present, full_rank, dense = len(energies), min(shape[-2:]), math.prod(shape)
    lowest = minimum_rank(full_rank, minimum_rank_fraction)
    ranks = sorted(
        {
            min(present, rounded_up(r, full_rank=full_rank, multiple=multiple, alignment=alignment))
            for r in range(min(lowest, present), present + 1)
        }
    )
    lost = [0.0]  # by keeping all directions, all but the last, ...
    for energy in reversed(energies):
        lost.append(lost[-1] + energy)
    total = lost[-1] or 1.0
    choices = [
        Choice(
            rank,
            stored_parameters(shape, rank, has_core=has_core),
            lost[present - rank] / total,
        )
        for rank in ranks
    ]
    if can_be_dense:
        smaller = [choice for choice in choices if choice.parameters < dense]
        # The size comes first: where no rank pays, as without this rule.
        smaller = [choice for choice in smaller if pays(choice.rank or 0)] or smaller
        if len(smaller) < len(choices):
            return [*smaller, Choice(None, dense, 0.0)]
    return choices


def allocate(layers: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """Choose one size for each layer so that little is lost and the sum of all is in the budget.

    Greedy by energy per parameter over the steps from one size to the next; a step that would be
    worth more than the one before it is taken together with that. So the steps of every layer come
    in the order of their worth, and the result is that of the relaxed problem up to the first step
    that the budget has no room for (Dantzig, 1957): it loses no more than the optimum and the
    largest gain of a single step, and is optimal where the steps fill the budget exactly. What is
    left of the budget then goes to whatever fits.

    Args:
        layers: of each layer the sizes it can have, as of :func:`layer_choices`.
        budget: parameters of all layers together.

    Returns:
        The choice for each layer; the smallest of all where even they exceed the budget.
    """
    chosen = [0] * len(layers)
    left = budget - sum(choices[0].parameters for choices in layers)
    steps = sorted(
        (-_worth(choices[start], choices[end]), i, start, end)
        for i, choices in enumerate(layers)
        for start, end in useful_steps(choices)
    )
    for _, i, start, end in steps:
        needed = layers[i][end].parameters - layers[i][start].parameters
        if needed > left:
            break
        chosen[i], left = end, left - needed
    while (step := _largest_gain(layers, chosen, left)) is not None:
        i, end = step
        left -= layers[i][end].parameters - layers[i][chosen[i]].parameters
        chosen[i] = end
    return [choices[j] for choices, j in zip(layers, chosen, strict=True)]


def useful_steps(choices: Sequence[Choice]) -> list[tuple[int, int]]:
    """Join the steps between the sizes of a layer so that each is worth less than the one before.

    Returns:
        Indices of the sizes before and after each step: the lower convex hull of what is lost over
        parameters. Steps that gain nothing are left out.
    """
    hull = [0]
    for j in range(1, len(choices)):
        while len(hull) > 1 and _worth(choices[hull[-1]], choices[j]) >= _worth(
            choices[hull[-2]], choices[hull[-1]]
        ):
            hull.pop()
        hull.append(j)
    steps = itertools.pairwise(hull)
    return [(i, j) for i, j in steps if choices[j].lost < choices[i].lost]


def _worth(before: Choice, after: Choice) -> float:
    """Energy share gained per parameter."""
    return (before.lost - after.lost) / (after.parameters - before.parameters)


def _largest_gain(
    layers: Sequence[Sequence[Choice]], chosen: Sequence[int], left: int
) -> tuple[int, int] | None:
    """Return layer and size of the step that gains most of those that fit; None if none gains."""
    best, most = None, 0.0
    for i, (choices, j) in enumerate(zip(layers, chosen, strict=True)):
        limit = choices[j].parameters + left
        # The largest that fits: it loses the least.
        end = bisect_left(choices, limit + 1, key=lambda choice: choice.parameters) - 1
        if end > j and choices[j].lost - choices[end].lost > most:
            best, most = (i, end), choices[j].lost - choices[end].lost
    return best
