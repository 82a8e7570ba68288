"""Mixup and CutMix: every image of a batch is mixed with a partner, and so are the answers.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412; Yun et al., "CutMix:
Regularization Strategy to Train Strong Classifiers with Localizable Features", arXiv 1905.04899.
One share for the whole batch, as in timm's mode "batch". timm's own Mixup draws from numpy's global
generator and takes even batches only, hence this one.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How a batch is mixed."""

    share: float
    """Of the image itself; the rest is the partner's."""
    box: tuple[slice, slice] | None
    """Rows and columns that come from the partner (CutMix); None: all pixels are mixed (mixup)."""


def draw(random: np.random.Generator, *, mixup: float, cutmix: float, size: tuple[int, int]) -> Mix:
    """Choose between mixup and CutMix, where both are in use by a throw of a coin, and a share.

    Args:
        random: where numbers come from.
        mixup: parameter a of Beta(a, a) for mixup's share; 0: no mixup.
        cutmix: the same for CutMix.
        size: (height, width) of the images.
    """
    is_cutmix = bool(cutmix) and (not mixup or random.random() < 0.5)
    alpha = cutmix if is_cutmix else mixup
    share = float(random.beta(alpha, alpha))
    if not is_cutmix:
        return Mix(share=share, box=None)
    box, area = [], 1.0
    for extent in size:
        half = int(extent * math.sqrt(1 - share)) // 2
        center = int(random.integers(extent))
        start, stop = max(0, center - half), min(extent, center + half)
        box.append(slice(start, stop))
        area *= (stop - start) / extent
    return Mix(share=1 - area, box=(box[0], box[1]))  # a box may reach beyond the image


def mix_images(images: Tensor, partners: Tensor, mix: Mix) -> Tensor:
    """Mix images (b, channels, height, width) with their partners, of the same shape."""
    if mix.box is None:
        return images.mul(mix.share).add_(partners, alpha=1 - mix.share)
    mixed = images.clone()
    mixed[(..., *mix.box)] = partners[(..., *mix.box)]
    return mixed


def mix_labels(labels: Tensor, partners: Tensor, mix: Mix, *, classes: int) -> Tensor:
    """Return probabilities (b, classes) float32 of labels (b,) int64 and of the partners'."""
    own, other = (functional.one_hot(part, classes).float() for part in (labels, partners))
    return own.mul_(mix.share).add_(other, alpha=1 - mix.share)
