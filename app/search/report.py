"""The report of a search, finished or not: what was evaluated, and what it teaches."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from app.errors import UserError
from app.reporting.drawing import save, style
from app.reporting.page import render_search, write_page
from app.reporting.report import Written
from app.search import figures
from app.search.definition import STORED, load, train_again
from app.search.importance import LEAST_EVALUATIONS, importance
from app.search.space import Space
from app.search.store import STORE, Evaluation, read_evaluations
from app.search.tally import best_first

_SHOWN = 15
"""Evaluations in the table."""


def write_search_report(folder: Path, *, output: Path | None, formats: Sequence[str]) -> Written:
    """Draw what a search has evaluated, and write figures and page.

    Args:
        folder: of the search.
        output: folder of the report; None: FOLDER/report.
        formats: of the figures' files, of drawing.FORMATS.

    Raises:
        UserError: there is no evaluation yet, a file is damaged, or the folder not writable.
    """
    space = load(folder / STORED).space
    evaluations = read_evaluations(folder / STORE)
    if not evaluations:
        raise UserError(f"{folder}: no evaluation of this search has finished yet")
    target = output or folder / "report"
    positions = np.array([space.encode(one.parameters) for one in evaluations])
    found = importance(positions, [one.loss for one in evaluations])
    notices = []
    if found is None:
        notices.append(
            f"the importance of parameters needs {LEAST_EVALUATIONS} evaluations; "
            f"{len(evaluations)} have finished"
        )
    with style():
        drawings = [
            figures.losses(evaluations),
            figures.pareto(evaluations),
            figures.parallel_coordinates(evaluations, space),
            figures.importances(found, space) if found else None,
        ]
        shown = [drawing for drawing in drawings if drawing]
        files = [path for one in shown for path in save(one, target / "figures", formats)]
        page = render_search(
            title=f"Search {folder.resolve().name}",
            statuses=Counter(one.status for one in evaluations).most_common(),
            columns=columns(space),
            rows=[row(one) for one in best_first(evaluations)[:_SHOWN]],
            command=train_again(folder, evaluations[0].processes),
            drawings=shown,
            notices=notices,
        )
    return Written(page=write_page(target, page), figures=files, notices=notices)


def columns(space: Space) -> list[str]:
    """Return the headings of a table of evaluations."""
    return ["number", "status", "loss", "error", "trainable, %", "seed", *space.keys]


def row(one: Evaluation) -> list[str]:
    """Return an evaluation as a row of that table."""
    return [
        f"{one.number:05d}",
        one.status,
        f"{one.loss:.4g}",
        f"{one.error:.4g}",
        f"{one.trainable_percent:.1f}",
        str(one.seed),
        *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in one.parameters.values()),
    ]
