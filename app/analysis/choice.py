"""Which of the checkpoints that were found are measured, at which time, and against which.

Folders of checkpoints hold some of them twice (the last, the best) and averages beside them. A copy
would be measured as a time at which nothing moved, and an average as one of another network.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from app.analysis.files import Source, number_in
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
    """Of each the epoch or step that they all hold, or the number in their names, or their number
    in natural order."""


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
    originals: list[Found] = []
    # Named copies come last, so that they are copies of the others and not the other way round.
    for entry in sorted(kept, key=lambda entry: entry.source.is_named_copy):
        original = next((other for other in originals if _is_copy(entry, other)), None)
        if original is not None:
            reason = f"the same as {original.path.name}"
            passed_over.append(PassedOver(path=entry.path, reason=reason))
        elif originals and entry.source.is_named_copy and _time(entry) == (None, None):
            passed_over.append(PassedOver(path=entry.path, reason="a copy by its name"))
        else:
            originals.append(entry)
    return [entry for entry in kept if entry in originals], passed_over


def order(found: Sequence[Found]) -> tuple[Series, list[PassedOver]]:
    """Sort checkpoints by time, one for each.

    Where most of them are the only one of their epoch, the others of an epoch are passed over: what
    was written within it, and otherwise all but the last step's.

    Args:
        found: as :func:`drop_copies` returns them, in natural order.
    """
    for label, times in (
        ("epoch", [entry.epoch for entry in found]),
        ("optimizer step", [entry.step for entry in found]),
    ):
        by_time: dict[int, list[Found]] = {}
        for entry, time in zip(found, times, strict=True):
            if time is not None:
                by_time.setdefault(time, []).append(entry)
        chosen = {time: min(entries, key=_preference) for time, entries in by_time.items()}
        if None in times or 2 * len(chosen) <= len(found):
            continue
        if label == "epoch" and any(entry.within_epoch for entry in chosen.values()):
            continue  # its true time is between two epochs
        series = Series(
            found=[chosen[time] for time in sorted(chosen)], label=label, times=sorted(chosen)
        )
        return series, [
            PassedOver(path=entry.path, reason=f"{label} {time} is {chosen[time].path.name}")
            for time, entries in by_time.items()
            for entry in entries
            if entry is not chosen[time]
        ]
    numbers = [number_in(entry.path) for entry in found]
    known = [number for number in numbers if number is not None]
    if len(known) == len(found) and all(a < b for a, b in pairwise(known)):
        return Series(found=list(found), label="number in the name", times=known), []
    return Series(found=list(found), label="checkpoint", times=list(range(1, len(found) + 1))), []


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


def _time(entry: Found) -> tuple[int | None, int | None]:
    return entry.epoch, entry.step


def _is_copy(entry: Found, other: Found) -> bool:
    """Whether two checkpoints hold the same weights, and do not say that their times differ."""
    times = list(zip(_time(entry), _time(other), strict=True))
    if _time(entry) == _time(other) == (None, None):
        times = [(number_in(entry.path), number_in(other.path))]
    differ = any(a is not None and b is not None and a != b for a, b in times)
    return entry.fingerprint == other.fingerprint and not differ


def _preference(entry: Found) -> tuple[bool, bool, int]:
    """Sort what belongs to one epoch: the first one stands for it."""
    return entry.within_epoch, entry.source.is_named_copy, -(entry.step or 0)
