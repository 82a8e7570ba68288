"""What others wrap a network in, and the network inside."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inside := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inside
        else:
            return model
