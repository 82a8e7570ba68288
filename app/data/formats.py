"""The two file formats of the classic image sets: idx (MNIST) and pickled batches (CIFAR)."""

import gzip
import math
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np

_UNSIGNED_BYTE = 8
"""Code of the element type in an idx file."""

_LARGEST_IDX = 2**32
"""Bytes of data."""

_PICKLED: dict[tuple[str, str], Any] = {
    (module, name): value
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    for name, value in (
        ("_reconstruct", np.empty(0).__reduce__()[0]),
        ("ndarray", np.ndarray),
        ("dtype", np.dtype),
    )
}
"""All that a pickled batch may call."""


def read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped if its name ends with .gz.

    The format (Y. LeCun, the MNIST database): two zero bytes, the element type, the number of
    dimensions; each dimension as a big-endian 32-bit integer; the elements in C order.

    Returns:
        uint8, with ``dimensions`` dimensions, not writeable.

    Raises:
        ValueError: unreadable, truncated, or not such a file.
    """
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(start)
            shape = np.frombuffer(header[4:], ">u4").tolist() if len(header) == start else []
            size = math.prod(shape)
            # No more than is announced: a packed file could fill the memory.
            content = file.read(size + 1) if size <= _LARGEST_IDX else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be read ({error})") from None
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if not header.startswith(magic):
        raise ValueError(
            f"is not an idx file of bytes in {dimensions} dimension(s): it begins with "
            f"{header[:4].hex()!r} and not {magic.hex()!r}"
        )
    if len(header) < start:
        raise ValueError(f"ends after {len(header)} bytes, within its header")
    if len(content) != size:
        number = len(content) if len(content) < size else "more"
        raise ValueError(f"holds {number} bytes of data, its header announces {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_cifar(path: Path, *, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one pickled batch of CIFAR-10 or CIFAR-100, without executing what it may hold.

    Args:
        path: the file.
        label_key: "labels" in CIFAR-10, "fine_labels" or "coarse_labels" in CIFAR-100.

    Returns:
        Images (n, 3, 32, 32) uint8, and labels (n,) int64.

    Raises:
        ValueError: unreadable, truncated, or not such a file.
    """
    try:
        with path.open("rb") as file:
            entry = _RestrictedUnpickler(file, encoding="latin1").load()
    except Exception as error:  # damaged pickles fail in many ways
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(entry, dict) or not {"data", label_key} <= entry.keys():
        raise ValueError(f"is not a dictionary with 'data' and {label_key!r}")
    images, labels = entry["data"], entry[label_key]
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape[1:] != (3 * 32 * 32,)
    ):
        raise ValueError("'data' is not an array of bytes, 3072 per image")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{label_key!r} is not a list of integers")
    if any(abs(label) >= 2**63 for label in labels):
        raise ValueError(f"{label_key!r} holds labels of more than 64 bits")
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays; a pickle could call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a data set")
        return _PICKLED[module, name]
