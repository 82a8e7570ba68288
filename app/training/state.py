"""What a checkpoint holds of a run's parts, and how they are brought back to it."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from app.config import parse, to_yaml
from app.config.yaml_text import dump_value
from app.errors import UserError, of_the_machine, one_line
from app.recording.schema import run_groups
from app.training.build import Parts, readings_of
from app.training.early_stopping import EarlyStopping
from app.training.same_data import check_stored_data, preprocessing_of, restore_preprocessing
from oialr.options import READINGS, Selection

logger = logging.getLogger(__name__)

_FIXED = ("optimizer", "momentum", "weight_decay")
"""Keys of the section training that are part of the optimizer's stored state."""
_EXPECTED_TO_CHANGE = ("run.dir", "run.stop_after")
"""Keys that a run is resumed with: they make no difference to its results."""


def shared_state(parts: Parts, early_stopping: EarlyStopping | None) -> dict[str, Any]:
    """Return what all processes share."""
    position, stopwatch = parts.position, parts.stopwatch
    return {
        "configuration": to_yaml(parts.configuration),
        "data": parts.data,
        "preprocessing": preprocessing_of(parts.task),
        "readings": readings_of(parts.configuration),
        "process_count": parts.runtime.process_count,
        "position": {"step": position.step, "epoch": position.epoch, "batch": position.batch},
        "steps": parts.steps,
        "last_loss": position.loss,
        "seconds": stopwatch.seconds,
        "cpu_seconds": stopwatch.cpu_seconds,
        "method": parts.method.state_dict() if parts.method else None,
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "precision": parts.precision.state_dict(),
        "average": parts.average.state_dict() if parts.average else None,
        "early_stopping": early_stopping.state_dict() if early_stopping else None,
    }


def own_state(parts: Parts) -> dict[str, Any]:
    """Return what this process alone knows, beside the tracker's bases."""
    own: dict[str, Any] = {"random_state": torch.get_rng_state()}
    if parts.runtime.device.type == "cuda":
        own["random_state_cuda"] = torch.cuda.get_rng_state(parts.runtime.device)
    return own


def restore(
    parts: Parts,
    early_stopping: EarlyStopping | None,
    shared: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
) -> None:
    """Bring the parts to where a checkpoint was written.

    Args:
        parts: at the start.
        early_stopping: as the run has it.
        shared: as :func:`shared_state` returned it.
        own: the parts of the processes; with another process count than this run's, of all, and
            random states are not taken over.

    Raises:
        UserError: the checkpoint does not fit the configuration.
    """
    stored = parse(shared["configuration"], source="the checkpoint's configuration")
    current = parse(to_yaml(parts.configuration), source="the configuration")
    for key in _FIXED:
        if (was := stored["training"][key]) != current["training"][key]:
            raise UserError(f"training.{key}: cannot change when a run is resumed: it was {was}")
    if stored["oialr"]["enabled"] != parts.configuration.oialr.enabled:
        raise UserError(
            "oialr.enabled: cannot change when a run is resumed: the method counts its steps from "
            "their first one on; start a new run, with model.initial=DIR for the weights"
        )
    _check_shares(parts, shared["method"])
    if "data" in shared:  # checkpoints of earlier versions are without
        check_stored_data(parts.data, shared["data"])
        restore_preprocessing(parts.task, shared.get("preprocessing", {}))
    if changes := _changes(stored, current):
        # On purpose by whoever resumes; but config.yaml may also have been damaged or mixed up.
        logger.warning(
            "the configuration differs from the checkpoint's: %s", ", ".join(sorted(changes))
        )
    try:
        _load(parts, early_stopping, shared, own)
    except (ValueError, RuntimeError, KeyError) as error:
        if of_the_machine(error):
            raise
        message = one_line(error)[:300]
        raise UserError(
            f"the checkpoint does not fit the configuration (was it changed?): {message}"
        ) from None


def check_epochs(parts: Parts, shared: Mapping[str, Any]) -> None:
    """Reject epochs of another number of steps: the schedule would end elsewhere than the run.

    Args:
        parts: of the run that goes on.
        shared: as :func:`shared_state` returned it, perhaps of an earlier version, which did not
            tell the steps.

    Raises:
        UserError: batches or data are others than before.
    """
    stored = parse(shared["configuration"], source="the checkpoint's configuration")
    epochs, steps = stored["training"]["epochs"], shared.get("steps")
    now = parts.task.steps_per_epoch
    if steps is not None and steps != epochs * now:
        raise UserError(
            f"an epoch has {now} steps now and had {steps // epochs} when the checkpoint was "
            "written, so that the learning rates would end before the run or after it: go on with "
            "the data and the training.batch_size of before (training.accumulation takes it in "
            "parts), or start a new run with model.initial=DIR for the weights"
        )


