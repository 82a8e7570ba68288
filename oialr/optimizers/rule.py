"""What has to be known of an optimizer, so that it can go on when a parameter is replaced."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from oialr.transport import Transport

Group = Mapping[str, Any]
"""A parameter group of an optimizer: its options by name."""


class Finish(Protocol):
    """Mends what the parts of a state are to each other, after each has been carried over."""

    def __call__(
        self,
        before: Mapping[str, Any],
        after: dict[str, Any],
        transport: Transport,
        group: Group,
    ) -> dict[str, Any]:
        """Return the state of the parameter that comes.

        Args:
            before: state of the parameter that goes; not to be changed.
            after: what has become of it, with no tensor in common; may be changed.
            transport: from the one parameter to the other.
            group: options of the parameter that goes.

        Returns:
            The state; empty where it shall begin anew.
        """


def coupled(group: Group) -> None:
    """Weight decay is added to the gradient: nothing is taken off the weight itself."""


def decoupled(group: Group) -> Any:
    """Weight decay is taken off the weight, times the learning rate."""
    return group["lr"]


def no_decay(group: Group) -> dict[str, Any]:
    """Options of a group that decays no more."""
    return {"weight_decay": 0.0}


@dataclass(frozen=True)
class OptimizerRule:
    """How the state of an optimizer follows a parameter that an event replaces.

    An entry of a parameter's state is a tensor of the parameter's shape that is named here, or a
    plain value: a number, a tensor without dimensions, None. Plain values stay as they are: step
    counts belong to the averages. Any other entry is of unknown meaning.
    """

    linear: Collection[str] = ()
    """Entries that are linear in the gradient: momentum, first moments. Carried over exactly."""
    squared: Collection[str] = ()
    """Entries that are averages or sums of the squared gradient: second moments."""
    absolute: Collection[str] = ()
    """Entries in the unit of the gradient that have no sign: they are the size of its entries, and
    are carried over as the root of a second moment."""
    finish: Finish | None = None
    """Mends what the parts are to each other; None: there is nothing to mend."""
    decay_rate: Callable[[Group], float | Tensor | None] = coupled
    """Share of a decay term that a step takes off the weight directly; None: weight decay is added
    to the gradient. :func:`coupled` and :func:`decoupled` are there for this."""
    without_decay: Callable[[Group], Mapping[str, Any]] = no_decay
    """Options that a group is given for its weight decay to end, and nothing else."""
    matrices_only: bool = False
    """Whether a step takes parameters of two dimensions alone."""

    def __post_init__(self) -> None:
        """Reject names that are no names, or stand for two things.

        Raises:
            ValueError: one of the collections is a string, or two of them share a name.
        """
        kinds = {kind: getattr(self, kind) for kind in ("linear", "squared", "absolute")}
        for kind, names in kinds.items():
            if isinstance(names, str):
                raise ValueError(f"{kind} must be a collection of names, such as {{{names!r}}}")
        names = [name for names in kinds.values() for name in names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} cannot be two of linear, squared and absolute")

    @property
    def averages(self) -> frozenset[str]:
        """Names of all entries that have the parameter's shape."""
        return frozenset({*self.linear, *self.squared, *self.absolute})
