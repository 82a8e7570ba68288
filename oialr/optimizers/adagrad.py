"""Adagrad, which divides by the root of the sum of all squared gradients since its start.

A sum of squares follows as an average of them does. The value that it began with follows too: the
squares of orthonormal columns sum to one, so that it is the same for a core, and for a factor it is
as much smaller as the factor's gradient. The sum never decays. Where it comes out too small, since
entries of the gradient were alike, a step is too large for as long as the gradient needs to add
what is missing; what it divides by holds the present gradient, so that no entry ever moves by more
than the learning rate. The step count lowers the learning rate if asked to, and stays.
"""

from torch.optim import Adagrad

from oialr.optimizers.rule import OptimizerRule

RULES = {Adagrad: OptimizerRule(squared={"sum"})}
