"""Why a layer cannot be replaced by its factorized twin, whatever the method's options are."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from oialr.layers.base import FACTOR_NAMES, FactoredLayer, FactoredParts
from oialr.layers.registry import adapter_of, claims, is_plain, kind_of
from oialr.layers.twin import FactoredTwin
from oialr.naming import full_name

MASTER_DTYPES = (torch.float32, torch.float64)
"""Products of bases in half precision lose their orthogonality."""


class Obstacles:
    """What keeps the layers of a network from being replaced, as the network stands now."""

    def __init__(self, model: nn.Module) -> None:
        """Look at a network, which must not be changed while this object is asked."""
        self._model = model
        self._holders = Counter(
            id(parameter) for module in model.modules() for parameter in module._parameters.values()
        )
        self._sharing = _sharing_memory(model.parameters())
        self._claims = claims(model)

    def of(self, name: str, *, to_train: bool = True) -> str | None:
        """Say why a weight cannot be factorized; None if it can be.

        Args:
            name: dense parameter name of a weight that is not factorized.
            to_train: the factors are to be trained, and not only to hold stored values.
        """
        path, _, key = name.rpartition(".")
        module = self._model.get_submodule(path)
        kind, weight = type(module), module._parameters.get(key)
        if isinstance(module, FactoredLayer):
            return "low-rank already"
        if weight is None:
            return f"is no parameter of {full_name(kind)} itself"
        adapter, claim = adapter_of(kind), self._claims.get(module)
        if adapter is None or not adapter.factorizes(kind, key, is_claimed=claim is not None):
            return f"{key} of {full_name(kind)} is never factorized"
        # A layer and the children whose weights it reads without a call are replaced together.
        whole = claim[1] if claim else module
        parts = [whole.get_submodule(child) for child in kind_of(whole).children]
        replaced = [whole, *parts]
        if reason := next((x for part in replaced if (x := _oddity(part, whole))), None):
            return reason
        if self._model in replaced:
            return "the model itself is this layer, and nothing holds it"
        if to_train and not weight.requires_grad:
            return "not trained"
        if to_train and weight.dtype not in MASTER_DTYPES:
            return f"{weight.dtype}; weights must be float32 or float64 (try autocast)"
        if reason := lost_hooks(weight):
            return reason
        if self._holders[id(weight)] > 1:
            return "tied to another layer's weight"
        if id(weight) in self._sharing:
            return "shares memory with another parameter"
        return adapter.obstacle(module, key)


def _sharing_memory(parameters: Iterable[nn.Parameter]) -> set[int]:
    """Return the ids of parameters that look at memory of another one, such as its transpose.

    Parts of one buffer that lie behind each other share nothing.
    """
    by_storage: dict[int, list[tuple[int, int, int]]] = {}
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or not parameter.numel():
            continue  # such as of fully_shard
        start = int(parameter.storage_offset())
        sides = zip(parameter.shape, parameter.stride(), strict=True)
        last = start + sum((size - 1) * int(stride) for size, stride in sides)
        key = parameter.untyped_storage()._cdata
        by_storage.setdefault(key, []).append((start, last, id(parameter)))
    sharing = set()
    for parts in by_storage.values():
        end, holder = -1, 0
        for start, last, name in sorted(parts):
            if start <= end:
                sharing |= {name, holder}
            if last > end:
                end, holder = last, name
    return sharing


def lost_hooks(parameter: nn.Parameter) -> str | None:
    """Say that somebody has hung on a parameter what another one in its place would be without.

    Those of DistributedDataParallel are elsewhere: it finds new parameters by itself.
    """
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "has hooks, which its replacement would lose"
    return None


def _oddity(module: nn.Module, whole: nn.Module) -> str | None:
    """Say what somebody has put on a layer that its twin would be without; None if nothing.

    Plain values are no obstacle, since the twin takes them over.

    Args:
        module: the layer.
        whole: itself, or the one whose child it is and that reads its weights.
    """
    own, kind = module.__dict__, type(module)
    if isinstance(module, FactoredLayer | FactoredParts):
        return None  # stays what it is
    if (adapter := adapter_of(kind)) is None:
        return f"its {full_name(kind)} would be called otherwise than by {kind_of(whole).name}"
    if any(value for key, value in own.items() if key.endswith("_hooks")):
        return "has hooks, which its replacement would lose"
    if "forward" in own:
        return "has a forward of its own, which its replacement would lose"
    usual = adapter.attributes(kind)
    held: dict[str, dict[str, Any]] = {
        "parameter": module._parameters,
        "buffer": module._buffers,
        "module": module._modules,
        "attribute": {key: value for key, value in own.items() if not is_plain(value)},
    }
    for what, things in held.items():
        for key in things:
            if key not in usual:
                return f"holds the {what} {key}, which its replacement would lack"
    taken = {*dir(getattr(adapter, "twin", FactoredParts)), *FactoredTwin.own}
    if names := sorted(own.keys() & taken - usual):
        return f"its attribute {names[0]} has the name of one that its replacement has"
    if names := sorted(own["_parameters"].keys() & set(FACTOR_NAMES)):
        return f"its parameter {names[0]} has the name of a factor"
    return None
