"""The optimizer and the learning-rate schedule, by configuration."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from app.config.optimizers import OPTIMIZERS
from oialr.compatibility import import_torchvision

if TYPE_CHECKING:
    from app.config.settings import TrainingSection


def build_optimizer(model: nn.Module, section: "TrainingSection") -> Optimizer:
    """Build the optimizer over two parameter groups, with and without weight decay.

    Biases, normalization weights and what the network names in ``no_weight_decay()`` (tokens,
    positions) are not decayed.
    """
    import_torchvision()
    from timm.optim import param_groups_weight_decay

    names: Any = getattr(model, "no_weight_decay", tuple)
    groups = param_groups_weight_decay(model, section.weight_decay, no_weight_decay_list=names())
    choice = OPTIMIZERS[section.optimizer]
    kind = getattr(import_module(choice.module), choice.name)
    optimizer = kind(groups, lr=section.learning_rate, **choice.options(section.momentum))
    assert isinstance(optimizer, Optimizer)
    return optimizer


def warmup_steps(section: "TrainingSection", steps_per_epoch: int) -> int:
    """Return the steps in which the learning rate rises, at the beginning."""
    return round(section.warmup_epochs * steps_per_epoch)


class Schedule:
    """Learning rate by optimizer steps: without state to store.

    It is a function of the step, and of how many there were since the latest conversion.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        section: "TrainingSection",
        *,
        steps: int,
        steps_per_epoch: int,
        since_conversion: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Make the schedule; parameter groups that are added later would not follow it.

        Args:
            optimizer: its groups' present learning rates are the peaks.
            section: shape of the schedule.
            steps: optimizer steps of the whole run.
            steps_per_epoch: optimizer steps of an epoch.
            since_conversion: tells the optimizer steps since layers turned low-rank the last time,
                when the warm-up after a conversion began; None: it has not begun.
        """
        import_torchvision()
        from timm.scheduler import CosineLRScheduler, StepLRScheduler

        warmup = warmup_steps(section, steps_per_epoch)
        common: dict[str, Any] = {
            "warmup_t": warmup,
            "warmup_lr_init": section.warmup_learning_rate,
            "t_in_epochs": False,
        }
        self._scheduler: Any
        if section.schedule == "cosine":
            # Length of all cycles over that of the first. The last step has the minimum.
            cycles = sum(section.cycle_mul**i for i in range(section.cycle_limit))
            common["t_initial"] = max(1, steps - warmup - 1) / cycles
            self._scheduler = CosineLRScheduler(
                optimizer,
                lr_min=section.minimum_learning_rate,
                cycle_limit=section.cycle_limit,
                cycle_mul=section.cycle_mul,
                cycle_decay=section.cycle_decay,
                k_decay=section.k_decay,
                warmup_prefix=True,
                **common,
            )
        else:
            self._scheduler = StepLRScheduler(optimizer, decay_t=steps, decay_rate=1.0, **common)
        self._optimizer = optimizer
        peaks = self._scheduler.base_values  # of the optimizer's groups, as they were above
        self._factors = [peak / peaks[0] for peak in peaks]
        self._since_conversion = since_conversion
        self._warmup_after_conversion = section.warmup_after_conversion

    def set(self, step: int) -> float:
        """Set the learning rates of a step.

        Args:
            step: optimizer steps taken before it, from 0.

        Returns:
            The learning rate of the first group.
        """
        self._scheduler.step_update(step)
        # The minimum and the warm-up's start are those of the first group: to timm they are all
        # groups' alike, so that at the end cores would have the learning rate of weights.
        rate = self._optimizer.param_groups[0]["lr"]
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = rate * factor
        since = self._since_conversion()
        if since is not None and since < self._warmup_after_conversion:
            for group in self._optimizer.param_groups:
                group["lr"] *= (since + 1) / self._warmup_after_conversion
        return float(self._optimizer.param_groups[0]["lr"])
