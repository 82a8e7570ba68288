"""TensorBoard, through torch's own writer: `tensorboard --logdir runs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from app.recording.loggers.protocol import Values, tags


class TensorBoard:
    """A :class:`app.recording.loggers.protocol.Logger` that writes event files to RUN/tensorboard.

    What a killed session wrote beyond its last checkpoint stays in its file, and is hidden by the
    mark that the next session's file begins with.
    """

    def __init__(
        self, folder: Path, *, configuration: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Begin another event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=0 if first_step is None else first_step + 1
        )

    def scalars(self, group: str, step: int, values: Values, *, layer: str | None = None) -> None:
        """Write each finite number under its tag."""
        for tag, value in tags(group, values, layer).items():
            self._writer.add_scalar(tag, value, step)

    def spectrum(self, layer: str, step: int, singular_values: np.ndarray) -> None:
        """Write a histogram of the singular values."""
        self._writer.add_histogram(f"spectrum/{layer}", singular_values, step)

    def flush(self) -> None:
        """Bring everything to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
