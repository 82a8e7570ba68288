"""Transport of the optimizer's state from a weight to its core, from a core to the next, and so on.

With core = L^T W R for matrices L, R with orthonormal columns, the gradient becomes L^T G R. What
an optimizer accumulates linearly in the gradient (first moments, momentum, a pending gradient) is
transported exactly by the same map. What it accumulates of the squared gradient has no exact
transport; E[(L^T G R)^2] = (L*L)^T E[G*G] (R*R), elementwise squares, holds for uncorrelated
entries of G and is the best of what was measured. Step counts belong to the moments and stay with
them. The maps are in :mod:`oialr.transport`, and what is what in the state of an optimizer says its
rule in :mod:`oialr.optimizers`.

A weight may be read as a stack of g matrices, one above the other: then L, R and the core have a
leading dimension g, and every matrix is transported by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.averages import WEIGHT_AVERAGE, put_average, take_average
from oialr.naming import full_name
from oialr.optimizers.registry import (
    known_averages,
    known_base,
    known_names,
    rule_of,
)
from oialr.optimizers.rule import Group, OptimizerRule
from oialr.options import UnknownState
from oialr.parameter_groups import TwinGroups
from oialr.transport import Transport


def check_optimizer(optimizer: Optimizer, unknown: UnknownState) -> None:
    """Reject an optimizer whose state cannot be transported, unless it may be reset.

    Raises:
        ValueError: the optimizer's type is not known and ``unknown`` is "error"; or LBFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS keeps one state for all parameters and cannot follow a conversion")
    if unknown == "error" and rule_of(optimizer) is None:
        base = known_base(optimizer)
        known = f"known: {', '.join(known_names())}"
        reason = f"it is derived from {base}, and may keep other state" if base else known
        raise ValueError(
            f"the state of {full_name(type(optimizer))} cannot be carried over to the cores "
            f"({reason}): oialr.register_optimizer tells how it can, and "
            "unknown_optimizer_state='reset' drops it at every event instead"
        )


