"""What a configuration names by its import path: package.module:name."""

from importlib import import_module
from typing import Any

from app.errors import UserError, typed_line


def is_import_path(name: str) -> bool:
    """Tell whether a name is an import path."""
    module, separator, member = name.partition(":")
    return bool(separator) and all(
        part.isidentifier() for part in [*module.split("."), *member.split(".")]
    )


def import_by_path(key: str, path: str) -> Any:
    """Import what a key of the configuration names.

    Modules are found as Python finds them: below the folder where the program was started, on
    PYTHONPATH and among the installed packages.

    Args:
        key: of the configuration, for the message.
        path: ``package.module:name``.

    Raises:
        UserError: it cannot be imported, or cannot be called.
    """
    module, _, member = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in member.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may raise anything
        reason = typed_line(error)
        raise UserError(f"{key}: {path} cannot be imported ({reason})") from None
    if not callable(found):
        raise UserError(f"{key}: {path} is a {type(found).__name__}, expected what can be called")
    return found
