"""A factorized layer that takes the place of a dense module, and gives it back."""

from copy import copy
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from oialr.layers.base import FactoredLayer

_MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
"""Parameters, buffers, children and hooks of a module."""


class FactoredTwin(FactoredLayer):
    """A factorized layer with the attributes of the dense module that it takes the place of.

    It is of the dense module's type too, so that whoever asks isinstance(layer, nn.Linear), or for
    in_features or padding, gets the answer as before.
    """

    dense_type: ClassVar[type[nn.Module]]
    """Type of the dense module: nn.Linear, nn.Conv2d, ..., or a subclass that adds no method."""
    _own = frozenset({"weight_shape", "execution", "released"})
    """Attributes that a dense module does not have."""

    @classmethod
    def from_dense(cls, dense: nn.Module, *factors: Tensor) -> Self:
        """Make the twin of a dense module from the factors of its weight.

        Args:
            dense: its attributes are copied, its bias is shared.
            factors: U (m, r), core (r, r), Vh (r, n); or A (m, r), B (r, n). With groups as
                described at the base class.
        """
        weight, bias = dense.weight, dense.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        twin: Self = _twin_type(cls, type(dense))(*factors, weight_shape=weight.shape, bias=bias)
        twin.__dict__.update(_attributes(dense))
        return twin

    def to_dense(self) -> nn.Module:
        """Make the dense module with the same function and the same bias object."""
        dense = self.dense_type.__new__(self.dense_type)
        nn.Module.__init__(dense)
        attributes = _attributes(self).items()
        dense.__dict__.update({key: value for key, value in attributes if key not in self._own})
        dense.register_parameter("weight", nn.Parameter(self.form_weight().detach()))
        dense.register_parameter("bias", self.bias)
        return dense

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled by what the type is made of, since it has no module to be found in."""
        factored = next(kind for kind in type(self).__mro__ if "dense_type" not in vars(kind))
        return _new, (factored, self.dense_type), self.__dict__


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
