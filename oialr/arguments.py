"""Which values the arguments of the method may have."""

from collections.abc import Callable, Mapping
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
    "target_size": (lambda value: value is None or 0 < value <= 1, "in (0, 1], or None"),
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


def check_arguments(values: Mapping[str, Any]) -> None:
    """Reject the first argument that is out of its range or none of its choices.

    Args:
        values: all arguments of the method, by name; others may be among them.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """
    for name, (is_right, right) in RANGES.items():
        if not is_right(values[name]):
            raise ValueError(f"{name} must be {right}, not {values[name]!r}")
    for name, kind in CHOICES.items():
        if values[name] not in (choices := get_args(kind)):
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {values[name]!r}")
    delay, release = values["delay"], values["release"]
    if release is not None and release < delay:
        raise ValueError(f"release must be at least delay, {delay}, not {release!r}")
    if release is None and values["frobenius_decay"] is not None:
        raise ValueError("frobenius_decay is for the factors that a release makes: set release too")
