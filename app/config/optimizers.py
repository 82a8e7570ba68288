"""The optimizers that a training takes by name: the one table that tells of them.

All are known to the library (docs/optimizers.md), so that their state follows every event. torch's
Muon is not among them: it takes matrices alone, and a network has biases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Choice:
    """An optimizer, and what becomes of training.momentum."""

    module: str
    """That its class is imported from."""
    name: str
    """Of the class."""
    options: Callable[[float], dict[str, Any]]
    """Keyword arguments beside the learning rate, by the momentum."""


OPTIMIZERS = {
    "adamw": Choice("torch.optim", "AdamW", lambda momentum: {"betas": (momentum, 0.999)}),
    "adam": Choice("torch.optim", "Adam", lambda momentum: {"betas": (momentum, 0.999)}),
    "nadam": Choice("torch.optim", "NAdam", lambda momentum: {"betas": (momentum, 0.999)}),
    "radam": Choice("torch.optim", "RAdam", lambda momentum: {"betas": (momentum, 0.999)}),
    "adagrad": Choice("torch.optim", "Adagrad", lambda _: {}),
    "adamax": Choice("torch.optim", "Adamax", lambda momentum: {"betas": (momentum, 0.999)}),
    "sgd": Choice(
        "torch.optim", "SGD", lambda momentum: {"momentum": momentum, "nesterov": momentum > 0}
    ),
    "rmsprop": Choice("torch.optim", "RMSprop", lambda momentum: {"momentum": momentum}),
    "lion": Choice("timm.optim", "Lion", lambda momentum: {"betas": (momentum, 0.99)}),
    # Gradients are clipped by training.gradient_clip, and nowhere else.
    "lamb": Choice(
        "timm.optim",
        "Lamb",
        lambda momentum: {"betas": (momentum, 0.999), "max_grad_norm": None},
    ),
}

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
