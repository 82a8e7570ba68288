"""Looks at image files before training starts, so that a damaged one does not end it later."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

from app.data.image_files import describe_problem
from app.data.image_listing import File
from app.data.pixel_depth import grey_values, is_deep_colour, is_deep_grey, to_rgb
from app.errors import UserError

logger = logging.getLogger(__name__)

THREADS = 16
"""On a parallel file system small files wait for latency, not for bandwidth."""
DECODED = 10_000
"""Images of validation and test that a process decodes at most, where headers are asked for."""

LOOKED_AT = 64
"""Images of each part whose values are looked at."""
DARK = 1 / 8
"""Share of the range that images of 16 bits use at least, if they are read as what they are."""


def check_images(
    parts: Mapping[str, Sequence[File]],
    mode: Literal["headers", "pixels", "none"],
    *,
    image_bits: int | None,
    process_index: int,
    process_count: int,
) -> None:
    """Open this process's share of all images of a data set.

    Args:
        parts: files of train, validation and test.
        mode: headers: all are opened, and as many as :data:`DECODED` of validation and test decoded
            too; pixels: all are decoded; none: nothing is done.
        image_bits: data.image_bits.
        process_index: of this process.
        process_count: processes that share the work.

    Raises:
        UserError: an image cannot be read; the first one is named, and the others are counted.
    """
    if mode == "none":
        return
    mine: list[tuple[str, bool]] = []
    decoded = 0
    for name, files in sorted(parts.items(), key=lambda part: part[0] == "train"):
        for path, _ in files[process_index::process_count]:
            decode = mode == "pixels" or (name != "train" and decoded < DECODED)
            decoded += decode
            mine.append((path, decode))
    with ThreadPoolExecutor(THREADS) as pool:
        probe = partial(_probe, image_bits=image_bits)
        problems = [problem for problem in pool.map(probe, mine) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def warn_of_dark_parts(parts: Mapping[str, Sequence[File]], image_bits: int | None) -> None:
    """Decode some images of each part, and warn where their values cannot be what they should.

    Args:
        parts: files of train, validation and test.
        image_bits: data.image_bits.
    """
    for name, files in parts.items():
        step = -(-len(files) // LOOKED_AT)
        seen = [look for path, _ in files[::step] if (look := _look(path, image_bits))]
        if len({value for look in seen for value in (look.smallest, look.largest)}) == 1:
            logger.warning(
                "data.root: all pixels of the %d images of %s that were looked at are equal",
                len(seen),
                name,
            )
        deep = [look.used for look in seen if look.used is not None]
        if deep and max(deep) <= DARK:
            bits = max(look.bits for look in seen)
            cure = f"set data.image_bits={bits}" if bits else "convert them to 8 bits"
            logger.warning(
                "data.root: images of 16 bits in %s use at most %.2g %% of their range, and are "
                "almost black: %s",
                name,
                100 * max(deep),
                cure,
            )


class _Look(NamedTuple):
    """What some image holds."""

    smallest: int
    largest: int
    """Of all channels."""
    used: float | None
    """Largest value over the largest possible; None of an image of 8 bits."""
    bits: int
    """That the largest grey value needs; 0 of colours."""


def _look(path: str, image_bits: int | None) -> _Look | None:
    """Decode an image; None where that is impossible, which others find."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            is_colour, needed = is_deep_colour(image), 0
            if is_deep_grey(image):
                values, bits = grey_values(image, image_bits)
                smallest, largest = int(values.min()), int(values.max())
                used, needed = largest / (2**bits - 1), largest.bit_length()
            else:
                extrema = to_rgb(image, image_bits).getextrema()
                smallest = min(low for low, _ in extrema)
                largest = max(high for _, high in extrema)
                used = largest / 255 if is_colour else None
    except Exception:  # decoders fail in many ways
        return None
    return _Look(smallest, largest, used, needed)


def _probe(image: tuple[str, bool], image_bits: int | None) -> str | None:
    """Return what is wrong with an image."""
    path, decode = image
    return describe_problem(path, decode, image_bits)
