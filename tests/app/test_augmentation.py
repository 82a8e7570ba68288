"""Mixup and CutMix, RandAugment and erasing, reading of regions, staging to a node's disk."""

import dataclasses
import io
import os
import pickle
import random
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.digit_tasks import digits, in_double, linear, together
from support.image_folders import folder_task, write_images
from support.image_folders import together as together_from_folder
from torch.nn import functional

from app import config
from app.config.settings import DataSection
from app.data.image_files import (
    EvaluationTransform,
    TrainingTransform,
    random_box,
    read_region,
)
from app.data.mixing import Mix, draw, mix_images, mix_labels
from app.data.randomness import seeded
from app.data.staging import stage, staged_root
from app.errors import UserError


@pytest.mark.usefixtures("global_random_state_untouched")
def test_seeded_numbers_repeat() -> None:
    draws = []
    for seed in (3, 3, 2**63 - 1):
        with seeded(seed):
            draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert len({*draws[0], *draws[2]}) == 6


@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 40), width=st.integers(1, 40))
def test_cutmix_takes_what_the_labels_say(seed: int, height: int, width: int) -> None:
    size = (height, width)
    mix = draw(np.random.default_rng(seed), mixup=0, cutmix=1, size=size)
    assert mix.box
    images, partners = torch.zeros(2, 3, *size), torch.ones(2, 3, *size)
    mixed = mix_images(images, partners, mix)
    assert mixed.mean().item() == pytest.approx(1 - mix.share, abs=1e-5)
    labels = mix_labels(torch.tensor([0, 1]), torch.tensor([1, 1]), mix, classes=3)
    expected = torch.tensor([[mix.share, 1 - mix.share, 0], [0, 1, 0]])
    torch.testing.assert_close(labels, expected)


def test_mixup_is_a_convex_combination() -> None:
    images, partners = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    mixed = mix_images(images, partners, Mix(share=0.3, box=None))
    torch.testing.assert_close(mixed, 0.3 * images + 0.7 * partners)


def test_shares_follow_their_distributions() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw(generator, mixup=0.2, cutmix=1, size=(64, 64)) for _ in range(2000)]
    boxes = [mix for mix in drawn if mix.box]
    assert 0.45 < len(boxes) / 2000 < 0.55
    shares = np.array([mix.share for mix in drawn if not mix.box])
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    assert shares.var() == pytest.approx(0.25 / 1.4, abs=0.02)  # of Beta(0.2, 0.2)
    shares = np.array([mix.share for mix in boxes])
    assert shares.mean() > 0.5  # boxes are cut off at the border


MIXED = {"mixup": 0.8, "cutmix": 1.0, "augmentation": "crop_flip"}


@pytest.mark.parametrize("count", [2, 3])
def test_process_count_changes_no_mixed_image(count: int) -> None:
    alone = together([digits(data=MIXED)], epoch=1)
    shares = together([digits(index, count, data=MIXED) for index in range(count)], epoch=1)
    for (inputs, targets), (other_inputs, other_targets) in zip(alone, shares, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)
        assert targets.shape == (len(inputs), 10)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(inputs)))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_partners_are_mirrored_in_the_batch(options: dict[str, float]) -> None:
    crops = {"augmentation": "crop_flip"}
    plain = together([digits(data=crops)], epoch=0)
    mixed = together([digits(data={**crops, **options})], epoch=0)
    shares = set()
    for (inputs, labels), (mixed_inputs, targets) in zip(plain, mixed, strict=True):
        partner_labels = labels.flip(0)
        different = labels != partner_labels
        share = targets[different, labels[different]]
        assert torch.allclose(share, share[0])
        shares.add(round(share[0].item(), 4))
        own = (mixed_inputs == inputs).flatten(1).float().mean(dim=1)
        if "mixup" in options:
            expected = share[0] * inputs + (1 - share[0]) * inputs.flip(0)
            torch.testing.assert_close(mixed_inputs, expected, atol=1e-5, rtol=1e-5)
        else:
            is_partner = mixed_inputs == inputs.flip(0)
            assert ((mixed_inputs == inputs) | is_partner).all()
            assert (own >= share[0] - 1e-5).all()
    assert len(shares) > 1


@pytest.mark.parametrize("count", [1, 3])
def test_loss_of_mixed_labels(count: int) -> None:
    options: dict[str, Any] = {"data": {"mixup": 0.8}, "label_smoothing": 0.1}
    model = linear()
    whole = next(digits(**options).train_batches(0))
    smooth = whole.targets.double() * 0.9 + 0.01
    log_probabilities = functional.log_softmax(model(whole.inputs.double()), dim=1)
    expected = -(smooth * log_probabilities).sum(dim=1).mean()
    tasks = [digits(index, count, **options) for index in range(count)]
    total = 0.0
    for task in tasks:
        batch = in_double(next(task.train_batches(0)))
        batch = dataclasses.replace(batch, targets=batch.targets.double())
        total += sum(task.loss(model, part).item() for part in batch.split(2))
    assert total == pytest.approx(expected.item(), rel=1e-6)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 7)
    write_images(root / "val", 3, first=10)
    return root


