"""Networks and optimizers that are split over the processes.

They are told by the names of their types, since none of the packages needs to be there. What is
low-rank may be split by torch's fully_shard and trained on; an event needs whole weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.averages import averages_aside
from oialr.naming import names_of
from oialr.wrappers import unwrapped, unwrapped_optimizer


def taken_whole(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Take network and optimizer out of what is around them, for the method to begin with.

    Raises:
        ValueError: no process holds the weights whole: FullyShardedDataParallel or fully_shard is
            around the network, around a part of it, or around what it is a part of; or a parameter
            is a DTensor; or the optimizer trains a part of them, which it chose at its start.
    """
    network, inner = unwrapped(model), unwrapped_optimizer(optimizer)
    if split := split_by(model) or split_by(network):
        raise ValueError(
            f"{split} splits the weights over the processes, and OIALR factorizes whole ones: make "
            "OIALR before, and shard the network after its last event, in `with method.sharding():`"
            "; what is low-rank already needs no OIALR to be trained on; or use "
            "DistributedDataParallel"
        )
    if "ZeroRedundancyOptimizer" in names_of(inner):
        raise ValueError(
            "ZeroRedundancyOptimizer chooses at its start which parameters each process trains, "
            "and the cores would never be among them: use the optimizer inside, such as AdamW; its "
            "state of a low-rank layer is small, since it is that of the core"
        )
    return network, inner


def check_can_change(model: nn.Module, step: int) -> None:
    """Reject an event of a network that has been sharded since the method began.

    Raises:
        ValueError: it has.
    """
    if split := split_by(model):
        raise ValueError(
            f"an event is due after step {step}, and needs whole weights, which {split} splits "
            "over the processes: shard the network after its last event (delay, update_interval "
            "and release say when that is), or call method.step() no more once it is sharded"
        )


def check_is_followed(model: nn.Module, optimizer: Optimizer) -> None:
    """Reject an optimizer that a sharded network has left behind: it steps for nobody.

    Raises:
        ValueError: it holds no parameter of the network any more.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) in held for parameter in model.parameters()):
        return
    if split := split_by(model):
        raise ValueError(
            f"{split} has replaced the network's parameters, and the optimizer whose steps OIALR "
            "counts holds none of them: shard the network in `with method.sharding():`, so that "
            "the optimizer follows, or train on without OIALR"
        )


def check_can_take_forms(model: nn.Module, difference: str) -> None:
    """Reject stored weights that would change the forms of a sharded network.

    Args:
        model: the network.
        difference: what would change.

    Raises:
        ValueError: it is sharded.
    """
    if split := split_by(model):
        raise ValueError(
            f"{difference}, and {split} has split the weights over the processes: give the network "
            "the stored ranks before it is sharded; nothing has been loaded"
        )


def whole(model: nn.Module) -> nn.Module:
    """Return the network inside whatever is around it; reject one that no process holds whole.

    Raises:
        ValueError: it is sharded.
    """
    network = unwrapped(model)
    if split := split_by(model) or split_by(network):
        raise ValueError(
            f"{split} splits the weights over the processes, and whole ones are needed here: "
            "gather them by torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "full_state_dict=True, and load them into a network that is not sharded"
        )
    return network


@contextmanager
def followed(
    model: nn.Module,
    optimizer: Optimizer,
    exchanges: Iterable[Callable[[Mapping[int, nn.Parameter]], None]] = (),
) -> Iterator[None]:
    """Let an optimizer hold the parameters that somebody makes of a network's meanwhile.

    torch's fully_shard replaces the parameters, and an optimizer from before would train what is
    there no more. Here it keeps its groups, and its state is split as the parameters are, from what
    each process holds: nothing is sent. Pending gradients are dropped.

    Args:
        model: the network.
        optimizer: of its parameters; changed in place.
        exchanges: told at the end, of each parameter that was replaced, by its id, the new one; the
            old one is still there.
    """
    before = dict(model.named_parameters())
    yield
    after = dict(model.named_parameters())
    replaced = {
        id(old): after[name] for name, old in before.items() if after.get(name, old) is not old
    }
    for group in optimizer.param_groups:
        group["params"][:] = [replaced.get(id(p), p) for p in group["params"]]
    for old in before.values():
        if id(old) in replaced and old in optimizer.state:
            new, state = replaced[id(old)], optimizer.state.pop(old)
            optimizer.state[new] = {k: _split_like(v, old, new) for k, v in state.items()}
    aside = averages_aside(optimizer)
    for old in before.values():
        if id(old) in replaced and old in aside:
            new, kept = replaced[id(old)], aside.pop(old)
            aside[new] = replace(kept, average=_split_like(kept.average, old, new))
    for exchange in exchanges:
        exchange(replaced)


def is_made_up(optimizer: Optimizer, options: Mapping[str, Any]) -> bool:
    """Whether a step of an optimizer is none of the training.

    torch.distributed.checkpoint fills the state of an optimizer that has none by a step of its own,
    with learning rates of 0, at which nothing moves.

    Args:
        optimizer: which has stepped.
        options: that its step was called with, by name.
    """
    is_theirs = "closure" in options and options["closure"] is None
    return is_theirs and not any(group.get("lr") for group in optimizer.param_groups)


def _split_like(value: Any, old: nn.Parameter, new: Any) -> Any:
    """Split an optimizer's average of a parameter as the parameter is; leave all else."""
    if not isinstance(value, Tensor) or value.shape != old.shape or "DTensor" not in names_of(new):
        return value
    from torch.distributed.tensor import distribute_tensor

    split = distribute_tensor(value, new.device_mesh, new.placements, src_data_rank=None)
    return split.to(new.device)


def split_by(model: nn.Module) -> str | None:
    """Return what splits the weights of a network, if something does."""
    modules = list(model.modules())
    kinds = {name for module in modules for name in names_of(module)}
    if "FullyShardedDataParallel" in kinds:
        return "FullyShardedDataParallel (FSDP)"
    if "FSDPModule" in kinds:
        return "fully_shard (FSDP2)"
    if any("DTensor" in names_of(parameter) for parameter in model.parameters()):
        return "DTensor"
    if any("_is_fsdp_managed_module" in module.__dict__ for module in modules):
        return "FullyShardedDataParallel (FSDP)"  # is around this network, and marks what is in it
    return None
