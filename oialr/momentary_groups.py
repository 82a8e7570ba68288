"""Groups of the optimizer that are there while it steps, for schedules that must not see them."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from oialr.around_steps import AroundSteps

Place = str | weakref.ref[nn.Parameter]
"""In a group: the name of a weight, or another parameter."""


RATES = frozenset({"lr", "max_lr_snapshot"})
"""Keys of a group that are learning rates; by the second one timm's optimizers divide the square of
the first for a corrected weight decay."""
LISTS = ("params", "param_names")
"""Keys of a group that have an entry for each parameter."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """What a group is made by, of another."""

    kind: str
    """Of what it is for."""
    origin: int
    """Position of the other group."""
    learning_rate_factor: float
    change: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None
    """Tells by the other's options which are different."""

    def options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options, by those of the other group."""
        kept = {key: value for key, value in group.items() if key not in LISTS}
        # A copy: what an optimizer counts up in the group itself may not be counted up twice.
        options = copy.deepcopy(kept)
        for key in RATES & group.keys():
            options[key] = group[key] * self.learning_rate_factor
        return {**options, **(self.change(group) if self.change else {})}


class MomentaryTwins(AroundSteps):
    """Takes parameters out of their groups into twins of these for the time of a step.

    A learning-rate schedule that is there already holds the groups that it found: it could not give
    rates to more of them, and torch's raise. So it goes on with these alone, and so do clipping,
    stored states and everybody else; and a twin has, at every step, the options that its origin has
    then, with its learning rate times the factor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        places: Mapping[int, Sequence[Place]],
        kinds: Mapping[str, str],
    ) -> None:
        """Hang on to an optimizer's steps.

        Args:
            optimizer: its groups are changed while it steps.
            places: of each group with weights, by its position, what it held at first, in order.
            kinds: of what a weight is now, by its name; of "factors" there are two in its place.
        """
        self._places = places
        self._kinds = kinds
        self._twins: list[Twin] = []
        self._first = 0
        """Position of the first twin while the optimizer steps."""
        self._whole: dict[int, list[nn.Parameter]] = {}
        """While the optimizer steps, what its groups hold otherwise, by their positions."""
        super().__init__(optimizer)

    def add(self, twin: Twin) -> None:
        """Let there be another twin from the next step on."""
        self._twins.append(twin)

    def positions(self, kind: str) -> list[int]:
        """Return the positions of the twins of a kind; none unless the optimizer steps."""
        if not self._whole:
            return []
        return [self._first + i for i, twin in enumerate(self._twins) if twin.kind == kind]

    def enter(self, optimizer: Optimizer) -> None:
        """Let the twins have what is theirs."""
        groups = optimizer.param_groups
        self._first = len(groups)
        members: dict[tuple[int, str], list[nn.Parameter]] = {
            (twin.origin, twin.kind): [] for twin in self._twins
        }
        for position in {twin.origin for twin in self._twins}:
            parameters = groups[position]["params"]
            self._whole[position], i = [*parameters], 0
            stay: list[nn.Parameter] = []
            for place in self._places[position]:
                if isinstance(place, str):
                    kind = self._kinds.get(place, "")
                    count = 2 if kind == "factors" else 1
                    members.get((position, kind), stay).extend(parameters[i : i + count])
                    i += count
                elif i < len(parameters) and parameters[i] is place():
                    stay.append(parameters[i])
                    i += 1
            parameters[:] = [*stay, *parameters[i:]]
        for twin in self._twins:
            options = twin.options(groups[twin.origin])
            groups.append({"params": members[twin.origin, twin.kind], **options})

    def suspend(self, optimizer: Optimizer) -> Callable[[], None]:
        """Give everything back for the time being."""
        groups, whole = optimizer.param_groups, self._whole
        twins, thinned = groups[self._first :], {i: [*groups[i]["params"]] for i in whole}
        self.leave(optimizer)

        def put_back() -> None:
            for position, parameters in thinned.items():
                groups[position]["params"][:] = parameters
            groups.extend(twins)
            self._whole = whole

        return put_back

    def leave(self, optimizer: Optimizer) -> None:
        """Give everything back."""
        if self._whole:
            del optimizer.param_groups[self._first :]
        for position, parameters in self._whole.items():
            optimizer.param_groups[position]["params"][:] = parameters
        self._whole = {}
