"""The basis of a task of one's own: parts in memory as tensors, and a loss for each sample."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from app.data import sharding
from app.data.base import ShardedTask, digest_of
from app.data.splitting import limit_training_part
from app.data.task import Batch
from app.errors import UserError

if TYPE_CHECKING:
    from app.config.settings import Configuration


class TensorTask(ShardedTask, ABC):
    """A task whose data fit into the memory of the device.

    A class of one's own reads the data, hands them to this constructor, and says what a network's
    outputs are worth: :meth:`losses`, and :meth:`measures` with the names in ``figures``. Order,
    shares of the processes and counting are done here (docs/own_networks_and_data.md).
    """

    figures: tuple[str, ...] = ()

    def __init__(
        self,
        configuration: "Configuration",
        parts: Mapping[str, tuple[Tensor, Tensor]],
        *,
        outputs: int | tuple[int, ...],
        process_index: int,
        process_count: int,
        device: torch.device,
    ) -> None:
        """Take the data.

        Args:
            configuration: data.train_samples, data.drop_last, training.batch_size and run.seed are
                read.
            parts: inputs (n, ...) and targets (n, ...) of "train", "validation" and "test", the
                same on all processes.
            outputs: of the network per sample: classes, or a shape.
            process_index: of this process.
            process_count: processes that share every global batch.
            device: where the data are kept.

        Raises:
            UserError: a part is missing or empty, or has other numbers of inputs and targets;
                data.train_samples is too large, or an epoch would have no batch.
        """
        _check_parts(type(self).__name__, parts)
        taken = dict(parts)
        inputs, targets = taken["train"]
        kept = limit_training_part(torch.arange(len(inputs)).numpy(), configuration.data)
        taken["train"] = inputs[: len(kept)], targets[: len(kept)]
        self._parts = {
            name: (inputs.to(device), targets.to(device))
            for name, (inputs, targets) in taken.items()
        }
        super().__init__(
            configuration,
            train_size=len(kept),
            input_shape=tuple(inputs.shape[1:]),
            outputs=outputs,
            process_index=process_index,
            process_count=process_count,
            device=device,
        )

    @cached_property
    def digest(self) -> str:
        """Of inputs and targets of all parts; see :class:`app.data.base.ShardedTask`."""
        return digest_of(tensor for part in self._parts.values() for tensor in part)

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample (b,), of a network's outputs (b, ...)."""

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each of ``figures`` for each sample (b,); their means are reported."""
        return {}

    def train_batches(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's shares of the global batches; see :class:`app.data.Task`."""
        order = self._to_device(sharding.epoch_order(self.train_size, seed=self._seed, epoch=epoch))
        inputs, targets = self._parts["train"]
        for number in range(first_batch, self.steps_per_epoch):
            positions = sharding.global_batch(self.train_size, self._batch_size, number)
            share, count = self._share(positions)
            samples = order[positions][share]
            yield Batch(
                inputs=inputs[samples],
                targets=targets[samples],
                count=count,
                global_count=positions.stop - positions.start,
            )

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yield this process's samples of a part; see :class:`app.data.Task`."""
        inputs, targets = self._parts[split]
        for positions in sharding.evaluation_batches(
            len(inputs), self._evaluation_batch_size, *self._process
        ):
            yield Batch(
                inputs=inputs[positions],
                targets=targets[positions],
                count=positions.stop - positions.start,
                global_count=len(inputs),
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean of the losses over the global batch; see :class:`app.data.Task`."""
        losses = self.losses(model(batch.inputs), batch.targets)
        return losses.sum() * batch.weight

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float | Tensor]:
        """Return the sums of losses and measures, and the count; see :class:`app.data.Task`."""
        outputs = model(batch.inputs)
        found = {
            "loss": self.losses(outputs, batch.targets),
            **self.measures(outputs, batch.targets),
        }
        sums: dict[str, float | Tensor] = {
            name: values.sum(dtype=torch.float64) for name, values in found.items()
        }
        return sums | {"count": self._count(batch)}

    def example_batch(self) -> Batch:
        """Return two samples of zeros."""
        inputs, targets = self._parts["train"]
        return Batch(
            inputs=torch.zeros_like(inputs[:1]).repeat_interleave(2, dim=0),
            targets=torch.zeros_like(targets[:1]).repeat_interleave(2, dim=0),
            count=2,
            global_count=2,
        )


def _check_parts(name: str, parts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Reject parts that would be found wrong only after an epoch, or at the end of a run."""
    for part in ("train", "validation", "test"):
        if part not in parts:
            raise UserError(f"data.name: {name} has no part {part!r}: {', '.join(parts)}")
        inputs, targets = parts[part]
        if not len(inputs) or len(inputs) != len(targets):
            raise UserError(
                f"data.name: {name} has {len(inputs)} inputs and {len(targets)} targets in its "
                f"part {part!r}, and as many of each are needed, at least one"
            )
