"""Where the moving average of a parameter is, as :class:`oialr.WeightAverage` keeps it.

It is an entry of the optimizer's state of the parameter, if there is any. Where there is none, as
of an optimizer that keeps none, and of one that begins anew after an event, an entry would be taken
for the whole state: there it lies aside.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.transport import Transport

WEIGHT_AVERAGE = "weight_average"
"""Key of the state. Not an optimizer's own: an average of the weight itself, linear in it."""


@dataclass(frozen=True)
class Aside:
    """An average that is not in the optimizer's state."""

    average: Tensor
    had_state: bool
    """Whether the optimizer had a state of the parameter before, with the average in it."""


_ASIDE: WeakKeyDictionary[Optimizer, dict[nn.Parameter, Aside]] = WeakKeyDictionary()


def averages_aside(optimizer: Optimizer) -> MutableMapping[nn.Parameter, Aside]:
    """Return the averages of those parameters of which the optimizer has no state."""
    return _ASIDE.setdefault(optimizer, {})


def has_room(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the state of a parameter may have another entry.

    An optimizer fills the state where it is empty, and does not where it is not; but for SGD, which
    looks for each entry by itself.
    """
    return bool(optimizer.state.get(parameter)) or isinstance(optimizer, torch.optim.SGD)


def take_average(optimizer: Optimizer, parameter: nn.Parameter) -> Aside | None:
    """Take the average of a parameter from wherever it is; None if there is none."""
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    aside = averages_aside(optimizer).pop(parameter, None)
    return Aside(state.pop(WEIGHT_AVERAGE), True) if WEIGHT_AVERAGE in state else aside


def put_average(
    optimizer: Optimizer, parameter: nn.Parameter, old: Aside | None, transport: Transport
) -> None:
    """Carry the average of a parameter that goes over to one that comes.

    Args:
        optimizer: has the state already that it goes on with.
        parameter: the one that comes.
        old: the other one's, if there was any.
        transport: from the one parameter to the other.
    """
    if old is None:
        return
    average = transport.average(old.average)
    if old.had_state and has_room(optimizer, parameter):
        optimizer.state[parameter][WEIGHT_AVERAGE] = average
    else:
        averages_aside(optimizer)[parameter] = Aside(average, old.had_state)
