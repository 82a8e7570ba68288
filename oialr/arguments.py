"""Which values the arguments of the method may have."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from oialr.layers.attention import AttentionProjection
from oialr.layers.cost import Execution
from oialr.optimizer_state import UnknownState

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "delay": (lambda value: value >= 1, "at least 1"),
    "update_interval": (lambda value: value >= 1, "at least 1"),
    "cutoff": (lambda value: 0 < value < 1, "in (0, 1)"),
    "layer_fraction": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "minimum_rank_fraction": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "largest_cut": (lambda value: 0 < value < 1, "in (0, 1)"),
    "retained_energy": (lambda value: value is None or 0 < value < 1, "in (0, 1), or None"),
    "largest_energy_cut": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "rank_multiple": (lambda value: value >= 1, "at least 1"),
    "core_learning_rate_factor": (lambda value: value > 0, "positive"),
}
CHOICES: dict[str, Any] = {
    "execution": Execution,
    "attention_projection": AttentionProjection,
    "unknown_optimizer_state": UnknownState,
    "factorization": Literal["auto", "owner", "heat", "replicated"],
}


def check_arguments(**values: Any) -> None:
    """Reject the first argument that is out of its range or none of its choices.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """
    for name, value in values.items():
        if name in RANGES:
            is_right, right = RANGES[name]
            if not is_right(value):
                raise ValueError(f"{name} must be {right}, not {value!r}")
        elif value not in (choices := get_args(CHOICES[name])):
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
