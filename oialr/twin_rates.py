"""Learning rates of the groups that are twins of others, where a loop sets those of the others.

Who knows of one group alone, as before the method, sets ``optimizer.param_groups[0]["lr"]``. The
twins follow then, at the next step. A schedule that is made after the method knows the twins, and
so does a loop that sets the rates of all groups: what they set is left as it is.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

FOLLOWING = "oialr_following"
"""Entry of a stored state: the rate of its origin that a twin has followed to, None of one whose
rate somebody sets."""
NAMES = {"cores": "cores", "factors": "factors", "dense": "weights that are dense again"}
"""What is in a twin, by its kind."""


@dataclass(frozen=True)
class _Twin:
    kind: str
    origin: int
    factor: float


class TwinRates:
    """Lets twins have the rates of their origins, times their factors.

    Rates in tensors, which may lie on a GPU, are not looked at.
    """

    def __init__(self) -> None:
        """Begin without twins."""
        self._twins: dict[int, _Twin] = {}
        """By their positions among the optimizer's groups."""
        self._seen: dict[int, tuple[float, float]] = {}
        """Rates of the origin and of the twin at the last look, of twins that nobody else sets."""
        self._stored: Mapping[int, float | None] | None = None
        """What a state that is being loaded tells; None: it is of an earlier version."""
        self._told: set[str] = set()

    def add(
        self, optimizer: Optimizer, position: int, *, kind: str, origin: int, factor: float
    ) -> None:
        """Look after a twin, whose rate is as it shall be.

        Args:
            optimizer: of the group.
            position: of the twin.
            kind: of what it is for.
            origin: position of the group that it is a twin of.
            factor: learning rate over that of the origin.
        """
        if "lr" not in optimizer.param_groups[origin]:
            return
        if not self._twins:
            optimizer.register_state_dict_post_hook(self._store)
            optimizer.register_load_state_dict_pre_hook(self._expect)
            optimizer.register_load_state_dict_post_hook(self._load)
        self._twins[position] = _Twin(kind, origin, factor)
        self._look(optimizer, position, optimizer.param_groups[origin]["lr"])

    def follow(self, optimizer: Optimizer) -> None:
        """Let twins follow, before a step, while no rate is changed for the time of the step."""
        if not self._twins:
            return
        groups = optimizer.param_groups
        if all(not isinstance(group["lr"], Tensor) and group["lr"] == 0 for group in groups):
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
            if rate != was and own == was * twin.factor:
                group["lr"] = rate * twin.factor
            elif rate != was and group["params"] and "stays" not in self._told:
                self._told.add("stays")
                logger.warning(
                    "OIALR's group of %s keeps the learning rate %g, which was not %g times that "
                    "of the weights, now %g: set it too, by method.learning_rate_factors",
                    *(NAMES[twin.kind], own, twin.factor, rate),
                )
            self._look(optimizer, position, rate)

    def _look(self, optimizer: Optimizer, position: int, origin: Any) -> None:
        own = optimizer.param_groups[position]["lr"]
        if not isinstance(origin, Tensor) and not isinstance(own, Tensor):
            self._seen[position] = origin, own

    def _store(self, _: Optimizer, state: dict[str, Any]) -> None:
        # Of every twin: torch.distributed.checkpoint loads the keys that are there already.
        rates = {position: rate for position, (rate, _) in self._seen.items()}
        state[FOLLOWING] = dict.fromkeys(self._twins) | rates

    def _expect(self, _: Optimizer, state: dict[str, Any]) -> None:
        self._stored = state.get(FOLLOWING)

    def _load(self, optimizer: Optimizer) -> None:
        self._seen = {}
        for position, twin in self._twins.items():
            if self._stored is None:
                self._look(optimizer, position, optimizer.param_groups[twin.origin]["lr"])
            elif (rate := self._stored.get(position)) is not None:
                self._look(optimizer, position, rate)

    def _check_swa(self, twin: _Twin, origin: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """Tell of torch's SWALR with one number, which passes over the factor."""
        rates = [each.get("swa_lr") for each in (origin, group)]
        if twin.factor == 1 or "swa" in self._told or None in rates:
            return
        if not any(isinstance(rate, Tensor) for rate in rates) and rates[0] == rates[1] != 0:
            self._told.add("swa")
            logger.warning(
                "SWALR gives the group of %s the same rate as that of the weights, and not %g "
                "times it, as OIALR's options say: give it a list, swa_lr=[rate * factor for "
                "factor in method.learning_rate_factors]",
                *(NAMES[twin.kind], twin.factor),
            )
