"""Which layers of a network produce its outputs."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from oialr.layers.registry import is_linear_map

HEADS = (
    *("head", "head_*", "*_head", "heads", "heads_*", "*_heads"),
    *("classifier", "*_classifier", "score", "qa_outputs", "cls", "lm_predictions", "logits_proj"),
)
"""Shell-style patterns of the names that timm, torchvision and transformers give to heads.

Not among them is fc, which hidden layers are called too; where it is the head, it is the last.
"""
NO_HEADS = ("pre_classifier",)


def output_layers(model: nn.Module) -> list[nn.Module]:
    """Find the layers that produce a network's outputs, by what it tells and by their names.

    They are, in this order of preference:

    1. what the network's ``get_classifier()`` returns, as of timm: one head, or several;
    2. what ``get_output_embeddings()`` returns, as of transformers, and the network's children of
       which the name is one of :data:`HEADS`;
    3. those of the one child that holds all layers, where a network only wraps another;
    4. the last linear map, in the order of the network's modules.

    Of a head of several layers it is the last one, of a list or dictionary of heads that of each,
    and of a head with heads as its children that of each of these.

    Args:
        model: the network, not necessarily dense.

    Returns:
        Modules that are linear maps; none for a network without any.
    """
    found = list(_told(model, "get_classifier"))
    if not found:
        found = [*_told(model, "get_output_embeddings"), *_named(model)]
    if found:
        return found
    holders = [child for child in model.children() if _linear_maps(child)]
    if len(holders) == 1 and not is_linear_map(model):
        return output_layers(holders[0])
    return _linear_maps(model)[-1:]


def _told(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """Yield the output layers among what a method of the network returns."""
    tell = getattr(model, method, None)
    if callable(tell):
        yield from _of_heads(tell())


def _named(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the output layers of the children with a head's name."""
    for name, child in module.named_children():
        if name not in NO_HEADS and any(fnmatchcase(name, pattern) for pattern in HEADS):
            yield from _of_heads(child)


def _of_heads(heads: Any) -> Iterator[nn.Module]:
    """Yield the output layers of one head or of several."""
    if isinstance(heads, nn.ModuleDict):
        heads = list(heads.values())
    if isinstance(heads, list | tuple | nn.ModuleList):
        for head in heads:
            yield from _of_heads(head)
    elif isinstance(heads, nn.Module):
        yield from list(_named(heads)) or _linear_maps(heads)[-1:]


def _linear_maps(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if is_linear_map(layer)]
