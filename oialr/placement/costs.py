"""What factorizations cost, predicted from shapes. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Predicts the seconds of factorizations by one process, from measured coefficients.

    An economy SVD of a matrix with sides l >= k is a QR decomposition (and the product with Q in
    the end), of l k^2 operations, and the SVD of the triangular factor, of k^3. Split over g
    processes (tall-skinny QR), each has l / g rows, there are ceil(log2 g) rounds of merging two
    triangular factors and of applying to the rows what merged them, and the SVD of the triangular
    factor is not shared at all.

    The defaults were measured by ``mpirun -n 2 python -m app.calibrate`` with one thread per
    process on an AMD EPYC (Zen 4), torch 2.13.0.
    """

    tall: float = field(default=1.0e-10, metadata={"unit": "seconds per l k^2"})
    square: float = field(default=2.1e-10, metadata={"unit": "seconds per k^3"})
    entry: float = field(default=4.3e-9, metadata={"unit": "seconds per l k"})
    call: float = field(default=4.1e-4, metadata={"unit": "seconds per factorization"})
    merge: float = field(default=3.5e-11, metadata={"unit": "seconds per k^3 and round of merging"})
    merge_rows: float = field(
        default=8.3e-11, metadata={"unit": "seconds per (l / g) k^2 and round of merging"}
    )
    merge_call: float = field(default=2.0e-3, metadata={"unit": "seconds per round of merging"})

    def __post_init__(self) -> None:
        for coefficient in fields(self):
            value = getattr(self, coefficient.name)
            if not (isinstance(value, float | int) and 0 <= value < math.inf):
                raise ValueError(f"{coefficient.name} must be 0 or more, not {value!r}")

    def seconds(self, shape: Sequence[int], processes: int = 1) -> float:
        """Seconds of an economy SVD of a matrix (m, n), or of each of a stack (g, m, n).

        Args:
            shape: of the matrix or stack.
            processes: over which a matrix is split; its long axis has as many rows on the largest
                shard as the short one at least (see :func:`split_limit`).
        """
        *batch, m, n = shape
        long, short = max(m, n), min(m, n)
        rows = math.ceil(long / processes)
        rounds = math.ceil(math.log2(processes))
        return math.prod(batch) * (
            self.tall * rows * short**2
            + self.square * short**3
            + self.entry * rows * short
            + self.call
            + rounds * (self.merge * short**3 + self.merge_rows * rows * short**2 + self.merge_call)
        )


def split_limit(shape: Sequence[int]) -> int:
    """Largest number of processes that a layer can be split over, at least 1.

    The tall-skinny QR wants a shard of at least as many rows as the short axis has on every
    process. Stacks are small matrices: they are not split.
    """
    if len(shape) > 2:
        return 1
    return max(1, max(shape) // max(1, min(shape)))
