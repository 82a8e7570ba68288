"""What is due after which optimizer step, and what has been done of it."""

from typing import Literal

from oialr.options import Options
from oialr.schedule import events_due


class Timetable:
    """Counts optimizer steps, and knows up to which of them somebody has looked."""

    def __init__(self, options: Options) -> None:
        """Begin before the first step."""
        self._options = options
        self.step_count = 0
        """Optimizer steps taken."""
        self.handled = 0
        """Steps up to which all that was due has been done."""
        self.released_at: int | None = None
        """Step of the release; None before it."""

    def due(self) -> list[int | Literal["release"]]:
        """Events that are due: 0 for the conversion, i for the i-th update, and the release."""
        return events_due(
            range(self.handled + 1, self.step_count + 1),
            delay=self._options.delay,
            update_interval=self._options.update_interval,
            release=self._options.release,
        )

    @property
    def conversion_due(self) -> bool:
        """Whether the conversion is among what is due."""
        return self.handled < self._options.delay <= self.step_count

    @property
    def steps_since_release(self) -> int | None:
        """Optimizer steps taken since the release; None before it."""
        return None if self.released_at is None else self.step_count - self.released_at
