"""Networks and optimizers that are split over the processes.

They are told by the names of their types, since nothing here communicates and none
of the packages needs to be there.
"""

from torch import nn
from torch.optim import Optimizer


def check_not_sharded(model: nn.Module) -> None:
    """Reject a network whose weights no process holds whole.

    Raises:
        ValueError: FullyShardedDataParallel or fully_shard is around the network, around a part of
            it, or around what it is a part of; or a parameter is a DTensor.
    """
    modules = list(model.modules())
    kinds = {name for module in modules for name in _names(module)}
    split = None
    if "FullyShardedDataParallel" in kinds:
        split = "FullyShardedDataParallel (FSDP)"
    elif "FSDPModule" in kinds:
        split = "fully_shard (FSDP2)"
    elif any("DTensor" in _names(parameter) for parameter in model.parameters()):
        split = "DTensor"
    elif any("_is_fsdp_managed_module" in module.__dict__ for module in modules):
        split = "FullyShardedDataParallel (FSDP)"  # is around this network, and marks what is in it
    if split:
        raise ValueError(
            f"{split} splits the weights over the processes, and OIALR factorizes whole ones: use "
            "DistributedDataParallel instead"
        )


def check_not_sharding(optimizer: Optimizer) -> None:
    """Reject an optimizer that trains a part of the parameters, which it chose at its start.

    Raises:
        ValueError: it does.
    """
    if "ZeroRedundancyOptimizer" in _names(optimizer):
        raise ValueError(
            "ZeroRedundancyOptimizer chooses at its start which parameters each process trains, "
            "and the cores would never be among them: use the optimizer inside, such as AdamW; its "
            "state of a low-rank layer is small, since it is that of the core"
        )


def _names(thing: object) -> set[str]:
    """Return the names of an object's types."""
    return {kind.__name__ for kind in type(thing).__mro__}