def check_stop(parts: Parts, folder: Path) -> None:
    """Reject a stop at a step that the run has behind it: it would not stop any more.

    Args:
        parts: at the step of a checkpoint.
        folder: of the run.

    Raises:
        UserError: so it is.
    """
    stop, step = parts.configuration.run.stop_after, parts.position.step
    if stop is not None and step >= stop:
        raise UserError(
            f"run.stop_after: {stop}, but the run in {folder} has {step} steps already; give a "
            "later step or null"
        )


def check_records(parts: Parts, shared: Mapping[str, Any]) -> None:
    """Reject what would be recorded under other names, or of other matrices, than before.

    Args:
        parts, shared: as of :func:`check_epochs`.

    Raises:
        UserError: the task has other figures of merit, or the weights of a full-rank network are
            read otherwise.
    """
    kept = shared.get("kept_rows", {}).get("eval", ())
    own = {column.name for column in run_groups(())["eval"]}
    was, now = [name for name in kept if name not in own], list(parts.task.figures)
    if kept and sorted(was) != sorted(now):
        raise UserError(
            f"data.name: the figures of merit are {_listed(now)} now and were {_listed(was)} when "
            "the checkpoint was written, and a run has one table of them: let the task have those "
            "of before, or start a new run with model.initial=DIR for the weights"
        )
    if parts.method is not None:
        return  # which holds its own state against them
    # Earlier versions read full-rank networks by the defaults, whatever the configuration said.
    stored = {name: getattr(Selection(), name) for name in READINGS} | shared.get("readings", {})
    if stored != readings_of(parts.configuration):
        cure = " ".join(f"oialr.{name}={value}" for name, value in stored.items())
        raise UserError(
            "oialr: the weights of this full-rank run were read as other matrices, and so are its "
            f"records: add {cure} to go on"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _check_shares(parts: Parts, method: Mapping[str, Any] | None) -> None:
    """Reject a share of the run that is another step now, of an event that is over.

    Raises:
        UserError: with the step that the share was.
    """
    section = parts.configuration.oialr
    if parts.method is None or method is None:
        return
    moved = [
        (name, was)
        for name in ("delay", "release")
        if isinstance(getattr(section, name), float)
        and isinstance(was := method.get(name), int)
        and was <= method["handled"]
        and was != section.step_of(name, parts.steps)
    ]
    if moved:
        name, was = moved[0]
        cure = " ".join(f"oialr.{name}={was}" for name, was in moved)
        raise UserError(
            f"oialr.{name}: {getattr(section, name):g} of the run was step {was}, and is step "
            f"{section.step_of(name, parts.steps)} of its {parts.steps} steps now; what happened "
            f"then cannot be moved: add {cure} to go on"
        )


def _load(
    parts: Parts,
    early_stopping: EarlyStopping | None,
    shared: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
) -> None:
    if parts.method and shared["method"]:
        parts.method.load_state_dict(shared["method"])
    parts.model.load_state_dict(shared["model"])
    parts.optimizer.load_state_dict(shared["optimizer"])
    parts.precision.load_state_dict(shared["precision"])
    if parts.average and shared["average"]:
        parts.average.load_state_dict(shared["average"])
    if early_stopping and shared["early_stopping"]:
        early_stopping.load_state_dict(shared["early_stopping"])
    position, stopwatch = parts.position, parts.stopwatch
    for name, value in shared["position"].items():
        setattr(position, name, value)
    position.loss = shared["last_loss"]
    stopwatch.seconds = shared["seconds"]
    # Checkpoints of earlier versions do not know it, and then nobody does.
    stopwatch.cpu_seconds = shared.get("cpu_seconds", math.nan)
    if parts.tracker:
        parts.tracker.load_state_dicts([part["parts"] for part in own])
    if shared["process_count"] == parts.runtime.process_count:
        torch.set_rng_state(own[0]["random_state"])
        # A checkpoint from a CPU has none, and the GPU's generator begins anew.
        if parts.runtime.device.type == "cuda" and "random_state_cuda" in own[0]:
            torch.cuda.set_rng_state(own[0]["random_state_cuda"], parts.runtime.device)


def _changes(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name the keys that have other values than in the checkpoint, but for where and how long."""
    return [
        f"{section}.{key} is {dump_value(value)} and was {dump_value(was)}"
        for section, values in current.items()
        for key, value in values.items()
        if (was := stored.get(section, {}).get(key, value)) != value
        and f"{section}.{key}" not in _EXPECTED_TO_CHANGE
    ]
