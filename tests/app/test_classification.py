"""Batches of sets in memory, their augmentation, the loss and the figures of merit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.digit_tasks import assert_equal, digits, in_double, linear, together
from torch import Tensor, nn
from torch.nn import functional

from app import config
from app.config.settings import DataSection
from app.data import Batch, build_task, datasets, pixels
from app.data.datasets import load
from app.data.pixels import channel_statistics, crop_and_flip
from app.errors import UserError


@pytest.mark.usefixtures("global_random_state_untouched")
@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_process_count_changes_no_image(count: int, augmentation: str) -> None:
    data = {"augmentation": augmentation}
    alone = together([digits(data=data)], epoch=1)
    assert [len(targets) for _, targets in alone] == [16, 16, 16, 2]
    shares = [digits(index, count, data=data) for index in range(count)]
    assert_equal(together(shares, epoch=1), alone)


@pytest.mark.parametrize("count", [1, 3])
def test_epoch_can_be_resumed_in_the_middle(count: int) -> None:
    data = {"augmentation": "crop_flip"}
    tasks = [digits(index, count, data=data) for index in range(count)]
    assert_equal(together(tasks, epoch=2, first_batch=2), together(tasks, epoch=2)[2:])


def test_epoch_shows_every_image_once_in_another_order() -> None:
    parts = load(config.build({"data": {"train_samples": 50}}).data)
    mean, std = parts.train.images.mean(), parts.train.images.std()
    task = digits()
    orders = []
    for epoch in range(2):
        batches = together([task], epoch)
        inputs = torch.cat([inputs for inputs, _ in batches])
        pixels = (inputs * std + mean).round().numpy()
        orders.append(pixels.reshape(50, -1).tolist())
        shown = sorted(zip(orders[-1], torch.cat([t for _, t in batches]).tolist(), strict=True))
        images = parts.train.images.reshape(50, -1).astype(float).tolist()
        assert shown == sorted(zip(images, parts.train.labels.tolist(), strict=True))
    assert orders[0] != orders[1]
    assert not torch.equal(together([digits(seed=1)], 0)[0][0], together([task], 0)[0][0])


def test_inputs_are_normalized_by_the_training_part() -> None:
    inputs = torch.cat([inputs for inputs, _ in together([digits()], 0)])
    assert inputs.dtype == torch.float32
    assert inputs.mean().item() == pytest.approx(0, abs=1e-6)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_random_numbers_differ_between_seeds_epochs_and_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []

    def record(images: Tensor, corners: Tensor, flipped: Tensor, *, margin: int) -> Tensor:
        drawn.append((tuple(corners.flatten().tolist()), tuple(flipped.tolist())))
        return images

    monkeypatch.setattr("app.data.classification.crop_and_flip", record)
    data = {"augmentation": "crop_flip", "drop_last": True}
    for seed in range(2):
        for epoch in range(2):
            list(digits(seed=seed, data=data).train_batches(epoch))
    assert len(drawn) == 2 * 2 * 3
    assert len({corners for corners, _ in drawn}) == len({flips for _, flips in drawn}) == 12


def test_augmentation_differs_between_samples() -> None:
    tasks = [digits(data={"augmentation": a}) for a in ("none", "crop", "crop_flip")]
    plain, cropped, flipped = (torch.cat([i for i, _ in together([t], 0)]) for t in tasks)
    corners = (cropped != plain).flatten(1).any(dim=1).float().mean()
    assert 0.6 < corners < 1  # 8 of 9 are moved
    flips = (flipped != cropped).flatten(1).any(dim=1).float().mean()
    assert 0.3 < flips < 0.7


@pytest.mark.parametrize("cut", ["_cut_by_numpy", "_cut_by_torch"])
@given(
    size=st.sampled_from([(1, 8, 8), (3, 5, 16)]),
    margin=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=20)
def test_crop_and_flip_is_a_window_into_the_padded_image(
    cut: str, size: tuple[int, int, int], margin: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (6, *size), generator=generator, dtype=torch.uint8)
    corners = torch.randint(0, 2 * margin + 1, (6, 2), generator=generator)
    flips = torch.rand(6, generator=generator) < 0.5
    flipped = flips.nonzero().flatten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "_cut_by_numpy", getattr(pixels, cut))
        result = crop_and_flip(images, corners, flipped, margin=margin)
    _, height, width = size
    for image, (top, left), flip, cropped in zip(
        images, corners.tolist(), flips, result, strict=True
    ):
        padded = torch.zeros(size[0], height + 2 * margin, width + 2 * margin, dtype=torch.uint8)
        padded[:, margin : margin + height, margin : margin + width] = image
        window = padded[:, top : top + height, left : left + width]
        assert torch.equal(cropped, window.flip(-1) if flip else window)


def test_channel_statistics_are_exact() -> None:
    images = np.random.default_rng(0).integers(256, size=(5000, 2, 3, 4), dtype=np.uint8)
    images[:, 1] = 7
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, [images[:, 0].std(), 1], rtol=1e-13)


@pytest.mark.usefixtures("global_random_state_untouched")
@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_evaluation_shows_every_sample_once(split: str, count: int) -> None:
    parts = load(config.build({"data": {"train_samples": 50}}).data)
    part = getattr(parts, split)
    batches = [
        batch for index in range(count) for batch in digits(index, count).evaluation_batches(split)
    ]
    assert all(batch.count == len(batch.inputs) <= -(-16 // count) for batch in batches)
    targets = torch.cat([batch.targets for batch in batches])
    np.testing.assert_array_equal(targets.numpy(), part.labels)
    inputs = torch.cat([batch.inputs for batch in batches])
    mean, std = parts.train.images.mean(), parts.train.images.std()
    pixels = (inputs * std + mean).round().numpy()
    np.testing.assert_array_equal(pixels, part.images)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sum_of_losses_is_the_mean_over_the_global_batch(
    count: int, accumulation: int, smoothing: float
) -> None:
    """With 5 processes the last global batch, of 2 samples, leaves some without a sample."""
    expected_model, model = linear(), linear()
    tasks = [
        digits(index, count, label_smoothing=smoothing, accumulation=accumulation)
        for index in range(count)
    ]
    whole = list(digits().train_batches(0))
    shares = zip(*(task.train_batches(0) for task in tasks), strict=True)
    for batch, batches in zip(whole, shares, strict=True):
        expected = functional.cross_entropy(
            expected_model(batch.inputs.double()), batch.targets, label_smoothing=smoothing
        )
        expected_model.zero_grad()
        expected.backward()
        model.zero_grad()
        total = 0.0
        for task, share in zip(tasks, batches, strict=True):
            for part in share.split(accumulation):
                loss = task.loss(model, in_double(part))
                loss.backward()
                total += loss.item()
        assert total == pytest.approx(expected.item(), rel=1e-12)
        for actual, wanted in zip(model.parameters(), expected_model.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-10, atol=1e-14)


def test_empty_share_is_one_padding_sample_that_counts_nothing() -> None:
    *_, batch = digits(4, 5).train_batches(0)
    *_, first = digits(0, 5).train_batches(0)
    assert (batch.count, batch.global_count) == (0, 2)
    assert torch.equal(batch.inputs, first.inputs)
    model = linear()
    parts = batch.split(3)  # as many as the others have: each may be a collective call
    assert [part.count for part in parts] == [0, 0, 0]
    loss = digits(4, 5).loss(model, in_double(parts[0]))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in model.parameters())


@given(count=st.integers(1, 20), parts=st.integers(1, 25))
def test_micro_batches_are_consecutive_and_not_empty(count: int, parts: int) -> None:
    values = torch.arange(count)
    batch = Batch(inputs=values[:, None], targets=values, count=count, global_count=50)
    split = batch.split(parts)
    assert len(split) == min(parts, count)
    assert torch.equal(torch.cat([part.targets for part in split]), values)
    for part in split:
        assert part.count == len(part.inputs) == len(part.targets) > 0
        assert torch.equal(part.inputs[:, 0], part.targets)
        assert part.global_count == 50


def test_evaluate_sums_up_on_the_device() -> None:
    task = digits(label_smoothing=0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batch = next(task.evaluation_batches("test"))
    sums = task.evaluate(model, batch)
    logits = model(batch.inputs)
    for value in sums.values():
        assert isinstance(value, Tensor)
        assert (value.dtype, value.shape, value.requires_grad) == (torch.float64, (), False)
    # Label smoothing belongs to training alone.
    loss = functional.cross_entropy(logits, batch.targets, reduction="sum").item()
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-6)
    assert float(sums["accuracy"]) == (logits.argmax(dim=1) == batch.targets).sum().item()
    assert float(sums["count"]) == 16
    assert set(sums) == {"loss", "count", *task.figures}


def test_sizes_and_example_batch() -> None:
    task = digits()
    assert (task.train_size, task.steps_per_epoch, task.outputs) == (50, 4, 10)
    assert (task.input_shape, task.figures) == ((1, 8, 8), ("accuracy",))
    assert task.splits == ("validation", "test")
    batch, real = task.example_batch(), next(task.train_batches(0))
    assert batch.inputs.shape == (2, 1, 8, 8)
    assert (batch.count, batch.global_count, len(batch.targets)) == (2, 2, 2)
    assert (batch.inputs.dtype, batch.targets.dtype) == (real.inputs.dtype, real.targets.dtype)
    assert task.loss(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), batch).isfinite()


def test_drop_last() -> None:
    task = digits(data={"drop_last": True})
    assert task.steps_per_epoch == 3
    assert [batch.count for batch in task.train_batches(0)] == [16, 16, 16]
    with pytest.raises(UserError, match=r"^training\.batch_size: 51 exceeds the 50 training .*"):
        digits(data={"drop_last": True}, batch_size=51)
    assert digits(batch_size=51).steps_per_epoch == 1


def test_a_part_of_equal_pixels_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A constant part is a damaged file or a wrong conversion: a network learns nothing of it."""
    real = datasets.load

    def load(data: DataSection) -> datasets.ImageSet:
        images = real(data)
        black = datasets.Images(images=np.zeros_like(images.test.images), labels=images.test.labels)
        return replace(images, test=black)

    monkeypatch.setattr(datasets, "load", load)
    build_task(config.build({}), process_index=0, process_count=1, device=torch.device("cpu"))
    assert caplog.messages == ["data.root: all pixels of test in digits are equal"]


def test_crops_begin_at_every_pixel_of_the_padding() -> None:
    task = digits(data={"augmentation": "crop"})  # of 8 pixels, padded by one
    corners = np.concatenate([task._random_crops(epoch, 0, 64)[0] for epoch in range(20)])
    shares = np.bincount(corners.ravel(), minlength=3) / corners.size
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)
