"""Which files are checkpoints, and in which order they were written."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from app.errors import UserError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")

INDEX = ".index.json"
"""End of the name of an index of shards, as Hugging Face's libraries write it: its "weight_map"
tells of each tensor the file in which it lies."""

COMPANIONS = (
    "process-*.pt",
    "stability-*",
    "partial-*",
    "damaged-*",
    "best",
    "exported",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "training_args*",
)
"""Names of files and folders that lie beside checkpoints and hold no weights, or some once more."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)")
_NAMED_TIME = re.compile(
    r"(?:^|[^a-z])(epochs?|steps?|iter(?:ation)?s?)[^a-z0-9]{0,2}(\d+)", re.IGNORECASE
)
_DECIMAL = re.compile(r"\d+\.\d+")
_COPIES = {"last", "latest", "best", "newest", "recovery"}
_INITIAL = {"init", "initial", "initialization", "initialisation"}
_AVERAGES = {"ema", "swa", "avg", "average", "averaged"}


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies."""

    files: tuple[Path, ...]
    """One, or its shards in their order."""
    index: Path | None = None
    """The index of the shards, where there is one."""

    @property
    def path(self) -> Path:
        """The index, or else the first file, which stands for all of them."""
        return self.index or self.files[0]

    @property
    def is_named_copy(self) -> bool:
        """Whether the name says that it is one of the others once more, such as the best."""
        return bool(_words(self.path) & _COPIES)

    @property
    def is_named_initial(self) -> bool:
        """Whether the name says that it was written before the training."""
        return bool(_words(self.path) & _INITIAL)

    @property
    def is_named_average(self) -> bool:
        """Whether the name says that it is an average over others."""
        return bool(_words(self.path) & _AVERAGES)


def find_checkpoints(paths: Sequence[Path]) -> tuple[list[Source], list[str]]:
    """List the checkpoints in files and folders, in natural order: 2 before 10.

    Folders are searched with all that is below them; files that are named count whatever their
    suffix. Shards are one checkpoint: those that an index (model.safetensors.index.json) names,
    whatever they are called, or else those whose names say so (model-00001-of-00002.safetensors).

    Returns:
        The checkpoints, and a line for each of which shards are missing, for each index that is
        none, and for each folder that cannot be read.

    Raises:
        UserError: a path does not exist, or there is no checkpoint in a folder.
    """
    found: list[Path] = []
    problems: list[str] = []
    for path in paths:
        if path.is_dir():
            below, unreadable = _files_below(path)
            problems += unreadable
            if not below and unreadable:
                raise UserError(unreadable[0])
            if not below:
                raise UserError(f"{path}: no checkpoint there (no file {', '.join(SUFFIXES)})")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    found = sorted(dict.fromkeys(found), key=natural_order)
    sources: list[Source] = []
    indexed: set[Path] = set()
    for index in (path for path in found if path.name.endswith(INDEX)):
        try:
            files = tuple(sorted(shards_by_tensor(index).values(), key=natural_order))
        except ValueError as error:
            problems.append(f"{index}: {error}")
            continue
        files = tuple(dict.fromkeys(files))
        indexed |= set(files)
        if missing := [file.name for file in files if not file.is_file()]:
            problems.append(f"{index}: its shard {missing[0]} is missing")
        else:
            sources.append(Source(files, index))
    alone = [path for path in found if not path.name.endswith(INDEX) and path not in indexed]
    for files in _together(alone):
        if (number := _missing_shard(files)) is not None:
            problems.append(f"{files[0]}: shard {number} of {_shard(files[0])[1]} is missing")
        else:
            sources.append(Source(files))
    return sorted(sources, key=lambda source: natural_order(source.path)), problems


def _files_below(folder: Path) -> tuple[list[Path], list[str]]:
    """Return all files below a folder that may be checkpoints, and the folders that are closed."""
    problems: list[str] = []

    def note(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be read ({error.strerror})")

    found = [
        Path(inner, name) for inner, _, names in os.walk(folder, onerror=note) for name in names
    ]
    found = [file for file in found if _is_checkpoint(file.relative_to(folder))]
    return [file for file in found if os.path.isfile(file)], problems


def shards_by_tensor(index: Path) -> dict[str, Path]:
    """Read an index of shards.

    Returns:
        Of each tensor's name the file in which it lies.

    Raises:
        ValueError: it is none; says why.
    """
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read as an index of shards ({error})") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) and v for v in places.values()):
        raise ValueError("is no index of shards: its weight_map does not name files")
    return {name: index.parent / file for name, file in places.items()}


def natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names by their value."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


class NamedTimes:
    """The times that the names of some checkpoints tell: their own, or else their folders'.

    A folder's number is that of a training as often as that of a time: run-7. It counts in folders
    that lie beside each other, or are called alike, and of which no file tells its own; so it does
    not for a file beside such folders, which is one of theirs once more as a rule.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Look at the names of all checkpoints of a series."""
        own: dict[Path, bool] = {}
        for path in paths:
            folder = _folder(path)
            own[folder] = own.get(folder, False) or has_number(path)
        without = (folder for folder, has in own.items() if not has)
        numbered = {folder for folder in without if _times_in_name(folder.name)}
        above = {
            parent
            for folder, has in own.items()
            if has or folder in numbered
            for parent in folder.parents
        }
        alone = numbered - above
        beside = Counter(folder.parent for folder in alone)
        alike = Counter(folder.name for folder in alone)
        self._folders = {f for f in alone if beside[f.parent] > 1 or alike[f.name] > 1}

    def times(self, path: Path) -> dict[str, int]:
        """Return the numbers that tell the time of one of the checkpoints.

        They stand under the beginning of the words that tell what is counted: "epoc", "step" and
        "iter". Where there is no such word the last whole number stands under "".
        """
        times = _times_in_name(_stem(path))
        if not times and (folder := _folder(path)) in self._folders:
            times = _times_in_name(folder.name)
        return times

    def number(self, path: Path) -> int | None:
        """Return the number that tells the time of one of the checkpoints; None if there is none.

        It is the one after "epoch", or else after "step" or "iteration", or else the last whole
        one: 0.81 in val_loss=0.81 is none, and neither are the numbers of shards.
        """
        times = self.times(path)
        return next((times[unit] for unit in ("epoc", "step", "iter", "") if unit in times), None)


def has_named_time(path: Path) -> bool:
    """Whether the file's own name tells an epoch, a step or an iteration."""
    return bool(_times_in_name(_stem(path)).keys() - {""})


