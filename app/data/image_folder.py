"""Image classification from folders of image files, such as ImageNet.

Below data.root: train/CLASS/FILE and val/CLASS/FILE, and optionally test/CLASS/FILE. With test/ the
validation part is val/. Without it val/ is the test part, as is usual for ImageNet, and
the validation part is ``data.validation_fraction`` of train/, by a fixed seed. What else lies there
is left out, and told of in one line (:mod:`app.data.image_listing`).
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from app.config.settings import Configuration, DataSection
from app.data import Batch, sharding
from app.data.classification import Classification
from app.data.image_check import check_images, warn_of_dark_parts
from app.data.image_files import (
    MEAN,
    STD,
    EvaluationTransform,
    ImageFiles,
    Normalization,
    TrainingTransform,
    collate,
    resized_side,
)
from app.data.image_listing import File, LeftOut, list_folder
from app.data.loader_signals import end_with_the_program, start
from app.data.shared_memory import naming_shared_memory
from app.data.splitting import limit_training_part, split_off, split_off_validation
from app.errors import UserError

logger = logging.getLogger(__name__)


class ImageFolderClassification(Classification):
    """Images that stay on disk: read, decoded and augmented by loader processes."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        process_index: int,
        process_count: int,
        device: torch.device,
    ) -> None:
        """List the files, and look at this process's share of them (data.check_images).

        Raises:
            UserError: a folder is missing or empty, the classes of the parts differ, an image
                cannot be read, or as in :class:`Classification`.
        """
        data = configuration.data
        self._parts, self.class_names = _list_parts(data)
        super().__init__(
            configuration,
            train_size=len(self._parts["train"]),
            input_shape=(3, data.image_size, data.image_size),
            outputs=len(self.class_names),
            process_index=process_index,
            process_count=process_count,
            device=device,
        )
        self._workers = data.workers
        self._normalize = Normalization(device)
        self._train_transform = TrainingTransform(data)
        self._evaluation_transform = EvaluationTransform(data.image_size, data.image_bits)
        check_images(
            self._parts,
            data.check_images,
            image_bits=data.image_bits,
            process_index=process_index,
            process_count=process_count,
        )
        if data.check_images != "none" and process_index == 0:
            warn_of_dark_parts(self._parts, data.image_bits)

    @cached_property
    def digest(self) -> str:
        """Of the files and classes of all parts, wherever they lie."""
        text = hashlib.sha256()
        for part, files in self._parts.items():
            for path, label in files:
                text.update(f"{part} {path.rsplit(os.sep, 2)[1:]} {label}\n".encode())
        return text.hexdigest()[:12]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What evaluation makes of an image: resized, cropped, normalized."""
        size = self.input_shape[-1]
        return {
            "pixels": "RGB, 0 to 255",
            "shorter_side": resized_side(size),
            "central_crop": size,
            "mean": [255 * value for value in MEAN],
            "std": [255 * value for value in STD],
        }

    def train_batches(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's shares of the global batches; see :class:`app.data.Task`.

        The random numbers of a sample follow (seed, epoch, index of the sample), so that images are
        the same whatever the process count, the workers and the first batch. With mixup or CutMix
        the partner of an image is the one as far from the end of this process's share as it is
        from the start: another one for another process count.

        Raises:
            UserError: an image is damaged.
        """
        files = ImageFiles(self._parts["train"], self._train_transform, key=(self._seed, epoch))
        order = sharding.epoch_order(self.train_size, seed=self._seed, epoch=epoch)
        batches = [
            sharding.global_batch(self.train_size, self._batch_size, number)
            for number in range(first_batch, self.steps_per_epoch)
        ]
        shares = [self._share(positions) for positions in batches]
        indices = [
            order[positions][share] for positions, (share, _) in zip(batches, shares, strict=True)
        ]
        loaded = self._load(files, indices)
        for number, positions, (_, count), (images, labels) in zip(
            range(first_batch, self.steps_per_epoch), batches, shares, loaded, strict=True
        ):
            inputs, targets = images, labels
            if self._mixup or self._cutmix:
                partners = images.flip(0), labels.flip(0)
                inputs, targets = self._mix((images, labels), partners, epoch, number)
            yield Batch(
                inputs=inputs,
                targets=targets,
                count=count,
                global_count=positions.stop - positions.start,
            )

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yield this process's samples of "validation" or "test"; see :class:`app.data.Task`.

        Raises:
            UserError: an image is damaged.
        """
        files = ImageFiles(self._parts[split], self._evaluation_transform)
        batches = sharding.evaluation_batches(
            len(files), self._evaluation_batch_size, *self._process
        )
        indices = [np.arange(positions.start, positions.stop) for positions in batches]
        for inputs, targets in self._load(files, indices):
            yield Batch(inputs=inputs, targets=targets, count=len(inputs), global_count=len(files))

    def _load(
        self, files: ImageFiles, batches: Sequence[np.ndarray]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and classes with the given indices on the device, batch by batch."""
        loader = DataLoader(
            files,
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of indices will do
            num_workers=self._workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # for the seeds of workers, instead of the global one
            worker_init_fn=end_with_the_program,
        )
        with naming_shared_memory():
            for loaded in start(loader):
                if isinstance(loaded, UserError):
                    raise loaded
                inputs, targets = (part.to(self.device, non_blocking=True) for part in loaded)
                yield (self._normalize(inputs) if inputs.dtype == torch.uint8 else inputs), targets


def _list_parts(data: DataSection) -> tuple[dict[str, list[File]], tuple[str, ...]]:
    """Return the files of the parts train, validation and test, and the names of the classes."""
    root = Path(data.root)
    left_out = LeftOut()
    train, classes = list_folder(root / "train", left_out)
    parts = {"train": train}
    for name in ("val", "test") if (root / "test").exists() else ("val",):
        parts[name], own_classes = list_folder(root / name, left_out)
        if different := set(classes) ^ set(own_classes):
            raise UserError(
                f"data.root: {root / 'train'} and {root / name} must have the same classes; only "
                f"one of them has {', '.join(sorted(different)[:5])}"
            )
    if str(left_out):
        logger.warning("data.root: left out in %s: %s", root, left_out)
    labels = np.array([label for _, label in train])
    if "test" in parts:
        parts["validation"] = parts.pop("val")
        indices, _ = split_off(labels, 0)  # in random order, as always
    else:
        parts["test"] = parts.pop("val")
        indices, validation = split_off_validation(labels, data)
        parts["validation"] = [train[index] for index in validation]
    parts["train"] = [train[index] for index in limit_training_part(indices, data)]
    return parts, tuple(classes)
