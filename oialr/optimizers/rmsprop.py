"""RMSprop, which divides by the root of an average of squares, or by that of a variance.

Its momentum is a sum of gradients over these roots, which are carried over as if they were alike.
"""

from collections.abc import Mapping
from typing import Any

from torch.optim import RMSprop

from oialr.optimizers.rule import Group, OptimizerRule
from oialr.transport import Transport


def _carry_variance(
    before: Mapping[str, Any],
    after: dict[str, Any],
    transport: Transport,
    group: Group,
) -> dict[str, Any]:
    """Carry over the variance of a centered RMSprop, square_avg - grad_avg^2, and not square_avg.

    That keeps what it divides by from becoming negative.
    """
    if "grad_avg" in after:
        variance = (before["square_avg"] - before["grad_avg"].square()).clamp_min(0)
        after["square_avg"] = transport.squared(variance) + after["grad_avg"].square()
    return after


RULES = {
    RMSprop: OptimizerRule(
        linear={"momentum_buffer", "grad_avg"}, squared={"square_avg"}, finish=_carry_variance
    )
}
