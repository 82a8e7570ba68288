"""Adam and what differs from it by no state: AdamW, NAdam and RAdam.

The first moment is linear in the gradient, the second an average of its square, and of AMSGrad's
the largest one. The step count, and NAdam's product of momenta, correct for averages that began at
zero: they belong to the moments and stay with them.
"""

from typing import Any

from torch.optim import Adam, AdamW, NAdam, RAdam

from oialr.optimizers.rule import Group, OptimizerRule, decoupled


def _decoupled_if_asked_for(group: Group) -> Any:
    return group["lr"] if group.get("decoupled_weight_decay") else None


MOMENTS: dict[str, Any] = {"linear": {"exp_avg"}, "squared": {"exp_avg_sq", "max_exp_avg_sq"}}

RULES = {
    Adam: OptimizerRule(**MOMENTS, decay_rate=_decoupled_if_asked_for),
    AdamW: OptimizerRule(**MOMENTS, decay_rate=decoupled),
    NAdam: OptimizerRule(**MOMENTS, decay_rate=_decoupled_if_asked_for),
    RAdam: OptimizerRule(**MOMENTS, decay_rate=_decoupled_if_asked_for),
}
