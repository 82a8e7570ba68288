"""Training steps between two records: their losses stay on the device until these are fetched."""

import time
from collections.abc import Callable
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
    seconds: list[float]
    """Of each step, with its share of the wait for a device that was still at work."""
    samples_per_second: float
    """Over all of them."""
    problem: bool
    """Whether some process had one."""


def fetch(
    steps: list[Step],
    processes: Processes,
    *,
    problem: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> FetchedSteps:
    """Wait for the losses of some steps, at least one. A collective call.

    A step only asks a GPU for its work, and nobody waits for it before this: so the wait belongs to
    the steps, to each as much as to the others. On CPUs one waits for other processes alone.

    Args:
        steps: the same ones on all processes.
        processes: who trains together.
        problem: whether this process has one; it travels behind the losses.
        clock: tells the seconds.
    """
    start = clock()
    last = torch.full_like(steps[0].loss, problem)
    sums = torch.stack([*(step.loss for step in steps), last]).double()
    *losses, problems = processes.sum(sums).tolist()
    wait = (clock() - start) / len(steps)
    seconds = [step.seconds + wait for step in steps]
    return FetchedSteps(
        losses=losses,
        seconds=seconds,
        samples_per_second=sum(step.samples for step in steps) / sum(seconds),
        problem=problems > 0,
    )
