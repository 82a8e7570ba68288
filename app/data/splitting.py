"""Cutting a data set into its training and validation parts.

The cut follows a fixed seed and not run.seed, so that runs of all seeds are compared on the same
samples.
"""

from typing import TYPE_CHECKING

import numpy as np

from app.data.sharding import Stream, generator
from app.errors import UserError

if TYPE_CHECKING:
    from app.config.settings import DataSection


def split_off(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Take ``size`` samples out at random, of every class in proportion.

    Args:
        labels: (n,) integers.
        size: in [0, n].

    Returns:
        Indices of the samples that remain, (n - size,), and of those taken, (size,), in random
        order: the same for the same labels.
    """
    order = generator(Stream.SPLIT).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    # Evenly spaced positions of the samples sorted by class: of each class its share, within one.
    steps = np.arange(len(labels) + 1) * size // len(labels)
    taken = np.zeros(len(labels), dtype=bool)
    taken[by_class[np.diff(steps) > 0]] = True
    return order[~taken[order]], order[taken[order]]


def split_off_validation(labels: np.ndarray, data: "DataSection") -> tuple[np.ndarray, np.ndarray]:
    """Split by ``data.validation_fraction``, at least one sample; see :func:`split_off`.

    Raises:
        UserError: fewer than two samples.
    """
    if len(labels) < 2:
        raise UserError(
            f"data.root: {data.name} in {data.root} has {len(labels)} training images, too few to "
            f"set some aside for validation"
        )
    return split_off(labels, max(1, round(data.validation_fraction * len(labels))))


def limit_training_part(train: np.ndarray, data: "DataSection") -> np.ndarray:
    """Return the first ``data.train_samples`` indices of the training part, or all.

    Raises:
        UserError: the training part has fewer.
    """
    if data.train_samples is None:
        return train
    if data.train_samples > len(train):
        raise UserError(
            f"data.train_samples: {data.train_samples} exceeds the {len(train)} training samples "
            f"of {data.name}"
        )
    return train[: data.train_samples]
