"""Which of the checkpoints that were found are measured, at which time, and against which.

Folders of checkpoints hold some of them twice (the last, the best) and averages beside them. A copy
would be measured as a time at which nothing moved, and an average as one of another network. Two
trainings in one series would be measured as a collapse that never happened: they are refused.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from pathlib import Path

from app.analysis.files import NamedTimes, Source, has_named_time, has_number, without_time
from app.analysis.selection import Shapes


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that was looked into."""

    source: Source
    shapes: Shapes
    step: int | None
    epoch: int | None
    within_epoch: bool = False
    """Whether it was written after more than ``epoch`` epochs."""
    fingerprint: str = ""
    """Of the weights; equal ones have equal fingerprints."""
    integers: tuple[str, ...] = ()
    """Tensors of integers that may have been meant as weights, and are left out."""

    @property
    def path(self) -> Path:
        """The file that stands for it."""
        return self.source.path


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """A checkpoint that is not measured, since it adds nothing to the others."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Series:
    """Checkpoints in the order of time."""

    found: list[Found]
    label: str
    """What time is counted in."""
    times: list[int]
    """Of each the epoch or step that they hold, or the number in their names, or their number
    in natural order."""

    def described(self) -> str:
        """Say what orders them, and from where to where."""
        if self.label == _BY_NAME:
            first, last = self.found[0].path.name, self.found[-1].path.name
            return f"ordered by name, {first} ... {last}"
        return f"ordered by {self.label} {self.times[0]} ... {self.times[-1]}"


_BY_NAME = "checkpoint"
"""Label where nothing but the natural order of the names tells the time."""


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Which checkpoint each one is compared with: the one of ``span`` before, if it is there."""

    times: list[int]
    span: int
    by_count: bool
    """Whether times are places in the order, since no two checkpoints are a window apart."""


def drop_copies(found: Sequence[Found]) -> tuple[list[Found], list[PassedOver]]:
    """Keep of equal checkpoints one, and averages only where there is nothing else.

    Args:
        found: of one network, in natural order.
    """
    passed_over = []
    kept = [entry for entry in found if not entry.source.is_named_average]
    if kept:
        passed_over += [
            PassedOver(path=entry.path, reason="an average")
            for entry in found
            if entry.source.is_named_average
        ]
    else:
        kept = list(found)
    names = _names(kept)

    def trust(entry: Found) -> tuple[bool, bool]:
        no_time = _time(entry) == (None, None) and names.number(entry.path) is None
        return entry.source.is_named_copy, no_time

    some_are_no_copies = any(not entry.source.is_named_copy for entry in kept)
    originals: list[Found] = []
    # What is a copy by its name comes last, and before it what tells no time: so they are copies of
    # the others and not the other way round.
    for entry in sorted(kept, key=trust):
        original = next((other for other in originals if _is_copy(entry, other, names)), None)
        if original is not None:
            reason = f"the same as {original.path.name}"
            passed_over.append(PassedOver(path=entry.path, reason=reason))
        elif originals and _is_copy_by_name(entry, originals, names, some_are_no_copies):
            passed_over.append(PassedOver(path=entry.path, reason="a copy by its name"))
        else:
            originals.append(entry)
    return [entry for entry in kept if entry in originals], passed_over


def several_series(found: Sequence[Found]) -> str | None:
    """Say in a line which checkpoints are of several trainings or networks; None: of one.

    They hold different weights at a time that nothing tells apart, in another folder or under
    another name. What is called the best or the last may differ from what else has its time.

    Args:
        found: as :func:`drop_copies` returns them.
    """
    names = _names(found)
    at: dict[tuple[tuple[str, int], ...], list[Found]] = {}
    for entry in found:
        if not entry.source.is_named_copy:
            at.setdefault(tuple(sorted(names.times(entry.path).items())), []).append(entry)
    for one, other in chain.from_iterable(combinations(entries, 2) for entries in at.values()):
        if one.fingerprint == other.fingerprint or not _are_of_one_time(one, other, names):
            continue
        name = without_time(one.path)
        if one.path.parent != other.path.parent:
            cure = "give the folder of one"
        elif name != without_time(other.path):
            cure = f"give the files of one, such as {one.path.parent / name}"
        else:
            continue
        return (
            f"{one.path} and {other.path}: of the same time, with different weights: two "
            f"trainings or networks are no series; {cure}"
        )
    return None


def order(found: Sequence[Found]) -> tuple[Series, list[PassedOver]]:
    """Sort checkpoints by time, one for each.

    Where most of them are the only one of their epoch, the others of an epoch are passed over: what
    was written within it, and otherwise all but the last step's. Where nothing orders all of them,
    those are passed over that do not tell the epoch or step that most of them hold.

    Args:
        found: as :func:`drop_copies` returns them, in natural order.
    """
    unordered = [e for e in found if e.source.is_named_initial and _time(e) == (None, None)]
    initial = unordered[0] if len(unordered) == 1 else None
    found = sorted(found, key=lambda entry: entry is not initial)

    def times(told: Callable[[Found], int | None]) -> list[int | None]:
        """Return what is told of the checkpoints; what is called initial was before all else."""
        others = {told(entry) for entry in found if entry is not initial}
        return [
            (None if 0 in others else 0) if entry is initial else told(entry) for entry in found
        ]

    held = {
        "epoch": times(lambda entry: entry.epoch),
        "optimizer step": times(lambda entry: entry.step),
    }
    for label, values in held.items():
        if None not in values and (choice := _by_time(label, found, values)):
            return choice
    names = _names(found)
    if series := _by_number(found, times(lambda entry: names.number(entry.path)), names):
        return series, []
    for label, values in held.items():
        if choice := _by_time(label, found, values):
            return choice
    return Series(found=found, label=_BY_NAME, times=list(range(1, len(found) + 1))), []


