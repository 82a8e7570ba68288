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
    "release_warmup": (lambda value: value >= 0, "at least 0"),
    "factor_learning_rate_factor": (lambda value: value > 0, "positive"),
    "frobenius_decay": (lambda value: value is None or value >= 0, "at least 0, or None"),
}
CHOICES: dict[str, Any] = {
    "execution": Execution,
    "attention_projection": AttentionProjection,
    "unknown_optimizer_state": UnknownState,
    "factorization": Literal["auto", "owner", "heat", "replicated"],
}


def check_arguments(*, release: int | None, **values: Any) -> None:
    """Reject the first argument that is out of its range or none of its choices.

    Args:
        release: judged by the delay.
        values: all others.

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
    if release is not None and release < values["delay"]:
        raise ValueError(f"release must be at least delay, {values['delay']}, not {release!r}")
    if release is None and values["frobenius_decay"] is not None:
        raise ValueError("frobenius_decay is for the factors that a release makes: set release too")
