"""The end of a training whose validation loss does not fall any more."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from app.config.settings import TrainingSection
from app.training.checkpoint import Checkpoints
from oialr.method import OIALR
from oialr.preparation import prepare

logger = logging.getLogger(__name__)

SINCE_BEST = "epochs_since_best"
"""Key of summary.json, with training.early_stopping."""
BEST_KEYS = ("ranks", "model")
"""What the best weights are kept with."""


def ended_early(summary: Mapping[str, Any], training: TrainingSection) -> str | None:
    """Return the line of a finished run that has stopped early, and would again; None: it did not.

    Args:
        summary: of the run.
        training: as the run is configured now.
    """
    epochs, patience = summary["epochs"], training.early_stopping
    since: int = summary.get(SINCE_BEST, 0)
    if patience is None or since < patience or epochs >= training.epochs:
        return None
    since_then = "1 epoch" if since == 1 else f"{since} epochs"
    return (
        f"stopped early, after epoch {epochs} of {training.epochs}: no smaller validation loss in "
        f"{since_then}; a larger training.early_stopping, or null, trains on"
    )


class EarlyStopping:
    """Keeps the weights of the epoch with the least validation loss, and says when to stop.

    Where layers turn low-rank or are released, it begins anew: the network is another one, and the
    best weights of the one before do not count, nor do those of an epoch that ends right there, of
    which nothing has been trained in the new form.
    """

    def __init__(self, checkpoints: Checkpoints, *, patience: int) -> None:
        """Start before the first epoch. A collective call.

        Args:
            checkpoints: where the best weights are kept.
            patience: epochs without a smaller loss after which training stops.
        """
        self._checkpoints = checkpoints
        self._patience = patience
        self._best = math.inf
        self._best_step: int | None = None
        self.epochs_since = 0
        """Epochs since the one with the least loss, or since a beginning."""
        self._begun_step = 0
        self._kept_step = checkpoints.newest_step()
        self._lost = False

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return self.epochs_since >= self._patience

    def begin_anew(self, step: int) -> None:
        """Forget what was best up to a step, after which the network has another form."""
        self._best, self._best_step = math.inf, None
        self.epochs_since, self._begun_step = 0, step

    def improves(self, step: int, loss: float) -> bool:
        """Take note of an epoch's validation loss; tell whether it is the least so far.

        Args:
            step: optimizer steps taken. An epoch that ends with the step of a beginning does not
                count.
            loss: on the validation part.
        """
        if step <= self._begun_step:
            return False
        if loss < self._best:
            self._best, self.epochs_since = loss, 0
            return True
        self.epochs_since += 1
        return False

    def keep(
        self, step: int, model: nn.Module, method: OIALR | None, *, process_count: int
    ) -> None:
        """Write the weights as the best ones. A collective call."""
        state = method.state_dict() if method else {"ranks": {}, "released": {}}
        shared = {
            "process_count": process_count,
            "step": step,
            "ranks": state["ranks"],
            "released": state["released"],
            "model": model.state_dict(),
        }
        self._checkpoints.save(step, shared, {})
        self._best_step = step

    def restore_best(self, model: nn.Module) -> int | None:
        """Give the network the best weights, at the ranks that it had then. A collective call.

        The optimizer does not follow: nothing can be trained after it.

        Returns:
            The step that they are of; None: there are none, and the network stays as it is.
        """
        loaded = None if self._best_step is None else self._checkpoints.load()
        if loaded is None:
            reason = "the best weights are lost"
            if self._best_step is None and not self._lost:
                since = " since layers changed their form" if self._begun_step else " as yet"
                reason = f"no epoch has ended{since}"
            logger.warning("%s: the newest weights are tested", reason)
            return None
        best, _ = loaded
        prepare(model).load_state_dict(best["model"])
        # Of a killed session they may be later ones than it knew.
        step: int | None = best.get("step", self._best_step)
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return the state, but for the best weights."""
        return {
            "best": self._best,
            "best_step": self._best_step,
            "epochs_since": self.epochs_since,
            "begun_step": self._begun_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a stored state, unless its best weights are not there any more.

        A killed session may have found better ones after its last checkpoint. They stay: they are
        found again, or are better than what is.
        """
        self._begun_step = state.get("begun_step", 0)  # states of earlier versions are without
        step = state.get("best_step", self._kept_step)
        if step is not None and (self._kept_step is None or self._kept_step < step):
            logger.warning(
                "early stopping begins anew: the best weights are damaged or not there any more"
            )
            self._lost = True
            return
        self._best, self._best_step = state["best"], step
        self.epochs_since = state["epochs_since"]
