"""Muon, whose step is the polar factor of its momentum.

The momentum is an average of gradients, and linear. The polar factor of L^T M R with square L, R is
L^T polar(M) R, for the Newton-Schulz polynomial that torch takes in its place too: a rotation of
the bases leaves Muon as exactly as it was as gradient descent with momentum, up to the bfloat16 in
which the polynomial is computed. A step moves a core (r, r) by lr in the spectral norm and by the
root of r times that in the Frobenius norm, where it is that of min(m, n) and more on the weight.

torch's Muon takes parameters of two dimensions alone. Cores and factors have two where a weight is
read as one matrix; where it is a stack of them, the layer is refused when the method is made. Other
parameters of a network are trained by a second optimizer, which the method need not know of.
"""

import torch

from oialr.optimizers.rule import OptimizerRule, decoupled

RULES = {
    kind: OptimizerRule(linear={"momentum_buffer"}, decay_rate=decoupled, matrices_only=True)
    for kind in [getattr(torch.optim, "Muon", None)]
    if kind is not None
}
