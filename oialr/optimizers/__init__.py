"""What is known of optimizers: one file per family, each with its rules and their derivation.

A new one is a file and its name in the list below; docs/optimizers.md says what a rule is.
"""

from oialr.optimizers import adagrad, adam, adamax, lamb, lion, muon, rmsprop, sgd
from oialr.optimizers.registry import register_optimizer as register_optimizer
from oialr.optimizers.rule import OptimizerRule as OptimizerRule

FAMILIES = (adagrad, adam, adamax, lamb, lion, muon, rmsprop, sgd)

for _family in FAMILIES:
    for _kind, _rule in _family.RULES.items():
        register_optimizer(_kind, _rule)
