"""The space of a search: parameters of the configuration, their ranges and choices.

A candidate is a point of the unit cube, one coordinate per parameter in the order of the file, and
the propagators see nothing else: all of them serve every kind of parameter, at one scale. Linear
ranges are mapped linearly, log ranges by the exponent, integers and choices by equal parts.
"""

import itertools
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from app import config
from app.config import yaml_text
from app.config.section import Section
from app.config.settings import Configuration
from app.errors import UserError

SECTIONS = ("data", "model", "training", "oialr")
"""Sections whose keys are hyperparameters."""


class Entry(Section):
    """A parameter as the file describes it."""

    range: list[int | float] | None = Field(None, min_length=2, max_length=2)
    choices: list[Any] | None = Field(None, min_length=2)
    scale: Literal["linear", "log"] = "linear"
    at_most: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.range is None) == (self.choices is None):
            raise ValueError("give a range or choices")
        if self.range is None:
            if self.scale == "log" or self.at_most is not None:
                raise ValueError("scale and at_most belong to a range")
            return self
        if self.range[0] >= self.range[1]:
            raise ValueError(f"the range {self.range} must ascend")
        if self.scale == "log" and self.range[0] <= 0:
            raise ValueError(f"the range {self.range} must be positive for scale: log")
        return self


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of the configuration that is searched over."""

    key: str
    low: float = math.nan
    high: float = math.nan
    integer: bool = False
    log: bool = False
    choices: tuple[Any, ...] = ()
    at_most: str | None = None
    """Key whose value bounds this one's from above."""

    def decode(self, coordinate: float) -> Any:
        """Return the value at a coordinate in [0, 1]."""
        if self.choices:
            return self.choices[min(int(coordinate * len(self.choices)), len(self.choices) - 1)]
        low, high = self._bounds()
        value = low + coordinate * (high - low)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return int(min(max(round(value), self.low), self.high)) if self.integer else value

    def encode(self, value: Any) -> float:
        """Return a coordinate that :meth:`decode` maps to the value."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high = self._bounds()
        coordinate = ((math.log(value) if self.log else value) - low) / (high - low)
        return min(max(coordinate, 0.0), 1.0)

    def _bounds(self) -> tuple[float, float]:
        """Return the ends of the interval that the unit interval is mapped to.

        Half an integer more on either side gives the first and the last their full part.
        """
        half = 0.5 if self.integer else 0.0
        low, high = self.low - half, self.high + half
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def levels(self) -> tuple[Any, ...]:
        """Return the values that stand for all in a check: the ends, or every choice."""
        return self.choices or (self.decode(0.0), self.decode(1.0))


class Space:
    """The parameters, in order."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        """Take the parameters; those that others are bounded by may come before or after.

        Raises:
            UserError: parameters are bounded by each other.
        """
        self.parameters = tuple(parameters)
        self.keys = tuple(parameter.key for parameter in parameters)
        bounds = {parameter.key: parameter.at_most for parameter in parameters if parameter.at_most}
        sorter = TopologicalSorter({key: {bound} for key, bound in bounds.items()})
        try:
            order = tuple(sorter.static_order())
        except CycleError as error:
            chain = " is bounded by ".join(reversed(error.args[1]))
            raise UserError(f"space: at_most: {chain}; take one of them out") from None
        self._bounded = tuple((key, bounds[key]) for key in order if key in bounds)
        """Keys and what bounds them, which comes first where it is bounded itself."""

    def decode(self, position: Sequence[float] | np.ndarray) -> dict[str, Any]:
        """Return the values, by key, at a point of the unit cube."""
        pairs = zip(self.parameters, position, strict=True)
        return {parameter.key: parameter.decode(float(u)) for parameter, u in pairs}

    def encode(self, values: Mapping[str, Any]) -> np.ndarray:
        """Return a point (n,) float64 of the unit cube that :meth:`decode` maps to the values."""
        return np.array([p.encode(values[p.key]) for p in self.parameters])

    def configure(self, base: Configuration, values: Mapping[str, Any]) -> Configuration:
        """Return the base configuration with the values in place, checked.

        Raises:
            UserError: as :func:`app.config.build`.
        """
        return config.build(self._sections(base, values))

    def values_of(self, configuration: Configuration) -> dict[str, Any]:
        """Return the parameters' values, by key, in a configuration."""
        sections = configuration.model_dump()
        return {key: _look_up(sections, key) for key in self.keys}

    def _sections(self, base: Configuration, values: Mapping[str, Any]) -> dict[str, Any]:
        sections = base.model_dump()
        for key, value in values.items():
            config.assign(sections, key, value)
        for key, bound in self._bounded:
            config.assign(sections, key, min(values[key], _look_up(sections, bound)))
        return sections

    def check(self, base: Configuration) -> None:
        """Build the configuration at the ends and choices of every parameter, and of every pair.

        Ranges are intervals, so what holds at both ends holds between them; what sections demand of
        several keys concerns two at a time.

        Raises:
            UserError: a key that does not exist, a value out of its range, or a contradiction.
        """
        for values in self.corners(base):
            try:
                self.configure(base, values)
            except UserError as error:
                raise UserError(f"space: {error}") from None

    def corners(self, base: Configuration) -> Iterator[dict[str, Any]]:
        """Yield the values at the ends of every parameter alone, then of every pair.

        All others have the base's value, bounded by their range, or a parameter's first.
        """
        usual = {p.key: _usual(p, base) for p in self.parameters}
        for parameter in self.parameters:
            for level in parameter.levels():
                yield {**usual, parameter.key: level}
        for first, second in itertools.combinations(self.parameters, 2):
            for a, b in itertools.product(first.levels(), second.levels()):
                yield {**usual, first.key: a, second.key: b}

    def column_types(self) -> dict[str, str]:
        """Return numpy's dtype of every parameter's column; a choice is kept as JSON text."""
        types = {}
        for parameter in self.parameters:
            width = max((len(json.dumps(choice)) for choice in parameter.choices), default=0)
            types[parameter.key] = f"S{width}" if width else "i8" if parameter.integer else "f8"
        return types