def check_held(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """Reject weights, by name, that an optimizer does not hold.

    Raises:
        ValueError: it does not hold one of them.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, weight in weights.items() if id(weight) not in held]:
        raise ValueError(
            f"{missing[0]} is not among the optimizer's parameters; where weights of other "
            "ranks have been loaded since the optimizer was made, make it afterwards"
        )


def check_forms(optimizer: Optimizer, stacks: Mapping[str, Sequence[int]]) -> None:
    """Reject weights whose cores would be stacks of matrices, if the optimizer takes none.

    Args:
        optimizer: trains the weights.
        stacks: the shape that each weight is read in, by name: (m, n) or (g, m, n).

    Raises:
        ValueError: it would refuse them itself at the first step after the conversion.
    """
    rule = rule_of(optimizer)
    if rule is None or not rule.matrices_only:
        return
    for name, shape in stacks.items():
        if len(shape) > 2:
            raise ValueError(
                f"{type(optimizer).__name__} takes matrices alone, and {name} would be a stack of "
                f"{shape[0]}: exclude it, or read it as one matrix (attention_projection='packed')"
            )


def check_stored_optimizer(
    optimizer: Optimizer, state: Mapping[str, Any], *, model: nn.Module
) -> None:
    """Reject optimizer state that was stored at other ranks than the network has.

    torch's own load_state_dict takes it, and a fused step then writes beyond the parameters' end.

    Args:
        optimizer: before its load_state_dict.
        state: what it is to load.
        model: knows the parameters' names.

    Raises:
        ValueError: a group has another number of parameters; or an average of the gradient, or of
            its square, has not its parameter's shape.
    """
    groups, stored = optimizer.param_groups, state["param_groups"]
    if len(groups) != len(stored):
        return  # torch's own message is the right one
    names = {parameter: name for name, parameter in model.named_parameters()}
    rule = rule_of(optimizer)
    averages = (rule.averages if rule else known_averages()) | {WEIGHT_AVERAGE}
    order = (
        "It was stored at other ranks: call load_state_dict of the network (or that of OIALR) "
        "before that of the optimizer"
    )
    for i, (group, theirs) in enumerate(zip(groups, stored, strict=True)):
        sizes = len(group["params"]), len(theirs["params"])
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the optimizer state does not fit the network: group {i} has {sizes[0]} "
                f"parameters, and was stored with {sizes[1]}. {order}; after a release OIALR's "
                "state too"
            )
        for parameter, key in zip(group["params"], theirs["params"], strict=True):
            for what, value in state["state"].get(key, {}).items():
                is_average = what in averages and isinstance(value, Tensor)
                if is_average and value.shape != parameter.shape:
                    raise ValueError(
                        f"the optimizer state does not fit the network: {what} "
                        f"{tuple(value.shape)} of {names.get(parameter, 'a parameter')} "
                        f"{tuple(parameter.shape)}. {order}"
                    )


def check_before_event(
    optimizer: Optimizer,
    *,
    dense: Mapping[str, nn.Parameter],
    cores: Mapping[str, nn.Parameter],
    groups: TwinGroups,
    unknown: UnknownState,
) -> None:
    """Find what would stop an event half way, before it has changed anything.

    Args:
        optimizer: as it is now.
        dense: full-rank weights that the event replaces, by name.
        cores: those that it replaces or rotates.
        groups: where what replaces the weights will be moved to.
        unknown: what is done with state of unknown meaning.

    Raises:
        ValueError: the optimizer does not hold a core or a full-rank weight, or not the one that it
            held at first; or it holds state of unknown meaning and ``unknown`` is "error".
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, weight in dense.items():
        if id(weight) not in held or not groups.awaits(name, weight):
            raise ValueError(f"{name} is not among the optimizer's parameters any more")
    for name, core in cores.items():
        if id(core) not in held:
            raise ValueError(
                f"the core of {name} is not among the optimizer's parameters: was the layer made "
                "low-rank, or its weights loaded, by something else than this method?"
            )
    rule = rule_of(optimizer)
    for name, weight in {**dense, **cores}.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if unknown == "error" and not _is_known(rule, key, value, weight):
                raise ValueError(f"optimizer state {key!r} of {name} is of no known kind")


def replace_parameter(
    optimizer: Optimizer,
    old: nn.Parameter,
    new: Mapping[nn.Parameter, Transport],
    *,
    unknown: UnknownState,
) -> None:
    """Let parameters of other shapes take the place of another in the optimizer.

    The place within the parameter group stays the same. The state and a pending gradient follow.

    Args:
        optimizer: changed in place.
        old: the parameter that goes.
        new: the parameters that come, in their order, and how each comes out of the old one.
        unknown: what is done with state of unknown meaning.

    Raises:
        ValueError: state of unknown meaning and ``unknown`` is "error".
    """
    group = _group_of(optimizer, old)
    if group is not None:
        i = next(i for i, parameter in enumerate(group["params"]) if parameter is old)
        group["params"][i : i + 1] = list(new)
        if "param_names" in group:
            name = group["param_names"][i]
            names = [name] if len(new) == 1 else [f"{name}.{j}" for j in range(len(new))]
            group["param_names"][i : i + 1] = names
    rule = rule_of(optimizer)
    average = take_average(optimizer, old) if group is not None else None
    state = optimizer.state.pop(old, None) if group is not None else None
    for parameter, transport in new.items():
        if old.grad is not None:
            parameter.grad = transport.linear(old.grad)
        if state and group is not None:
            moved = transported(state, old, transport, rule=rule, group=group, unknown=unknown)
            if moved:
                optimizer.state[parameter] = moved
        put_average(optimizer, parameter, average, transport)
    old.grad = None  # a list of parameters from before would clip by its norm


def rotate_parameter(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    transport: Transport,
    *,
    unknown: UnknownState,
) -> None:
    """Transport state and pending gradient of a core that keeps its shape and its object.

    Args:
        optimizer: changed in place.
        parameter: the core.
        transport: its rotation.
        unknown: what is done with state of unknown meaning.

    Raises:
        ValueError: state of unknown meaning and ``unknown`` is "error".
    """
    if parameter.grad is not None:
        parameter.grad = transport.linear(parameter.grad)
    group = _group_of(optimizer, parameter)
    average = take_average(optimizer, parameter)
    state = optimizer.state.pop(parameter, None)
    if state and group is not None:
        moved = transported(
            state, parameter, transport, rule=rule_of(optimizer), group=group, unknown=unknown
        )
        if moved:
            optimizer.state[parameter] = moved
    put_average(optimizer, parameter, average, transport)


def transported(
    state: dict[str, Any],
    parameter: Tensor,
    transport: Transport,
    *,
    rule: OptimizerRule | None,
    group: Group,
    unknown: UnknownState,
) -> dict[str, Any]:
    """Return the state that belongs to what takes a parameter's place, but for an average of it.

    Args:
        state: the optimizer's entry for the parameter.
        parameter: the one that goes.
        transport: from it to the one that comes.
        rule: of the optimizer; None: it is not known.
        group: options of the parameter that goes.
        unknown: "reset" drops all of the state where a part of it has an unknown meaning, or the
            optimizer is not known: moments and step counts go together.

    Returns:
        The new entry, which shares no tensor with the old one; empty after a reset.

    Raises:
        ValueError: a part of the state has an unknown meaning and ``unknown`` is "error".
    """
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if rule is None or not _is_known(rule, key, value, parameter):
            if unknown == "reset":
                return {}
            raise ValueError(f"optimizer state {key!r} is of no known kind")
        if not isinstance(value, Tensor):
            moved[key] = value  # None where a moment is not in use
        elif value.dim() == 0:
            moved[key] = value.clone()  # a step count, which is counted up in place
        elif key in rule.linear:
            moved[key] = transport.linear(value)
        elif key in rule.squared:
            moved[key] = transport.squared(value)
        else:
            moved[key] = transport.squared(value.square()).sqrt()
    if rule is None or rule.finish is None:
        return moved
    return rule.finish(state, moved, transport, group)


def _is_known(rule: OptimizerRule | None, key: str, value: Any, parameter: Tensor) -> bool:
    """Whether an entry of a parameter's state is a plain value, or an average as large as it."""
    if rule is None:
        return False
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, int | float)
    is_average = key == WEIGHT_AVERAGE or key in rule.averages
    return value.dim() == 0 or (is_average and value.shape == parameter.shape)


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    """Return the group that holds a parameter; None: somebody has taken it out."""
    held = (
        group
        for group in optimizer.param_groups
        if any(each is parameter for each in group["params"])
    )
    return next(held, None)
