"""What of a finished run's checkpoints is dropped, and what is told where that is missed."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import AgreedStorageError
from app.training.build import Parts
from app.training.checkpoint import Checkpoints
from app.training.progress import Progress

logger = logging.getLogger(__name__)

FOR_FAULTS = 2
"""Checkpoints of so many are kept for the case that one is damaged; of more, for their own sake."""


def tidy(parts: Parts, checkpoints: Checkpoints, progress: Progress) -> None:
    """Drop what only a run that goes on would need, see run.tidy. A collective call.

    Where that fails, everything stays, with a warning: the run has finished all the same.
    """
    run = parts.configuration.run
    if not run.tidy:
        return
    try:
        freed = checkpoints.tidy(1 if run.keep_checkpoints <= FOR_FAULTS else run.keep_checkpoints)
    except AgreedStorageError as error:
        if parts.runtime.is_first:
            logger.warning("old checkpoints and bases of stability stay: %s", error)
        return
    if freed > 0:
        progress.say(
            f"dropped old checkpoints and bases of stability, {freed / 2**20:.1f} MiB (run.tidy)"
        )


def warn_of_missing_bases(parts: Parts, own: Sequence[Mapping[str, Any]]) -> None:
    """Tell that a run which goes on measures stability against nothing at first.

    Args:
        parts: at the step of a checkpoint.
        own: what the checkpoint holds of the processes.
    """
    settings = parts.configuration.stability
    if not parts.tracker or any(one["parts"] for one in own) or not parts.runtime.is_first:
        return
    logger.warning(
        "no bases of stability are in the checkpoint (run.tidy drops those of a finished run): "
        "stability is unknown for %d %s",
        settings.window,
        settings.unit,
    )
