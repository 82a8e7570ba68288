"""Which files are checkpoints, and in which order they were written."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from app.errors import UserError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")

COMPANIONS = (
    "process-*.pt",
    "stability-*",
    "partial-*",
    "damaged-*",
    "best",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "training_args*",
)
"""Names of files and folders that lie beside checkpoints and hold no weights, or some once more."""


def find_checkpoints(paths: Sequence[Path]) -> list[Path]:
    """List the checkpoints in files and folders, in natural order: 2 before 10.

    Folders are searched with all that is below them; files that are named count whatever their
    suffix.

    Raises:
        UserError: a path does not exist, or there is no checkpoint in a folder.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = [file for file in path.rglob("*") if _is_checkpoint(file.relative_to(path))]
            below = [file for file in below if file.is_file()]
            if not below:
                raise UserError(f"{path}: no checkpoint there (no file {', '.join(SUFFIXES)})")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return sorted(dict.fromkeys(found), key=natural_order)


def natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names by their value."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def number_in(path: Path) -> int | None:
    """Return the last number in a file's name, or else in its folder's; None if there is none."""
    for name in (path.stem, path.parent.name):
        if numbers := re.findall(r"\d+", name):
            return int(numbers[-1])
    return None


def _is_checkpoint(path: Path) -> bool:
    if path.suffix not in SUFFIXES:
        return False
    return not any(fnmatchcase(part, pattern) for part in path.parts for pattern in COMPANIONS)
