"""Image sets that fit into memory, read from local files in their official layouts.

The layouts, below data.root, are those that torchvision downloads to: four idx files in
MNIST/raw and the like, unpacked or as .gz; pickled batches in cifar-10-batches-py and the like.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.data.data_set import LoadedSet
from app.data.formats import read_cifar, read_idx
from app.errors import UserError, one_line
from oialr.compatibility import import_torchvision

if TYPE_CHECKING:
    from app.config.data_section import DataSection
    from app.data.datasets import Images, ImageSet


@dataclass(frozen=True, kw_only=True)
class OfficialSet(LoadedSet):
    """Where a set of the official layouts lies, and what it must hold.

    The validation part is ``data.validation_fraction`` of the official training part, by a fixed
    seed, and the test part the official one.
    """

    torchvision: str
    """Name of the class in torchvision.datasets."""
    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    train_size: int
    test_size: int
    shape: tuple[int, int, int]
    classes: int
    label_key: str | None = None
    """In the pickles of CIFAR; None: the files are images and labels as idx."""

    def find(self, root: str, name: str) -> Path | None:
        """Return the path of a file, or None where it is missing."""
        path = Path(root, self.folder, name)
        packed = [path.with_name(f"{name}.gz")] if self.label_key is None else []
        return next((path for path in (path, *packed) if path.is_file()), None)

    def check_images(self, images: np.ndarray, size: int) -> None:
        """Raise ValueError unless these are ``size`` images of the right shape."""
        if images.shape != (size, *self.shape):
            raise ValueError(f"holds images {images.shape}, expected {(size, *self.shape)}")

    def check_labels(self, labels: np.ndarray, size: int) -> None:
        """Raise ValueError unless these are ``size`` labels of known classes."""
        if len(labels) != size:
            raise ValueError(f"holds {len(labels)} labels, expected {size}")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(f"holds labels that are not in [0, {self.classes})")

    def load(self, data: "DataSection") -> "ImageSet":
        """Read the set and cut it into its parts."""
        from app.data.datasets import ImageSet
        from app.data.splitting import limit_training_part, split_off_validation

        official = _read(data, self, self.train_files, self.train_size)
        test = _read(data, self, self.test_files, self.test_size)
        train, validation = split_off_validation(official.labels, data)
        return ImageSet(
            train=official.select(limit_training_part(train, data)),
            validation=official.select(validation),
            test=test,
            classes=self.classes,
        )

    def download(self, data: "DataSection") -> None:
        """Let torchvision download the set, if files are missing."""
        if all(self.find(data.root, name) for name in (*self.train_files, *self.test_files)):
            return
        import_torchvision()
        from torchvision import datasets

        try:
            getattr(datasets, self.torchvision)(data.root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.download: {data.name} could not be downloaded to {data.root} "
                f"({one_line(error)}); "
                f"{_by_hand(data, self)}"
            ) from None


def idx_set(name: str, *, torchvision: str) -> OfficialSet:
    """Return a set in the layout of MNIST: 70,000 grey images of 28 x 28 in ten classes."""
    return OfficialSet(
        name=name,
        torchvision=torchvision,
        folder=f"{torchvision}/raw",
        train_files=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        test_files=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        train_size=60_000,
        test_size=10_000,
        shape=(1, 28, 28),
        classes=10,
    )


def _read(data: "DataSection", source: OfficialSet, files: tuple[str, ...], size: int) -> "Images":
    """Read one official part.

    Args:
        data: where it lies.
        source: what is expected.
        files: images and labels as idx, or pickles that follow each other.
        size: samples expected.
    """
    from app.data.datasets import Images

    paths = []
    for name in files:
        path = source.find(data.root, name)
        if path is None:
            missing = Path(data.root, source.folder, name)
            raise UserError(
                f"data.root: {missing} not found; set data.download=true, or "
                f"{_by_hand(data, source)}"
            )
        paths.append(path)
    if source.label_key is None:
        with _naming(paths[0]):
            images = read_idx(paths[0], dimensions=3)[:, None]
            source.check_images(images, size)
        with _naming(paths[1]):
            labels = read_idx(paths[1], dimensions=1).astype(np.int64)
            source.check_labels(labels, size)
        return Images(images=images, labels=labels)
    parts = []
    for path in paths:
        with _naming(path):
            images, labels = read_cifar(path, label_key=source.label_key)
            source.check_images(images, size // len(paths))
            source.check_labels(labels, size // len(paths))
            parts.append((images, labels))
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Images(images=images, labels=labels)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn a ValueError about a file into a UserError that names it."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"data.root: {path} {error}; remove it and set data.download=true, or put an intact "
            f"copy there"
        ) from None


def _by_hand(data: "DataSection", source: OfficialSet) -> str:
    files = ", ".join((*source.train_files, *source.test_files))
    packed = " (or the same as .gz)" if source.label_key is None else ""
    return f"put {files}{packed} into {Path(data.root, source.folder)}"
