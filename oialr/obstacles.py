"""Why a layer cannot be replaced by its factorized twin, whatever the method's options are."""

from collections import Counter
from numbers import Number
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from oialr.layers.attention import INPUT_PROJECTIONS, FactoredAttention
from oialr.layers.base import FactoredLayer
from oialr.layers.conv import FactoredConv
from oialr.layers.linear import FactoredLinear

FACTORED: dict[type[nn.Module], type[FactoredLinear] | type[FactoredConv]] = {
    nn.Linear: FactoredLinear,
    NonDynamicallyQuantizableLinear: FactoredLinear,  # out_proj of nn.MultiheadAttention
    nn.Conv1d: FactoredConv,
    nn.Conv2d: FactoredConv,
    nn.Conv3d: FactoredConv,
}
"""The twin of each layer type with one weight; nn.MultiheadAttention has FactoredAttention."""

ATTENTION = (nn.MultiheadAttention, FactoredAttention)

MASTER_DTYPES = (torch.float32, torch.float64)
"""Products of bases in half precision lose their orthogonality."""


def known_type(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return which type of :data:`FACTORED` a layer's type is, if only under another name.

    A subclass may use its weight otherwise: it is known if it adds nothing but plain values, no
    method above all.
    """
    for ancestor in kind.__mro__:
        if ancestor in FACTORED:
            return ancestor
        added = {key: value for key, value in vars(ancestor).items() if key not in vars(_Bare)}
        if not all(map(_is_plain, added.values())):
            return None
    return None


class _Bare:
    """Has what Python itself puts into every class."""

    nothing: None


class Obstacles:
    """What keeps the layers of a network from being replaced, as the network stands now."""

    def __init__(self, model: nn.Module) -> None:
        """Look at a network, which must not be changed while this object is asked."""
        self._model = model
        self._holders = Counter(
            id(parameter) for module in model.modules() for parameter in module._parameters.values()
        )
        self._attentions = {
            module.out_proj: module for module in model.modules() if type(module) in ATTENTION
        }

    def of(self, name: str) -> str | None:
        """Say why a weight cannot be factorized; None if it can be.

        Args:
            name: dense parameter name of a weight that is not factorized.
        """
        path, _, key = name.rpartition(".")
        module = self._model.get_submodule(path)
        kind, weight = type(module), module._parameters.get(key)
        known = known_type(kind)
        if weight is None:
            return f"is no parameter of {_full_name(kind)} itself"
        # Attention and its output projection are replaced together.
        attention: Any = module if key in INPUT_PROJECTIONS else self._attentions.get(module)
        if kind in ATTENTION:
            is_known = key in INPUT_PROJECTIONS
        elif known is NonDynamicallyQuantizableLinear:  # anyone else may read its weight himself
            is_known = key == "weight" and attention is not None
        else:
            is_known = key == "weight" and known is not None
        if not is_known:
            return f"{key} of {_full_name(kind)} is never factorized"
        replaced = [module] if attention is None else [attention, attention.out_proj]
        if reason := next(filter(None, map(_oddity, replaced)), None):
            return reason
        if self._model in replaced:
            return "the model itself is this layer, and nothing holds it"
        if not weight.requires_grad:
            return "not trained"
        if weight.dtype not in MASTER_DTYPES:
            return f"{weight.dtype}; weights must be float32 or float64 (try autocast)"
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            return "has hooks, which its replacement would lose"
        if self._holders[id(weight)] > 1:
            return "tied to another layer's weight"
        return None


def _oddity(module: nn.Module) -> str | None:
    """Say what somebody has put on a layer that its twin would be without; None if nothing.

    Plain values are no obstacle, since the twin takes them over.
    """
    own, kind = module.__dict__, type(module)
    if isinstance(module, FactoredLayer | FactoredAttention):
        return None  # stays what it is
    if kind is not nn.MultiheadAttention and known_type(kind) is None:
        return f"its {_full_name(kind)} would be called otherwise than by nn.MultiheadAttention"
    if any(value for key, value in own.items() if key.endswith("_hooks")):
        return "has hooks, which its replacement would lose"
    if "forward" in own:
        return "has a forward of its own, which its replacement would lose"
    usual = _usual_names(kind)
    held: dict[str, dict[str, Any]] = {
        "parameter": module._parameters,
        "buffer": module._buffers,
        "module": module._modules,
        "attribute": {key: value for key, value in own.items() if not _is_plain(value)},
    }
    for what, things in held.items():
        for key in things:
            if key not in usual:
                return f"holds the {what} {key}, which its replacement would lack"
    return None


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _usual_names(kind: Any) -> frozenset[str]:
    """Names of all that a new layer of a known type has: attributes, parameters and children."""
    sizes = (1, 1, 1) if issubclass(kind, nn.modules.conv._ConvNd) else (1, 1)
    new = kind(*sizes, device="meta")
    return frozenset({*new.__dict__, *new._parameters, *new._modules})


def _is_plain(value: Any) -> bool:
    """Whether a value is one that a twin can take over: nothing that computes or is trained."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Number | str | bytes | torch.dtype | torch.device)