def read_space(entries: Any, base: Configuration) -> Space:
    """Read and check the space of a search configuration.

    Args:
        entries: key of the configuration to [low, high], or to a mapping with range or choices.
        base: what all candidates share.

    Raises:
        UserError: one line with the parameter and what would be right.
    """
    if not isinstance(entries, dict) or not entries:
        raise UserError("space: expected parameters such as 'oialr.cutoff: [0.01, 0.9]'")
    parameters = []
    for key, entry in entries.items():
        if not str(key).startswith(tuple(f"{section}." for section in SECTIONS)):
            raise UserError(
                f"space: {key} is no hyperparameter; expected a key of {', '.join(SECTIONS)}"
            )
        if key.startswith("oialr.") and not base.oialr.enabled:
            raise UserError(f"space: {key} has no effect with oialr.enabled=false")
        parameters.append(_read_parameter(key, entry))
    known = set(entries)
    for parameter in parameters:
        if parameter.at_most and parameter.at_most not in known | set(config.documented_keys()):
            raise UserError(f"space: {parameter.key}: at_most: {parameter.at_most}: unknown key")
    space = Space(parameters)
    for parameter in parameters:
        _check_bound(space, parameter, base)
    space.check(base)
    return Space([_as_configured(space, base, parameter) for parameter in parameters])


def _check_bound(space: Space, parameter: Parameter, base: Configuration) -> None:
    """Reject a bound that is no number, be it as the base has it or as it is searched over."""
    bound = parameter.at_most
    if not bound:
        return
    levels = [each.levels() for each in space.parameters if each.key == bound]
    values = levels[0] if levels else (_look_up(base.model_dump(), bound),)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"space: {parameter.key}: at_most: {bound} can be {yaml_text.dump_value(value)}, "
                f"which is no number; name a key that always is one"
            )


def _as_configured(space: Space, base: Configuration, parameter: Parameter) -> Parameter:
    """Return a parameter with its choices as the configuration has them: 1.0 for 1 of a float."""
    usual = {each.key: _usual(each, base) for each in space.parameters}
    choices = [
        space.values_of(space.configure(base, {**usual, parameter.key: choice}))[parameter.key]
        for choice in parameter.choices
    ]
    return replace(parameter, choices=tuple(choices))


def _read_parameter(key: str, value: Any) -> Parameter:
    raw = {"range": value} if isinstance(value, list) else value
    if not isinstance(raw, dict):
        raise UserError(
            f"space: {key}: expected [low, high], {{range: [low, high], scale: log}} or "
            f"{{choices: [...]}}, got {value!r}"
        )
    try:
        entry = Entry.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"{part}: " for part in problem["loc"])
        message = problem.get("ctx", {}).get("error", problem["msg"])
        raise UserError(f"space: {key}: {place}{message} (got {value!r})") from None
    if entry.choices is not None:
        return Parameter(key=key, choices=tuple(entry.choices))
    assert entry.range is not None
    low, high = entry.range
    return Parameter(
        key=key,
        low=low,
        high=high,
        integer=_is_integer(key, entry.range),
        log=entry.scale == "log",
        at_most=entry.at_most,
    )


def _is_integer(key: str, ends: Sequence[float]) -> bool:
    """Whether the configuration wants integers; where it takes both, whether both ends are."""
    section, _, name = key.partition(".")
    annotation = Configuration.model_fields[section].annotation
    assert annotation is not None
    field = annotation.model_fields.get(name)
    if field is None:
        return all(isinstance(end, int) for end in ends)
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    if int in kinds and float not in kinds:
        if not all(float(end).is_integer() for end in ends):
            raise UserError(f"space: {key}: the range {list(ends)} must have integer ends")
        return True
    return int in kinds and all(isinstance(end, int) for end in ends)


def _look_up(sections: Mapping[str, Any], key: str) -> Any:
    node: Any = sections
    for part in key.split("."):
        node = node[part]
    return node


def _usual(parameter: Parameter, base: Configuration) -> Any:
    """Return the base's value if the parameter can take it, else its first level."""
    try:
        value = _look_up(base.model_dump(), parameter.key)
    except (KeyError, TypeError):
        return parameter.levels()[0]
    if parameter.choices:
        return value if value in parameter.choices else parameter.choices[0]
    inside = isinstance(value, int | float) and parameter.low <= value <= parameter.high
    return value if inside else parameter.levels()[0]
