"""What all tasks share that spread every global batch over the processes."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from app.data import sharding
from app.data.task import Batch
from app.errors import UserError
from oialr.linalg.checksum import checksum

if TYPE_CHECKING:
    from app.config.settings import Configuration


class ShardedTask:
    """Sizes of a task, and this process's share of a global batch."""

    splits: tuple[str, ...] = ("validation", "test")

    def __init__(
        self,
        configuration: "Configuration",
        *,
        train_size: int,
        input_shape: tuple[int, ...],
        outputs: int | tuple[int, ...],
        process_index: int,
        process_count: int,
        device: torch.device,
    ) -> None:
        """Set the sizes.

        Args:
            configuration: training and run.seed are read.
            train_size: samples of the training part.
            input_shape: of one sample.
            outputs: see :class:`app.data.Task`.
            process_index: of this process.
            process_count: processes that share every global batch.
            device: where batches are put.

        Raises:
            UserError: an epoch would have no batch.
        """
        training = configuration.training
        self.train_size = train_size
        self.input_shape = input_shape
        self.outputs = outputs
        self.steps_per_epoch = sharding.steps_per_epoch(
            train_size, training.batch_size, drop_last=configuration.data.drop_last
        )
        if self.steps_per_epoch == 0:
            raise UserError(
                f"training.batch_size: {training.batch_size} exceeds the {train_size} training "
                f"samples, and data.drop_last drops the only batch; lower it, or set "
                f"data.drop_last=false"
            )
        self.device = device
        self._seed = configuration.run.seed
        self._batch_size = training.batch_size
        self._process = (process_index, process_count)
        # No more samples at once than a forward in training has.
        self._evaluation_batch_size = math.ceil(
            training.batch_size / (process_count * training.accumulation)
        )

    @property
    def digest(self) -> str:
        """Of the samples, the same wherever they are read; empty where it is not known."""
        return ""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What makes a network's input of a sample as it is stored, as JSON has it."""
        return {}

    def restore_preprocessing(self, stored: Mapping[str, Any]) -> None:
        """Take over what a network was trained with, where it follows from the training part."""

    def _share(self, global_batch: slice) -> tuple[slice, int]:
        """Return this process's share within a global batch, and its number of true samples.

        An empty share becomes the first sample of the global batch, as padding: a real sample keeps
        the running statistics of normalizations sensible.
        """
        mine = sharding.share(global_batch.stop - global_batch.start, *self._process)
        count = mine.stop - mine.start
        return (mine if count else slice(0, 1)), count

    def _count(self, batch: Batch) -> Tensor:
        """Return a batch's samples as one of the sums of an evaluation: made where they are."""
        return torch.full((), batch.count, dtype=torch.float64, device=self.device)

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        """Bring numbers to the device, without waiting for the work that it has to do before."""
        tensor = torch.from_numpy(numbers)
        if self.device.type == "cuda":  # from other memory the host would have to wait
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Return a text that the bits of some tensors give, wherever they lie.

    Eight bytes are read as two words: of round numbers in float64 the lower one is zero, and what
    they differ in would be lost at the upper end of the sums.
    """
    words = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors)
    words = (t.contiguous().view(torch.int32) if t.element_size() == 8 else t for t in words)
    return f"{int(checksum(words, torch.device('cpu'))) % 2**64:016x}"
