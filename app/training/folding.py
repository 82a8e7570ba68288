"""Names of layers folded together: blocks.0.fc, blocks.1.fc and blocks.2.fc are blocks.0-2.fc."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

Content = TypeVar("Content", bound=Hashable)


def fold(entries: Sequence[tuple[str, Content]]) -> list[tuple[str, Content]]:
    """Put entries together that are equal but for a number in their names that counts up.

    Args:
        entries: parameter names, parts separated by dots, and what is said of each.

    Returns:
        The same in the order of the first of each, with ranges of numbers in the names.
    """
    folded = [(name.split("."), content) for name, content in entries]
    for place in reversed(range(max((len(parts) for parts, _ in folded), default=0))):
        folded = _fold_at(place, folded)
    return [(".".join(parts), content) for parts, content in folded]


def _fold_at(
    place: int, entries: Sequence[tuple[list[str], Content]]
) -> list[tuple[list[str], Content]]:
    """Fold the numbers at one place of the names."""
    folded: list[tuple[list[str], Content]] = []
    # Where an entry of this kind lies, its first number and its last one so far.
    seen: dict[Hashable, tuple[int, int, int]] = {}
    for parts, content in entries:
        if place >= len(parts) or not parts[place].isdecimal():
            folded.append((parts, content))
            continue
        before, number, after = parts[:place], int(parts[place]), parts[place + 1 :]
        kind = (tuple(before), tuple(after), content)
        if kind in seen and seen[kind][2] == number - 1:
            index, first, _ = seen[kind]
            folded[index] = ([*before, f"{first}-{number}", *after], content)
        else:
            index, first = len(folded), number
            folded.append((parts, content))
        seen[kind] = (index, first, number)
    return folded
