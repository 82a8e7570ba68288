"""Joins what the parts left in a folder: gpu.json, and tables of it in gpu.md."""

import argparse
import json
from pathlib import Path
from typing import Any

HIDDEN = {"profile", "summary", "last_lines", "traceback"}


def cell(value: Any) -> str:
    """Return a number with three digits, and all else as it is."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of all columns that a row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in HIDDEN))
    lines = ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("| --- " * len(columns) + "|")
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return lines


def profiles(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of kernels for each row that has them."""
    lines = []
    for row in rows:
        if profile := row.get("profile"):
            lines += [
                "",
                f"### {row['network']}, {row['mode']}, {row['variant']}: "
                f"{profile['device_milliseconds']:.1f} of {row['milliseconds']:.1f} ms on the "
                f"device, {profile['launches']:.0f} launches",
                "",
                *table(profile["kernels"]),
            ]
    return lines


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    parts = {
        path.stem: json.loads(path.read_text())
        for path in sorted(folder.glob("*.json"))
        if path.name != "gpu.json"
    }
    (folder / "gpu.json").write_text(json.dumps(parts, indent=1))
    lines = ["# Measured on a GPU", ""]
    for name, part in parts.items():
        lines += [
            f"## {name}",
            "",
            f"{part['device']}, torch {part['torch']}, Python {part['python']}, "
            f"{part.get('seconds', 0):.0f} s",
            "",
            *table(part["rows"]),
            *profiles(part["rows"]),
            "",
        ]
    (folder / "gpu.md").write_text("\n".join(lines))
    print(f"{folder / 'gpu.md'}: {', '.join(parts) or 'nothing was measured'}")


if __name__ == "__main__":
    main()
