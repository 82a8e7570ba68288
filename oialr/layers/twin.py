"""A factorized layer that takes the place of a dense module, and gives it back."""

from copy import copy
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from oialr.layers.base import COMPILED, FACTOR_NAMES, FactoredLayer
from oialr.layers.reading import MatrixReading

_MACHINERY = (frozenset(nn.Module().__dict__) - {"training"}) | {COMPILED}
"""Parameters, buffers, children and hooks of a module."""


class FactoredTwin(FactoredLayer):
    """A factorized layer with the attributes of the dense module that it takes the place of.

    What it holds beside the weight, a bias above all, is shared: the same objects as before, so
    that the optimizer and everyone else keep their hold on them.

    It is of the dense module's type too, so that whoever asks isinstance(layer, nn.Linear), or for
    in_features or padding, gets the answer as before.
    """

    dense_type: ClassVar[type[nn.Module]]
    """Type of the dense module: nn.Linear, nn.Conv2d, ..., or a subclass that adds no method."""
    bias: nn.Parameter | None
    own = frozenset({"reading", "execution", "released"})
    """Attributes that a dense module does not have."""

    @classmethod
    def from_dense(cls, dense: nn.Module, *factors: Tensor, reading: MatrixReading) -> Self:
        """Make the twin of a dense module from the factors of its weight.

        Args:
            dense: its attributes are copied; its parameters but for the weight, its buffers and its
                children are shared.
            factors: U (m, r), core (r, r), Vh (r, n); or A (m, r), B (r, n). With groups as
                described at the base class.
            reading: of the weight, by which it was factorized.
        """
        twin: Self = _twin_type(cls, type(dense))(*factors, reading=reading)
        twin.__dict__.update(_attributes(dense))
        twin._parameters.update(_others(dense))
        _share(dense, twin)
        return twin

    def to_dense(self) -> nn.Module:
        """Make the dense module with the same function, which shares all but the weight."""
        dense = self.dense_type.__new__(self.dense_type)
        nn.Module.__init__(dense)
        attributes = _attributes(self).items()
        dense.__dict__.update({key: value for key, value in attributes if key not in self.own})
        dense.register_parameter("weight", self.dense_weight())
        dense._parameters.update(_others(self))
        _share(self, dense)
        return dense

    def plain_pair(self) -> nn.Sequential | None:
        """Make two plain layers, one after the other, with the same function: :meth:`pair`.

        They are of torch's own types, so that whoever looks for those (quantization, exporters)
        finds them. They share memory with this layer where they can.

        Returns:
            The layers; None for a kind of layer that is not two of its kind.
        """
        return None

    def plain(self, rows: int | None) -> nn.Module:
        """Make a plain module with the same function: :meth:`plain_pair` or the dense layer.

        Args:
            rows: of the input (batch times tokens, or output positions), for which the faster of
                both is made; None: the dense one.
        """
        pair = self.plain_pair() if self.pair_pays(rows) else None
        return (self.to_dense() if pair is None else pair).train(self.training)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled by what the type is made of, since it has no module to be found in."""
        factored = next(kind for kind in type(self).__mro__ if "dense_type" not in vars(kind))
        # As torch stores a module: what its compile method has made stays with the original.
        return _new, (factored, self.dense_type), self.__getstate__()


_types: dict[tuple[type, type], type] = {}


def _twin_type(factored: type, dense: type) -> Any:
    """Make the type of the twins of a dense type, such as FactoredLinear for nn.Linear; once."""
    if (factored, dense) not in _types:
        members = {"dense_type": dense}
        _types[factored, dense] = type(f"Factored{dense.__name__}", (factored, dense), members)
    return _types[factored, dense]


def _new(factored: type[FactoredTwin], dense: type[nn.Module]) -> FactoredTwin:
    kind: type[FactoredTwin] = _twin_type(factored, dense)
    return kind.__new__(kind)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes that are neither tensors nor modules."""
    return {key: copy(value) for key, value in module.__dict__.items() if key not in _MACHINERY}


def _others(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters that are neither the weight nor its factors."""
    own = {"weight", *FACTOR_NAMES} if isinstance(module, FactoredLayer) else {"weight"}
    return {key: value for key, value in module._parameters.items() if key not in own}


def _share(source: nn.Module, target: nn.Module) -> None:
    """Let a module have the buffers and children of another."""
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    target._modules.update(source._modules)
