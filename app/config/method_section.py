"""The section of the method: the options of the library, with what a run adds to them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, create_model, model_validator
from pydantic_core import PydanticCustomError

from app.config.section import LARGEST_INTEGER, Section
from oialr.options import BOUNDS, Options, choices, kinds

NOT_FOR_A_RUN = {"unknown_optimizer_state"}
"""Options without a key: the application's optimizers are all known."""
DEFAULTS: dict[str, Any] = {"delay": 1000, "update_interval": 500, "latest_delay": 0.5}
"""Of what the library must be told: those of a short run."""
SHARES = (
    "delay",
    "update_interval",
    "release",
    "stability_window",
    "stability_start",
    "latest_delay",
)
"""Numbers of steps, which may be shares of the run's steps."""

STABILITY_KEYS = ("stability_threshold", "stability_window", "stability_start", "latest_delay")
RELEASE_KEYS = ("release_warmup", "factor_learning_rate_factor")
UPDATE_KEYS = ("update_interval", "layer_fraction", "core_learning_rate_factor")
CUT_KEYS = ("cutoff", "retained_energy")
BOUND_KEYS = ("largest_cut", "largest_energy_cut")

WORDS: dict[str, tuple[Any, str]] = {"release": (Literal["delay"], " delay: that of the delay.")}
"""What the application takes beside numbers, and what it means."""


def _definitions() -> dict[str, Any]:
    """Return type, default, range and text of every option, as pydantic takes them."""
    definitions = {}
    for each in fields(Options):
        if each.name in NOT_FOR_A_RUN:
            continue
        kind, default = kinds()[each.name], DEFAULTS.get(each.name, each.default)
        if kind == Sequence[str]:  # as YAML has it
            kind, default = list[str], [*each.default]  # type: ignore[misc]
        bounds = {name: each.metadata[name] for name in BOUNDS if name in each.metadata}
        text = each.metadata["text"]
        if each.name in SHARES:
            least = "ge" if each.metadata.get("ge") == 0 else "gt"
            kind, bounds = kind | float, {least: 0}
            text += " Below 1 it is a share of the run's steps."
        if each.name in WORDS:
            kind, text = kind | WORDS[each.name][0], text + WORDS[each.name][1]
        if choices(kind) and bounds:  # a range is for the numbers alone
            check = _number_or(choices(kind), is_optional=default is None)
            kind, bounds = Annotated[kind, PlainValidator(check)], {}
        definitions[each.name] = (kind, Field(default, description=text, **bounds))
    return definitions


def _number_or(words: Sequence[str], *, is_optional: bool) -> Callable[[Any], Any]:
    """Return the check of a key that has a positive number, one of some words, or perhaps None."""

    def check(value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_none = value is None and is_optional
        if is_none or (is_number and 0 < value < math.inf) or value in words:
            return value
        raise PydanticCustomError("option", f"should be greater than 0, or {', '.join(words)}")

    return check


if TYPE_CHECKING:

    class _MethodSection(Section, Options):
        """What the function above makes, for who checks types."""

        delay: int | float | Literal["stability"] = 1000  # type: ignore[assignment]
        update_interval: int | float = 500  # type: ignore[assignment]
        release: int | float | Literal["delay"] | None = None  # type: ignore[assignment]
        stability_window: int | float | None = None  # type: ignore[assignment]
        stability_start: int | float = 0  # type: ignore[assignment]
        latest_delay: int | float | None = 0.5  # type: ignore[assignment]

else:
    _MethodSection = create_model("_MethodSection", __base__=Section, **_definitions())


class OIALRSection(_MethodSection):
    """The method (arXiv 2401.08505, section 4)."""

    enabled: bool = Field(True, description="false: the full-rank baseline.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        values = {name: getattr(self, name) for name in SHARES}
        shares = [name for name, value in values.items() if isinstance(value, float)]
        for name in shares:
            if values[name] >= 1:
                raise ValueError(
                    f"{name}: {values[name]} is no share of the run, below 1; a step is a whole "
                    "number"
                )
        # Which of a share and a step comes first is seen when the run's steps are known.
        delay = self.delay if isinstance(self.delay, int) else 1
        late = {"release": delay + 1, "latest_delay": LARGEST_INTEGER}
        steps: dict[str, Any] = {name: late.get(name, 1) for name in shares}
        if self.release == "delay" and self.delay == "stability":
            raise ValueError(
                "release: 'delay' is that of all layers, and with delay=stability each has its "
                "own: name a step or a share of the run"
            )
        if self._released_at_delay():
            steps |= {"delay": delay, "release": delay}
        try:
            Options(**{**self._values(), **steps})
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"{name}: {rest}") from None
        return self

    def _released_at_delay(self) -> bool:
        """Tell whether release is the delay; where only the run tells, what the keys suppose."""
        if self.release == "delay":
            return True
        if self.release is None or self.delay == "stability":
            return False
        if isinstance(self.release, float) == isinstance(self.delay, float):
            return self.release == self.delay
        cuts_at_conversion = self.cut_at_conversion or self.defer_conversion
        return self.truncation == "outputs" and not cuts_at_conversion

    def _values(self) -> dict[str, Any]:
        return self.model_dump(exclude={"enabled"})

    def step_of(self, name: str, steps: int) -> int | None:
        """Return one of :data:`SHARES` in steps of a run of so many; None without.

        A share is at least one step. A delay by stability has no step: None.
        """
        if name == "release" and self.release == "delay":
            name = "delay"
        value: int | float | str | None = getattr(self, name)
        if isinstance(value, str):
            return None
        return max(1, round(value * steps)) if isinstance(value, float) else value

    def unused(self, steps: int) -> dict[str, str]:
        """Return the keys of low-rank training without effect beside the others, with the reason.

        Args:
            steps: of the run.
        """
        release = self.step_of("release", steps)
        at_delay = release is not None and release == self.step_of("delay", steps)
        by_energy, sized = self.retained_energy is not None, self.target_size is not None
        rules = (
            (self.delay != "stability", STABILITY_KEYS, "it is for oialr.delay=stability"),
            (release is None, RELEASE_KEYS, "there is no oialr.release"),
            (at_delay, UPDATE_KEYS, "released at oialr.delay, layers have no core and no updates"),
            (by_energy, ("cutoff",), "oialr.retained_energy takes its place"),
            (sized, CUT_KEYS, "oialr.target_size takes its place"),
            (sized and at_delay, BOUND_KEYS, "oialr.target_size is met at once, by the release"),
        )
        return {f"oialr.{name}": why for holds, names, why in rules if holds for name in names}

    def told_in_vain(self, steps: int) -> list[str]:
        """Return a line for each key that was changed and has no effect beside the others."""
        fields = {f"oialr.{name}": field for name, field in type(self).model_fields.items()}
        values = {f"oialr.{name}": value for name, value in self._values().items()}
        return [
            f"{key}={values[key]} has no effect: {reason}"
            for key, reason in self.unused(steps).items()
            if values[key] != fields[key].default
        ]

    def options(self, steps: int, *, warmup: int = 0) -> Options:
        """Return the method's options in a run.

        Args:
            steps: of the run.
            warmup: steps in which its learning rate rises: no window of stability begins before.
        """
        values = self._values() | {name: self.step_of(name, steps) for name in SHARES}
        if self.delay == "stability":
            start = max(values["stability_start"], warmup)
            values |= {"delay": "stability", "stability_start": start}
        return Options(**values)
