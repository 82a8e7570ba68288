"""What is learned: data, loss and figures of merit.

A task hands out batches on the device, each process its own share, and knows nothing of the network
but that it is called with a batch's inputs. It never communicates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This process's share of a global batch."""

    inputs: Tensor
    """(b, ...) on the device. Where the share is empty, one padding sample, so that forward and
    backward work all the same."""
    targets: Tensor
    """(b,) or (b, ...)."""
    count: int
    """True samples in it: b, or 0 where the share is empty."""
    global_count: int
    """Samples of the whole global batch, over all processes."""

    @property
    def weight(self) -> float:
        """What a sum of losses over the batch is multiplied by; 0 where it is padding alone."""
        return 1 / self.global_count if self.count else 0

    def split(self, parts: int) -> "list[Batch]":
        """Cut into consecutive micro-batches, at most as many as there are samples.

        One without true samples is there so many times: it counts nothing, and takes part in what
        the others' micro-batches ask for.
        """
        if not self.count:
            return [self] * parts
        sizes = min(parts, self.count)
        return [
            Batch(
                inputs=inputs,
                targets=targets,
                count=len(inputs),
                global_count=self.global_count,
            )
            for inputs, targets in zip(
                self.inputs.tensor_split(sizes), self.targets.tensor_split(sizes), strict=True
            )
        ]


class Task(Protocol):
    """What the trainer needs to know of a task."""

    train_size: int
    """Samples of the training part."""
    steps_per_epoch: int
    """Global batches of an epoch."""
    input_shape: tuple[int, ...]
    """Of one sample: (channels, height, width) for images, (steps, columns) for time series."""
    outputs: int | tuple[int, ...]
    """Outputs of the network per sample: classes, or the (horizon, variables) of a forecast."""
    figures: tuple[str, ...]
    """Names of the figures of merit, beside the loss."""
    splits: tuple[str, ...]
    """Parts to evaluate on: "validation" and "test", and perhaps others."""

    def train_batches(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's share of each global batch of an epoch, from ``first_batch`` on."""

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yield this process's samples of a part: over all processes, every sample once.

        Processes may have different numbers of batches.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the loss over the true samples, divided by ``global_count`` (scalar).

        The sum over the processes is the mean over the global batch. A padding sample counts
        nothing, but stays in the graph.
        """

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float | Tensor]:
        """Return sums over the batch: "loss", every figure of merit, and "count", the samples.

        Scalars of dtype float64 on the device, which nobody has waited for. The caller chooses the
        model's evaluation mode.
        """

    def example_batch(self) -> Batch:
        """Return two samples of zeros, for a forward and backward that nobody looks at."""
