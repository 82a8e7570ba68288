"""Which process factorizes which layer, and which layers are split over several processes.

Pure functions on shapes: nothing here communicates. All processes compute the same plan.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oialr.placement.costs import Costs, split_limit

Factorization = Literal["auto", "owner", "heat", "replicated"]

WORTH = 0.95
"""Share of the time of whole layers within which a plan with split ones must end.

Predictions are not better than that, and splitting moves more bytes.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who factorizes what."""

    groups: list[tuple[int, ...]]
    """For each layer the processes that factorize it together; the first of them is its owner.

    Empty: every process factorizes it by itself.
    """
    order: list[int]
    """All layers, in the order in which every process works on those that are its own."""
    finish: list[float]
    """For each layer, the predicted second in which it is done."""
    loads: list[float]
    """For each process, the predicted second in which it is done."""

    @property
    def makespan(self) -> float:
        """Predicted seconds until the last process is done."""
        return max(self.loads)

    @property
    def imbalance(self) -> float:
        """Predicted seconds of the last process over the mean; 1 is balanced."""
        return self.makespan * len(self.loads) / sum(self.loads) if any(self.loads) else 1.0

    @property
    def split(self) -> list[int]:
        """The layers that are split over several processes, in the order of the work."""
        return [layer for layer in self.order if len(self.groups[layer]) > 1]


def svd_cost(shape: Sequence[int]) -> float:
    """Relative time of an SVD of a matrix (m, n), or of a stack (g, m, n): g m n min(m, n)."""
    return float(math.prod(shape)) * min(shape[-2:])


def assign(costs: Sequence[float], process_count: int) -> list[int]:
    """Give every layer an owner, the most expensive first: see :func:`_pack`.

    The longest load is at most 4/3 - 1/(3 p) times the shortest possible, that of the greedy way
    (Graham, SIAM J. Appl. Math. 17, 1969). Ties go to the earlier layer and to the process of lower
    index, so that the result is a function of the arguments alone and every process computes the
    same.

    Args:
        costs: one per layer.
        process_count: p, at least 1.

    Returns:
        The owner of each layer, in [0, p).
    """
    plan = _schedule([[cost] for cost in costs], [1] * len(costs), [0] * process_count)
    return [group[0] for group in plan.groups]


def make_plan(
    shapes: Sequence[Sequence[int]],
    nodes: Sequence[int],
    *,
    mode: Factorization,
    costs: Costs,
    can_split: bool,
) -> Plan:
    """Plan the factorization of many layers.

    "auto" splits a layer only if it alone would take longer than the balanced time, total / p, and
    only if that ends the whole clearly earlier (:data:`WORTH`). How far is decided by a target:
    each such layer gets the fewest processes with which it takes no longer than the target, then
    all are scheduled, and of all targets that make a difference the best is taken (two-phase
    scheduling of malleable tasks: Turek, Wolf and Yu, SPAA 1992). The plan is never longer than the
    greedy one of whole layers.

    Args:
        shapes: (m, n) of each layer, or (g, m, n) of a stack.
        nodes: for each process the number of its node. A group stays inside a node if it fits.
        mode: "owner": nothing is split; "heat": every layer that can be is split over as many
            processes as it can be; "replicated": every process factorizes every layer.
        costs: predict the time.
        can_split: whether the processes can share the work on a layer at all.
    """
    count = len(nodes)
    if mode == "replicated":
        finish, total = [], 0.0
        for shape in shapes:
            total += costs.seconds(shape)
            finish.append(total)
        layers = list(range(len(shapes)))
        return Plan(groups=[() for _ in layers], order=layers, finish=finish, loads=[total] * count)
    limits = [min(count, split_limit(shape)) if can_split else 1 for shape in shapes]
    times = [
        [costs.seconds(shape, g) for g in range(1, limit + 1)]
        for shape, limit in zip(shapes, limits, strict=True)
    ]
    if mode == "heat":
        return _schedule(times, limits, nodes)
    whole = _schedule(times, [1] * len(times), nodes)
    balanced = sum(options[0] for options in times) / count
    large = [i for i, options in enumerate(times) if len(options) > 1 and options[0] > balanced]
    if mode == "owner" or not large:
        return whole
    plans = []
    shortest = max(min(options) for options in times)
    targets = {time for i in large for time in times[i] if shortest <= time < whole.makespan}
    for target in sorted(targets):
        sizes = [1] * len(times)
        for i in large:
            sizes[i] = next(g for g, time in enumerate(times[i], start=1) if time <= target)
        plans.append(_schedule(times, sizes, nodes))
    best = min(plans, key=lambda plan: plan.makespan, default=whole)
    return best if best.makespan < WORTH * whole.makespan else whole


def _schedule(times: Sequence[Sequence[float]], sizes: Sequence[int], nodes: Sequence[int]) -> Plan:
    """Schedule layers whose group sizes are decided: split layers first, then whole ones.

    All processes of a group start together, so that the split layers come first, the longest first,
    and every process finds the others of its group waiting for the same layer.

    Args:
        times: for each layer its seconds with 1, 2, ... processes.
        sizes: for each layer the number of its processes.
        nodes: for each process the number of its node.
    """
    time = [options[size - 1] for options, size in zip(times, sizes, strict=True)]
    order = sorted(range(len(times)), key=lambda i: (sizes[i] == 1, -time[i]))
    loads = [0.0] * len(nodes)
    groups: list[tuple[int, ...]] = [()] * len(times)
    finish = [0.0] * len(times)
    split = [i for i in order if sizes[i] > 1]
    for i in split:
        groups[i] = _least_loaded(sizes[i], loads, nodes)
        finish[i] = max(loads[process] for process in groups[i]) + time[i]
        for process in groups[i]:
            loads[process] = finish[i]
    whole = order[len(split) :]
    for i, owner in zip(whole, _pack([time[i] for i in whole], loads), strict=True):
        groups[i] = (owner,)
        loads[owner] += time[i]
        finish[i] = loads[owner]
    return Plan(groups=groups, order=order, finish=finish, loads=loads)


def _pack(times: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Give whole layers their owners, so that the last process is done as early as possible.

    The better of two: greedily to the least loaded process, and MULTIFIT (Coffman, Garey and
    Johnson, SIAM J. Comput. 7, 1978): bisection for the shortest time in which first-fit finds room
    for all. The second serves where there are only a few layers per process.

    Args:
        times: of the layers, descending.
        loads: seconds for which each process is busy already.
    """
    heap = [(load, process) for process, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = []
    for time in times:
        load, owner = heap[0]
        owners.append(owner)
        heapq.heapreplace(heap, (load + time, owner))
    high = max(load for load, _ in heap)
    low = max([(sum(loads) + sum(times)) / len(loads), *loads, *times[:1]])
    while high > 1.01 * low:
        limit = (low + high) / 2
        fitting = _first_fit(times, loads, limit)
        if fitting is not None:
            owners, high = fitting, limit
        else:
            low = limit
    return owners


def _first_fit(times: Sequence[float], loads: Sequence[float], limit: float) -> list[int] | None:
    """Give each layer to the first process that it keeps busy no longer than the limit, if any."""
    loads = list(loads)
    owners = []
    for time in times:
        owner = next((i for i, load in enumerate(loads) if load + time <= limit), None)
        if owner is None:
            return None
        owners.append(owner)
        loads[owner] += time
    return owners


def _least_loaded(size: int, loads: Sequence[float], nodes: Sequence[int]) -> tuple[int, ...]:
    """Choose the processes that are free first: of one node, if any has so many, else of all."""
    free = sorted(range(len(loads)), key=lambda process: (loads[process], process))
    of_node: dict[int, list[int]] = {}
    for process in free:
        of_node.setdefault(nodes[process], []).append(process)
    candidates = [members[:size] for members in of_node.values() if len(members) >= size]
    chosen = min(candidates or [free[:size]], key=lambda members: loads[members[-1]])
    return tuple(sorted(chosen))
