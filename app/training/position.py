"""How far a run has come, and that it has come no farther."""

import math
from dataclasses import dataclass


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    """Epochs finished, their evaluation included."""
    batch: int = 0
    """Global batches of the present epoch that were trained on."""
    loss: float = math.nan
    """Of the last step that was recorded."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run was stopped before its end, after a checkpoint."""
