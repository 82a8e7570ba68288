"""Looks at image files before training starts, so that a damaged one does not end it later."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Literal

from app.errors import UserError
from app.tasks.image_files import describe_problem
from app.tasks.image_listing import File

THREADS = 16
"""On a parallel file system small files wait for latency, not for bandwidth."""
DECODED = 10_000
"""Images of validation and test that a process decodes at most, where headers are asked for."""


def check_images(
    parts: Mapping[str, Sequence[File]],
    mode: Literal["headers", "pixels", "none"],
    *,
    process_index: int,
    process_count: int,
) -> None:
    """Open this process's share of all images of a data set.

    Args:
        parts: files of train, validation and test.
        mode: headers: all are opened, and as many as :data:`DECODED` of validation and test decoded
            too; pixels: all are decoded; none: nothing is done.
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
        problems = [problem for problem in _probe(pool, mine) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def _probe(pool: ThreadPoolExecutor, images: Sequence[tuple[str, bool]]) -> Iterator[str | None]:
    """Return what is wrong with each image."""
    paths, decode = zip(*images, strict=True) if images else ((), repeat(False))
    return pool.map(describe_problem, paths, decode)
