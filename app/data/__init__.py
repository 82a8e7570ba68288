"""Data sets and tasks: a task hands out batches, and tells losses and figures of merit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.data.building import build_task as build_task
    from app.data.datasets import download as download
    from app.data.task import Batch as Batch
    from app.data.task import Task as Task
    from app.data.tensors import TensorTask as TensorTask

_PLACES = {
    "Batch": "app.data.task",
    "Task": "app.data.task",
    "TensorTask": "app.data.tensors",
    "build_task": "app.data.building",
    "download": "app.data.datasets",
}


def __getattr__(name: str) -> Any:
    """Import a name where it is asked for: a configuration needs app.data.sets, and no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
