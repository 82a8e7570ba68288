"""What frameworks put around a network and its optimizer.

Wrappers are told by the names of their types, since none of the packages needs to be there.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

INSIDE = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",  # of torch.compile
}
"""The attribute that holds the network, by the name of the wrapper's type."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside whatever is around it, such as DistributedDataParallel."""
    while inside := _name_inside(model):
        model = getattr(model, inside)
    return model


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside that of accelerate."""
    while "AcceleratedOptimizer" in _names(optimizer):
        inside: Any = optimizer
        optimizer = inside.optimizer
    return optimizer


def _name_inside(model: nn.Module) -> str | None:
    return next((INSIDE[name] for name in _names(model) if name in INSIDE), None)


def _names(thing: object) -> list[str]:
    """Return the names of an object's types."""
    return [kind.__name__ for kind in type(thing).__mro__]
