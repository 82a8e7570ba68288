"""Copies of networks, of those too that keep what a forward pass has left in them."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, known: Mapping[int, Any] | None = None) -> Model:
    """Copy a network.

    Tensors with a history, such as attention that a layer keeps to be looked at, or the weight that
    torch.nn.utils.weight_norm forms, lose it in the copy: of these copy.deepcopy makes an error.

    Args:
        model: the network; it stays as it is.
        known: what is not copied, as of copy.deepcopy: by the id of a thing, what takes its place.

    Returns:
        The copy.
    """
    memo = dict(known or {})
    for tensor in _with_a_history(model):
        memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)


def _with_a_history(model: nn.Module) -> Iterator[Tensor]:
    """Give the tensors that autograd has made and modules hold, in containers too."""
    left: list[Any] = [vars(module) for module in model.modules()]
    seen = set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value
