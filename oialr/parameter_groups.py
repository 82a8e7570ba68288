"""Groups of the optimizer for what takes the place of full-rank weights."""

import weakref
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.momentary_groups import LISTS, MomentaryTwins, Place, Twin
from oialr.twin_options import TwinOptions

Kind = Literal["cores", "factors", "dense"]
"""Cores; the factors A and B after a release; full-rank weights that a release has brought back."""

MARK = "oialr_twin"
"""Key of a group that is a twin. It is in no stored state."""


@dataclass(frozen=True)
class Mark:
    """What a twin is, for who meets it in a copy of the optimizer, where nobody else knows."""

    kind: Kind
    origin: int
    """Position of the group that it is a twin of."""
    learning_rate_factor: float
    has_change: bool
    """Whether other options than the learning rate differ from the origin's."""
    places: tuple[str | None, ...] = field(repr=False)
    """What the origin held at first: names of weights, and None for each other parameter."""


class TwinGroups:
    """Twins of the parameter groups that hold weights to be factorized, for what replaces these.

    A twin has its origin's options but for those that it is made with. It is there, empty, from the
    start, so that a learning-rate schedule made afterwards knows it and treats it like any other
    group. Where there is a schedule already, twins are there while the optimizer steps, and at no
    other time (:mod:`oialr.momentary_groups`).
    """

    def __init__(self, optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
        """Look at the groups; none is added yet.

        Args:
            optimizer: holds the weights.
            weights: the full-rank weights by name, in the order that what replaces them shall have
                in the twins.
        """
        names = {id(weight): name for name, weight in weights.items()}
        self._adopted = _take_back(optimizer, names)
        """Positions of twins that were there already, empty now, by kind and origin."""
        # Groups are known by their position: load_state_dict makes new dictionaries of them.
        self._origin: dict[str, int] = {}
        self._order = {name: i for i, name in enumerate(weights)}
        self._weights = {name: weakref.ref(weight) for name, weight in weights.items()}
        self._places: dict[int, list[Place]] = {}
        """Of each group with weights: names of these and other parameters, in their order."""
        self._stored_names: dict[str, str] = {}
        """Names of weights in the groups, where these have names."""
        for i, group in enumerate(optimizer.param_groups):
            found = [names.get(id(parameter)) for parameter in group["params"]]
            if any(found):
                self._origin |= {name: i for name in found if name}
                self._places[i] = [
                    name or weakref.ref(parameter)
                    for name, parameter in zip(found, group["params"], strict=True)
                ]
                stored = group.get("param_names", [])
                pairs = zip(found, stored, strict=False)
                self._stored_names |= {name: key for name, key in pairs if name}
        self._marks: dict[int, Mark] = {}
        self._twins: dict[tuple[Kind, int], int] = {}
        self._rate_factors: dict[int, float] = {}
        self.twins = TwinOptions()
        """Lets twins follow where a loop sets the options of other groups alone."""
        self._keys: dict[int, list[tuple[int, int]]] = {}
        self._kinds: dict[str, Kind] = {}
        """Of what has taken the weights' places, by their names."""
        self._momentary: MomentaryTwins | None = None

    def add(
        self,
        optimizer: Optimizer,
        kind: Kind,
        *,
        learning_rate_factor: float = 1.0,
        change: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        """Add the twins of a kind, for as long as the optimizer is there, or for its steps.

        Args:
            optimizer: changed in place.
            kind: of what they are for.
            learning_rate_factor: learning rate of a twin over that of its origin.
            change: tells by the origin's options which of them are others in its twin; None: no.
        """
        has_schedule = any("initial_lr" in group for group in optimizer.param_groups)
        if has_schedule and self._momentary is None and not self._adopted:
            self._momentary = MomentaryTwins(optimizer, self._places, self._kinds)
        for i in sorted(set(self._origin.values())):
            twin = Twin(
                kind=kind, origin=i, learning_rate_factor=learning_rate_factor, change=change
            )
            if self._momentary:
                self._momentary.add(twin)
                continue
            if not self._marks:
                optimizer.register_state_dict_post_hook(_without_marks)
                optimizer.register_load_state_dict_post_hook(self._mark)
            origin, position = optimizer.param_groups[i], self._adopted.get((kind, i))
            if position is None:
                position = len(optimizer.param_groups)
                lists: dict[str, Any] = {key: [] for key in LISTS if key in origin}
                optimizer.add_param_group({**twin.options(origin), **lists})
            self._twins[kind, i], self._keys[position] = position, []
            self._rate_factors[position] = learning_rate_factor
            places = (place if isinstance(place, str) else None for place in self._places[i])
            has_change = change is not None
            self._marks[position] = Mark(kind, i, learning_rate_factor, has_change, (*places,))
            self._mark(optimizer)
            self.twins.add(optimizer, position, twin)

    def _mark(self, optimizer: Optimizer) -> None:
        """Let the twins, of which a loaded state has made new dictionaries, be known as such."""
        for position, mark in self._marks.items():
            optimizer.param_groups[position][MARK] = mark

    def rate_factors(self, optimizer: Optimizer) -> list[float]:
        """Return the learning rate of each group over that of its origin; 1 of any other group."""
        return [self._rate_factors.get(i, 1.0) for i in range(len(optimizer.param_groups))]

    def check_schedule(self, optimizer: Optimizer) -> bool:
        """Reject a learning-rate schedule, or a loop, that gives all groups the same rate.

        Returns:
            Whether that can be told: not as long as the rates are 0.

        Raises:
            ValueError: it does, such as OneCycleLR with one number, and a twin has a factor.
        """
        told = True
        for (kind, i), twin in self._twins.items():
            factor = self._rate_factors[twin]
            groups = [optimizer.param_groups[j] for j in (i, twin)]
            # Rates that a schedule has begun with tell more than those that it has come to, which
            # may be its lowest one. A rate in a tensor is not looked at: it may lie on a GPU.
            first, second = (group.get("initial_lr", group["lr"]) for group in groups)
            if factor == 1 or isinstance(first, Tensor):
                continue
            if first and first == second:
                raise ValueError(
                    f"the learning-rate schedule starts the group of {kind} at the same rate as "
                    f"that of the weights, and not at {factor:g} times it, as OIALR's options say: "
                    "give it a list, such as OneCycleLR(optimizer, max_lr=[rate * factor for "
                    "factor in method.learning_rate_factors], ...), and where a loop sets "
                    "group['lr'], multiply by them, too"
                )
            told = told and bool(first)
        return told

    def positions(self, kind: Kind) -> list[int]:
        """Return the positions of the twins of a kind among the optimizer's groups now."""
        if self._momentary:
            return self._momentary.positions(kind)
        return [twin for (key, _), twin in self._twins.items() if key == kind]

    def exchange(self, replaced: Mapping[int, nn.Parameter]) -> None:
        """Know other parameters of the same meaning: of each that was replaced, by its id, one.

        What was replaced must be there still, since it is told by its id.
        """
        for places in self._places.values():
            for i, place in enumerate(places):
                if not isinstance(place, str) and id(place()) in replaced:
                    places[i] = weakref.ref(replaced[id(place())])

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
        self._kinds[name] = kind
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

    def arrange(
        self,
        optimizer: Optimizer,
        homes: Mapping[str, tuple[Kind | None, Sequence[nn.Parameter]]],
        *,
        dead: Sequence[nn.Parameter],
    ) -> None:
        """Put what stands for all weights where the events that led there would have put it.

        Args:
            optimizer: changed in place.
            homes: of each weight by name, of which kind it is now (None: as at first), and its
                parameters.
            dead: parameters that leave the optimizer.
        """
        leaving = {id(p) for p in dead} | {id(p) for _, ps in homes.values() for p in ps}
        names = {
            id(parameter): name
            for group in optimizer.param_groups
            for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        twins: dict[int, list[str]] = {twin: [] for twin in self._keys}
        for name in sorted(homes, key=self._order.__getitem__):
            kind, held = homes[name]
            self._kinds.pop(name, None)
            if kind is None:
                self._weights[name] = weakref.ref(held[0])
            else:
                self._kinds[name] = kind
            if kind and (twin := self._twins.get((kind, self._origin[name]))) is not None:
                twins[twin].append(name)
            stored = self._stored_names.get(name, "")
            several = len(held) > 1
            for j, parameter in enumerate(held):
                names[id(parameter)] = f"{stored}.{j}" if several else stored
        moved = {name for members in twins.values() for name in members}
        for i in (*self._places, *twins):
            group = optimizer.param_groups[i]
            others = {id(p): p for p in group["params"] if id(p) not in leaving}
            parameters: list[nn.Parameter] = []
            for place in self._places[i] if i in self._places else twins[i]:
                if isinstance(place, str):
                    if i in twins or place not in moved:
                        parameters += homes[place][1]
                elif (other := others.pop(id(place()), None)) is not None:
                    parameters.append(other)
            group["params"][:] = [*parameters, *others.values()]
            if "param_names" in group:
                group["param_names"][:] = [names[id(parameter)] for parameter in group["params"]]
            if i in twins:
                self._keys[i] = [
                    (self._order[name], j) for name in twins[i] for j in range(len(homes[name][1]))
                ]


def check_twins(optimizer: Optimizer, twins: Mapping[Kind, tuple[float, bool]]) -> None:
    """Reject twins of another method, in a copy of its optimizer, that are others than needed.

    Args:
        optimizer: as it is now.
        twins: that will be needed: their learning rate over that of their origin, and whether
            other options differ.

    Raises:
        ValueError: there are twins, and not these.
    """
    marks: list[Mark] = [group[MARK] for group in optimizer.param_groups if MARK in group]
    found = {mark.kind: (mark.learning_rate_factor, mark.has_change) for mark in marks}
    if found and found != dict(twins):
        raise ValueError(
            "the optimizer is a copy of that of another OIALR, whose core_learning_rate_factor, "
            "release, factor_learning_rate_factor or frobenius_decay were others, and has its "
            "groups: give the same options, or make a new optimizer"
        )


def exchange(
    optimizer: Optimizer, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]
) -> None:
    """Put parameters at the place of the first of some others, of which all leave the optimizer.

    Args:
        optimizer: changed in place, but for its state.
        old: of which one group holds one or several.
        new: what comes.
    """
    leaving = {id(parameter) for parameter in old}
    for group in optimizer.param_groups:
        found = [i for i, parameter in enumerate(group["params"]) if id(parameter) in leaving]
        if not found:
            continue
        names = group.get("param_names")
        for i in reversed(found):
            del group["params"][i]
            name = names.pop(i) if names else ""
        group["params"][found[0] : found[0]] = new
        if names is not None:
            names[found[0] : found[0]] = [name] * len(new)
        return


def _take_back(optimizer: Optimizer, names: Mapping[int, str]) -> dict[tuple[Kind, int], int]:
    """Put weights that are in twins already where they were at first.

    Args:
        optimizer: perhaps a copy of that of another method; changed in place.
        names: of weights by their ids.

    Returns:
        The positions of the twins, by kind and origin.
    """
    groups = optimizer.param_groups
    twins: dict[tuple[Kind, int], int] = {}
    for position, twin in enumerate(groups):
        mark: Mark | None = twin.get(MARK)
        if mark is None:
            continue
        twins[mark.kind, mark.origin] = position
        origin = groups[mark.origin]
        keys = [key for key in LISTS if key in origin]
        rows = [*zip(*([*origin[key], *twin[key]] for key in keys), strict=True)]
        known = {names[id(row[0])]: row for row in rows if id(row[0]) in names}
        others = [row for row in rows if id(row[0]) not in names]
        ordered = []
        for place in mark.places:
            if place in known:
                ordered.append(known.pop(place))
            elif place is None and others:
                ordered.append(others.pop(0))
        ordered += [*others, *known.values()]
        for i, key in enumerate(keys):
            origin[key][:] = [row[i] for row in ordered]
            twin[key][:] = []
    return twins


def _without_marks(_: Optimizer, state: dict[str, Any]) -> None:
    """Leave the marks of twins out of a stored state."""
    for group in state["param_groups"]:
        group.pop(MARK, None)


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
