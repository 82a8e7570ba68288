"""Image classification from folders: parts, transforms, random numbers, and what can go wrong."""

import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.digit_tasks import assert_equal
from support.image_folders import CLASSES, SIZE, folder_task, together, write_images
from support.launching import train
from support.tiny_run import PAPER

from app.data import Task
from app.data.image_files import MEAN, STD
from app.data.image_listing import LeftOut, list_folder
from app.data.pixel_depth import grey_values
from app.errors import UserError

PER_CLASS = 7


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that tests only read."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", PER_CLASS)
    write_images(root / "val", 3, first=10)
    return root


@pytest.fixture
def own_images(images: Path, tmp_path: Path) -> Path:
    """A data set that a test may change."""
    return Path(shutil.copytree(images, tmp_path / "images"))


def colours(task: Task, split: str) -> list[tuple[int, int]]:
    """Label and number of every image of a part, told from its colour."""
    seen = []
    for batch in task.evaluation_batches(split):
        bytes_ = (batch.inputs * torch.tensor(STD)[:, None, None]).mean(dim=(2, 3))
        bytes_ = 255 * (bytes_ + torch.tensor(MEAN)) - 19.5
        for (red, green, _), label in zip(bytes_.tolist(), batch.targets.tolist(), strict=True):
            assert round(red / 60) == label
            seen.append((label, round(green / 10)))
    return seen


def all_images(numbers: range) -> list[tuple[int, int]]:
    return [(label, number) for label in range(3) for number in numbers]


def test_sizes(images: Path) -> None:
    task = folder_task(images)
    assert (task.train_size, task.steps_per_epoch) == (15, 2)  # 6 of 21 are for validation
    assert (task.input_shape, task.outputs) == ((3, SIZE, SIZE), 3)
    batch = next(task.train_batches(0))
    assert batch.inputs.shape == (8, 3, SIZE, SIZE)
    assert (batch.inputs.dtype, batch.targets.dtype) == (torch.float32, torch.int64)
    assert (batch.count, batch.global_count) == (8, 8)


def test_without_test_folder_val_is_the_test_part(images: Path) -> None:
    task = folder_task(images)
    assert colours(task, "test") == all_images(range(10, 13))
    validation = colours(task, "validation")
    assert len(set(validation)) == 6
    assert set(validation) < set(all_images(range(PER_CLASS)))
    assert [sum(label == c for label, _ in validation) for c in range(3)] == [2, 2, 2]
    train = {Path(path).relative_to(images) for path, _ in task._parts["train"]}
    held_out = {Path("train", CLASSES[label], f"{n}.png") for label, n in validation}
    assert not train & held_out
    assert len(train | held_out) == 21


def test_with_test_folder_all_of_train_is_trained_on(own_images: Path) -> None:
    write_images(own_images / "test", 2, first=14)
    task = folder_task(own_images)
    assert task.train_size == 21
    assert colours(task, "validation") == all_images(range(10, 13))
    assert colours(task, "test") == all_images(range(14, 16))
    few = folder_task(own_images, train_samples=9)
    assert few.train_size == 9
    assert {label for _, label in few._parts["train"]} == {0, 1, 2}


@pytest.mark.parametrize("count", [2, 5])
def test_processes_share_the_images_of_one(images: Path, count: int) -> None:
    alone = together([folder_task(images)])
    assert [len(targets) for _, targets in alone] == [8, 7]
    tasks = [folder_task(images, index, count) for index in range(count)]
    assert_equal(together(tasks), alone)
    seen = [image for task in tasks for image in colours(task, "test")]
    assert seen == all_images(range(10, 13))


def test_empty_share_is_one_padding_sample(images: Path) -> None:
    task = folder_task(images, 3, 4, batch_size=3, train_samples=4)
    counts = [(batch.count, len(batch.inputs)) for batch in task.train_batches(0)]
    assert counts == [(0, 1), (0, 1)]


def test_resume_in_the_middle_of_an_epoch(images: Path) -> None:
    task = folder_task(images, batch_size=4)
    assert_equal(together([task], 3, first_batch=2), together([task], 3)[2:])


