"""Image classification: loss, accuracy, and the sets that fit into memory."""

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.data import Batch, datasets, mixing, sharding
from app.data.base import ShardedTask
from app.data.pixels import channel_statistics, crop_and_flip
from app.data.sharding import Stream
from oialr.linalg.checksum import checksum

if TYPE_CHECKING:
    from app.config.settings import Configuration


logger = logging.getLogger(__name__)


class Classification(ShardedTask):
    """What all tasks of image classification share: loss and figures of merit."""

    figures: tuple[str, ...] = ("accuracy",)

    def __init__(self, configuration: "Configuration", **sizes: Any) -> None:
        """Set the sizes; see :class:`app.data.base.ShardedTask`.

        Raises:
            UserError: an epoch would have no batch.
        """
        super().__init__(configuration, **sizes)
        self._label_smoothing = configuration.training.label_smoothing
        self._mixup, self._cutmix = configuration.data.mixup, configuration.data.cutmix

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy with label smoothing; see :class:`app.data.Task`."""
        total = functional.cross_entropy(
            model(batch.inputs),
            batch.targets,
            label_smoothing=self._label_smoothing,
            reduction="sum",
        )
        return total * batch.weight

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float | Tensor]:
        """Return the sums of the cross entropy (not smoothed) and of right answers, and the count.

        See :class:`app.data.Task`.
        """
        logits = model(batch.inputs)
        losses = functional.cross_entropy(logits, batch.targets, reduction="none")
        right = logits.argmax(dim=1) == batch.targets
        return {
            "loss": losses.sum(dtype=torch.float64),
            "accuracy": right.sum(dtype=torch.float64),
            "count": self._count(batch),
        }

    def example_batch(self) -> Batch:
        """Return two black images of the first class, (2, channels, height, width) float32."""
        return Batch(
            inputs=torch.zeros(2, *self.input_shape, device=self.device),
            targets=torch.zeros(2, dtype=torch.int64, device=self.device),
            count=2,
            global_count=2,
        )

    def _mix(
        self, own: tuple[Tensor, Tensor], partners: tuple[Tensor, Tensor], epoch: int, number: int
    ) -> tuple[Tensor, Tensor]:
        """Mix images with their partners, in the same way in all shares of a global batch.

        Args:
            own: images (b, channels, height, width) and labels (b,).
            partners: the same of the partners.
            epoch: part of the key of the random numbers, as ``number`` is.
            number: of the global batch.

        Returns:
            Images, and probabilities of the classes (b, classes).
        """
        assert isinstance(self.outputs, int)
        height, width = self.input_shape[1:]
        random = sharding.generator(Stream.MIXING, self._seed, epoch, number)
        mix = mixing.draw(random, mixup=self._mixup, cutmix=self._cutmix, size=(height, width))
        return (
            mixing.mix_images(own[0], partners[0], mix),
            mixing.mix_labels(own[1], partners[1], mix, classes=self.outputs),
        )


class InMemoryClassification(Classification):
    """A set that fits into memory: bytes on the device, where batches are formed and augmented."""

    def __init__(
        self,
        configuration: "Configuration",
        *,
        process_index: int,
        process_count: int,
        device: torch.device,
    ) -> None:
        """Read the set that the configuration names.

        Raises:
            UserError: as in :func:`app.data.datasets.load` and :class:`Classification`.
        """
        data = configuration.data
        images = datasets.load(data)
        super().__init__(
            configuration,
            train_size=len(images.train.labels),
            input_shape=images.train.images.shape[1:],
            outputs=images.classes,
            process_index=process_index,
            process_count=process_count,
            device=device,
        )
        self._augmentation = data.augmentation
        self._margin = self.input_shape[-1] // 8
        self._normalize_by(*channel_statistics(images.train.images))
        parts = {"train": images.train, "validation": images.validation, "test": images.test}
        for name, part in parts.items():
            if part.images.min() == part.images.max():
                logger.warning("data.root: all pixels of %s in %s are equal", name, data.name)
        self._parts = {
            name: (torch.tensor(part.images, device=device), torch.tensor(part.labels).to(device))
            for name, part in parts.items()
        }

    @cached_property
    def digest(self) -> str:
        """Of the images and labels of all parts."""
        held = [tensor for part in self._parts.values() for tensor in part]
        return f"{int(checksum(held, self.device)) % 2**48:012x}"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean and deviation of each channel over the training part, in units of stored pixels."""
        mean, std = self._statistics
        return {"pixels": "as stored", "mean": mean.tolist(), "std": std.tolist()}

    def restore_preprocessing(self, stored: Mapping[str, Any]) -> None:
        """Normalize as a network was trained with, whatever the training part is here."""
        if {"mean", "std"} <= stored.keys():
            self._normalize_by(np.array(stored["mean"]), np.array(stored["std"]))

    def _normalize_by(self, mean: np.ndarray, std: np.ndarray) -> None:
        self._statistics = mean, std
        self._scale, self._shift = (
            torch.tensor(values, dtype=torch.float32, device=self.device)[:, None, None]
            for values in (1 / std, -mean / std)
        )

    def train_batches(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's shares of the global batches; see :class:`app.data.Task`.

        A sample is augmented in the same way whatever the process count and the first batch: random
        numbers follow (seed, epoch, global batch, position in it). With mixup or CutMix its partner
        is the sample as far from the end of the global batch as it is from the start.
        """
        order = sharding.epoch_order(self.train_size, seed=self._seed, epoch=epoch)
        order_on_device = self._to_device(order)
        for number in range(first_batch, self.steps_per_epoch):
            positions = sharding.global_batch(self.train_size, self._batch_size, number)
            share, count = self._share(positions)
            samples = order_on_device[positions]
            crops = self._random_crops(epoch, number, len(samples))
            inputs, targets = self._take(samples[share], [part[share] for part in crops])
            if self._mixup or self._cutmix:
                partners = self._take(samples.flip(0)[share], [part[::-1][share] for part in crops])
                inputs, targets = self._mix((inputs, targets), partners, epoch, number)
            yield Batch(
                inputs=inputs,
                targets=targets,
                count=count,
                global_count=positions.stop - positions.start,
            )

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yield this process's samples of "validation" or "test"; see :class:`app.data.Task`."""
        images, labels = self._parts[split]
        for positions in sharding.evaluation_batches(
            len(labels), self._evaluation_batch_size, *self._process
        ):
            count = positions.stop - positions.start
            yield Batch(
                inputs=self._normalize(images[positions]),
                targets=labels[positions],
                count=count,
                global_count=len(labels),
            )

    def _normalize(self, images: Tensor) -> Tensor:
        """Turn bytes into float32 of mean 0 and standard deviation 1 over the training part."""
        return images.float().mul_(self._scale).add_(self._shift)

    def _random_crops(self, epoch: int, number: int, size: int) -> list[np.ndarray]:
        """Return corners (size, 2) and flips (size,) for the samples of a global batch.

        Nothing if images are not cropped.
        """
        if self._augmentation == "none":
            return []
        # Numbers for a full-sized batch, so that the last one's do not depend on its size.
        random = sharding.generator(Stream.AUGMENTATION, self._seed, epoch, number)
        corners = random.integers(2 * self._margin + 1, size=(self._batch_size, 2))[:size]
        flips = random.random(self._batch_size)[:size] < 0.5
        return [corners, flips & (self._augmentation == "crop_flip")]

    def _take(self, samples: Tensor, crops: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Return normalized training images (b, channels, height, width) and labels (b,).

        Args:
            samples: (b,) numbers of the images.
            crops: as of :meth:`_random_crops`, for these samples.
        """
        images, labels = self._parts["train"]
        taken = images.index_select(0, samples)
        if crops:
            corners, flips = crops
            taken = crop_and_flip(
                taken,
                self._to_device(corners.copy()),
                self._to_device(np.flatnonzero(flips)),
                margin=self._margin,
            )
        return self._normalize(taken), labels[samples]
