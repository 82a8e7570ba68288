"""What is due after which optimizer step, and what has been done of it."""

from typing import Literal

from oialr.options import Options
from oialr.schedule import events_due, intervals_due


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

    def due(self, *, steps_ahead: int = 0) -> list[int | Literal["release"]]:
        """Events that are due, or will be when so many more steps are taken.

        Returns:
            0 for the conversion, i for the i-th update, and "release"; where the delay is by
            stability, steps at which layers may be converted or updated in place of the numbers.
        """
        options = self._options
        steps = range(self.handled + 1, self.step_count + steps_ahead + 1)
        if options.delay == "stability":
            return intervals_due(
                steps,
                start=options.stability_start,
                update_interval=options.update_interval,
                release=options.release,
            )
        return events_due(
            steps,
            delay=options.delay,
            update_interval=options.update_interval,
            release=options.release,
        )

    @property
    def steps_since_release(self) -> int | None:
        """Optimizer steps taken since the release; None before it."""
        return None if self.released_at is None else self.step_count - self.released_at
