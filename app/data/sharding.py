"""Which samples a process sees, in which order. Pure functions of numbers: nothing communicates.

The order of an epoch is a function of (seed, epoch, position) alone. Global batch b holds the
positions [b B, min((b + 1) B, size)), B being the global batch size, and each process takes a
contiguous share of every global batch. So the process count decides who computes what, and
never what is computed.
"""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purposes of random numbers: streams of different purposes are independent."""

    SPLIT = 1
    ORDER = 2
    AUGMENTATION = 3
    SAMPLE = 4
    MIXING = 5


def generator(stream: Stream, *key: int) -> np.random.Generator:
    """Return a new generator, the same for the same purpose and key.

    Args:
        stream: the purpose.
        key: integers in [0, 2^32), always as many of them for one purpose: numpy takes (1, 0) for
            (1,).
    """
    return np.random.default_rng([stream, *key])


def epoch_order(size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the samples of an epoch in order: a permutation of [0, size), (size,) int64."""
    return generator(Stream.ORDER, seed, epoch).permutation(size)


def steps_per_epoch(size: int, batch_size: int, *, drop_last: bool) -> int:
    """Return the number of global batches of an epoch.

    Args:
        size: samples.
        batch_size: B.
        drop_last: leave out a last batch of fewer than B samples.
    """
    return size // batch_size if drop_last else -(-size // batch_size)


def global_batch(size: int, batch_size: int, batch: int) -> slice:
    """Return the positions of a global batch within its epoch."""
    return slice(batch * batch_size, min((batch + 1) * batch_size, size))


def share(n: int, index: int, count: int) -> slice:
    """Return the contiguous share of n positions that falls to process ``index`` of ``count``.

    Shares differ by at most one position, the larger ones first; with n < count the last ones are
    empty.
    """
    base, larger = divmod(n, count)
    start = index * base + min(index, larger)
    return slice(start, start + base + (index < larger))


def micro_batches(n: int, count: int, accumulation: int) -> int:
    """Return into how many parts every process cuts its share of a global batch of n samples.

    The same number for all, since normalizations that are synchronized let all wait for all in
    every part: at most ``accumulation``, and none without a sample for who has the smallest share.
    """
    return max(1, min(accumulation, n // count))


def evaluation_batches(size: int, batch_size: int, index: int, count: int) -> Iterator[slice]:
    """Yield this process's positions of a part of the data, in batches.

    Over all processes every position comes once.

    Args:
        size: samples.
        batch_size: of one process, unlike elsewhere here.
        index: of this process.
        count: processes.
    """
    mine = share(size, index, count)
    for start in range(mine.start, mine.stop, batch_size):
        yield slice(start, min(start + batch_size, mine.stop))
