"""What every factorized layer has in common: a weight held as U core Vh, or as A B."""

from typing import Any

import torch
from torch import Tensor, nn

from oialr.layers.cost import Way, cheapest_way, pair_pays
from oialr.layers.formed import guarded_weight
from oialr.layers.reading import MatrixReading
from oialr.options import Execution

FROZEN = ("U", "core", "Vh")
"""Names of the factors of which the core alone is trained."""
RELEASED = ("A", "B")
"""Names of the factors after a release, which are both trained."""
FACTOR_NAMES = FROZEN + RELEASED
COMPILED = "_compiled_call_impl"
"""The attribute that a module's compile method sets: it calls that very module, and no copy."""
HOOKS = frozenset(key for key in nn.Module().__dict__ if "hook" in key)
"""Attributes of a module that hold what somebody has hung on it."""


class FactoredLayer(nn.Module):
    """A layer whose weight, read as a matrix W (m, n), is held as factors of rank r.

    How it is read is the matter of :class:`MatrixReading`: in most kinds of layers the leading
    dimension makes the rows.

    At first W = U core Vh.

    U (m, r) and Vh (r, n) are parameters without gradient: they are saved and moved with the
    module, yet DistributedDataParallel sends neither them (they would be sent at every forward if
    they were buffers) nor a gradient for them. The core (r, r) is trained, and so is the bias.

    After a release W = A B: A (m, r) and B (r, n) take the place of the three, and both are
    trained.

    A weight may also be read as a stack of g > 1 matrices, one for each group of a convolution.
    All of them have the same rank, and every factor has a leading dimension g: U (g, m / g, r),
    core (g, r, r), Vh (g, r, n), and so on.

    U and Vh may be stored in a lower precision than the core (``frozen_dtype``): ``factors`` are
    what is stored, ``operands`` what an input is multiplied by.

    The concrete layers say how the weight is applied; for every shape of the input they choose the
    cheapest way (:mod:`oialr.layers.cost`) unless ``execution`` names one.
    """

    execution: Execution = "auto"
    """How the weight is applied; "auto": the cheapest way for the present rank and input."""

    released: bool
    """Whether the weight is held as A B, and not as U core Vh."""
    U: nn.Parameter
    core: nn.Parameter
    Vh: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter
    reading: MatrixReading
    """How the dense weight is read."""

    __repr__ = nn.Module.__repr__  # not that of a dense layer, which knows nothing of a rank

    def __init__(self, *factors: Tensor, reading: MatrixReading) -> None:
        nn.Module.__init__(self)  # a twin's next base is a dense layer, whose weight it has not
        self.reading = reading
        self.set_factors(*factors)

    cheapest_way = staticmethod(cheapest_way)
    """Returns the way of the least cost for some rows and a matrix (m, n) of rank r."""

    def configure(self, *, execution: Execution, recompute_convolutions: bool) -> None:
        """Take the method's options for the execution of layers."""
        self.execution = execution

    @property
    def rank(self) -> int:
        """Rank r of the factorization."""
        return self.factors[-1].shape[-2]

    @property
    def groups(self) -> int:
        """Number g of matrices that the weight is read as."""
        last = self.factors[-1]
        return last.shape[0] if last.dim() == 3 else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight read as a matrix: (m, n), or (m / g, n) of each group's."""
        return self.factors[0].shape[-2], self.factors[-1].shape[-1]

    def way(self, rows: int, m: int | None = None) -> Way:
        """Return how the weight is applied to an input.

        Args:
            rows: of the input (batch times positions).
            m: rows of the weight that the input meets; None: all.
        """
        if self.execution != "auto":
            return self.execution
        if self.released:
            return "factored"
        height, n = self.matrix_shape
        return self.cheapest_way(rows, height if m is None else m, n, self.rank)

    @property
    def weight(self) -> Tensor:
        """The dense weight, formed anew at every access, to be read: writing to it raises."""
        return guarded_weight(self.form_weight())

    def form_weight(self) -> Tensor:
        """Form the dense weight."""
        left, *others = self.operands
        for factor in others:
            left = left @ factor
        return self.reading.to_weight(left)

    def dense_weight(self) -> nn.Parameter:
        """Make a parameter of the dense weight, trained if this layer is."""
        return nn.Parameter(self.form_weight().detach(), self.trained.requires_grad)

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """U, core and Vh, or A and B, whose product is the weight."""
        return (self.A, self.B) if self.released else (self.U, self.core, self.Vh)

    @property
    def trained(self) -> nn.Parameter:
        """What is trained of the weight, and nothing else before a release: the core, or A."""
        return self.A if self.released else self.core

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The factors as an input is multiplied by them, all in the dtype of what is trained.

        Under autocast to the dtype that the frozen ones are stored in they are left as they are.
        Frozen factors take no gradient, even where somebody lets all parameters take one: the
        optimizer, which does not hold them, would never clear it.
        """
        factors, like = self._frozen_factors(), self.trained
        if all(factor.dtype == like.dtype for factor in factors):
            return factors
        device = like.device.type
        if (
            torch.amp.is_autocast_available(device)  # not on the meta device
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) == factors[-1].dtype
        ):
            return factors
        return tuple(factor.to(like.dtype) for factor in factors)

    def _frozen_factors(self) -> tuple[Tensor, ...]:
        """Return the factors, of which none but the trained ones takes a gradient."""
        if self.released or not (self.U.requires_grad or self.Vh.requires_grad):
            return self.factors
        return self.U.detach(), self.core, self.Vh.detach()

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (m, r), B (r, n) whose product is the weight: U core and Vh before a release.

        With groups as described at the class. The core is merged in float64, so that only the
        rounding of the result is left.
        """
        if self.released:
            return self.A.detach(), self.B.detach()
        dtype = self.core.dtype
        A = self.U.detach().double() @ self.core.detach().double()
        return A.to(dtype), self.Vh.detach().to(dtype)

    @torch.no_grad()
    def store_frozen(self, dtype: torch.dtype | None) -> None:
        """Round the frozen factors to a dtype, in which they are stored; the same Parameters.

        Args:
            dtype: None: that of the core. After a release there is nothing that is frozen.
        """
        if self.released:
            return
        for factor in (self.U, self.Vh):
            factor.data = factor.data.to(dtype or self.core.dtype)

    def pair_pays(self, rows: int | None) -> bool:
        """Whether :meth:`pair` is applied faster than the dense weight, without a backward.

        Args:
            rows: of the input (batch times tokens, or output positions); None: say no.
        """
        if rows is None:
            return False
        m, n = self.matrix_shape
        return pair_pays(m, n, self.rank, rows=rows, groups=self.groups)

    def set_factors(self, *factors: Tensor) -> None:
        """Replace the factors by others of any rank: new Parameter objects.

        Args:
            factors: U (m, r), core (r, r), Vh (r, n); or A (m, r), B (r, n), which release the
                layer. With groups as described at the class. What is a Parameter already stays the
                object that it is.
        """
        others = {k: p for k, p in self._parameters.items() if k not in FACTOR_NAMES}
        self._parameters.clear()
        self.released = len(factors) == len(RELEASED)
        for name, factor in zip(RELEASED if self.released else FROZEN, factors, strict=True):
            is_trained = name not in {"U", "Vh"}
            self.register_parameter(
                name,
                factor if isinstance(factor, nn.Parameter) else nn.Parameter(factor, is_trained),
            )
        self._parameters.update(others)  # last, in whatever way the layer came to its factors


def hooks_of(layer: nn.Module) -> dict[str, Any]:
    """Return what holds a layer's hooks: the objects themselves, which their handles know."""
    return {key: value for key, value in layer.__dict__.items() if key in HOOKS}


class FactoredParts(nn.Module):
    """A layer of several weights, each of which may be held as factors by a child."""

    def part(self, key: str) -> FactoredLayer | None:
        """Return what holds the factors of a weight; None if the weight is dense."""
        raise NotImplementedError

    def densify(self, key: str) -> nn.Parameter:
        """Hold a factorized weight as a dense one again, and return that."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """Make the dense module of the same function."""
        raise NotImplementedError

    def plain(self, rows: int | None) -> nn.Module:
        """Make a module of the same function in which no weight is factorized, its children too.

        Args:
            rows: of the input, for which the faster of two layers and a dense one is made; None:
                the dense one.
        """
        raise NotImplementedError
