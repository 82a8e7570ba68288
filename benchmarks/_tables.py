"""The tables that benchmarks print."""

from collections.abc import Mapping
from typing import Any


def table(document: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of figures, by what they are of and by their names."""
    rows = [
        f"| {what} | {figure} | {value} |"
        for what, figures in document.items()
        for figure, value in figures.items()
    ]
    return "\n".join(["| what | figure | value |", "| --- | --- | --- |", *rows])
