"""What becomes of an average of gradients, of their squares or of the weight when factors change.

What an optimizer accumulates linearly in the gradient is transported exactly by the map of the
gradient itself. What it accumulates of the squared gradient has no exact transport; of maps by
known matrices the expectation for uncorrelated entries is taken, which has the elementwise squares
of the matrices. Values come in the shape of the parameter that goes, and leave in that of the one
that comes; of a dense weight they are read as a matrix first, as the weight itself is. Everything
may be a stack, with a leading dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from oialr.layers.reading import MatrixReading
from oialr.linalg.svd import squares_of_b


class Transport(Protocol):
    """From a parameter to one that takes its place."""

    def linear(self, value: Tensor) -> Tensor:
        """Carry an average of the gradient over."""

    def squared(self, value: Tensor) -> Tensor:
        """Carry an average of the squared gradient over."""

    def average(self, value: Tensor) -> Tensor:
        """Carry an average of the parameter itself over."""


@dataclass(frozen=True)
class FromDense:
    """From a dense weight, of which all is read as the weight is, to what takes its place."""

    reading: MatrixReading
    """Of the weight."""
    transport: Transport
    """From the matrix (m, n) or the stack (g, m, n)."""

    def linear(self, value: Tensor) -> Tensor:
        """Carry an average of the gradient over."""
        return self.transport.linear(self.reading.to_matrix(value))

    def squared(self, value: Tensor) -> Tensor:
        """Carry an average of the squared gradient over."""
        return self.transport.squared(self.reading.to_matrix(value))

    def average(self, value: Tensor) -> Tensor:
        """Carry an average of the weight itself over."""
        return self.transport.average(self.reading.to_matrix(value))


@dataclass(frozen=True)
class FromStored:
    """From a core between bases that are stored in a lower precision, and so not orthonormal.

    W = U core Vh is Q (H core G^T) P^T with orthonormal Q and P, between which an event works. An
    average of the core is one of W only by H and G. Moments go without: what rounding has made of
    them is far below what a step makes of them.
    """

    between: Callable[[Tensor], Tensor]
    """Makes H core G^T of a core."""
    transport: Transport
    """From the core between Q and P^T."""

    def linear(self, value: Tensor) -> Tensor:
        """Carry an average of the gradient over."""
        return self.transport.linear(value)

    def squared(self, value: Tensor) -> Tensor:
        """Carry an average of the squared gradient over."""
        return self.transport.squared(value)

    def average(self, value: Tensor) -> Tensor:
        """Carry an average of the core itself over."""
        return self.transport.average(self.between(value))


@dataclass(frozen=True)
class Projection:
    """To the core L^T W R of a weight or core, whose gradient is L^T G R."""

    left: Tensor
    """L (m, r), orthonormal columns."""
    right: Tensor
    """R (n, r), orthonormal columns."""

    def linear(self, value: Tensor) -> Tensor:
        """L^T M R."""
        return self.left.mT @ value @ self.right

    def squared(self, value: Tensor) -> Tensor:
        """(L*L)^T v (R*R), the expectation of (L^T G R)^2 for uncorrelated entries of G."""
        return self.left.square().mT @ value @ self.right.square()

    def average(self, value: Tensor) -> Tensor:
        """L^T W R: the closest that the bases can hold."""
        return self.linear(value)


@dataclass(frozen=True)
class DenseToA:
    """From a dense weight W to A, where W is replaced by A B; the gradient is G B^T."""

    A: Tensor
    """U diag(s)^(1/2) (m, r)."""
    B: Tensor
    """diag(s)^(1/2) Vh (r, n)."""
    kept: Literal["A", "B"] = "B"
    """The factor that an average of the weight has as it is, the other one being the best for it.
    Of W itself that leaves A B: A A^+ W is W_r but where W was cut for inputs that meet its rows,
    and W B^+ B but where it was cut for inputs that meet its columns."""

    def linear(self, value: Tensor) -> Tensor:
        """M B^T, exactly."""
        return value @ self.B.mT

    def squared(self, value: Tensor) -> Tensor:
        """Return v (B*B)^T, right in expectation for uncorrelated entries of the gradient."""
        return value @ self.B.square().mT

    def average(self, value: Tensor) -> Tensor:
        """W B^+: with B the closest product to W; A itself where B holds what is left."""
        if self.kept == "A":
            return self.A.clone()
        energy = self.B.square().sum(-1, keepdim=True)  # s, by rows
        return value @ (self.B * _inverse(energy)).mT


@dataclass(frozen=True)
class DenseToB:
    """From a dense weight W to B, where W is replaced by A B; the gradient is A^T G."""

    A: Tensor
    """U diag(s)^(1/2) (m, r)."""
    B: Tensor
    """diag(s)^(1/2) Vh (r, n)."""
    kept: Literal["A", "B"] = "B"
    """As of :class:`DenseToA`."""

    def linear(self, value: Tensor) -> Tensor:
        """A^T M, exactly."""
        return self.A.mT @ value

    def squared(self, value: Tensor) -> Tensor:
        """(A*A)^T v, right in expectation for uncorrelated entries of the gradient."""
        return self.A.square().mT @ value

    def average(self, value: Tensor) -> Tensor:
        """B itself, where A holds what is left of the average; otherwise A^+ W."""
        if self.kept == "B":
            return self.B.clone()
        energy = self.A.square().sum(-2)[..., None]  # s, by rows of A^T
        return (self.A.mT * _inverse(energy)) @ value


@dataclass(frozen=True)
class CoreToFactors:
    """From a core = L diag(s) R^T to A = U L diag(s)^(1/2) and B = diag(s)^(1/2) R^T Vh.

    A core saw the gradient within its bases alone, U M Vh. What of that lies within the directions
    that are left, U L (L^T M R) R^T Vh, is carried over by the maps of A and B. Without a cut that
    is all of it; a cut drops what is outside of them on either side, though the factors can learn
    there: first moments forget in some ten steps anyway, in which the release's warm-up falls.
    Of the square it saw a share of about r / m (for A; r / n for B), which the squares of U and Vh
    would spread over all rows: second moments too small by that share, and Adam's first steps too
    large. So the squares are weighted to a sum of one in every row (column): each entry is a mean
    of the core's second moments times s, which is right where these are alike.
    """

    U: Tensor
    """(m, r0), before the last rotation, as is Vh (r0, n)."""
    Vh: Tensor
    left: Tensor
    """L (r0, r)."""
    s: Tensor
    """(r,)."""
    right: Tensor
    """R (r0, r)."""

    @property
    def s_of_b(self) -> Tensor:
        """Of B the squared singular values (r,): s but where that is 0."""
        return squares_of_b(self.s)

    def form_a(self) -> Tensor:
        """U L diag(s)^(1/2) (m, r)."""
        return (self.U @ self.left) * self.s.sqrt()[..., None, :]

    def form_b(self) -> Tensor:
        """diag(s)^(1/2) R^T Vh (r, n)."""
        return self.s_of_b.sqrt()[..., :, None] * (self.right.mT @ self.Vh)

    @property
    def core(self) -> Projection:
        """From the core to the rotated one."""
        return Projection(self.left, self.right)


@dataclass(frozen=True)
class CoreToA:
    """The part of A of :class:`CoreToFactors`."""

    factors: CoreToFactors

    def linear(self, value: Tensor) -> Tensor:
        """U L (L^T M R) diag(s)^(1/2)."""
        f = self.factors
        return f.U @ (f.left @ f.core.linear(value)) * f.s_of_b.sqrt()[..., None, :]

    def squared(self, value: Tensor) -> Tensor:
        """Weighted means over the rows of the core's, times s."""
        f = self.factors
        return row_weights(f.U @ f.left) @ f.core.squared(value) * f.s_of_b[..., None, :]

    def average(self, value: Tensor) -> Tensor:
        """U c R diag(s)^(-1/2): with B the closest product to U c Vh."""
        f = self.factors
        return f.U @ (value @ f.right) * _inverse(f.s_of_b).sqrt()[..., None, :]


