"""Image classification from folders of image files, such as ImageNet.

Below data.root: train/CLASS/FILE and val/CLASS/FILE, and optionally test/CLASS/FILE. With test/ the
validation part is val/. Without it val/ is the test part, as is usual for ImageNet, and
the validation part is ``data.validation_fraction`` of train/, by a fixed seed.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from app.compatibility import import_torchvision
from app.errors import UserError
from app.settings import Configuration, DataSection
from app.tasks import Batch, sharding
from app.tasks.classification import Classification
from app.tasks.sharding import Stream
from app.tasks.splitting import limit_training_part, split_off, split_off_validation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue in [0, 1], as torchvision and timm use them."""

CROP_RATIO = 0.875
"""Share of the shorter side that the central crop keeps in evaluation."""

File = tuple[str, int]
"""Path of an image and its class."""


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
        """List the files.

        Raises:
            UserError: a folder is missing or empty, the classes of the parts differ, or as in
                :class:`Classification`.
        """
        data = configuration.data
        self._parts, classes = _list_parts(data)
        super().__init__(
            configuration,
            train_size=len(self._parts["train"]),
            input_shape=(3, data.image_size, data.image_size),
            outputs=classes,
            process_index=process_index,
            process_count=process_count,
            device=device,
        )
        self._workers = data.workers
        self._train_transform, self._evaluation_transform = _transforms(data.image_size)

    def train_batches(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's shares of the global batches; see :class:`app.tasks.Task`.

        The random numbers of a sample follow (seed, epoch, index of the sample), so that images are
        the same whatever the process count, the workers and the first batch.

        Raises:
            UserError: an image is damaged.
        """
        files = _Files(self._parts["train"], self._train_transform, key=(self._seed, epoch))
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
        for positions, (_, count), tensors in zip(batches, shares, loaded, strict=True):
            yield Batch(
                inputs=tensors[0],
                targets=tensors[1],
                count=count,
                global_count=positions.stop - positions.start,
            )

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yield this process's samples of "validation" or "test"; see :class:`app.tasks.Task`.

        Raises:
            UserError: an image is damaged.
        """
        files = _Files(self._parts[split], self._evaluation_transform)
        batches = sharding.evaluation_batches(
            len(files), self._evaluation_batch_size, *self._process
        )
        indices = [np.arange(positions.start, positions.stop) for positions in batches]
        for inputs, targets in self._load(files, indices):
            yield Batch(inputs=inputs, targets=targets, count=len(inputs), global_count=len(files))

    def _load(
        self, files: "_Files", batches: Sequence[np.ndarray]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and classes with the given indices on the device, batch by batch."""
        loader = DataLoader(
            files,
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of indices will do
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # for the seeds of workers, instead of the global one
        )
        for loaded in loader:
            if isinstance(loaded, UserError):
                raise loaded
            inputs, targets = loaded
            yield (
                inputs.to(self.device, non_blocking=True),
                targets.to(self.device, non_blocking=True),
            )


class _Files(Dataset[tuple[Tensor, int] | UserError]):
    """Reads and transforms one image at a time; its only state is its arguments."""

    def __init__(
        self, files: Sequence[File], transform: Any, key: tuple[int, int] | None = None
    ) -> None:
        """Take what is to be read.

        Args:
            files: paths and classes.
            transform: from a PIL image to a (3, size, size) float32 tensor, random numbers from
                torch's default generator.
            key: (seed, epoch) of the random numbers; None: the transform needs none.
        """
        self._files = files
        self._transform = transform
        self._key = key

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        """Return image and class, or what is wrong with the file.

        An exception would reach the main process as a traceback of several lines, hence the value.
        """
        from torchvision.datasets.folder import default_loader

        path, label = self._files[index]
        try:
            image = default_loader(path)
        except Exception as error:  # decoders fail in many ways
            reason = " ".join(str(error).split())
            return UserError(f"data.root: {path} is not a readable image ({reason}); remove it")
        if self._key is None:
            return self._transform(image), label
        seed = sharding.generator(Stream.SAMPLE, *self._key, int(index)).integers(2**63)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            return self._transform(image), label


def _collate(
    samples: Sequence[tuple[Tensor, int] | UserError],
) -> tuple[Tensor, Tensor] | UserError:
    """Stack images (b, 3, size, size) and classes (b,) int64, or return the first error."""
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.tensor(labels)


def _transforms(size: int) -> tuple[Any, Any]:
    """Return the transforms of training and of evaluation."""
    import_torchvision()
    from torchvision import transforms as t

    tensor = [t.ToTensor(), t.Normalize(MEAN, STD)]
    return (
        t.Compose([t.RandomResizedCrop(size), t.RandomHorizontalFlip(), *tensor]),
        t.Compose([t.Resize(math.ceil(size / CROP_RATIO)), t.CenterCrop(size), *tensor]),
    )


def _list_parts(data: DataSection) -> tuple[dict[str, list[File]], int]:
    """Return the files of the parts train, validation and test, and the number of classes."""
    root = Path(data.root)
    train, classes = _list_folder(root / "train")
    parts = {"train": train}
    for name in ("val", "test") if (root / "test").exists() else ("val",):
        parts[name], own_classes = _list_folder(root / name)
        if different := set(classes) ^ set(own_classes):
            raise UserError(
                f"data.root: {root / 'train'} and {root / name} must have the same classes; only "
                f"one of them has {', '.join(sorted(different)[:5])}"
            )
    labels = np.array([label for _, label in train])
    if "test" in parts:
        parts["validation"] = parts.pop("val")
        indices, _ = split_off(labels, 0)  # in random order, as always
    else:
        parts["test"] = parts.pop("val")
        indices, validation = split_off_validation(labels, data)
        parts["validation"] = [train[index] for index in validation]
    parts["train"] = [train[index] for index in limit_training_part(indices, data)]
    return parts, len(classes)


def _list_folder(folder: Path) -> tuple[list[File], list[str]]:
    """Return all image files below the class folders of a folder, and the classes, sorted."""
    import_torchvision()
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise UserError(
            f"data.root: {folder} not found; image_folder needs train/CLASS/FILE and "
            f"val/CLASS/FILE below data.root"
        )
    try:
        listing = ImageFolder(folder)
    except OSError as error:  # no class folder, or one without images
        reason = " ".join(str(error).split())
        raise UserError(f"data.root: nothing to learn from in {folder}: {reason}") from None
    return listing.samples, listing.classes
