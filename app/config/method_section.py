"""The section of the method: the options of the library, with what a run adds to them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, create_model, model_validator

from app.config.section import Section
from oialr.options import BOUNDS, Options, kinds

NOT_FOR_A_RUN = {"unknown_optimizer_state"}
"""Options without a key: the application's optimizers are all known."""
DEFAULTS = {"delay": 1000, "update_interval": 500}
"""Of what the library must be told: those of a short run."""
SHARES = ("delay", "update_interval", "release")
"""Numbers of steps, which may be shares of the run's steps."""


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
            kind, bounds = kind | float, {"gt": 0}
            text += " Below 1 it is a share of the run's steps."
        definitions[each.name] = (kind, Field(default, description=text, **bounds))
    return definitions


if TYPE_CHECKING:

    class _MethodSection(Section, Options):
        """What the function above makes, for who checks types."""

        delay: int | float = DEFAULTS["delay"]  # type: ignore[assignment]
        update_interval: int | float = DEFAULTS["update_interval"]  # type: ignore[assignment]
        release: int | float | None = None  # type: ignore[assignment]

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
        steps: dict[str, Any] = {
            name: max(self.delay, 1) + 1 if name == "release" else 1 for name in shares
        }
        steps |= {"release": None} if values["release"] is None else {}
        try:
            Options(**{**self._values(), **steps})
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"{name}: {rest}") from None
        return self

    def _values(self) -> dict[str, Any]:
        return self.model_dump(exclude={"enabled"})

    def step_of(self, name: str, steps: int) -> int | None:
        """Return delay, update_interval or release in steps of a run of so many; None without.

        A share is at least one step.
        """
        value: int | float | None = getattr(self, name)
        return max(1, round(value * steps)) if isinstance(value, float) else value

    def options(self, steps: int) -> Options:
        """Return the method's options in a run of so many steps."""
        return Options(**{**self._values(), **{name: self.step_of(name, steps) for name in SHARES}})
