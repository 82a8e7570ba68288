"""Singular values of many matrices, computed by their owners and known to all processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oialr.placement.assignment import assign, svd_cost
from oialr.placement.processes import Processes


def gather_energies(
    shapes: Sequence[Sequence[int]], get_matrix: Callable[[int], Tensor], processes: Processes
) -> list[list[float] | None]:
    """Return the squared singular values of matrices that all processes hold. A collective call.

    They are the eigenvalues of the smaller Gram matrix, in float64: what is lost of small ones has
    no weight in a sum of squares, and an SVD would take several times as long.

    Args:
        shapes: (m, n) of each matrix, or (g, m, n) of a stack.
        get_matrix: returns the matrix of an index.
        processes: share the work.

    Returns:
        Of each matrix min(m, n) values, descending, the same on all processes; of a stack their
        sums over the matrices. None where a value is not finite or nothing converges.
    """
    owners = assign(list(map(svd_cost, shapes)), processes.count)
    mine = {
        i: _energies(get_matrix(i)) for i, owner in enumerate(owners) if owner == processes.index
    }
    gathered = processes.gather(mine)
    return [gathered[owner][i] for i, owner in enumerate(owners)]


def _energies(matrix: Tensor) -> list[float] | None:
    stack = matrix.detach().double()
    gram = stack @ stack.mT if stack.shape[-2] <= stack.shape[-1] else stack.mT @ stack
    try:
        values = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)
    except torch.linalg.LinAlgError:
        return None
    summed = values.reshape(-1, values.shape[-1]).sum(0)
    return summed.tolist() if summed.isfinite().all() else None