def test_loader_processes_change_nothing(images: Path) -> None:
    """Neither the images, nor the random state of this process."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    inline, workers = folder_task(images), folder_task(images, workers=2)
    assert_equal(together([inline]), together([workers]))
    assert colours(workers, "test") == colours(inline, "test")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=str
)
def test_loader_processes_outlive_a_request_to_stop(images: Path, number: int) -> None:
    task = folder_task(images, workers=1, batch_size=1)
    batches = task.train_batches(0)
    next(batches)
    (loader,) = multiprocessing.active_children()
    subprocess.run(["sh", "-c", f"kill -{number:d} {loader.pid}"], check=True)  # somebody else
    assert len(list(batches)) == 14


def test_loader_processes_end_when_their_parent_asks_them_to(images: Path) -> None:
    """Otherwise Python waits for them at its end, after an error for example."""
    batches = folder_task(images, workers=1, batch_size=1).train_batches(0)
    next(batches)
    (loader,) = multiprocessing.active_children()
    loader.terminate()
    loader.join(60)
    assert loader.exitcode == 0


def test_augmentation_differs_between_epochs(images: Path) -> None:
    task = folder_task(images, train_samples=1)
    crops = [next(task.train_batches(epoch)).inputs for epoch in range(4)]
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 4
    assert torch.equal(next(task.train_batches(1)).inputs, crops[1])


def test_augmentation_differs_between_samples(own_images: Path) -> None:
    for name in CLASSES:
        for number in range(PER_CLASS):
            copy = own_images / "train" / name / f"{number}.png"
            copy.write_bytes((own_images / "val" / "ant" / "0.png").read_bytes())
    inputs = torch.cat([inputs for inputs, _ in together([folder_task(own_images)])])
    assert len(inputs.flatten(1).unique(dim=0)) == 15


def test_evaluation_takes_the_central_crop(own_images: Path) -> None:
    pixels = np.zeros((36, 54, 3), dtype=np.uint8)
    pixels[2:34, 11:43] = 255  # scaled to 18 by 27 pixels, the crop of 16 by 16 is all white
    Image.fromarray(pixels).save(own_images / "val" / "ant" / "0.png")
    image = next(folder_task(own_images).evaluation_batches("test")).inputs[0, :, 1:-1, 1:-1]
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image, white[:, None, None].expand_as(image))


def test_grey_values_of_16_bits_in_a_pgm(own_images: Path) -> None:
    """PIL opens them with the mode I, and not I;16 as those of a .png."""
    content = b"P5\n30 30\n65535\n" + np.full((30, 30), 128 * 257, dtype=">u2").tobytes()
    for path in own_images.glob("*/*/*.png"):
        path.unlink()
        path.with_suffix(".pgm").write_bytes(content)
    task = folder_task(own_images)
    expected = (128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    for batches in (task.train_batches(0), task.evaluation_batches("test")):
        inputs = torch.cat([batch.inputs for batch in batches])
        assert (inputs - expected[:, None, None]).abs().max() < 0.02


def png(pixels: np.ndarray, *, significant_bits: int | None = None) -> bytes:
    """Return a PNG of 16 bits, of grey values (height, width) or colours (height, width, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    colours = pixels.shape[2] if pixels.ndim == 3 else 1
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colours - 1, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = [chunk(b"IHDR", header)]
    if significant_bits:
        content.append(chunk(b"sBIT", bytes([significant_bits] * colours)))
    content += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


def replace_all(root: Path, content: bytes, suffix: str) -> None:
    for path in root.glob("*/*/*.png"):
        path.unlink()
        path.with_suffix(suffix).write_bytes(content)


def mean_grey(task: Task) -> float:
    """Return the mean over training and test of images of one grey, in [0, 1]."""
    batches = [*task.train_batches(0), *task.evaluation_batches("test")]
    inputs = torch.cat([batch.inputs for batch in batches])
    grey = inputs * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert grey.std() < 0.01
    return float(grey.mean())


def flat(value: int, *shape: int) -> np.ndarray:
    return np.full(shape or (30, 30), value, dtype=np.uint16)


def tiff_of_12_bits(value: int) -> bytes:
    """Two values in three bytes."""
    tags = [(256, 30), (257, 30), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 12 * 9 + 4),
            (277, 1), (278, 30), (279, 45 * 30)]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags)
    packed = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + packed * 450


