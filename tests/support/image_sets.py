"""Small image sets in their official layouts."""

import dataclasses
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data.official import OfficialSet
from app.data.sets import DATA_SETS

TRAIN, TEST = 40, 20


def expect_small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the official layouts have fewer samples."""
    for name, source in DATA_SETS.items():
        if isinstance(source, OfficialSet):
            small = dataclasses.replace(source, train_size=TRAIN, test_size=TEST)
            monkeypatch.setitem(DATA_SETS, name, small)


def labels_of(size: int, classes: int) -> np.ndarray:
    return np.arange(size) * 7 % classes


def images_of(labels: np.ndarray, *shape: int) -> np.ndarray:
    """Images whose first pixel is the label and whose second is the index."""
    images = np.random.default_rng(0).integers(256, size=(len(labels), *shape), dtype=np.uint8)
    flat = images.reshape(len(labels), -1)
    flat[:, 0] = labels
    flat[:, 1] = np.arange(len(labels))
    return images


def write_idx(path: Path, array: np.ndarray, *, pack: bool = False) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if pack:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_mnist(root: Path, folder: str = "MNIST", *, pack: bool = False) -> Path:
    raw = root / folder / "raw"
    for part, size in (("train", TRAIN), ("t10k", TEST)):
        labels = labels_of(size, 10)
        write_idx(raw / f"{part}-images-idx3-ubyte", images_of(labels, 28, 28), pack=pack)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels, pack=pack)
    return raw


def python2_pickle(entries: dict[str, Any]) -> bytes:
    """Protocol 2 with the byte strings of Python 2, as in the official files of CIFAR."""

    def dump(value: Any) -> bytes:
        match value:
            case str():
                return b"U" + bytes([len(value)]) + value.encode()
            case int():
                return b"J" + struct.pack("<i", value)
            case list():
                return b"](" + b"".join(map(dump, value)) + b"e"
            case np.ndarray():
                content = value.tobytes()
                return (
                    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
                    + (b"(K\x01" + dump(value.shape[0]) + dump(value.shape[1]) + b"\x86")
                    + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
                    + (dump(-1) + dump(-1) + b"K\x00tb\x89T")
                    + struct.pack("<i", len(content))
                    + content
                    + b"tb"
                )
        raise AssertionError(value)

    items = b"".join(dump(key) + dump(value) for key, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


def write_cifar(root: Path, name: str = "cifar10") -> Path:
    source = DATA_SETS[name]
    assert isinstance(source, OfficialSet)
    folder = root / source.folder
    folder.mkdir(parents=True)
    for files, size in ((source.train_files, TRAIN), (source.test_files, TEST)):
        labels = labels_of(size, source.classes)
        images = images_of(labels, 3 * 32 * 32)
        for file, part in zip(files, np.array_split(np.arange(size), len(files)), strict=True):
            entries = {
                "batch_label": file,
                "data": images[part],
            }
            if name == "cifar10":
                entries["labels"] = labels[part].tolist()
            else:
                entries |= {"fine_labels": labels[part].tolist(), "coarse_labels": [0] * len(part)}
            (folder / file).write_bytes(python2_pickle(entries))
    return folder
