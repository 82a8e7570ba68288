"""From a configuration to its task."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from app.data.sets import DATA_SETS
from app.data.task import Task
from app.errors import UserError
from app.import_path import import_by_path

if TYPE_CHECKING:
    from app.config.settings import Configuration

_MEMBERS = (
    *("train_size", "steps_per_epoch", "input_shape", "outputs", "figures", "splits"),
    *("train_batches", "evaluation_batches", "loss", "evaluate", "example_batch"),
)
"""What a task must have: :class:`app.data.Task`."""
_OWN_COLUMNS = frozenset({"step", "epoch", "split", "loss", "count"})
"""What stands beside the figures of merit, in the sums of an evaluation and in its records."""


def build_task(
    configuration: "Configuration",
    *,
    process_index: int,
    process_count: int,
    device: torch.device,
) -> Task:
    """Read the data and build the task of a configuration. Nothing is downloaded here.

    Args:
        configuration: data, training and run.seed are read.
        process_index: of this process, in [0, process_count).
        process_count: processes that share every global batch.
        device: where batches are put, and data sets that fit into memory are kept.

    Raises:
        UserError: the data is missing or damaged, or does not fit the configuration.
    """
    data = configuration.data
    path = data.name if data.by_import_path else DATA_SETS[data.name].task
    kind = import_by_path("data.name", path)
    place = {"process_index": process_index, "process_count": process_count, "device": device}
    if not data.by_import_path:
        task: Task = kind(configuration, **place)
        return task
    _check_complete(data.name, sorted(getattr(kind, "__abstractmethods__", ())))
    try:
        own = kind(configuration, **data.arguments, **place)
    except TypeError as error:
        raise UserError(
            f"data.arguments: {data.name} cannot be built with {data.arguments}: {error}"
        ) from None
    _check_complete(data.name, [name for name in _MEMBERS if not hasattr(own, name)])
    _check_figures(data.name, own.figures)
    if missing := {"validation", "test"} - set(own.splits):
        raise UserError(
            f"data.name: {data.name} has no part {', '.join(sorted(missing))} among its splits, "
            "and a run chooses by the one and is tested on the other"
        )
    return own


def _check_figures(name: str, figures: Sequence[str]) -> None:
    """Reject names of figures of merit that no column of metrics.h5 can have.

    Raises:
        UserError: naming the figure.
    """
    if isinstance(figures, str):
        raise UserError(
            f"data.name: the figures of {name} are a text, and are to be a tuple: ({figures!r},)"
        )
    names = list(figures)
    for figure in names:
        reason = None
        if figure in _OWN_COLUMNS:
            reason = "every evaluation has that beside them"
        elif names.count(figure) > 1:
            reason = "it is there twice"
        elif figure in ("", ".") or "/" in figure:
            reason = "it is to be the name of a column, without a slash"
        if reason:
            raise UserError(f"data.name: {name} has a figure {figure!r}: {reason}")


def _check_complete(name: str, missing: Sequence[str]) -> None:
    """Reject a class of the user's own that lacks something.

    Raises:
        UserError: naming what is missing.
    """
    if missing:
        raise UserError(
            f"data.name: {name} is no task: it lacks {', '.join(missing)} "
            f"(docs/own_networks_and_data.md)"
        )