@pytest.mark.parametrize(
    ("content", "suffix", "data"),
    [
        (png(flat(128 << 4)), ".png", {"image_bits": 12}),
        (png(flat(128)), ".png", {"image_bits": 8}),
        (png(flat(2)), ".png", {"image_bits": 2}),
        (png(flat(128 << 4), significant_bits=12), ".png", {}),
        (png(flat(128 << 8), significant_bits=12), ".png", {}),  # scaled up, as the standard asks
        (png(flat(0x0800 << 4 | 8), significant_bits=12), ".png", {}),  # with its upper bits below
        (png(flat(0x8080), significant_bits=16), ".png", {}),
        (tiff_of_12_bits(128 << 4), ".tif", {}),
        (b"P5\n30 30\n4095\n" + flat(128 << 4).astype(">u2").tobytes(), ".pgm", {}),
        (b"P5\n30 30\n4095\n" + flat(2048).astype(">u2").tobytes(), ".pgm", {"image_bits": 12}),
    ],
    ids=range(10),
)  # fmt: skip
def test_grey_values_are_scaled_by_the_bits_that_they_use(
    own_images: Path, content: bytes, suffix: str, data: dict[str, Any]
) -> None:
    replace_all(own_images, content, suffix)
    expected = 2 / 3 if data.get("image_bits") == 2 else 0.5
    assert mean_grey(folder_task(own_images, **data)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (png(np.arange(900).reshape(30, 30) % 250), "set data.image_bits=8"),
        (png(np.arange(900).reshape(30, 30) * 4), "set data.image_bits=12"),
        (png(np.arange(2700).reshape(30, 30, 3)), "convert them to 8 bits"),
    ],
    ids=["8", "12", "colours"],
)
def test_images_of_16_bits_that_are_almost_black_are_told(
    own_images: Path, content: bytes, cure: str, caplog: pytest.LogCaptureFixture
) -> None:
    replace_all(own_images, content, ".png")
    folder_task(own_images, 1, 2)
    assert not caplog.messages  # one process tells
    folder_task(own_images, 0, 2)
    for name, message in zip(("train", "test", "validation"), caplog.messages, strict=True):
        assert message.startswith(f"data.root: images of 16 bits in {name} use at most ")
        assert message.endswith(f"almost black: {cure}")


def test_a_dark_image_that_was_scaled_up_stays_dark(own_images: Path) -> None:
    """As the standard asks of a writer: 12 bits shifted to the left, none of them above 4096."""
    values = (np.arange(900).reshape(30, 30) % 250) << 4
    with Image.open(io.BytesIO(png(values, significant_bits=12))) as image:
        assert grey_values(image, None)[1] == 16
    with Image.open(io.BytesIO(png(values + 5, significant_bits=12))) as image:
        assert grey_values(image, None)[1] == 12


def test_a_part_of_equal_pixels_is_told(own_images: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in own_images.glob("val/*/*.png"):
        Image.new("RGB", (9, 9), (7, 7, 7)).save(path)
    folder_task(own_images)
    assert caplog.messages == [
        "data.root: all pixels of the 9 images of test that were looked at are equal"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((30, 30), 0.5, np.float32), r"holds floats \(mode F\), whose range is unknown"),
        (np.full((30, 30), 9, np.int32), r"holds integers of 32 bits \(mode I\), whose range"),
    ],
)
@pytest.mark.parametrize("check", ["headers", "none"])
def test_values_of_unknown_range_are_refused(
    own_images: Path, values: np.ndarray, message: str, check: str
) -> None:
    path = own_images / "val" / "ant" / "0.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(UserError, match=rf"^data\.root: \S+0\.tif {message}") as caught:
        list(folder_task(own_images, check_images=check).evaluation_batches("test"))
    assert "\n" not in str(caught.value)


def test_bits_of_grey_values_are_not_for_colours(own_images: Path) -> None:
    (own_images / "train" / "ant" / "0.png").write_bytes(png(flat(900, 30, 30, 3)))
    with pytest.raises(UserError, match=r"0\.png holds colours of 16 bits, and data\.image_bits"):
        folder_task(own_images, image_bits=12)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_all_kinds_are_read_as_rgb(own_images: Path, mode: str) -> None:
    """A square of mid grey, of the whole size of the image, in training and evaluation."""
    grey = Image.new("L", (30, 30), 128)
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 30), 128 * 257, dtype=np.uint16))
    else:
        image = grey.convert(mode)
    assert image.mode == mode
    for path in own_images.glob("*/*/*.png"):
        path.unlink()
        image.save(path.with_suffix(".jpg" if mode == "CMYK" else ".png"))
    task = folder_task(own_images)
    expected = (128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    for batches in (task.train_batches(0), task.evaluation_batches("test")):
        inputs = torch.cat([batch.inputs for batch in batches])
        assert (inputs - expected[:, None, None]).abs().max() < 0.02


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no image", b"", None])
def test_damaged_image_is_named(own_images: Path, content: bytes | None, workers: int) -> None:
    path = own_images / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:-900] if content is None else content)
    task = folder_task(own_images, workers=workers, check_images="none")
    with pytest.raises(UserError) as caught:
        list(task.evaluation_batches("test"))
    assert str(caught.value).startswith(f"data.root: {path} is not a readable image (")
    assert "\n" not in str(caught.value)


