"""Adamax, which divides the first moment by a decaying maximum of the gradient's magnitude.

u_t = max(beta2 u_(t-1), |g_t|) is neither linear in the gradient nor a mean of its square, and what
it would have been in another basis cannot be known from it. (|L|^T u |R|) is a bound for all
gradients, but too large by up to the root of m n, and a u that is too large lasts for
1 / (1 - beta2) steps: training would stand still. One that is too small is mended by the
gradient itself, within the step that would have been too large. So the root of (L*L)^T u^2 (R*R) is
taken, the right size for uncorrelated entries of the gradient: their largest magnitudes are to each
other as their deviations.

What that leaves open is closed by an invariant: the corrected first moment m_t / (1 - beta1^t) is a
weighted mean of gradients whose magnitudes u_t bounds, but for the little that it has decayed, so
that no entry moves by more than about the learning rate. The first moment is known exactly in the
new basis, and u is raised to it where it is less.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Adamax

from oialr.optimizers.rule import Group, OptimizerRule
from oialr.transport import Transport


def _raise_to_first_moment(
    before: Mapping[str, Any],
    after: dict[str, Any],
    transport: Transport,
    group: Group,
) -> dict[str, Any]:
    if "exp_inf" in after:
        corrected = after["exp_avg"].abs() / (1 - group["betas"][0] ** after["step"])
        after["exp_inf"] = torch.maximum(after["exp_inf"], corrected)
    return after


RULES = {
    Adamax: OptimizerRule(linear={"exp_avg"}, absolute={"exp_inf"}, finish=_raise_to_first_moment)
}
