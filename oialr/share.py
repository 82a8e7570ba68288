"""How much of a network the method can factorize."""

from collections import Counter
from collections.abc import Iterable
from math import prod

from torch import nn

from oialr.layer_survey import LayerReport

LITTLE = 0.5
"""Share of the parameters below which a user may not know how little is factorized."""
REASONS = 3
"""Reasons that are told, the weightiest first."""


def little_factorized(model: nn.Module, layers: Iterable[LayerReport]) -> str | None:
    """Say that little of a network is factorized, and why; None where it is not little.

    Counted are the trained multidimensional weights, a shared one once, without those that the user
    has excluded by name.

    Args:
        model: the dense network.
        layers: every multidimensional weight of it.
    """
    sizes: Counter[str | None] = Counter()
    seen = set()
    for layer in layers:
        weight = model.get_parameter(layer.name)
        if weight.requires_grad and weight not in seen and not layer.is_left_out:
            sizes[layer.stays_dense] += prod(layer.shape)
        seen.add(weight)
    total = sizes.total()
    factorized = sizes.pop(None, 0)
    if factorized >= LITTLE * total:
        return None
    reasons = "; ".join(
        f"{100 * size / total:.0f} % stay full-rank: {reason}"
        for reason, size in sizes.most_common(REASONS)
        if size >= 0.005 * total
    )
    return f"only {100 * factorized / total:.0f} % of the parameters are factorized. {reasons}"
