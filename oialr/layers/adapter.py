"""What the method has to know of a kind of layers: the protocol of adapters.

:mod:`oialr.layers.registry` knows all adapters. Everything else, from the survey to the transport
of moments and the table of costs, asks them and knows no kind by itself.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from oialr.layers import cost
from oialr.layers.base import FactoredLayer
from oialr.layers.cost import Way
from oialr.layers.reading import MatrixReading
from oialr.layers.twin import FactoredTwin
from oialr.linalg.weighting import Side
from oialr.options import Selection


class LayerAdapter:
    """One kind of layers: what it replaces, how its weight is read, and what stands in the way.

    As it is, the class fits layers with one parameter called ``weight`` that is read by the rule of
    :class:`MatrixReading`, once ``name``, ``dense_types`` and ``twin`` are given. Everything is
    overridden where a kind differs. An adapter has no state.
    """

    name: ClassVar[str]
    """What messages call the kind, such as nn.Linear."""
    dense_types: ClassVar[tuple[type[nn.Module] | str, ...]]
    """Types that are replaced, or their full names (package.module.Type) where an import of the
    package is not wanted."""
    twin: ClassVar[type[FactoredTwin]]
    """The factorized layer."""
    example: ClassVar[tuple[Any, ...]] = (1, 1)
    """Arguments that make a small layer of any of the types: whatever a layer has beyond it,
    somebody has put there, and a twin would lack it."""
    option: ClassVar[str | None] = None
    """Name of the method's option without which the kind stays full-rank; None: there is none."""
    accepts_subclasses: ClassVar[bool] = True
    """Whether a subclass that adds nothing but plain values is the same kind."""
    is_linear_map: ClassVar[bool] = True
    """Whether means of the basis stability take the weights in: not those of embeddings."""
    inputs_meet: ClassVar[Side | None] = None
    """Which side of the matrix the layer's inputs meet, W x or x^T W; None: they are not looked at,
    and ``truncation="outputs"`` cuts the weight by its own spectrum."""
    weights: ClassVar[tuple[str, ...]] = ("weight",)
    """Names of the parameters that can be factorized."""
    children: ClassVar[tuple[str, ...]] = ()
    """Names of children that the dense layer does not call but reads the weights of. A weight of
    theirs and the layer are replaced together."""

    def factorizes(self, kind: type[nn.Module], key: str, *, is_claimed: bool) -> bool:
        """Whether a parameter of a layer is one of the weights that can be factorized.

        Args:
            kind: type of the layer.
            key: name of the parameter in it.
            is_claimed: whether the layer is among the ``children`` of one that will be asked.
        """
        return key in self.weights

    def maps_linearly(self, key: str) -> bool:
        """Whether a multidimensional parameter of a layer is the weight of a linear map."""
        return self.is_linear_map

    def reading(
        self, layer: nn.Module, key: str, options: Selection | None = None
    ) -> MatrixReading:
        """Say how a multidimensional parameter of a dense layer is read.

        Asked of all of them, also of subclasses that are never factorized: they are measured.

        Args:
            layer: the dense layer.
            key: name of the parameter in it.
            options: of the method, for its selection of layers; None: the defaults.
        """
        return MatrixReading(tuple(layer.get_parameter(key).shape))

    def obstacle(self, layer: nn.Module, key: str) -> str | None:
        """Say why this layer's weight cannot be factorized, in a few words; None if it can be.

        What holds for any layer is asked elsewhere (:mod:`oialr.obstacles`): hooks, ties, dtypes,
        weights that are not trained or too small, and attributes that somebody has added.
        """
        return None

    def factorize(
        self, layer: nn.Module, key: str, factors: Sequence[Tensor]
    ) -> tuple[nn.Module, FactoredLayer]:
        """Make a layer of the same function whose weight is held as factors.

        Args:
            layer: the dense layer, unchanged by this.
            key: name of the weight.
            factors: U (m, r), core (r, r), Vh (r, n); or A (m, r), B (r, n); with a leading
                dimension g each for a stack.

        Returns:
            What takes the layer's place in the network, and what holds the factors: the same, but
            for a layer of several weights.
        """
        reading = self.reading(layer, key).with_rows(factors[0].shape[-2])
        twin = self.twin.from_dense(layer, *factors, reading=reading)
        return twin, twin

    def opened(self, layer: nn.Module) -> nn.Module:
        """Make a layer that calls its ``children``, so that they can be replaced."""
        raise NotImplementedError(f"{self.name} has children and does not open them")

    def key_of_child(self, child: str, beside: Collection[str]) -> str | None:
        """Name the weight that a child of the factorized layer holds the factors of, if it does.

        Args:
            child: name of the child.
            beside: names of all that a checkpoint stores at the layer itself.
        """
        return None

    def inputs(self, layer: nn.Module, reading: MatrixReading, x: Tensor) -> Tensor:
        """Return what meets the matrix of a weight in a call, one input in each row.

        Args:
            layer: the dense layer that is called.
            reading: of its weight.
            x: that it is called with.

        Returns:
            (b, n), or (b, m) where ``inputs_meet`` are the rows; of a stack (g, b, n) or (g, b, m).
        """
        return x.reshape(-1, x.shape[-1])

    def rows(self, layer: nn.Module, inputs: Sequence[Any], output: Any) -> int:
        """Count the rows b of a call: how often each number of the weight is multiplied.

        Args:
            layer: that was called.
            inputs: positional arguments of the call, then those by name.
            output: what it returned.
        """
        result = output[0] if isinstance(output, tuple) else output
        return int(result.numel() // result.shape[-1])

    def full_rank_multiply_adds(self, *, rows: int, m: int, n: int) -> float:
        """Multiply-adds of a training step of the dense layer; as of :mod:`oialr.layers.cost`."""
        return cost.full_rank_cost(rows=rows, m=m, n=n)

    def multiply_adds(self, way: Way, *, rows: int, m: int, n: int, r: int) -> float:
        """Multiply-adds of a training step with U core Vh, of which the core is trained."""
        return cost.multiply_adds(way, rows=rows, m=m, n=n, r=r)

    def released_multiply_adds(self, *, rows: int, m: int, n: int, r: int) -> float:
        """Multiply-adds of a training step with A B, both trained."""
        return cost.released_multiply_adds(rows=rows, m=m, n=n, r=r)

    def inner_positions(self, layer: nn.Module, reading: MatrixReading) -> int:
        """Return how many rows the product between A and B has for each row of the output."""
        return 1

    def released_margin(self, reading: MatrixReading) -> float:
        """Share of the dense layer's multiply-adds up to which A B, both trained, pays."""
        return cost.MARGIN

    def cheapest_way(self, *, rows: int, m: int, n: int, r: int) -> Way:
        """Return the way that the twin takes by itself."""
        return cost.cheapest_way(rows, m, n, r)

    def rank_pays(self, m: int, n: int, r: int) -> bool:
        """Whether a training step at this rank takes less time than the full-rank layer's."""
        return cost.rank_pays(m, n, r)

    def attributes(self, kind: type[nn.Module]) -> frozenset[str]:
        """Names of all that a new layer has: attributes, parameters, buffers and children."""
        with torch.device("meta"):
            new: Any = kind(*self.example)
        return frozenset({*new.__dict__, *new._parameters, *new._buffers, *new._modules})
