"""How a dense weight is read as a matrix, or as a stack of matrices, and put back."""

import math
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class MatrixReading:
    """Reads a weight, and with it its gradient and moments, as a matrix (m, n).

    The rule, which holds unless ``order`` or ``row_dimensions`` say otherwise: the leading
    dimension is kept and makes the rows, the rest is flattened and makes the columns
    (arXiv 2401.08505, section 3).

    With groups g > 1 the weight is a stack (g, m, n): the rows are g blocks, one above the other,
    and each of them is a matrix of its own.
    """

    shape: tuple[int, ...]
    """Shape of the dense weight."""
    groups: int = 1
    """Number g of matrices."""
    order: tuple[int, ...] | None = None
    """Permutation of the dimensions that comes first; None: they stay as they are stored."""
    row_dimensions: int = 1
    """How many dimensions, after the permutation, make the rows; the others make the columns."""
    separable: bool = False
    """Whether it is a kernel (o, i, kh, kw) that :meth:`by_direction` may read."""

    def __post_init__(self) -> None:
        if sorted(self._order) != list(range(len(self.shape))):
            raise ValueError(f"order {self.order} is no permutation of the dimensions {self.shape}")
        if not 0 < self.row_dimensions < len(self.shape):
            raise ValueError(
                f"row_dimensions must leave a row and a column of {self.shape}, not be "
                f"{self.row_dimensions}"
            )
        if self.groups < 1 or self._rows % self.groups:
            raise ValueError(f"{self._rows} rows cannot be parted into {self.groups} groups")

    @property
    def is_by_direction(self) -> bool:
        """Whether it is that of :meth:`by_direction`."""
        return self.separable and self.row_dimensions == 2

    def by_direction(self, wanted: bool = True) -> "MatrixReading":
        """Return the reading of a kernel (o, i, kh, kw) as (o kh, i kw), or that by the rule.

        Each side has a direction of the kernel, as in the low-rank convolutions of Tai et al.
        (arXiv 1511.06067): W of rank r is a kernel (r, i, 1, kw), followed by one of (o, r, kh, 1).
        The matrix is nearly square, so that a core of full rank has the freedom of the kernel,
        where the rule leaves a core of o numbers squared.
        """
        if not wanted:
            return replace(self, order=None, row_dimensions=1)
        return replace(self, order=(0, 2, 1, 3), row_dimensions=2)

    def with_rows(self, m: int) -> "MatrixReading":
        """Return the reading of the same weight that factors with m rows belong to."""
        if not self.separable:
            return self
        rule = self.by_direction(False)
        return rule if m == rule.matrix_shape[0] else self.by_direction()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrix, or of each of the stack."""
        columns = self._permuted[self.row_dimensions :]
        return self._rows // self.groups, math.prod(columns)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Shape in which the weight is factorized: (m, n), or (g, m, n) if g > 1."""
        return self.matrix_shape if self.groups == 1 else (self.groups, *self.matrix_shape)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (m, n) or (g, m, n), a view where it can be."""
        if self.order is not None:
            weight = weight.permute(self.order)
        return weight.reshape(self.stack_shape)

    def to_weight(self, matrix: Tensor) -> Tensor:
        """Return a tensor (m, n) or (g, m, n) in the weight's shape, contiguous."""
        if self.order is None:
            return matrix.reshape(self.shape)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrix.reshape(self._permuted).permute(back).contiguous()

    def __str__(self) -> str:
        """Describe the reading within a sentence."""
        stack = f"{self.groups} matrices " if self.groups > 1 else "a matrix "
        return f"{stack}{self.matrix_shape}"

    @property
    def _order(self) -> tuple[int, ...]:
        return tuple(range(len(self.shape))) if self.order is None else self.order

    @property
    def _permuted(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self._order)

    @property
    def _rows(self) -> int:
        return math.prod(self._permuted[: self.row_dimensions])
