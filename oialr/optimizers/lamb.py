"""LAMB: Adam's step, scaled by layer to the norm of the weight.

The moments are Adam's. The trust ratio |W| / |update| is computed anew at every step and nothing
is kept of it; a core has the Frobenius norm of its weight, so that a step on it is as large as one
on the weight. The step count is in the parameter group, and stays with it: groups that the method
adds count from where those that they are made of stand, empty or not.

timm's LAMB adapts to the layer only where weights decay, unless it is told always to. A group whose
decay is replaced by that of a product is therefore told so. It adds weight decay to the update
before that is scaled; the decay of a product is taken off the factors at the learning rate, as by
its option decoupled_decay: the ratio would have to be known for anything else.

timm's (timm.optim.Lamb), known by its name so that timm need not be there.
"""

from typing import Any

from oialr.optimizers.lion import corrected_rate
from oialr.optimizers.rule import Group, OptimizerRule


def _decoupled(group: Group) -> Any:
    return corrected_rate(group) if group.get("decoupled_decay") else group["lr"]


def _without_decay(group: Group) -> dict[str, Any]:
    return {
        "weight_decay": 0.0,
        "always_adapt": group["always_adapt"] or group["weight_decay"] != 0,
    }


RULES = {
    "timm.optim.lamb.Lamb": OptimizerRule(
        linear={"exp_avg"},
        squared={"exp_avg_sq"},
        decay_rate=_decoupled,
        without_decay=_without_decay,
    )
}
