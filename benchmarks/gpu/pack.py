"""Packs Fashion-MNIST and a part of CIFAR-10 into a few MiB, to be carried to a GPU host.

``python -m benchmarks.gpu.pack DATA FOLDER`` reads the official files below DATA (the layout that
the application reads, docs/recipes.md) and writes FOLDER/NAME.zip: labels, and all images as tiles
of lossless WebP pictures. 40,000 and 10,000 images of Fashion-MNIST and 20,000 and 2,500 of
CIFAR-10 take 58 MB.
"""

import argparse
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZES = {"fashion_mnist": (40_000, 10_000), "cifar10": (20_000, 2_500)}
TILES = 50
"""Images on each side of a picture."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Training and test part: images (n, channels, height, width) uint8, labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def random_images(channels: int, count: int = 64) -> Images:
    """Draw images that mean nothing, 28 or 32 pixels wide."""
    generator = torch.Generator().manual_seed(0)
    side = 28 if channels == 1 else 32
    images = torch.randint(
        256, (count, channels, side, side), generator=generator, dtype=torch.uint8
    )
    labels = torch.randint(10, (count,), generator=generator)
    return Images(train_images=images, train_labels=labels, test_images=images, test_labels=labels)


def read(data: Path, name: str) -> dict[str, np.ndarray]:
    """Read as many images as are packed, the first of each part, with their labels."""
    from app.data.formats import read_cifar, read_idx

    train_size, test_size = SIZES[name]
    if name == "fashion_mnist":
        folder = data / "FashionMNIST" / "raw"
        parts = [
            (
                read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)[:, None],
                read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1),
            )
            for part in ("train", "t10k")
        ]
    else:
        folder = data / "cifar-10-batches-py"
        training = [read_cifar(folder / f"data_batch_{i}", label_key="labels") for i in range(1, 6)]
        images, labels = zip(*training, strict=True)
        parts = [
            (np.concatenate(images), np.concatenate(labels)),
            read_cifar(folder / "test_batch", label_key="labels"),
        ]
    (train, train_labels), (test, test_labels) = parts
    return {
        "train_images": train[:train_size].reshape(train_size, *test.shape[1:]),
        "train_labels": train_labels[:train_size],
        "test_images": test[:test_size],
        "test_labels": test_labels[:test_size],
    }


def pack(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write a zip archive: labels as .npy, images as pictures of tiles in lossless WebP."""
    from PIL import Image

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, array in arrays.items():
            if array.ndim == 1:
                buffer = io.BytesIO()
                np.save(buffer, array.astype(np.uint8))
                archive.writestr(f"{key}.npy", buffer.getvalue(), zipfile.ZIP_DEFLATED)
                continue
            n, c, h, w = array.shape
            per_picture = TILES * TILES
            assert n % per_picture == 0
            for start in range(0, n, per_picture):
                tiles = array[start : start + per_picture].reshape(TILES, TILES, c, h, w)
                picture = tiles.transpose(0, 3, 1, 4, 2).reshape(TILES * h, TILES * w, c)
                buffer = io.BytesIO()
                image = Image.fromarray(picture.squeeze(-1) if c == 1 else picture).convert("RGB")
                image.save(buffer, "WEBP", lossless=True, quality=100, method=4)
                archive.writestr(f"{key}-{start:06d}-{c}x{h}x{w}.webp", buffer.getvalue())


def unpack(folder: Path, name: str) -> Images:
    """Read what :func:`pack` wrote."""
    from PIL import Image

    images: dict[str, list[np.ndarray]] = {}
    labels = {}
    with zipfile.ZipFile(folder / f"{name}.zip") as archive:
        for member in sorted(archive.namelist()):
            content = io.BytesIO(archive.read(member))
            if member.endswith(".npy"):
                labels[member[:-4]] = torch.from_numpy(np.load(content).astype(np.int64))
                continue
            key, _, shape = member.removesuffix(".webp").rsplit("-", 2)
            c, h, w = map(int, shape.split("x"))
            picture = np.asarray(Image.open(content).convert("RGB"))[..., :c]
            tiles = picture.reshape(TILES, h, TILES, w, c).transpose(0, 2, 4, 1, 3)
            images.setdefault(key, []).append(tiles.reshape(-1, c, h, w))
    parts = {key: torch.from_numpy(np.concatenate(arrays)) for key, arrays in images.items()}
    return Images(**parts, **labels)


def main() -> None:
    """Pack both sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        path = options.folder / f"{name}.zip"
        pack(read(options.data, name), path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
