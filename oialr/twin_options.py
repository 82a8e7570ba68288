"""Options of the groups that are twins of others, where a loop sets those of the others.

Who knows of one group alone, as before the method, sets ``optimizer.param_groups[0]["lr"]``, or its
weight decay. The twins follow then, at the next step. A schedule that is made after the method
knows the twins, and so does a loop that sets an option of all groups: what they set is left as it
is, but for the decay of a twin whose decay is that of a product.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from oialr.momentary_groups import LISTS, RATES, Twin

logger = logging.getLogger(__name__)

FOLLOWING = "oialr_following"
"""Entry of a stored state: the rate of its origin that a twin has followed to, None of one whose
rate somebody sets."""
COMMON = "oialr_common"
"""Entry of a stored state: of a twin its other options in which it follows, and as what."""
NAMES = {"cores": "cores", "factors": "factors", "dense": "weights that are dense again"}
"""What is in a twin, by its kind."""


class TwinOptions:
    """Lets twins have the options of their origins: rates times their factors, the others alike.

    Options in tensors, which may lie on a GPU, are not looked at.
    """

    def __init__(self) -> None:
        """Begin without twins."""
        self._twins: dict[int, Twin] = {}
        """By their positions among the optimizer's groups."""
        self._seen: dict[int, tuple[float, float]] = {}
        """Rates of the origin and of the twin at the last look, of twins that nobody else sets."""
        self._common: dict[int, dict[str, Any]] = {}
        """Of each twin the other options that nobody else sets, as they were at the last look."""
        self._stored: Mapping[str, Any] = {}
        """A state that is being loaded."""
        self._told: set[str] = set()

    def add(self, optimizer: Optimizer, position: int, twin: Twin) -> None:
        """Look after a twin, whose options are as they shall be.

        Args:
            optimizer: of the group.
            position: of the twin.
            twin: what it is made by.
        """
        if not self._twins:
            optimizer.register_state_dict_post_hook(self._store)
            optimizer.register_load_state_dict_pre_hook(self._expect)
            optimizer.register_load_state_dict_post_hook(self._load)
        self._twins[position] = twin
        self._look(optimizer, position, optimizer.param_groups[twin.origin].get("lr"))
        self._compare(optimizer, position)

    def follow(self, optimizer: Optimizer) -> None:
        """Let twins follow, before a step, while no rate is changed for the time of the step."""
        for position in self._twins:
            self._follow_options(optimizer, position)
        groups = optimizer.param_groups
        rates = [group.get("lr") for group in groups]
        if all(not isinstance(rate, Tensor) and rate == 0 for rate in rates):
            return  # torch.distributed.checkpoint makes such a step, in which nothing moves
        for position, twin in self._twins.items():
            origin, group = groups[twin.origin], groups[position]
            self._check_swa(twin, origin, group)
            if position not in self._seen:
                continue
            (was, own), rate = self._seen.pop(position), origin["lr"]
            if "initial_lr" in group or isinstance(rate, Tensor):
                continue  # a schedule knows it
            if isinstance(group["lr"], Tensor) or group["lr"] != own:
                continue  # somebody has set it
            factor = twin.learning_rate_factor
            if rate != was and own == was * factor:
                group["lr"] = rate * factor
            elif rate != was and group["params"] and "stays" not in self._told:
                self._told.add("stays")
                logger.warning(
                    "OIALR's group of %s keeps the learning rate %g, which was not %g times that "
                    "of the weights, now %g: set it too, by method.learning_rate_factors",
                    *(NAMES[twin.kind], own, factor, rate),
                )
            self._look(optimizer, position, rate)

    def _follow_options(self, optimizer: Optimizer, position: int) -> None:
        twin, group = self._twins[position], optimizer.param_groups[position]
        origin, common = optimizer.param_groups[twin.origin], self._common[position]
        for key, was in [*common.items()]:
            own, value = group.get(key), origin.get(key)
            if key not in origin or not (_is_plain(own) and _is_plain(value)) or own != was:
                del common[key]  # somebody has set it
            elif value != was:
                group[key], common[key] = copy.copy(value), copy.copy(value)
        group.update(twin.change(origin) if twin.change else {})

    def _look(self, optimizer: Optimizer, position: int, origin: Any) -> None:
        own: Any = optimizer.param_groups[position].get("lr")
        if not any(rate is None or isinstance(rate, Tensor) for rate in (origin, own)):
            self._seen[position] = origin, own

    def _compare(self, optimizer: Optimizer, position: int) -> None:
        twin, group = self._twins[position], optimizer.param_groups[position]
        origin = optimizer.param_groups[twin.origin]
        others = {*LISTS, *RATES, *(twin.change(origin) if twin.change else ())}
        self._common[position] = {
            key: copy.copy(value)
            for key, value in origin.items()
            if key not in others
            and key in group
            and _is_plain(value)
            and _is_plain(group[key])
            and group[key] == value
        }

    def _store(self, _: Optimizer, state: dict[str, Any]) -> None:
        # Of every twin: torch.distributed.checkpoint loads the keys that are there already, and
        # takes a list as one value.
        rates = {position: rate for position, (rate, _) in self._seen.items()}
        state[FOLLOWING] = dict.fromkeys(self._twins) | rates
        state[COMMON] = {
            position: [[key, value] for key, value in common.items()]
            for position, common in self._common.items()
        }

    def _expect(self, _: Optimizer, state: dict[str, Any]) -> None:
        # torch.distributed.checkpoint puts what it has loaded beside what is there, by strings.
        self._stored = {
            key: {int(position): value for position, value in state[key].items()}
            for key in (FOLLOWING, COMMON)
            if key in state
        }

    def _load(self, optimizer: Optimizer) -> None:
        # States of earlier versions are without: there it is seen at the groups.
        rates, common = self._stored.get(FOLLOWING), self._stored.get(COMMON)
        self._seen = {}
        for position, twin in self._twins.items():
            if rates is None:
                self._look(optimizer, position, optimizer.param_groups[twin.origin].get("lr"))
            elif (rate := rates.get(position)) is not None:
                self._look(optimizer, position, rate)
            if common is None:
                self._compare(optimizer, position)
            else:
                self._common[position] = dict(common.get(position, ()))

    def _check_swa(self, twin: Twin, origin: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """Tell of torch's SWALR with one number, which passes over the factor."""
        rates = [each.get("swa_lr") for each in (origin, group)]
        if twin.learning_rate_factor == 1 or "swa" in self._told or None in rates:
            return
        if not any(isinstance(rate, Tensor) for rate in rates) and rates[0] == rates[1] != 0:
            self._told.add("swa")
            logger.warning(
                "SWALR gives the group of %s the same rate as that of the weights, and not %g "
                "times it, as OIALR's options say: give it a list, swa_lr=[rate * factor for "
                "factor in method.learning_rate_factors]",
                *(NAMES[twin.kind], twin.learning_rate_factor),
            )


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word or several of them, of which none lies on a device."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)
