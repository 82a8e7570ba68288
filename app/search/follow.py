"""A running search in the terminal: how many evaluations came to what, and the best of them."""

from collections import Counter
from pathlib import Path

from app.reporting.follow import Shown, tabulate, watch
from app.search.definition import STORED, load
from app.search.report import columns, row
from app.search.store import STORE, read_evaluations

_SHOWN = 10


def follow_search(folder: Path, *, interval: float) -> None:
    """Show a search until it has finished or Ctrl-C is pressed.

    Args:
        folder: of the search.
        interval: seconds between two looks.

    Raises:
        UserError: the search cannot be read.
    """
    space = load(folder / STORED).space

    def look() -> tuple[Shown, bool]:
        finished = (folder / "summary.json").exists()  # before the evaluations: these are all then
        evaluations = read_evaluations(folder / STORE)
        counts = Counter(one.status for one in evaluations).most_common()
        came_to = ", ".join(f"{count} {status}" for status, count in counts) or "none yet"
        state = "finished" if finished else "not finished"
        best = sorted(evaluations, key=lambda one: one.loss)[:_SHOWN]
        headline = f"{folder}: a search, {state}; evaluations: {came_to}"
        return tabulate(headline, columns(space), [row(one) for one in best]), finished

    watch(look, interval=interval)
