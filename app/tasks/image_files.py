"""Reading of image files in loader processes: decoded, cropped, augmented, one at a time.

Pixels stay bytes on their way to the device, where they are normalized: a quarter of the memory.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from app.compatibility import import_torchvision, let_timm_posterize
from app.errors import UserError
from app.settings import DataSection
from app.tasks import sharding
from app.tasks.randomness import seeded
from app.tasks.sharding import Stream

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue in [0, 1], as torchvision and timm use them."""

CROP_RATIO = 0.875
"""Share of the shorter side that the central crop keeps in evaluation."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""
File = tuple[str, int]
"""Path of an image and its class."""


@dataclass(frozen=True)
class Transform:
    """What is made of an image, in two steps that fail for different reasons."""

    decode: Callable[[Any, np.random.Generator], Any]
    """From an opened PIL image, not decoded yet, to an RGB image of the final size."""
    finish: Callable[[Any, np.random.Generator], Tensor]
    """From that to (3, size, size): bytes, or normalized float32."""


class ImageFiles(Dataset[tuple[Tensor, int] | UserError]):
    """Reads and transforms one image at a time; its only state is its arguments."""

    def __init__(
        self, files: Sequence[File], transform: Transform, key: tuple[int, int] = (0, 0)
    ) -> None:
        """Take what is to be read.

        Args:
            files: paths and classes.
            transform: what is made of them.
            key: (seed, epoch) of the random numbers.
        """
        self._files = files
        self._transform = transform
        self._key = key

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        """Return image and class, or what is wrong with the file.

        An exception would reach the main process as a traceback of several lines, hence the value.
        """
        from PIL import Image

        path, label = self._files[index]
        random = sharding.generator(Stream.SAMPLE, *self._key, int(index))
        try:
            with Image.open(path) as image:
                pixels = self._transform.decode(image, random)
        except Exception as error:  # decoders fail in many ways
            reason = " ".join(str(error).split())
            return UserError(f"data.root: {path} is not a readable image ({reason}); remove it")
        return self._transform.finish(pixels, random), label


def collate(
    samples: Sequence[tuple[Tensor, int] | UserError],
) -> tuple[Tensor, Tensor] | UserError:
    """Stack images (b, 3, size, size) and classes (b,) int64, or return the first error."""
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.tensor(labels)


def normalization(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from bytes (..., 3, height, width) on a device to normalized float32."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (MEAN, STD))
    return lambda images: (images - mean) / std


def evaluation_transform(size: int) -> Transform:
    """Return the transform of evaluation: the central crop of the resized image, as bytes."""
    import_torchvision()
    from torchvision import transforms as t

    crop = t.Compose([t.Resize(math.ceil(size / CROP_RATIO)), t.CenterCrop(size)])

    return Transform(
        decode=lambda image, _: crop(image.convert("RGB")),
        finish=lambda pixels, _: t.functional.pil_to_tensor(pixels),
    )


def training_transform(data: DataSection) -> Transform:
    """Return the transform of training: random crop, flip, RandAugment, random erasing.

    Szegedy et al., arXiv 1409.4842, section 6 (crop); Cubuk et al., arXiv 1909.13719 (RandAugment);
    Zhong et al., arXiv 1708.04896 (erasing); the last two are timm's.

    Raises:
        UserError: ``data.random_augment`` is not in timm's notation.
    """
    import_torchvision()
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms as t

    augment = _random_augment(data)
    erase = RandomErasing(data.random_erasing, mode="pixel", device="cpu")

    draws_globally = augment is not None or data.random_erasing > 0
    normalize = normalization(torch.device("cpu"))

    def decode(image: Any, random: np.random.Generator) -> Any:
        width, height = image.size
        return read_region(image, random_box(width, height, random), data.image_size)

    def finish(crop: Any, random: np.random.Generator) -> Tensor:
        if random.random() < 0.5:
            crop = t.functional.hflip(crop)
        seed = int(random.integers(2**63))
        with seeded(seed) if draws_globally else nullcontext():
            pixels: Tensor = t.functional.pil_to_tensor(augment(crop) if augment else crop)
            # What is erased becomes noise around the mean, which needs the normalized image.
            return erase(normalize(pixels)) if data.random_erasing else pixels

    return Transform(decode=decode, finish=finish)


def random_box(width: int, height: int, random: np.random.Generator) -> Box:
    """Choose a region of 8 to 100 % of an image's area, with sides of 3 : 4 to 4 : 3.

    As torchvision's RandomResizedCrop: after ten shapes that do not fit, the largest central one.

    Args:
        width, height: of the image.
        random: where numbers come from.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def read_region(image: Any, box: Box, size: int) -> Any:
    """Decode a region of an image and resize it to ``size`` pixels square, RGB.

    A JPEG is decoded at half, a quarter or an eighth of its resolution where that is enough: its
    format allows for that at a fraction of the time.

    Args:
        image: opened by PIL, not decoded yet.
        box: the region.
        size: width and height of the result.
    """
    from PIL.Image import Resampling

    width, height = image.size
    scale = size / min(box[2] - box[0], box[3] - box[1])
    image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    x, y = image.size[0] / width, image.size[1] / height
    scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return image.convert("RGB").resize((size, size), Resampling.BILINEAR, scaled)


def _random_augment(data: DataSection) -> Callable[[Any], Any] | None:
    if data.random_augment is None:
        return None
    let_timm_posterize()
    from timm.data.auto_augment import rand_augment_transform

    mean = tuple(round(255 * value) for value in MEAN)
    try:
        augment: Callable[[Any], Any] = rand_augment_transform(
            data.random_augment,
            {"translate_const": round(0.45 * data.image_size), "img_mean": mean},
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.random_augment: {data.random_augment!r} is not in timm's notation, such as "
            f"rand-m9-mstd0.5-inc1 ({type(error).__name__}: {error})"
        ) from None
    return augment
