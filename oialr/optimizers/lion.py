"""Lion, which moves every entry by the sign of its momentum.

All that it keeps is one average of gradients, which is linear. The sign is not: a step in another
basis is another step, but no larger one. It moves all entries of a core (r, r) by the learning
rate, and so the weight by r of them in the Frobenius norm, where a step on the weight itself moves
it by the root of m n.

timm's (timm.optim.Lion), known by its name so that timm need not be there.
"""

from typing import Any

from oialr.optimizers.rule import Group, OptimizerRule


def corrected_rate(group: Group) -> Any:
    """Rate of timm's decoupled weight decay: the learning rate, or lr^2 / max_lr if asked for."""
    rate = group["lr"]
    return rate * rate / group["max_lr_snapshot"] if group.get("corrected_weight_decay") else rate


RULES = {"timm.optim.lion.Lion": OptimizerRule(linear={"exp_avg"}, decay_rate=corrected_rate)}
