"""The rules by the exact type of an optimizer."""

from typing import Any

from torch.optim import Optimizer

from oialr.naming import full_name
from oialr.optimizers.rule import OptimizerRule

_RULES: dict[type[Optimizer] | str, OptimizerRule] = {}


def register_optimizer(kind: type[Optimizer] | str, rule: OptimizerRule) -> None:
    """Tell how the state of an optimizer follows the weights that become low-rank.

    It holds for this very type: a subclass may keep other state, and is registered by itself.
    docs/optimizers.md leads through it. A type that is registered twice has the last rule.

    Args:
        kind: the optimizer's class, or its full name such as "package.module.Class", for a package
            that need not be there.
        rule: what is known of its state.

    Raises:
        ValueError: this is no class of an optimizer and no full name, or the rule is none.
    """
    is_class = isinstance(kind, type) and issubclass(kind, Optimizer)
    if not is_class and not (isinstance(kind, str) and "." in kind):
        raise ValueError(
            f"register_optimizer takes an optimizer's class, or its full name such as "
            f"'package.module.Class', not {kind!r}"
        )
    if not isinstance(rule, OptimizerRule):
        raise ValueError(f"the rule of {kind} must be an OptimizerRule, not {rule!r}")
    _RULES[kind] = rule


def rule_of(optimizer: Optimizer) -> OptimizerRule | None:
    """Return the rule of an optimizer's exact type; None if it is not known."""
    return _look_up(type(optimizer))


def known_base(optimizer: Optimizer) -> str | None:
    """Return the name of the nearest type with a rule that an optimizer is derived from."""
    bases = type(optimizer).__mro__[1:]
    return next((base.__name__ for base in bases if _look_up(base)), None)


def known_names() -> list[str]:
    """Return the names of all types with a rule, without their modules."""
    return [kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__ for kind in _RULES]


def known_averages() -> frozenset[str]:
    """Return the names of all entries that are known to have their parameter's shape."""
    return frozenset[str]().union(*(rule.averages for rule in _RULES.values()))


def _look_up(kind: type[Any]) -> OptimizerRule | None:
    return _RULES.get(kind) or _RULES.get(full_name(kind))
