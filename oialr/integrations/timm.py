"""The method, and the measurement of basis stability, in the loop of timm's train.py.

Its optimizer is there before ``resume_checkpoint``, averages, DistributedDataParallel, schedules
and the saver are. So the method begins with it, steps with it, and its state travels in the
optimizer's: everything else of the program stays as it is.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from oialr.method import OIALR
from oialr.stability.alone import StabilityTracker
from oialr.stability.tracker import mean_stability
from oialr.wrappers import renew_wrappers


def oialr_in_loop(model: nn.Module, optimizer: Optimizer, **options: Any) -> OIALR:
    """Let a network turn low-rank whenever its optimizer steps.

    To be called as soon as there is an optimizer, before anything is restored or wrapped::

        optimizer = create_optimizer_v2(model, ...)
        method = oialr_in_loop(model, optimizer, delay=1000, update_interval=500)

    ``resume_checkpoint`` and ``CheckpointSaver`` then restore and store the method with the
    optimizer. An average follows by ``method.follow(model_ema)``, where it is made.

    Args:
        model: the network.
        optimizer: of its parameters; its state_dict gets another entry, "oialr".
        **options: of :class:`oialr.OIALR`; delay and update_interval count optimizer steps.

    Returns:
        The method, whose ``step`` is called by itself.

    Raises:
        ValueError: as :class:`oialr.OIALR`.
    """
    method = OIALR(model, optimizer, **options)

    def after_step(*_: Any) -> None:
        event = method.step()
        if event and event.shapes_changed:
            renew_wrappers(method.model)

    def store(_: Optimizer, state: dict[str, Any]) -> None:
        state["oialr"] = method.state_dict()

    def restore(_: Optimizer, state: dict[str, Any]) -> None:
        if "oialr" in state:
            method.load_state_dict(state["oialr"])

    optimizer.register_step_post_hook(after_step)
    optimizer.register_state_dict_post_hook(store)
    optimizer.register_load_state_dict_pre_hook(restore, prepend=True)
    return method


class StabilityMetrics:
    """Measures basis stability for the metrics of an epoch, full-rank or low-rank.

    ``train_metrics.update(stability.measure())`` takes it into summary.csv; ``tracker`` holds all
    measurements, as of :class:`oialr.StabilityTracker`. A resume begins a new history.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        """Look at the network's weights.

        Args:
            model: the network, whichever wrappers are around it.
            **options: of :class:`oialr.StabilityTracker`, such as window.
        """
        self.tracker = StabilityTracker(model, **options)

    def measure(self) -> dict[str, float]:
        """Measure, on this process alone; return the mean, NaN within the first window."""
        return {"stability": mean_stability(self.tracker.measure())}
