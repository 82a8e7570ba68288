"""Image sets that fit into memory, read from local files in their official layouts.

The layouts, below data.root, are those that torchvision downloads to:

- mnist, fashion_mnist: four idx files in MNIST/raw or FashionMNIST/raw, unpacked or as .gz;
- cifar10: the pickles data_batch_1 to data_batch_5 and test_batch in cifar-10-batches-py;
- cifar100: the pickles train and test in cifar-100-python.

The digits come with scikit-learn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.compatibility import import_scikit_learn
from app.data.ett import is_series, series_path
from app.data.formats import read_cifar, read_idx
from app.data.splitting import limit_training_part, split_off, split_off_validation
from app.errors import UserError
from oialr.compatibility import import_torchvision

if TYPE_CHECKING:
    from app.config.settings import Configuration, DataSection

DIGITS_TEST, DIGITS_VALIDATION = 360, 180
"""Sizes of the parts of the 1,797 digits; the other 1,257 are the training part."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """One part of an image set."""

    images: np.ndarray
    """(n, channels, height, width) uint8."""
    labels: np.ndarray
    """(n,) int64, in [0, classes)."""

    def select(self, indices: np.ndarray) -> "Images":
        """Return the samples with these indices, in their order."""
        return Images(images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """An image set in its three parts."""

    train: Images
    validation: Images
    test: Images
    classes: int


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a set of the official layouts lies, and what it must hold."""

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


def _idx(torchvision: str) -> _Source:
    return _Source(
        torchvision=torchvision,
        folder=f"{torchvision}/raw",
        train_files=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        test_files=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        train_size=60_000,
        test_size=10_000,
        shape=(1, 28, 28),
        classes=10,
    )


_SOURCES = {
    "mnist": _idx("MNIST"),
    "fashion_mnist": _idx("FashionMNIST"),
    "cifar10": _Source(
        torchvision="CIFAR10",
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_files=("test_batch",),
        train_size=50_000,
        test_size=10_000,
        shape=(3, 32, 32),
        classes=10,
        label_key="labels",
    ),
    "cifar100": _Source(
        torchvision="CIFAR100",
        folder="cifar-100-python",
        train_files=("train",),
        test_files=("test",),
        train_size=50_000,
        test_size=10_000,
        shape=(3, 32, 32),
        classes=100,
        label_key="fine_labels",
    ),
}


def load(data: "DataSection") -> ImageSet:
    """Read an image set and cut it into its parts.

    The validation part is ``data.validation_fraction`` of the official training part, by a fixed
    seed, and the test part the official one. The digits have no official parts: 360 of them are the
    test part and 180 the validation part, by a fixed seed.

    Raises:
        UserError: a file is missing or damaged, or ``data.train_samples`` is too large.
    """
    if data.name == "digits":
        return _load_digits(data)
    source = _SOURCES[data.name]
    official = _read(data, source, source.train_files, source.train_size)
    test = _read(data, source, source.test_files, source.test_size)
    train, validation = split_off_validation(official.labels, data)
    return ImageSet(
        train=official.select(limit_training_part(train, data)),
        validation=official.select(validation),
        test=test,
        classes=source.classes,
    )


def download(configuration: "Configuration") -> None:
    """Let torchvision download the data set to data.root, if configured and files are missing.

    Files that are there are left alone, damaged ones too. Call it on one process per node, before
    the others look for the files.

    Raises:
        UserError: the download failed, or the data set cannot be downloaded.
    """
    data = configuration.data
    if not data.download or data.name == "digits":
        return
    if data.name == "image_folder":
        raise UserError(
            "data.download: image_folder is your own data and cannot be downloaded; put train/ and "
            "val/ into data.root"
        )
    if is_series(data.name):
        raise UserError(
            f"data.download: {data.name} has no official place to download from; put "
            f"{series_path(data).name} into {series_path(data).parent}"
        )
    source = _SOURCES[data.name]
    if all(source.find(data.root, name) for name in (*source.train_files, *source.test_files)):
        return
    import_torchvision()
    from torchvision import datasets

    try:
        getattr(datasets, source.torchvision)(data.root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.download: {data.name} could not be downloaded to {data.root} ({reason}); "
            f"{_by_hand(data, source)}"
        ) from None


def _load_digits(data: "DataSection") -> ImageSet:
    import_scikit_learn()
    from sklearn.datasets import load_digits

    digits = load_digits()
    whole = Images(
        images=digits.images[:, None].astype(np.uint8),  # 0 to 16, exactly
        labels=digits.target.astype(np.int64),
    )
    rest, test = split_off(whole.labels, DIGITS_TEST)
    train, validation = split_off(whole.labels[rest], DIGITS_VALIDATION)
    return ImageSet(
        train=whole.select(limit_training_part(rest[train], data)),
        validation=whole.select(rest[validation]),
        test=whole.select(test),
        classes=10,
    )


def _read(data: "DataSection", source: _Source, files: tuple[str, ...], size: int) -> Images:
    """Read one official part.

    Args:
        data: where it lies.
        source: what is expected.
        files: images and labels as idx, or pickles that follow each other.
        size: samples expected.
    """
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


def _by_hand(data: "DataSection", source: _Source) -> str:
    files = ", ".join((*source.train_files, *source.test_files))
    packed = " (or the same as .gz)" if source.label_key is None else ""
    return f"put {files}{packed} into {Path(data.root, source.folder)}"
