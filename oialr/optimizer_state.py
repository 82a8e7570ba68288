"""Transport of the optimizer's state from a weight to its core, and from a core to the next.

With core = L^T W R for matrices L, R with orthonormal columns, the gradient becomes L^T G R. What
an optimizer accumulates linearly in the gradient (first moments, momentum, a pending gradient) is
transported exactly by the same map. What it accumulates of the squared gradient has no exact
transport; E[(L^T G R)^2] = (L*L)^T E[G*G] (R*R), elementwise squares, holds for uncorrelated
entries of G and is the best of what was measured. Step counts belong to the moments and stay with
them.

A weight may be read as a stack of g matrices, one above the other: then L, R and the core have a
leading dimension g, and every matrix is transported by itself.
"""

from bisect import bisect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

UnknownState = Literal["error", "reset"]

KNOWN_OPTIMIZERS = (Adam, AdamW, NAdam, RAdam, torch.optim.SGD, RMSprop)
WEIGHT_AVERAGE = "weight_average"
"""Not an optimizer's own: an average of the weight itself, which is linear in it."""
LINEAR = frozenset({"exp_avg", "momentum_buffer", "grad_avg", WEIGHT_AVERAGE})
SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg"})


def check_optimizer(optimizer: Optimizer, unknown: UnknownState) -> None:
    """Reject an optimizer whose state cannot be transported, unless it may be reset.

    Raises:
        ValueError: the optimizer's type is not known and ``unknown`` is "error"; or LBFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS keeps one state for all parameters and cannot follow a conversion")
    if unknown == "error" and not isinstance(optimizer, KNOWN_OPTIMIZERS):
        known = ", ".join(kind.__name__ for kind in KNOWN_OPTIMIZERS)
        raise ValueError(
            f"the state of {type(optimizer).__name__} cannot be carried over to the cores (known: "
            f"{known}); unknown_optimizer_state='reset' drops it at every event instead"
        )


def check_loaded_state(optimizer: Optimizer, model: nn.Module) -> None:
    """Reject optimizer state that was stored at other ranks than the network has.

    torch's own load_state_dict takes it, and a fused step then writes beyond the parameters' end.

    Args:
        optimizer: after its load_state_dict.
        model: knows the parameters' names.

    Raises:
        ValueError: an average of the gradient, or of its square, has not its parameter's shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                is_average = key in LINEAR | SQUARED and isinstance(value, Tensor)
                if is_average and value.shape != parameter.shape:
                    raise ValueError(
                        f"the loaded optimizer state does not fit the network: {key} "
                        f"{tuple(value.shape)} of {names.get(parameter, 'a parameter')} "
                        f"{tuple(parameter.shape)}. It was stored at other ranks: call "
                        "load_state_dict of OIALR before that of the optimizer"
                    )


def check_before_event(
    optimizer: Optimizer,
    *,
    dense: Mapping[str, nn.Parameter],
    cores: Mapping[str, nn.Parameter],
    core_groups: "CoreGroups | None",
    unknown: UnknownState,
) -> None:
    """Find what would stop an event half way, before it has changed anything.

    Args:
        optimizer: as it is now.
        dense: full-rank weights that the event replaces, by name.
        cores: those that it replaces or rotates.
        core_groups: where the weights' cores will be moved to.
        unknown: what is done with state of unknown meaning.

    Raises:
        ValueError: the optimizer does not hold a full-rank weight, or not the one that it held at
            first; or it holds state of unknown meaning and ``unknown`` is "error".
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, weight in dense.items():
        if id(weight) not in held or (core_groups and not core_groups.awaits(weight)):
            raise ValueError(f"{name} is not among the optimizer's parameters any more")
    for name, weight in {**dense, **cores}.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if unknown == "error" and not _is_known(key, value, weight):
                raise ValueError(f"optimizer state {key!r} of {name} is of no known kind")


def replace_parameter(
    optimizer: Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    left: Tensor,
    right: Tensor,
    *,
    unknown: UnknownState,
) -> None:
    """Let a parameter of another shape take the place of another in the optimizer.

    The place within the parameter group stays the same. The state and a pending gradient follow.

    Args:
        optimizer: changed in place.
        old: the parameter that goes; as a matrix (m, n).
        new: the parameter that comes, (r, r) = left^T old right.
        left: L (m, r), orthonormal columns.
        right: R (n, r), orthonormal columns.
        unknown: what is done with state of unknown meaning.

    Raises:
        ValueError: state of unknown meaning and ``unknown`` is "error".
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]
    if old.grad is not None:
        new.grad = _linear(old.grad, left, right)
        old.grad = None  # a list of parameters from before would clip by its norm
    state = optimizer.state.pop(old, None)
    if state and (moved := transported(state, old, left, right, unknown=unknown)):
        optimizer.state[new] = moved


