"""Which process factorizes which layer. Pure functions on shapes: nothing here communicates."""

from collections.abc import Sequence


def svd_cost(m: int, n: int) -> float:
    """Relative time of an economy SVD of an (m, n) matrix: m n min(m, n)."""
    return float(m) * n * min(m, n)


def assign(costs: Sequence[float], process_count: int) -> list[int]:
    """Give every layer an owner: greedily, the most expensive first, to the least loaded process.

    The longest load is at most 4/3 - 1/(3 p) times the shortest possible (Graham, SIAM J. Appl.
    Math. 17, 1969). Ties go to the earlier layer and to the process of lower index, so that the
    result is a function of the arguments alone and every process computes the same.

    Args:
        costs: one per layer.
        process_count: p, at least 1.

    Returns:
        The owner of each layer, in [0, p).
    """
    loads = [0.0] * process_count
    owners = [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        owner = min(range(process_count), key=lambda process: loads[process])
        owners[layer] = owner
        loads[owner] += costs[layer]
    return owners
