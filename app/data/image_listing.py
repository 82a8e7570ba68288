"""Which files of a folder are images of which class, and what else lies there.

What file managers, notebooks and storage systems put beside images is left out, and no folder is
entered twice, whatever links lead to it.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import UserError

PARTS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of the files that are images, in any case; those that torchvision's ImageFolder takes."""

_OF_THE_SYSTEM = {
    "@eaDir",
    "@tmp",
    "@Recycle",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
}
"""Folders that storage systems and archivers make, with thumbnails and deleted files."""

File = tuple[str, int]
"""Path of an image and its class."""


@dataclass
class LeftOut:
    """What was found and is no image of the set, to be told in a line."""

    hidden: Counter[str] = field(default_factory=Counter)
    """By name: hidden files and folders, and those of the system."""
    links: list[str] = field(default_factory=list)
    """To folders that are entered elsewhere, or that hold the link itself."""
    loose: int = 0
    """Images outside of the folders of the classes."""
    others: Counter[str] = field(default_factory=Counter)
    """Files by suffix."""

    def __str__(self) -> str:
        """Describe it in one line; empty where there is nothing."""
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden.total()} hidden or of the system ({_most(self.hidden)})")
        if self.links:
            parts.append(
                f"{len(self.links)} links to folders that are entered elsewhere or hold the link "
                f"({self.links[0]})"
            )
        if self.loose:
            parts.append(f"{self.loose} images outside of the folders of the classes")
        if self.others:
            parts.append(
                f"{self.others.total()} files that are no {', '.join(SUFFIXES)} "
                f"({_most(self.others)})"
            )
        return "; ".join(parts)


class Walk:
    """The folders below one part of a data set, each of them once."""

    def __init__(self, part: Path, left_out: LeftOut) -> None:
        """Prepare.

        Args:
            part: where a walk stays: a link into it adds nothing.
            left_out: told of what is passed.
        """
        self._part = part.resolve()
        self._left_out = left_out
        self._entered: set[Path] = set()
        """Folders outside of the part, to which links led."""

    def __call__(self, start: Path) -> Iterator[tuple[Path, list[str]]]:
        """Yield each folder from ``start`` down with the names of its files, sorted.

        Raises:
            UserError: a folder cannot be read.
        """
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            folders, files = self.entries(folder)
            yield folder, files
            waiting += [folder / name for name in folders]

    def entries(self, folder: Path) -> tuple[list[str], list[str]]:
        """Return the folders to be entered in a folder, and the files, by name and sorted."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            folders, files = [], []
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _OF_THE_SYSTEM:
                    self._left_out.hidden[entry.name] += 1
                elif entry.is_dir():
                    if self._enters(entry, folder):
                        folders.append(entry.name)
                elif entry.is_file() or entry.is_symlink():  # a link to nothing is found damaged
                    files.append(entry.name)
        except OSError as error:
            raise UserError(f"data.root: cannot read {folder} ({error.strerror})") from None
        return folders, files

    def _enters(self, entry: os.DirEntry[str], folder: Path) -> bool:
        """Whether a folder is to be entered: not one that is, was or will be entered elsewhere."""
        is_link = entry.is_symlink()
        if not is_link and not self._entered:
            return True
        target = Path(entry.path).resolve()
        inside = target.is_relative_to(self._part)
        if not is_link and inside:
            return True
        holds_itself = folder.resolve().is_relative_to(target)
        if inside or holds_itself or target in self._entered:
            self._left_out.links.append(entry.path)
            return False
        self._entered.add(target)
        return True


def list_folder(folder: Path, left_out: LeftOut) -> tuple[list[File], list[str]]:
    """Return all image files below the class folders of a folder, and the classes, sorted.

    Args:
        folder: of one part, with a folder for each class.
        left_out: told of what is passed over.

    Raises:
        UserError: the folder is missing, or has no class, or a class has no image.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.root: {folder} not found; image_folder needs train/CLASS/FILE and "
            f"val/CLASS/FILE below data.root"
        )
    walk = Walk(folder, left_out)
    classes, loose = walk.entries(folder)
    suffixes = [_suffix(name) for name in loose]
    left_out.loose += sum(suffix in SUFFIXES for suffix in suffixes)
    left_out.others.update(suffix for suffix in suffixes if suffix not in SUFFIXES)
    if not classes:
        raise UserError(
            f"data.root: nothing to learn from in {folder}: it holds no class folder"
            + (f", but {left_out}" if str(left_out) else "")
        )
    files: list[File] = []
    for label, name in enumerate(classes):
        before = len(files)
        passed_over: Counter[str] = Counter()
        # Sorted by their paths as text, which is the order of torchvision's ImageFolder.
        for inner, names in sorted(walk(folder / name), key=lambda found: str(found[0])):
            images = [file for file in names if _suffix(file) in SUFFIXES]
            files += [(os.path.join(inner, file), label) for file in images]
            passed_over.update(_suffix(file) for file in names if _suffix(file) not in SUFFIXES)
        left_out.others += passed_over
        if len(files) == before:
            others = f"; its other files are not read ({_most(passed_over)})" if passed_over else ""
            raise UserError(
                f"data.root: nothing to learn from in {folder / name}: no image of "
                f"{', '.join(SUFFIXES)}{others}"
            )
    return files, classes


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _most(counts: Counter[str]) -> str:
    """List the most frequent ones with their numbers."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
    named = [f"{name or 'no suffix'}: {count}" for name, count in most]
    return ", ".join(named + ["..."] * (len(counts) > 3))
