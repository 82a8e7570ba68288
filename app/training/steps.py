"""Training steps between two records: their losses stay on the device until these are fetched."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from oialr.placement.processes import Processes


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is remembered of a step."""

    step: int
    loss: Tensor
    """This process's part of the sum, on the device."""
    learning_rate: float
    seconds: float
    """From the wait for the batch until the optimizer's step was asked for."""
    samples: int
    """Of the global batch."""


@dataclass(frozen=True, kw_only=True)
class FetchedSteps:
    """What some steps came to, over all processes."""

    losses: list[float]
    samples_per_second: float
    """Over all of them, with the wait for a device that was still at work."""
    problem: bool
    """Whether some process had one."""


def fetch(steps: list[Step], processes: Processes, *, problem: bool) -> FetchedSteps:
    """Wait for the losses of some steps, at least one. A collective call.

    Args:
        steps: the same ones on all processes.
        processes: who trains together.
        problem: whether this process has one; it travels behind the losses.
    """
    start = time.perf_counter()
    last = torch.full_like(steps[0].loss, problem)
    sums = torch.stack([*(step.loss for step in steps), last]).double()
    *losses, problems = processes.sum(sums).tolist()
    seconds = sum(step.seconds for step in steps) + time.perf_counter() - start
    return FetchedSteps(
        losses=losses,
        samples_per_second=sum(step.samples for step in steps) / seconds,
        problem=problems > 0,
    )