@dataclass(frozen=True)
class CoreToB:
    """The part of B of :class:`CoreToFactors`."""

    factors: CoreToFactors

    def linear(self, value: Tensor) -> Tensor:
        """diag(s)^(1/2) (L^T M R) R^T Vh."""
        f = self.factors
        return f.s.sqrt()[..., :, None] * (f.core.linear(value) @ f.right.mT @ f.Vh)

    def squared(self, value: Tensor) -> Tensor:
        """Weighted means over the columns of the core's, times s."""
        f = self.factors
        weights = row_weights((f.right.mT @ f.Vh).mT).mT
        return f.s[..., :, None] * (f.core.squared(value) @ weights)

    def average(self, value: Tensor) -> Tensor:
        """B itself: A holds what is left of the average."""
        return self.factors.form_b()


@dataclass(frozen=True)
class CoreToDense:
    """From a core back to the dense weight U core Vh."""

    U: Tensor
    """(m, r)."""
    Vh: Tensor
    """(r, n)."""
    reading: MatrixReading
    """Of the dense weight."""

    def linear(self, value: Tensor) -> Tensor:
        """U M Vh: all that the core saw."""
        return self.reading.to_weight(self.U @ value @ self.Vh)

    def squared(self, value: Tensor) -> Tensor:
        """Weighted means of the core's, which is right where these are alike."""
        weighted = row_weights(self.U) @ value @ row_weights(self.Vh.mT).mT
        return self.reading.to_weight(weighted)

    def average(self, value: Tensor) -> Tensor:
        """U c Vh, exactly."""
        return self.linear(value)


def row_weights(U: Tensor) -> Tensor:
    """Return the squares of U (m, r), with a sum of one in every row; alike where a row is zero."""
    weights = U.square() + torch.finfo(U.dtype).eps ** 2
    return weights / weights.sum(-1, keepdim=True)


def _inverse(s: Tensor) -> Tensor:
    """1 / s, and 0 where s is 0."""
    return torch.where(s > 0, 1 / s, torch.zeros_like(s))
