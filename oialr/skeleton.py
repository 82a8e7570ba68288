"""A network without its numbers: the dense names and shapes, at no cost in memory."""

from itertools import chain

import torch
from torch import nn

from oialr.convert import get_layer, to_dense
from oialr.copies import copied
from oialr.layers.base import FactoredLayer


def dense_skeleton(model: nn.Module) -> nn.Module:
    """Make a copy of a network on the meta device, with dense layers for all factorized ones."""
    memo: dict[int, torch.Tensor] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return to_dense(copied(model, memo))


def factored_weights(model: nn.Module) -> dict[str, FactoredLayer]:
    """Find the factorized layers of a network by the dense parameter names of their weights."""
    layers = {}
    for name, parameter in dense_skeleton(model).named_parameters(remove_duplicate=False):
        layer = get_layer(model, name) if parameter.dim() >= 2 else None
        if isinstance(layer, FactoredLayer):
            layers[name] = layer
    return layers