def _by_time(
    label: str, found: Sequence[Found], times: Sequence[int | None]
) -> tuple[Series, list[PassedOver]] | None:
    """Sort by what most checkpoints hold; None where most do not, or are not alone at their time.

    Returns:
        The series, and what is passed over.
    """
    by_time: dict[int, list[Found]] = {}
    passed_over = []
    for entry, time in zip(found, times, strict=True):
        if time is None:
            reason = f"holds no {label}, as most of them do"
            passed_over.append(PassedOver(path=entry.path, reason=reason))
        else:
            by_time.setdefault(time, []).append(entry)
    chosen = {time: min(entries, key=_preference) for time, entries in by_time.items()}
    if 2 * len(chosen) <= len(found):
        return None
    if label == "epoch" and any(entry.within_epoch for entry in chosen.values()):
        return None  # its true time is between two epochs
    series = Series(
        found=[chosen[time] for time in sorted(chosen)], label=label, times=sorted(chosen)
    )
    return series, passed_over + [
        PassedOver(path=entry.path, reason=f"{label} {time} is {chosen[time].path.name}")
        for time, entries in by_time.items()
        for entry in entries
        if entry is not chosen[time]
    ]


def _by_number(
    found: Sequence[Found], numbers: Sequence[int | None], names: NamedTimes
) -> Series | None:
    """Sort by the numbers in all names; None where these need not be times.

    They are where they agree with the order of the names, or where words beside them say so.
    """
    known = {number: e for number, e in zip(numbers, found, strict=True) if number is not None}
    if len(known) < len(found):
        return None
    others = [entry for entry in known.values() if not entry.source.is_named_initial]
    units = {frozenset(names.times(entry.path)) for entry in others}
    have_words = len(units) == 1 and all(has_named_time(entry.path) for entry in others)
    if not have_words and any(a > b for a, b in pairwise(known)):
        return None
    times = sorted(known)
    return Series(found=[known[t] for t in times], label="number in the name", times=times)


def compare(times: Sequence[int], window: int) -> Comparisons:
    """Choose what is compared, by time and not by count, so that nothing shifts it.

    A checkpoint that is missing, or one more between two others, changes no other comparison.

    Args:
        times: ascending.
        window: in the most common distance of two checkpoints that follow each other.
    """
    gaps = Counter(b - a for a, b in pairwise(times))
    span = window * min(gaps, key=lambda gap: (-gaps[gap], gap)) if gaps else window
    known = set(times)
    by_count = len(times) > window and not any(time - span in known for time in times)
    if by_count:
        return Comparisons(times=list(range(len(times))), span=window, by_count=True)
    return Comparisons(times=list(times), span=span, by_count=False)


def _names(found: Sequence[Found]) -> NamedTimes:
    return NamedTimes(entry.path for entry in found)


def _time(entry: Found) -> tuple[int | None, int | None]:
    return entry.epoch, entry.step


def _are_of_one_time(one: Found, other: Found, names: NamedTimes) -> bool:
    """Whether the times that two checkpoints with equal times in their names hold are the same."""
    held = list(zip(_time(one), _time(other), strict=True))
    if one.within_epoch != other.within_epoch or any(
        a is not None and b is not None and a != b for a, b in held
    ):
        return False
    if any(a is not None and a == b for a, b in held):
        return True
    if has_number(one.path) and has_number(other.path):
        return True
    # The number is the folder's: nothing tells the time of a.pt and b.pt in epoch-7.
    return one.path.name == other.path.name and bool(names.times(one.path))


def _is_copy_by_name(
    entry: Found, originals: Sequence[Found], names: NamedTimes, others: bool
) -> bool:
    """Whether a checkpoint that holds no time is one of the others, as its name says.

    It is not where the name tells a time that none of the others has.

    Args:
        entry: the checkpoint.
        originals: those before it.
        names: what the names of all of them tell.
        others: whether there are any whose names do not say that they are copies. Where all are
            the best, a number tells them apart; else it may be that of a ResNet-50.
    """
    if not entry.source.is_named_copy or _time(entry) != (None, None):
        return False
    tells_time = has_named_time(entry.path) if others else names.times(entry.path)
    numbers = {names.number(other.path) for other in originals}
    return not tells_time or names.number(entry.path) in numbers


def _is_copy(entry: Found, other: Found, names: NamedTimes) -> bool:
    """Whether two checkpoints hold the same weights, and do not say that their times differ."""
    times = list(zip(_time(entry), _time(other), strict=True))
    if _time(entry) == _time(other) == (None, None):
        times = [(names.number(entry.path), names.number(other.path))]
    differ = any(a is not None and b is not None and a != b for a, b in times)
    return entry.fingerprint == other.fingerprint and not differ


def _preference(entry: Found) -> tuple[bool, bool, int]:
    """Sort what belongs to one epoch: the first one stands for it."""
    return entry.within_epoch, entry.source.is_named_copy, -(entry.step or 0)
