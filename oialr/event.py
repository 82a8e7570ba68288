"""What is told of a conversion, an update or a release."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerEvent:
    """What happened to one layer."""

    name: str
    """Dense parameter name."""
    owner: int
    """Index of the process that factorized it, the first of several; 0 where every process did."""
    previous_rank: int
    rank: int
    """The full rank of a layer that is dense."""
    singular_values: Tensor
    """All of them before the cut (previous_rank,), descending, on the CPU.

    Of a stack of matrices: of each place in the order the largest.
    """


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened after an optimizer step."""

    kind: Literal["convert", "update", "cut", "release"]
    """A conversion, an update that left all ranks, one that cut some, or a release."""
    step: int
    """Optimizer steps taken so far."""
    layers: Sequence[LayerEvent]
    """Without those whose factorization did not converge: they stay as they were."""
    shapes_changed: bool
    """The network has new Parameter objects: DistributedDataParallel must be made anew, and every
    list of parameters (to clip, to average, to penalize) be fetched anew."""
    changed_form: bool
    """Layers that were dense before are low-rank now, or low-rank ones were released."""
    peak_bytes: int | None
    """The most that parameters, gradients, optimizer state and all that the event made took at once
    on this process; not what LAPACK or cuSOLVER allocate inside. None unless it was measured."""
    seconds: float
    factorization_seconds: Sequence[float]
    """For each process, what it spent on factorizations."""
    predicted_seconds: Sequence[float]
    """For each process, what the plan predicts of that."""
    broadcast_bytes: int

    @property
    def imbalance(self) -> float:
        """Seconds on factorizations: the most of a process over the mean; 1 is balanced."""
        mean = sum(self.factorization_seconds) / len(self.factorization_seconds)
        return max(self.factorization_seconds) / mean if mean else 1.0