def has_number(path: Path) -> bool:
    """Whether the file's own name holds a whole number, which may tell its time."""
    return bool(_times_in_name(_stem(path)))


def without_time(path: Path) -> str:
    """Return the file's name as a pattern: what tells its time, and decimals, is a star."""
    name = _DECIMAL.sub("*", path.name)
    own = _times_in_name(_stem(path))
    if not own:
        return name
    if "" in own:
        return re.sub(r"\d+(?!.*\d)", "*", _SHARD.sub(r"\g<stem>", name))

    def star(found: re.Match[str]) -> str:
        return found[0][: found.start(2) - found.start()] + "*"

    return _NAMED_TIME.sub(star, name)


def _together(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Put the shards of each checkpoint together, at the place of the first one."""
    groups: dict[tuple[Path, str, str, int], list[Path]] = {}
    for path in paths:
        name, count = path.name, 0
        if shard := _SHARD.fullmatch(path.stem):
            name, count = shard["stem"], int(shard["count"])
        groups.setdefault((path.parent, name, path.suffix, count), []).append(path)
    return [tuple(group) for group in groups.values()]


def _shard(path: Path) -> tuple[int, int]:
    """Return number and count of a shard; (1, 1) of a whole checkpoint."""
    shard = _SHARD.fullmatch(path.stem)
    return (int(shard["number"]), int(shard["count"])) if shard else (1, 1)


def _missing_shard(files: Sequence[Path]) -> int | None:
    """Return the first number that is missing; shards are counted from 1, by some from 0."""
    numbers = {_shard(file)[0] for file in files}
    first = min(1, *numbers)
    expected = range(first, first + _shard(files[0])[1])
    return next((number for number in expected if number not in numbers), None)


def _folder(path: Path) -> Path:
    """Return the folder of a file, the same however its path is spelt."""
    return Path(os.path.abspath(path.parent))


def _stem(path: Path) -> str:
    shard = _SHARD.fullmatch(path.stem)
    return shard["stem"] if shard else path.stem


def _times_in_name(name: str) -> dict[str, int]:
    if named := _NAMED_TIME.findall(name.lower()):
        return {word[:4]: int(number) for word, number in named}
    numbers = re.findall(r"\d+", _DECIMAL.sub("", name))
    return {"": int(numbers[-1])} if numbers else {}


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.name.lower()))


def _is_checkpoint(path: Path) -> bool:
    if path.suffix not in SUFFIXES and not path.name.endswith(INDEX):
        return False
    return not any(fnmatchcase(part, pattern) for part in path.parts for pattern in COMPANIONS)
