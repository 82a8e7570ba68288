"""Data that are the same: on all processes, and as those that a network was trained with."""

import logging
import platform
from collections.abc import Mapping
from typing import Any

from app.data import Task
from app.errors import AgreedUserError, UserError
from oialr.placement.processes import Processes

logger = logging.getLogger(__name__)


def describe_data(task: Task) -> dict[str, Any]:
    """Return what tells a task's data from others, as numbers and text.

    A task of one's own may go without ``digest``, text that other samples or parts change, and
    ``class_names``, in the order of the network's outputs (and without ``preprocessing``).
    """
    digest, names = getattr(task, "digest", ""), getattr(task, "class_names", ())
    return {
        "train_size": task.train_size,
        "steps_per_epoch": task.steps_per_epoch,
        "outputs": task.outputs,
        "input_shape": tuple(task.input_shape),
        "class_names": tuple(map(str, names)),
        "samples": digest if isinstance(digest, str) else "",
    }


def check_same_data(task: Task, processes: Processes) -> None:
    """Reject data that are not the same on all processes. A collective call.

    Each reads by itself, and which sample is whose, and which part it belongs to, follows from what
    it has read: with a file more or less on one node, samples would be trained on twice, and
    validated on where others train.

    Raises:
        AgreedUserError: they are not; it names a node, and what it has.
    """
    if processes.count == 1:
        return
    first, *others = processes.gather((describe_data(task), platform.node()))
    for index, (theirs, node) in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != first[0][name]:
                raise AgreedUserError(
                    f"data.root: process {index} on {node} reads other data than process 0 on "
                    f"{first[1]} ({name} {value} and {first[0][name]}): make them the same on all "
                    "nodes, copies in data.stage_to too"
                )


def check_stored_data(now: Mapping[str, Any], was: Mapping[str, Any]) -> None:
    """Hold data against those that a network was trained with.

    Other samples are told of, since somebody may have added some; other classes are refused.

    Args:
        now: as of :func:`describe_data`.
        was: the same, of the network's checkpoint or file.

    Raises:
        UserError: an output of the network stands for another class now.
    """
    names, before = (list(data["class_names"]) for data in (now, was))
    if names and before and names != before:
        others = ", ".join(sorted(set(names) ^ set(before))[:5]) or "in another order"
        raise UserError(
            f"data.root: these are not the classes that the network was trained with ({others}): "
            "its outputs would count for the wrong ones"
        )
    if now["samples"] and was["samples"] and now["samples"] != was["samples"]:
        logger.warning(
            "these are not the data that the network was trained with (other samples, more or "
            "fewer), and are divided anew: what is validated or tested on may have been trained on"
        )


def preprocessing_of(task: Task) -> dict[str, Any]:
    """Return what makes a network's input of a stored sample; empty where the task does not say."""
    return dict(getattr(task, "preprocessing", {}))


def restore_preprocessing(task: Task, stored: Mapping[str, Any]) -> None:
    """Let a task make the input that a network was trained with, as :func:`preprocessing_of`."""
    restore = getattr(task, "restore_preprocessing", None)
    if restore is not None:
        restore(stored)