def test_damaged_images_are_found_before_the_first_step(own_images: Path) -> None:
    """Truncated ones in evaluation, those without a header everywhere; shared by processes."""
    truncated, *_ = damaged = [
        own_images / "val" / "bee" / "1.png",
        own_images / "train" / "ant" / "0.png",
        own_images / "train" / "ant" / "1.png",
        own_images / "train" / "ant" / "2.png",
    ]
    truncated.write_bytes(truncated.read_bytes()[:-900])
    for path in damaged[1:]:
        path.write_bytes(b"no image")
    messages = []
    for number in range(2):
        try:
            folder_task(own_images, number, 2)
        except UserError as error:
            messages.append(str(error))
    for message in messages:
        assert re.match(r"data\.root: \S+ is not a readable image \(.*\); remove it", message)
        assert "\n" not in message
    counts = [int(m.partition("(and ")[2].partition(" ")[0] or 0) + 1 for m in messages]
    assert sum(counts) == 4
    assert any(str(truncated) in message for message in messages)
    folder_task(own_images, check_images="none")


def test_an_image_that_would_fill_the_memory_is_refused_by_its_header(own_images: Path) -> None:
    """60,000 by 60,000 pixels in a few bytes."""
    content = png(flat(0, 2, 2))
    size = struct.pack(">II", 60_000, 60_000)
    header = content[12:16] + size + content[24:29]
    crc = struct.pack(">I", zlib.crc32(header))
    path = own_images / "train" / "ant" / "0.png"
    path.write_bytes(content[:12] + header + crc + content[33:])
    with pytest.raises(UserError, match=r"ant/0\.png is not a readable image \(Image size"):
        folder_task(own_images)


def test_a_truncated_training_image_is_found_where_pixels_are_asked_for(own_images: Path) -> None:
    path = own_images / "train" / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:-900])
    write_images(own_images / "test", 1)
    folder_task(own_images)
    with pytest.raises(UserError, match=r"ant/0\.png is not a readable image"):
        folder_task(own_images, check_images="pixels")


def add_what_lies_beside_images(root: Path) -> None:
    image = (root / "val" / "ant" / "0.png").read_bytes()
    for name in (".ipynb_checkpoints/a.png", "@eaDir/a.png", "ant/.ipynb_checkpoints/a.png",
                 "ant/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "ant/._0.png", "ant/.DS_Store",
                 "bee/Thumbs.db", "bee/moving.gif", "bee/MOVING.GIF", "notes.txt"):  # fmt: skip
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


