"""Arithmetic on images held as arrays of bytes."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, corners: Tensor, flipped: Tensor, *, margin: int) -> Tensor:
    """Pad with zeros (black), cut out images of the old size, flip some of them.

    He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2.

    Args:
        images: (b, channels, height, width).
        corners: (b, 2) integers in [0, 2 margin], top and left corner within the padded image.
        flipped: (k,) int64, indices of the images that are mirrored left and right.
        margin: pixels of padding on each side.

    Returns:
        (b, channels, height, width).
    """
    height, width = images.shape[2:]
    padded = functional.pad(images, (margin, margin, margin, margin))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (b, channels, top, left, ...)
    cut = _cut_by_numpy if images.device.type == "cpu" else _cut_by_torch
    return cut(windows, corners, flipped)


def _cut_by_torch(windows: Tensor, corners: Tensor, flipped: Tensor) -> Tensor:
    samples = torch.arange(len(windows), device=windows.device)
    result = windows[samples, :, corners[:, 0], corners[:, 1]]
    return result.index_copy_(0, flipped, result.index_select(0, flipped).flip(-1))


def _cut_by_numpy(windows: Tensor, corners: Tensor, flipped: Tensor) -> Tensor:
    """The same on the host, where numpy copies whole rows and torch single pixels."""
    top, left = corners.numpy().T
    mirrored = flipped.numpy()
    result = windows.numpy()[np.arange(len(windows)), :, top, left]
    result[mirrored] = result[mirrored][..., ::-1]
    return torch.from_numpy(result)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of every channel, exactly, from counts of the 256 values.

    Args:
        images: (n, channels, height, width) uint8.

    Returns:
        Two (channels,) float64 arrays; a constant channel has the deviation 1 and not 0, so that
        one can divide by it.
    """
    values = np.arange(256)
    chunks = np.array_split(images, math.ceil(len(images) / 4096))  # bincount copies to int64
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = sum(np.bincount(chunk[:, channel].ravel(), minlength=256) for chunk in chunks)
        weights = counts / np.sum(counts)
        mean = values @ weights
        means.append(mean)
        deviations.append(math.sqrt((values - mean) ** 2 @ weights) or 1.0)
    return np.array(means), np.array(deviations)
