"""Images of more than 8 bits per value, which PIL does not turn into bytes by itself.

Grey values of 16 bits are scaled by the bits that are used: cameras and medical devices put 12 into
files of 16, which are almost black when they are read as 16. Colours of 16 bits come from PIL as
their upper 8 bits.
"""

import io
import struct
from typing import Any

import numpy as np

CONTAINER = 16
"""Bits of the grey values that are more than bytes, in all formats that are read."""

_DIFFERENT = 16
"""Values that an image has at least, if what they have in common is to mean something."""


class PixelError(ValueError):
    """An image whose values cannot be turned into bytes; says why, after the file's name."""


def check_mode(image: Any, image_bits: int | None) -> None:
    """Refuse what could only be guessed at, of an opened PIL image.

    Args:
        image: opened, decoded or not.
        image_bits: as of :func:`to_rgb`.

    Raises:
        PixelError: integers of 32 bits or floats, whose range no header tells; or colours of 16
            bits, of which fewer were asked for.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise PixelError(
            f"holds {kind} (mode {image.mode}), whose range is unknown; convert it to 8 or 16 bits"
        )
    if is_deep_colour(image) and image_bits not in (None, CONTAINER):
        raise PixelError(
            f"holds colours of 16 bits, and data.image_bits={image_bits} is for grey values; "
            f"convert it to 8 bits"
        )


def is_deep_grey(image: Any) -> bool:
    """Whether an opened image has one value of more than 8 bits per pixel."""
    return bool(image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"))


def is_deep_colour(image: Any) -> bool:
    """Whether an opened image, not decoded yet, has colours of 16 bits, cut to 8 by PIL."""
    return not is_deep_grey(image) and ";16" in _raw_mode(image)


def to_rgb(image: Any, image_bits: int | None) -> Any:
    """Return an opened PIL image as RGB of bytes, without transparency.

    Args:
        image: opened, not decoded yet.
        image_bits: bits of the grey values in files of 16; None: what the file says, and otherwise
            all. Larger values become white.

    Raises:
        PixelError: as :func:`check_mode`.
    """
    check_mode(image, image_bits)
    if is_deep_grey(image):
        from PIL import Image

        image = Image.fromarray(_to_bytes(*grey_values(image, image_bits)))
    return image.convert("RGB")


def grey_values(image: Any, image_bits: int | None) -> tuple[np.ndarray, int]:
    """Decode an opened image of :func:`is_deep_grey`.

    Args:
        image, image_bits: as of :func:`to_rgb`.

    Returns:
        (height, width) int64, and the bits that they are to be read as.
    """
    bits = _stored_bits(image) or image_bits
    marked = 0 if bits else _significant_bits(image)
    values = np.asarray(image).astype(np.int64)  # decoded here: the header's layout is gone then
    if marked and not _fills_container(values, marked):
        bits = marked
    return values, bits or CONTAINER


def _to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """Scale integers in [0, 2^bits) to bytes."""
    if bits >= 8:
        return np.minimum(values >> (bits - 8), 255).astype(np.uint8)
    return np.minimum(values * 255 // (2**bits - 1), 255).astype(np.uint8)


def _raw_mode(image: Any) -> str:
    """Return how the values lie in the file, in PIL's notation."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _stored_bits(image: Any) -> int | None:
    """Return the bits that the file's own layout says, beyond doubt; None if it does not."""
    if _raw_mode(image) == "I;12":  # a TIFF of packed values of 12 bits
        return 12
    # PIL has scaled those of a .pgm by the largest value that its header names.
    arguments = image.tile[0][3] if image.tile else ()
    if image.format == "PPM" and isinstance(arguments, tuple) and arguments[1] != 65535:
        return CONTAINER
    return None


def _significant_bits(image: Any) -> int:
    """Return the bits that the chunk sBIT of a PNG names; 0 where there is none."""
    if image.format != "PNG" or image.fp is None:
        return 0
    position = image.fp.tell()
    try:
        image.fp.seek(8)
        while len(head := image.fp.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                bits = image.fp.read(1)
                return bits[0] if bits and 0 < bits[0] <= CONTAINER else 0
            if kind == b"IDAT":
                return 0
            image.fp.seek(length + 4, io.SEEK_CUR)
        return 0
    finally:
        image.fp.seek(position)


def _fills_container(values: np.ndarray, bits: int) -> bool:
    """Whether values were scaled up to the container, as the PNG standard asks of a writer.

    That is, by a shift to the left, with zeros or the upper bits once more below. Many programs
    write the plain values instead. Where an image is so dark that it could be either, it takes some
    different values to tell that none of them has lower bits of its own.
    """
    if (values >= 2**bits).any():
        return True
    mask = 2 ** (CONTAINER - bits) - 1
    low, repeated = values & mask, (values >> bits) & mask
    is_scaled = not low.any() or bool((low == repeated).all())
    return is_scaled and len(np.unique(values)) >= _DIFFERENT
