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
    count, _, height, width = images.shape
    padded = functional.pad(images, (margin, margin, margin, margin))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (b, channels, top, left, ...)
    samples = torch.arange(count, device=images.device)
    cut = windows[samples, :, corners[:, 0], corners[:, 1]]
    return cut.index_copy_(0, flipped, cut.index_select(0, flipped).flip(-1))


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
