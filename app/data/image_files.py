"""Reading of image files in loader processes: decoded, cropped, augmented, one at a time.

Pixels stay bytes on their way to the device, where they are normalized: a quarter of the memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from app.compatibility import let_timm_posterize
from app.config.settings import DataSection
from app.data import sharding
from app.data.image_listing import File
from app.data.pixel_depth import PixelError, check_mode, to_rgb
from app.data.randomness import seeded
from app.data.sharding import Stream
from app.errors import UserError, one_line
from oialr.compatibility import import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue in [0, 1], as torchvision and timm use them."""

CROP_RATIO = 0.875
"""Share of the shorter side that the central crop keeps in evaluation."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


class Transform(Protocol):
    """What is made of an image, in two steps that fail for different reasons."""

    def decode(self, image: Any, random: np.random.Generator) -> Any:
        """Turn an opened PIL image, not decoded yet, into an RGB image of the final size."""

    def finish(self, pixels: Any, random: np.random.Generator) -> Tensor:
        """Turn that into (3, size, size): bytes, or normalized float32."""


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
            return UserError(_describe(path, error))
        return self._transform.finish(pixels, random), label


def describe_problem(path: str, decode: bool, image_bits: int | None) -> str | None:
    """Open an image and return what is wrong with it, or None.

    Args:
        path: of the file.
        decode: decode all of it, at the lowest resolution that its format allows for; False: read
            the header alone, which does not find a truncated file.
        image_bits: data.image_bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            check_mode(image, image_bits)
            if decode:
                image.draft("RGB", (1, 1))
                image.load()
    except Exception as error:  # decoders fail in many ways
        return _describe(path, error)
    return None


def _describe(path: str, error: Exception) -> str:
    reason = one_line(error)
    if isinstance(error, PixelError):
        return f"data.root: {path} {reason}"
    return f"data.root: {path} is not a readable image ({reason}); remove it"


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


class Normalization:
    """From bytes (..., 3, height, width) to float32 of ImageNet's mean 0 and deviation 1."""

    def __init__(self, device: torch.device) -> None:
        """Put the constants on the device of the images, once."""
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] * 255 for values in (MEAN, STD)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize images."""
        return (images - self._mean) / self._std


def resized_side(size: int) -> int:
    """Return what the shorter side is resized to, of which a crop of ``size`` pixels is left."""
    return math.ceil(size / CROP_RATIO)


class EvaluationTransform:
    """The central crop of the resized image, as bytes."""

    def __init__(self, size: int, image_bits: int | None = None) -> None:
        """Prepare for crops of ``size`` pixels square; see :func:`to_rgb` for ``image_bits``."""
        import_torchvision()
        from torchvision import transforms as t

        self._image_bits = image_bits
        self._crop = t.Compose([t.Resize(resized_side(size)), t.CenterCrop(size)])

    def decode(self, image: Any, random: np.random.Generator) -> Any:
        """See :class:`Transform`."""
        return self._crop(to_rgb(image, self._image_bits))

    def finish(self, pixels: Any, random: np.random.Generator) -> Tensor:
        """See :class:`Transform`."""
        return _to_bytes(pixels)


class TrainingTransform:
    """Random crop, flip, RandAugment, random erasing.

    Szegedy et al., arXiv 1409.4842, section 6 (crop); Cubuk et al., arXiv 1909.13719 (RandAugment);
    Zhong et al., arXiv 1708.04896 (erasing); the last two are timm's.
    """

    def __init__(self, data: DataSection) -> None:
        """Prepare what the configuration asks for.

        Raises:
            UserError: ``data.random_augment`` is not in timm's notation.
        """
        self._size = data.image_size
        self._image_bits = data.image_bits
        self._augment = _random_augment(data)
        self._erase: Callable[[Tensor], Tensor] | None = None
        if data.random_erasing > 0:
            import_torchvision()
            from timm.data.random_erasing import RandomErasing

            self._erase = RandomErasing(data.random_erasing, mode="pixel", device="cpu")
        self._normalize = Normalization(torch.device("cpu"))

    def decode(self, image: Any, random: np.random.Generator) -> Any:
        """See :class:`Transform`."""
        width, height = image.size
        box = random_box(width, height, random)
        return read_region(image, box, self._size, self._image_bits)

    def finish(self, pixels: Any, random: np.random.Generator) -> Tensor:
        """See :class:`Transform`."""
        if random.random() < 0.5:
            from PIL import ImageOps

            pixels = ImageOps.mirror(pixels)
        if not (self._augment or self._erase):
            return _to_bytes(pixels)
        with seeded(int(random.integers(2**63))):  # timm draws from global generators
            augmented = _to_bytes(self._augment(pixels) if self._augment else pixels)
            # What is erased becomes noise around the mean, which needs the normalized image.
            return self._erase(self._normalize(augmented)) if self._erase else augmented


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


def read_region(image: Any, box: Box, size: int, image_bits: int | None = None) -> Any:
    """Decode a region of an image and resize it to ``size`` pixels square, RGB.

    A JPEG is decoded at half, a quarter or an eighth of its resolution where that is enough: its
    format allows for that at a fraction of the time.

    Args:
        image: opened by PIL, not decoded yet.
        box: the region.
        size: width and height of the result.
        image_bits: see :func:`app.data.pixel_depth.to_rgb`.
    """
    from PIL.Image import Resampling

    width, height = image.size
    scale = size / min(box[2] - box[0], box[3] - box[1])
    image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    x, y = image.size[0] / width, image.size[1] / height
    scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return to_rgb(image, image_bits).resize((size, size), Resampling.BILINEAR, scaled)


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


def _to_bytes(pixels: Any) -> Tensor:
    """Turn an RGB image of PIL into (3, height, width) uint8."""
    return torch.from_numpy(np.array(pixels).transpose(2, 0, 1).copy())