@pytest.mark.usefixtures("global_random_state_untouched")
@pytest.mark.parametrize(
    "options",
    [{"random_augment": "rand-m9-mstd0.5-inc1"}, {"random_erasing": 1.0}, {"mixup": 1.0}],
    ids=lambda options: next(iter(options)),
)
def test_augmentation_of_files_repeats_and_changes_images(
    images: Path, options: dict[str, Any]
) -> None:
    plain = together_from_folder([folder_task(images)])
    first = together_from_folder([folder_task(images, **options)])
    again = together_from_folder([folder_task(images, workers=1, **options)], first_batch=1)
    assert torch.equal(first[1][0], again[0][0])
    assert torch.equal(first[1][1], again[0][1])
    changed = [(a[0] != b[0]).flatten(1).any(dim=1) for a, b in zip(plain, first, strict=True)]
    assert torch.cat(changed).float().mean() > 0.5
    if "mixup" not in options:
        shares = [folder_task(images, index, 3, **options) for index in range(3)]
        for (inputs, _), (other, _) in zip(first, together_from_folder(shares), strict=True):
            assert torch.equal(inputs, other)


def test_erased_pixels_are_noise(images: Path) -> None:
    (inputs, _), *_ = together_from_folder([folder_task(images, random_erasing=1.0)])
    plain, *_ = together_from_folder([folder_task(images)])
    erased = inputs[inputs != plain[0]]
    assert abs(erased.mean()) < 0.3
    assert 0.7 < erased.std() < 1.3


def test_wrong_notation_of_rand_augment(images: Path) -> None:
    message = r"^data\.random_augment: 'sand-m9' is not in timm's notation, such as rand-m9"
    with pytest.raises(UserError, match=message) as caught:
        folder_task(images, random_augment="sand-m9")
    assert "\n" not in str(caught.value)


def test_transforms_can_be_sent_to_spawned_loaders() -> None:
    data = {"name": "image_folder", "random_augment": "rand-m9-inc1", "random_erasing": 1.0}
    transform = TrainingTransform(config.build({"data": {**data, "image_size": 64}}).data)
    results = []
    for one in (transform, pickle.loads(pickle.dumps(transform))):
        random = np.random.default_rng(0)
        results.append(one.finish(one.decode(smooth_image(200, 150, "JPEG"), random), random))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "digits", "random_augment": "x"}, "random_augment: is not for data.name=digits"),
        ({"name": "digits", "stage_to": "x"}, "stage_to: is not for data.name=digits"),
        ({"name": "image_folder", "augmentation": "crop"}, "augmentation: is not for data.name=im"),
        ({"name": "etth1", "mixup": 1.0}, "mixup: is not for data.name=etth1; leave it out"),
    ],
)
def test_options_that_a_data_set_has_no_use_for(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"data.{message}")):
        config.build({"data": values})


def test_labels_of_a_series_cannot_be_smoothed() -> None:
    with pytest.raises(UserError, match=r"^training\.label_smoothing: is not for data\.name=etth1"):
        config.load(None, ["data.name=etth1", "training.label_smoothing=0.1"])


@given(width=st.integers(1, 700), height=st.integers(1, 700), seed=st.integers(0, 2**32 - 1))
def test_random_box_lies_within_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = random_box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_boxes_have_the_areas_and_shapes_of_the_paper() -> None:
    generator = np.random.default_rng(0)
    boxes = np.array([random_box(500, 500, generator) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, ratios = width * height / 500**2, width / height
    assert 0.07 < shares.min() < 0.09
    assert 0.45 < shares.mean() < 0.54  # of large areas some shapes do not fit
    assert 0.73 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.35
    assert abs(np.log(ratios).mean()) < 0.02
    middle = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    assert all(abs(places.mean() - 250) < 5 for places in middle)
    # Nothing of an image as long as this fits: the largest square-like part of its middle.
    assert random_box(300, 9, generator) == (144, 0, 156, 9)


def smooth_image(width: int, height: int, kind: str) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 70 + i) * np.cos(y / 50 - i) for i in range(3)]
    pixels = (127 + 120 * np.stack(waves, axis=2)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return Image.open(stream)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    "box", [(0, 0, 640, 480), (100, 20, 400, 320), (301, 77, 333, 140), (5, 5, 600, 200)]
)
def test_region_is_what_cropping_and_resizing_gives(
    kind: str, box: tuple[int, int, int, int]
) -> None:
    result = read_region(smooth_image(640, 480, kind), box, 64)
    expected = smooth_image(640, 480, kind).crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    assert (result.size, result.mode) == ((64, 64), "RGB")
    difference = np.abs(np.asarray(result, int) - np.asarray(expected, int))
    assert difference.max() <= 6
    assert difference.mean() < 1.5