def rotate_parameter(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    left: Tensor,
    right: Tensor,
    *,
    unknown: UnknownState,
) -> None:
    """Transport state and pending gradient of a core that keeps its shape and its object.

    Args:
        optimizer: changed in place.
        parameter: the core (r, r), which becomes left^T core right.
        left, right: orthogonal (r, r).
        unknown: what is done with state of unknown meaning.

    Raises:
        ValueError: state of unknown meaning and ``unknown`` is "error".
    """
    if parameter.grad is not None:
        parameter.grad = _linear(parameter.grad, left, right)
    if state := optimizer.state.pop(parameter, None):
        moved = transported(state, parameter, left, right, unknown=unknown)
        if moved:
            optimizer.state[parameter] = moved


def transported(
    state: dict[str, Any],
    parameter: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    unknown: UnknownState,
) -> dict[str, Any]:
    """Return the state that belongs to left^T parameter right.

    Args:
        state: the optimizer's entry for the parameter.
        parameter: as a matrix (m, n).
        left: (m, r). right: (n, r).
        unknown: "reset" drops all of the state where a part of it has an unknown meaning: moments
            and step counts go together.

    Returns:
        The new entry; empty after a reset.

    Raises:
        ValueError: a part of the state has an unknown meaning and ``unknown`` is "error".
    """
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not _is_known(key, value, parameter):
            if unknown == "reset":
                return {}
            raise ValueError(f"optimizer state {key!r} is of no known kind")
        if not isinstance(value, Tensor) or value.dim() == 0:
            moved[key] = value  # a step count, or None where a moment is not in use
        else:
            moved[key] = (_linear if key in LINEAR else _squared)(value, left, right)
    if "grad_avg" in moved:
        # Centered RMSprop divides by the root of a variance, square_avg - grad_avg^2. Carrying that
        # over, and not square_avg, keeps it from becoming negative.
        variance = (state["square_avg"] - state["grad_avg"].square()).clamp_min(0)
        moved["square_avg"] = _squared(variance, left, right) + moved["grad_avg"].square()
    return moved


class CoreGroups:
    """A twin for every parameter group that holds weights to be factorized, for their cores.

    The twin has its origin's options and a learning rate of its own. It is there, empty, from the
    start, so that a learning-rate schedule made afterwards knows it and treats it like any other
    group.
    """

    def __init__(
        self, optimizer: Optimizer, weights: list[nn.Parameter], *, learning_rate_factor: float
    ) -> None:
        """Add the twins.

        Args:
            optimizer: changed in place.
            weights: the full-rank weights, in the order that their cores shall have in the twins.
            learning_rate_factor: learning rate of a twin over that of its origin.

        Raises:
            ValueError: a learning-rate schedule already holds the optimizer's groups.
        """
        if any("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                "core_learning_rate_factor adds parameter groups, which a learning-rate schedule "
                "must see: make the schedule after OIALR"
            )
        # Groups are known by their position: load_state_dict makes new dictionaries of them.
        self._place: dict[nn.Parameter, tuple[int, int]] = {}
        self._moved: dict[int, list[int]] = {}
        for origin in list(optimizer.param_groups):
            members = {id(parameter) for parameter in origin["params"]}
            mine = [i for i, weight in enumerate(weights) if id(weight) in members]
            if mine:
                twin = len(optimizer.param_groups)
                rate = origin["lr"] * learning_rate_factor
                names: dict[str, Any] = {"param_names": []} if "param_names" in origin else {}
                optimizer.add_param_group({**origin, **names, "params": [], "lr": rate})
                self._place |= {weights[i]: (twin, i) for i in mine}
                self._moved[twin] = []

    def awaits(self, weight: nn.Parameter) -> bool:
        """Whether a weight is one of those whose cores are to be moved."""
        return weight in self._place

    def move(self, optimizer: Optimizer, weight: nn.Parameter, core: nn.Parameter) -> None:
        """Move the core that has taken a weight's place in the optimizer to the twin of its group.

        The order within the twin is that of the layers, in whatever order they come, so that it is
        the same on all processes and in a checkpoint.
        """
        twin, index = self._place.pop(weight)
        position = bisect(self._moved[twin], index)
        self._moved[twin].insert(position, index)
        target = optimizer.param_groups[twin]
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter is core:
                    target["params"].insert(position, group["params"].pop(i))
                    if "param_names" in group:
                        target["param_names"].insert(position, group["param_names"].pop(i))
                    return


def _is_known(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether an entry of a parameter's state is a plain value, or an average as large as it."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return True
    return key in LINEAR | SQUARED and value.shape == parameter.shape


def _linear(value: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """L^T A R for A that is read as a matrix (m, n), or as a stack of them."""
    return left.mT @ value.reshape(*left.shape[:-1], right.shape[-2]) @ right


def _squared(value: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(L*L)^T v (R*R) for v that is read as a matrix (m, n), or as a stack of them."""
    return _linear(value, left.square(), right.square())
