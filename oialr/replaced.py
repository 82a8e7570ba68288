"""What becomes of a layer that another has replaced, where somebody holds it after all."""

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from oialr.layers.base import FactoredLayer


def retire(layer: nn.Module, name: str, weights: Sequence[str]) -> None:
    """Take the weights from a layer that has been replaced in the network.

    Somebody may hold it still: a list, an attribute that is no child, a bound method. Its weights
    would stand still from now on, and nobody would notice; so reading them, and with it calling the
    layer, raises an error that names it.

    Args:
        layer: changed in place: it gets a type of its own, a subclass of what it was.
        name: of the layer in the network.
        weights: the attributes that it loses, parameters or formed from them.
    """
    for key in weights:
        layer._parameters.pop(key, None)
    for key, child in list(layer._modules.items()):
        if isinstance(child, FactoredLayer):
            del layer._modules[key]
    layer.__dict__["_replaced_name"] = name
    layer.__class__ = _replaced_type(type(layer), tuple(weights))


_types: dict[tuple[type, tuple[str, ...]], type] = {}


def _replaced_type(kind: type, weights: tuple[str, ...]) -> Any:
    """Make the type of the layers of a kind that have been replaced; once."""
    if (kind, weights) not in _types:
        members: dict[str, Any] = {
            "__reduce__": lambda self: (_new, (kind, weights), self.__dict__),
            **dict.fromkeys(weights, property(_raise)),
        }
        _types[kind, weights] = type(f"Replaced{kind.__name__}", (kind,), members)
    return _types[kind, weights]


def _new(kind: type[nn.Module], weights: tuple[str, ...]) -> nn.Module:
    replaced: type[nn.Module] = _replaced_type(kind, weights)
    return replaced.__new__(replaced)


def _raise(layer: nn.Module) -> NoReturn:
    # No AttributeError, which nn.Module and hasattr would swallow.
    raise RuntimeError(
        f"{layer._replaced_name or 'the model'} was replaced in the network by another layer, and "
        "this one from before has lost its weight: whoever holds it (a list, an attribute that is "
        "no child, a bound method) must take it from the network anew, or oialr.exclude must name "
        "it"
    )