def test_what_lies_beside_images_is_left_out_and_told(
    own_images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = folder_task(own_images)
    assert not caplog.messages
    add_what_lies_beside_images(own_images)
    task = folder_task(own_images)
    assert (task._parts, task.outputs) == (plain._parts, 3)
    (line,) = caplog.messages
    assert line.startswith(f"data.root: left out in {own_images}: 6 hidden or of the system (")
    assert line.endswith("(.gif: 2, .db: 1, .txt: 1)")
    assert "\n" not in line


def test_links_lead_nowhere_twice(
    own_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = folder_task(own_images)
    train = own_images / "train"
    (train / "ant" / "up").symlink_to(train)
    (train / "ant" / "root").symlink_to(own_images)
    (train / "bee" / "self").symlink_to(".")
    (train / "bee" / "other").symlink_to("../ant")
    (train / "cow").symlink_to("cat")
    assert folder_task(own_images)._parts == plain._parts
    (line,) = caplog.messages
    assert ": 5 links to folders that are entered elsewhere or hold the link (" in line
    # A folder that lies elsewhere is entered, and once; so is a class, or a whole part.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(train / "cat", elsewhere / "more")
    (elsewhere / "more" / "loop").symlink_to(elsewhere)
    (train / "cat" / "a").symlink_to(elsewhere / "more")
    (train / "cat" / "b").symlink_to(elsewhere)
    (own_images / "val").rename(tmp_path / "val")
    (own_images / "val").symlink_to(tmp_path / "val")
    task = folder_task(own_images, validation_fraction=0.1)
    assert len(task._parts["train"]) + len(task._parts["validation"]) == 21 + PER_CLASS
    assert len(task._parts["test"]) == 9


def test_the_order_is_that_of_torchvision(own_images: Path) -> None:
    """So that the splits of runs of earlier versions, and of other programs, are the same."""
    from torchvision.datasets import ImageFolder

    inner = own_images / "train" / "ant" / "1"
    inner.mkdir()
    shutil.copy(own_images / "train" / "ant" / "0.png", inner / "B.PNG")
    shutil.copy(own_images / "train" / "ant" / "0.png", own_images / "train" / "ant" / "1-a.jpg")
    files, classes = list_folder(own_images / "train", LeftOut())
    listing = ImageFolder(own_images / "train")
    assert files == listing.samples
    assert classes == listing.classes


def test_a_folder_that_cannot_be_read_is_named(own_images: Path, monkeypatch: Any) -> None:
    real = os.scandir

    def scandir(path: Path) -> Any:
        if path.name == "bee":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read .*train/bee \(Permission denied\)"):
        folder_task(own_images)


def test_a_class_of_other_files_says_so(own_images: Path) -> None:
    for number in range(PER_CLASS):
        path = own_images / "train" / "cat" / f"{number}.png"
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(UserError, match=r"train/cat: no image of .*not read \(\.gif: 7\)"):
        folder_task(own_images)


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_part(own_images: Path, part: str) -> None:
    shutil.rmtree(own_images / part)
    with pytest.raises(UserError, match=r"not found; image_folder needs train/CLASS/FILE") as c:
        folder_task(own_images)
    assert str(own_images / part) in str(c.value)


def test_class_without_images_and_part_without_classes(own_images: Path) -> None:
    for name in os.listdir(own_images / "train" / "cat"):
        (own_images / "train" / "cat" / name).unlink()
    with pytest.raises(UserError, match=r"^data\.root: nothing to learn from in .*train.*cat"):
        folder_task(own_images)
    shutil.rmtree(own_images / "train")
    (own_images / "train").mkdir()
    for name in ("a.png", "b.JPG", "c.txt"):
        (own_images / "train" / name).touch()
    own = r"no class folder, but 2 images outside of the folders .*; 1 files .* \(\.txt: 1\)$"
    with pytest.raises(UserError, match=rf"^data\.root: nothing to learn from in .*train: .*{own}"):
        folder_task(own_images)


def test_parts_must_have_the_same_classes(own_images: Path) -> None:
    (own_images / "val" / "cat").rename(own_images / "val" / "cow")
    with pytest.raises(UserError, match=r"the same classes; only one of them has cat, cow$"):
        folder_task(own_images)


def test_too_few_images(own_images: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.train_samples: 16 exceeds the 15 training"):
        folder_task(own_images, train_samples=16)
    for name in CLASSES[1:]:
        shutil.rmtree(own_images / "train" / name)
        shutil.rmtree(own_images / "val" / name)
    for number in range(1, PER_CLASS):
        (own_images / "train" / "ant" / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"^data\.root: image_folder in .* has 1 training images"):
        folder_task(own_images)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "accumulation"), [("train", 1), ("train", 2), ("val", 1)])
def test_a_damaged_image_that_one_process_meets_ends_all_of_them_alike(
    own_images: Path, tmp_path: Path, part: str, accumulation: int
) -> None:
    """The one good line, one code, no traceback of those that wait; the last checkpoint stays."""
    path = own_images / part / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:-900])
    write_images(own_images / "test", 2)
    result = train(
        2,
        f"run.dir={tmp_path / 'run'}",
        f"data.root={own_images}",
        "data.name=image_folder",
        "data.check_images=none",
        f"data.image_size={SIZE}",
        "data.augmentation=none",
        "data.workers=0",
        "training.batch_size=4",
        f"training.accumulation={accumulation}",
        "training.epochs=3",
        "training.warmup_epochs=0",
        "model.arguments={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
        *PAPER,
        "oialr.delay=3",
        "oialr.update_interval=2",
        code=2,
    )
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: data.root: {path} is not a readable image (")
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
