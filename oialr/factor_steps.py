"""What is done around an optimizer's step after a release: warm-up and Frobenius decay.

Ours and not the paper's. The hooks change neither schedules nor what a checkpoint holds, and wait
for no device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.around_steps import AroundSteps
from oialr.linalg.precision import without_autocast
from oialr.naming import full_name
from oialr.optimizers.registry import rule_of
from oialr.optimizers.rule import OptimizerRule
from oialr.options import Release
from oialr.parameter_groups import TwinGroups


def check_decay(optimizer: Optimizer, options: Release) -> None:
    """Reject a Frobenius decay of an optimizer of which it is not known how its weights decay.

    Raises:
        ValueError: it is one.
    """
    if options.frobenius_decay is not None and rule_of(optimizer) is None:
        raise ValueError(
            f"frobenius_decay: it is not known how weights decay by "
            f"{full_name(type(optimizer))}: oialr.register_optimizer tells"
        )


class FactorSteps(AroundSteps):
    """Guides the steps of the factors A and B, and of weights that a release made dense again.

    A step on balanced factors of W = A B moves W by -lr (G V s V^T + U s U^T G): by the singular
    values s more or less than a step on the weight or the core, and in directions that the core's
    moments knew nothing of. So after a release their learning rate rises linearly from a small
    share of its own to the whole.

    Frobenius decay (arXiv 2105.01029) is the gradient of lambda / 2 |A B|_F^2: lambda A (B B^T) for
    A, lambda (A^T A) B for B, products of (r, r) alone. It is added to the gradient where the
    optimizer adds weight decay to it, and decoupled where that is decoupled. Of a dense weight it
    is the plain weight decay. The gradient has it in the step alone, as it has torch's own decay;
    but under GradScaler a fused optimizer writes into the gradients, and there the sum stays.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: TwinGroups,
        *,
        options: Release,
        steps_since_release: Callable[[], int | None],
    ) -> None:
        """Add the parameter groups of factors and dense weights, and hang on to the steps.

        Args:
            optimizer: changed in place; :func:`check_decay` has let it pass.
            groups: get the twins.
            options: of the release.
            steps_since_release: optimizer steps taken since; None before it.
        """
        has_decay = options.frobenius_decay is not None
        self._rule = rule_of(optimizer) or OptimizerRule()
        groups.add(
            optimizer,
            "factors",
            learning_rate_factor=options.factor_learning_rate_factor,
            change=self._rule.without_decay if has_decay else None,
        )
        groups.add(optimizer, "dense")
        self._groups = groups
        self._since = steps_since_release
        self._warmup = options.release_warmup
        self._decay = options.frobenius_decay
        self._changed: list[tuple[dict[str, Any], Any, Any]] = []
        """Groups whose learning rate is lowered, with what it was and is."""
        self._gradients: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        """Factors whose decay is in their gradient, with what that was and is."""
        super().__init__(optimizer)

    def enter(self, optimizer: Optimizer) -> None:
        """Let the twins' options follow, and lower their rates within the warm-up."""
        self._groups.twins.follow(optimizer)
        if (since := self._since()) is None or since >= self._warmup:
            return
        share = (since + 1) / (self._warmup + 1)
        positions = (*self._groups.positions("factors"), *self._groups.positions("dense"))
        for group in (optimizer.param_groups[position] for position in positions):
            lowered = group["lr"] * share
            self._changed.append((group, group["lr"], lowered))
            group["lr"] = lowered

    @torch.no_grad()
    def with_gradients(self, optimizer: Optimizer) -> None:
        """Let the factors decay."""
        if not self._decay or self._since() is None:
            return
        with without_autocast():
            for position in self._groups.positions("factors"):
                self._decay_factors(optimizer, optimizer.param_groups[position], self._decay)

    def leave(self, optimizer: Optimizer) -> None:
        """Undo what was done, but for rates and gradients that somebody has set meanwhile."""
        for group, whole, lowered in self._changed:
            if group["lr"] is lowered:
                group["lr"] = whole
        for parameter, gradient, with_decay in self._gradients:
            if parameter.grad is with_decay:
                parameter.grad = gradient
        self._changed, self._gradients = [], []

    def suspend(self, optimizer: Optimizer) -> Callable[[], None]:
        """Raise the learning rates for the time being; gradients have no decay yet."""
        changed = self._changed
        self.leave(optimizer)

        def put_back() -> None:
            self._changed = changed
            for group, whole, lowered in changed:
                if group["lr"] is whole:
                    group["lr"] = lowered

        return put_back

    def _decay_factors(self, optimizer: Optimizer, group: dict[str, Any], decay: float) -> None:
        parameters: list[nn.Parameter] = group["params"]
        for A, B in zip(parameters[::2], parameters[1::2], strict=True):
            if A.grad is None or B.grad is None:
                continue  # the optimizer leaves out what has no gradient
            terms = A @ (B @ B.mT), (A.mT @ A) @ B
            for parameter, term in zip((A, B), terms, strict=True):
                self._apply_decay(optimizer, group, parameter, decay * term)

    def _apply_decay(
        self, optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, term: Tensor
    ) -> None:
        """Let a parameter decay by a term, as the optimizer would by weight decay.

        A fused optimizer under GradScaler is given scaled gradients, with the scale and whether one
        of them is infinite, in which case it takes no step.
        """
        if (rate := self._rule.decay_rate(group)) is not None:
            if (found := getattr(optimizer, "found_inf", None)) is not None:
                term = term * (1 - found)
            parameter.sub_(rate * term)
            return
        gradient = parameter.grad
        assert gradient is not None
        if group.get("maximize"):
            term = -term
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            gradient.add_(term * scale)
            return
        parameter.grad = gradient.add(term)
        self._gradients.append((parameter, gradient, parameter.grad))
