"""Gradient descent: its momentum, of Nesterov too, is a sum of gradients, and all that it keeps."""

from torch.optim import SGD

from oialr.optimizers.rule import OptimizerRule

RULES = {SGD: OptimizerRule(linear={"momentum_buffer"})}
