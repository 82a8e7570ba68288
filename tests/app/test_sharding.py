"""Order of samples, global batches and shares: the process count only decides who has what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.data import sharding
from app.data.sharding import Stream

SIZES = st.integers(1, 60)
BATCH_SIZES = st.integers(1, 70)
PROCESS_COUNTS = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


def global_batches(size: int, batch_size: int, *, drop_last: bool = False) -> list[slice]:
    steps = sharding.steps_per_epoch(size, batch_size, drop_last=drop_last)
    return [sharding.global_batch(size, batch_size, number) for number in range(steps)]


@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_order_is_a_permutation_and_always_the_same(size: int, seed: int, epoch: int) -> None:
    order = sharding.epoch_order(size, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(size))
    np.testing.assert_array_equal(order, sharding.epoch_order(size, seed=seed, epoch=epoch))


def test_order_differs_between_seeds_and_epochs() -> None:
    orders = {
        tuple(sharding.epoch_order(100, seed=seed, epoch=epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_streams_are_independent() -> None:
    numbers = {
        sharding.generator(stream, *key).integers(2**63)
        for stream in Stream
        for key in ((), (0,), (1,), (0, 1), (1, 0))
    }
    # Trailing zeros are no part of a key: () and (0,) are one, as (1,) and (1, 0) are.
    assert len(numbers) == 3 * len(Stream)


@given(n=st.integers(0, 60), count=PROCESS_COUNTS)
def test_shares_cover_everything_in_order_and_evenly(n: int, count: int) -> None:
    shares = [sharding.share(n, index, count) for index in range(count)]
    assert [p for share in shares for p in range(n)[share]] == list(range(n))
    sizes = [share.stop - share.start for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(
    size=SIZES,
    batch_size=BATCH_SIZES,
    count=PROCESS_COUNTS,
    seed=SEEDS,
    first_batch=st.integers(0, 3),
)
def test_processes_together_train_on_the_sequence_of_one(
    size: int, batch_size: int, count: int, seed: int, first_batch: int
) -> None:
    order = sharding.epoch_order(size, seed=seed, epoch=1)
    seen = [
        sample
        for positions in global_batches(size, batch_size)[first_batch:]
        for index in range(count)
        for sample in order[positions][
            sharding.share(positions.stop - positions.start, index, count)
        ]
    ]
    assert seen == list(order[first_batch * batch_size :])


@given(size=SIZES, batch_size=BATCH_SIZES)
def test_only_drop_last_loses_samples_and_only_of_the_smaller_batch(
    size: int, batch_size: int
) -> None:
    batches = global_batches(size, batch_size)
    lengths = [batch.stop - batch.start for batch in batches]
    assert sum(lengths) == size
    assert all(length == batch_size for length in lengths[:-1])
    assert 0 < lengths[-1] <= batch_size
    full = [batch for batch in batches if batch.stop - batch.start == batch_size]
    assert global_batches(size, batch_size, drop_last=True) == full


@given(size=st.integers(0, 60), batch_size=BATCH_SIZES, count=PROCESS_COUNTS)
def test_evaluation_counts_every_sample_once(size: int, batch_size: int, count: int) -> None:
    batches = [
        list(sharding.evaluation_batches(size, batch_size, index, count)) for index in range(count)
    ]
    seen = [p for mine in batches for positions in mine for p in range(size)[positions]]
    assert seen == list(range(size))
    assert all(
        0 < positions.stop - positions.start <= batch_size for mine in batches for positions in mine
    )


@pytest.mark.parametrize(
    ("size", "batch_size", "drop_last", "steps"),
    [(10, 4, False, 3), (10, 4, True, 2), (8, 4, False, 2), (8, 4, True, 2), (3, 4, True, 0)],
)
def test_steps_per_epoch(size: int, batch_size: int, drop_last: bool, steps: int) -> None:
    assert sharding.steps_per_epoch(size, batch_size, drop_last=drop_last) == steps
