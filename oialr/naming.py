"""Names of types, as registries and checks know them without an import, and names in messages."""

from collections.abc import Sequence


def full_name(kind: type) -> str:
    """Return the name of a type with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def names_of(thing: object) -> list[str]:
    """Return the names of an object's type and of all that it is derived from, without modules."""
    return [kind.__name__ for kind in type(thing).__mro__]


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names in one line, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
