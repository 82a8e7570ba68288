"""Groups of the optimizer for what takes the place of full-rank weights."""

import weakref
from bisect import bisect
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

Kind = Literal["cores", "factors", "dense"]
"""Cores; the factors A and B after a release; full-rank weights that a release has brought back."""


class TwinGroups:
    """Twins of the parameter groups that hold weights to be factorized, for what replaces these.

    A twin has its origin's options but for those that it is made with. It is there, empty, from the
    start, so that a learning-rate schedule made afterwards knows it and treats it like any other
    group.
    """

    def __init__(self, optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
        """Look at the groups; none is added yet.

        Args:
            optimizer: holds the weights.
            weights: the full-rank weights by name, in the order that what replaces them shall have
                in the twins.
        """
        # Groups are known by their position: load_state_dict makes new dictionaries of them.
        self._origin: dict[str, int] = {}
        self._order = {name: i for i, name in enumerate(weights)}
        self._weights = {name: weakref.ref(weight) for name, weight in weights.items()}
        for i, group in enumerate(optimizer.param_groups):
            members = {id(parameter) for parameter in group["params"]}
            self._origin |= {name: i for name, w in weights.items() if id(w) in members}
        self._twins: dict[tuple[Kind, int], int] = {}
        self._keys: dict[int, list[tuple[int, int]]] = {}

    def add(
        self, optimizer: Optimizer, kind: Kind, *, learning_rate_factor: float = 1.0, **options: Any
    ) -> None:
        """Add the twins of a kind.

        Args:
            optimizer: changed in place.
            kind: of what they are for.
            learning_rate_factor: learning rate of a twin over that of its origin.
            options: of the twins, in place of the origin's.

        Raises:
            ValueError: a learning-rate schedule already holds the optimizer's groups.
        """
        if any("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                "core_learning_rate_factor and release add parameter groups, which a learning-rate "
                "schedule must see: make the schedule after OIALR"
            )
        for i in sorted(set(self._origin.values())):
            origin, twin = optimizer.param_groups[i], len(optimizer.param_groups)
            names: dict[str, Any] = {"param_names": []} if "param_names" in origin else {}
            rate = origin["lr"] * learning_rate_factor
            optimizer.add_param_group({**origin, **names, "params": [], "lr": rate, **options})
            self._twins[kind, i], self._keys[twin] = twin, []

    def positions(self, kind: Kind) -> list[int]:
        """Return the positions of the twins of a kind among the optimizer's groups."""
        return [twin for (key, _), twin in self._twins.items() if key == kind]

    def awaits(self, name: str, weight: nn.Parameter) -> bool:
        """Whether a full-rank weight is the one that was there at first; without twins, any."""
        return not self._twins or self._weights[name]() is weight

    def move(self, optimizer: Optimizer, kind: Kind, name: str, *parameters: nn.Parameter) -> None:
        """Move what has taken a weight's place in the optimizer to the twin of its group.

        The order within a twin is that of the layers, in whatever order they come, so that it is
        the same on all processes and in a checkpoint.

        Args:
            optimizer: changed in place; holds the parameters.
            kind: of what they are; without twins of the kind they stay where they are.
            name: of the weight.
            parameters: in their order within the twin.
        """
        if (twin := self._twins.get((kind, self._origin[name]))) is None:
            return
        for j, parameter in enumerate(parameters):
            # They stand where one parameter stood, which had one key.
            stored_name = _remove(optimizer, parameter, self._keys if j == 0 else {})
            key = self._order[name], j
            place = bisect(self._keys[twin], key)
            self._keys[twin].insert(place, key)
            target = optimizer.param_groups[twin]
            target["params"].insert(place, parameter)
            if stored_name is not None:
                target["param_names"].insert(place, stored_name)


def _remove(
    optimizer: Optimizer, parameter: nn.Parameter, keys: Mapping[int, list[tuple[int, int]]]
) -> str | None:
    """Take a parameter out of its group, and return its name there, if the group has names."""
    for position, group in enumerate(optimizer.param_groups):
        for i, held in enumerate(group["params"]):
            if held is parameter:
                del group["params"][i]
                if position in keys:
                    del keys[position][i]
                return group["param_names"].pop(i) if "param_names" in group else None
    raise ValueError("the parameter is not among the optimizer's")
