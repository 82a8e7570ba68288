"""The paper's algorithm in place of the recipe that a shipped configuration extends."""

from functools import cache
from pathlib import Path

_SETTINGS = Path(__file__).resolve().parents[1] / "configs" / "paper" / "settings.yaml"


@cache
def paper_keys() -> tuple[str, ...]:
    """Return ``section.key=value`` for the command line: what the recipes set, unset."""
    import yaml

    sections = yaml.safe_load(_SETTINGS.read_text())
    return tuple(
        f"{section}.{key}={'null' if value is None else value}"
        for section, keys in sections.items()
        for key, value in keys.items()
    )