def test_large_jpeg_is_decoded_at_a_part_of_its_resolution() -> None:
    image = smooth_image(640, 480, "JPEG")
    read_region(image, (0, 0, 640, 480), 64)
    assert image.size == (160, 120)  # a quarter; an eighth would be 60 pixels high
    image = smooth_image(640, 480, "JPEG")
    read_region(image, (0, 0, 100, 100), 64)
    assert image.size == (640, 480)


def test_evaluation_sees_the_whole_resolution() -> None:
    image = smooth_image(640, 480, "JPEG")
    transform = EvaluationTransform(56)
    random = np.random.default_rng(0)
    pixels = transform.finish(transform.decode(image, random), random)
    resized = smooth_image(640, 480, "JPEG").resize((85, 64), Image.Resampling.BILINEAR)
    left, top = round((85 - 56) / 2), (64 - 56) // 2
    expected = np.asarray(resized.crop((left, top, left + 56, top + 56)), int).transpose(2, 0, 1)
    assert pixels.dtype == torch.uint8
    assert np.abs(pixels.numpy().astype(int) - expected).max() <= 1


def staged(root: Path, target: Path) -> DataSection:
    return config.build(
        {"data": {"name": "image_folder", "root": str(root), "stage_to": str(target)}}
    ).data


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_staging_copies_once(images: Path, tmp_path: Path) -> None:
    data = staged(images, tmp_path / "local")
    stage(data)
    copy = Path(staged_root(data))
    assert contents(copy) == contents(images)
    assert copy.parent == tmp_path / "local"
    changed = next(copy.rglob("*.png"))
    changed.write_bytes(b"mine")
    stage(data)
    assert changed.read_bytes() == b"mine"
    assert {path.suffix for path in copy.parent.iterdir()} == {"", ".lock"}


def test_staging_follows_no_link_twice(images: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(images, tmp_path / "origin"))
    (origin / "train" / "ant" / "up").symlink_to(origin)
    (origin / "val" / "bee" / "self").symlink_to(".")
    data = staged(origin, tmp_path / "local")
    stage(data)
    assert contents(Path(staged_root(data))) == contents(images)


@pytest.mark.parametrize("inside", [".", "local"])
def test_staging_into_the_data_itself(images: Path, inside: str) -> None:
    before = contents(images)
    with pytest.raises(UserError, match=r"data\.stage_to: .* is inside data\.root"):
        stage(staged(images, images / inside))
    assert contents(images) == before
    assert not (images / "local").exists()


def test_other_data_has_another_place(images: Path, tmp_path: Path) -> None:
    other = tmp_path / images.name
    places = {staged_root(staged(root, tmp_path)) for root in (images, other)}
    assert len(places) == 2
    assert staged_root(config.build({}).data) == "data"


def test_jobs_that_stage_at_once_share_one_copy(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = staged(images, tmp_path / "local")
    copied = []
    monkeypatch.setattr(
        "shutil.copyfile", lambda a, b: (copied.append(a), b.write_bytes(a.read_bytes()))
    )
    jobs = [threading.Thread(target=stage, args=(data,)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(copied) == len(set(copied)) == len(contents(images))
    assert contents(Path(staged_root(data))) == contents(images)


def test_what_a_killed_job_left_is_removed(images: Path, tmp_path: Path) -> None:
    data = staged(images, tmp_path)
    leftover = Path(f"{staged_root(data)}.partial", "train", "old.png")
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    stage(data)
    assert contents(Path(staged_root(data))) == contents(images)
    assert not leftover.parent.parent.exists()


def test_full_disk_leaves_nothing_behind(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copyfile", full)
    data = staged(images, tmp_path / "local")
    with pytest.raises(UserError, match=r"^data\.stage_to: cannot copy .* \(No space left") as e:
        stage(data)
    assert "\n" not in str(e.value)
    assert [path.suffix for path in (tmp_path / "local").iterdir()] == [".lock"]


def test_an_image_that_cannot_be_read_is_named(images: Path, tmp_path: Path) -> None:
    path = images / "train" / "link.png"
    path.symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"^data\.root: cannot read .*link\.png \(No such file"):
        stage(staged(images, tmp_path / "local"))


def test_missing_origin(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.root: .*gone not found"):
        stage(staged(tmp_path / "gone", tmp_path))


def test_cutmix_has_a_parameter_of_its_own() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw(generator, mixup=0.01, cutmix=1000, size=(64, 64)) for _ in range(100)]
    # Boxes of half the area, cut off at the border; and next to no mixture of two images.
    assert all(0.45 < mix.share < 0.9 for mix in drawn if mix.box)
    assert sum(0.1 < mix.share < 0.9 for mix in drawn if not mix.box) < 10
