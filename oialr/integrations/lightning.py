"""The method, and the measurement of basis stability, as callbacks of Lightning's Trainer.

Lightning restores weights before there is an optimizer, and the optimizer's state after
``on_fit_start``. So the network is prepared in ``setup``, the method begins in ``on_fit_start``,
and its state travels with those of all callbacks in Lightning's own checkpoints.
"""

import math
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from oialr.errors import UserError
from oialr.method import OIALR
from oialr.preparation import prepare
from oialr.stability.alone import StabilityTracker
from oialr.stability.tracker import mean_stability
from oialr.wrappers import unwrapped_optimizer


class OIALRCallback(pl.Callback):
    """Turns a LightningModule low-rank while it is trained, by automatic or manual optimization.

    ``Trainer(callbacks=[OIALRCallback(delay=1000, update_interval=500)])``; resumes, gradient
    accumulation, clipping, DDP and averages of weights are Lightning's own. At an event
    ``trainable_percent`` and ``compression_percent`` are logged.
    """

    def __init__(self, **options: Any) -> None:
        """Keep what :class:`oialr.OIALR` will be made with.

        Args:
            **options: of :class:`oialr.OIALR`; delay and update_interval count optimizer steps.
        """
        self.options = options
        self.method: OIALR | None = None
        """There from ``on_fit_start`` on, and after the training."""
        self._stored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the module take weights of whatever ranks, which are loaded next, with a state.

        What an earlier ``test`` or ``validate`` has loaded is of another module.
        """
        self._stored = None
        for module in (pl_module, *_averages(trainer)):
            prepare(module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or go on where the checkpoint was, or where an earlier fit of the module ended.

        Raises:
            UserError: the module has several optimizers.
            ValueError: as :class:`oialr.OIALR`; a sharding strategy among others.
        """
        if len(trainer.optimizers) != 1:
            raise UserError(
                f"OIALRCallback needs one optimizer, and configure_optimizers of "
                f"{type(pl_module).__name__} returns {len(trainer.optimizers)}"
            )
        state, self._stored, last = self._stored, None, self.method
        optimizer = unwrapped_optimizer(trainer.optimizers[0])
        if last is None or last.model is not pl_module or last.optimizer is not optimizer:
            if state is None and last and last.model is pl_module:
                state = last.state_dict()
            self.method = OIALR(pl_module, optimizer, **self.options)
        assert self.method is not None
        if state is not None:
            self.method.load_state_dict(state)
        for average in _averages(trainer):
            self.method.follow(average)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Convert, update or release where an optimizer step has made it due."""
        assert self.method is not None
        strategy: Any = trainer.strategy
        event = self.method.step()
        if event is None:
            return
        if event.shapes_changed and isinstance(strategy.model, DistributedDataParallel):
            strategy.model = pl_module  # the old wrapper goes before there is a new one
            strategy.configure_ddp()
        pl_module.log("trainable_percent", self.method.trainable_percent())
        pl_module.log("compression_percent", self.method.compression_percent())

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state, for Lightning's checkpoint."""
        return self.method.state_dict() if self.method else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the method's state until the method begins."""
        self._stored = state_dict or None


def _averages(trainer: pl.Trainer) -> list[nn.Module]:
    """Return the averaged copies that callbacks of Lightning hold: its EMA, and SWA."""
    callbacks: list[Any] = [*trainer.callbacks]  # type: ignore[attr-defined]
    held = [getattr(callback, "_average_model", None) for callback in callbacks]
    return [average for average in held if isinstance(average, nn.Module)]


class StabilityCallback(pl.Callback):
    """Measures basis stability at the end of every training epoch, full-rank or low-rank.

    ``tracker`` holds all measurements, as of :class:`oialr.StabilityTracker`; their mean is logged
    as ``stability``. Process 0 measures alone. A resume begins a new history.
    """

    def __init__(self, **options: Any) -> None:
        """Keep what :class:`oialr.StabilityTracker` will be made with, such as window."""
        self.options = options
        self.tracker: StabilityTracker | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the network's weights."""
        network: nn.Module = pl_module
        self.tracker = StabilityTracker(network, **self.options)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, on process 0."""
        assert self.tracker is not None
        if trainer.is_global_zero:
            stability = mean_stability(self.tracker.measure())
            if not math.isnan(stability):  # as within the first window
                pl_module.log("stability", stability, rank_zero_only=True)
