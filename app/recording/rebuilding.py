"""A damaged metrics.h5: set aside, and followed by a new one with the rows that are left."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from app.recording.copying import Rows, keep_aside, readable_rows
from app.recording.schema import layer_groups, run_groups
from app.recording.store import MetricsStore


def rebuild(
    path: Path,
    *,
    counts: Mapping[str, int],
    kept: Mapping[str, Rows],
    configuration: str,
    layers: Mapping[str, tuple[int, ...]],
    figures: Sequence[str],
    not_averaged: Collection[str],
    full_ranks: Mapping[str, int],
    groups: Mapping[str, int],
) -> tuple[MetricsStore, str]:
    """Start a new file in a damaged one's place, which stays beside it under another name.

    Every row of the new file was read past its checksum, or was kept elsewhere.

    Args:
        path: of the damaged file.
        counts: rows that each group had.
        kept: all rows of some groups, from elsewhere.
        configuration, layers, figures, not_averaged, full_ranks, groups: as for
            :meth:`MetricsStore.create`.

    Returns:
        The new file, and a line that says what became of the old one and which rows are lost.
    """
    schema = run_groups(figures)
    for layer, shape in layers.items():
        of_layer = layer_groups(shape, full_ranks.get(layer))
        schema |= {f"layers/{layer}/{name}": columns for name, columns in of_layer.items()}

    def columns(group: str) -> dict[str, np.dtype]:
        return {column.name: np.dtype(column.dtype) for column in schema[group]}

    wanted = {group: count for group, count in counts.items() if count and group not in kept}
    rows = {**readable_rows(path, wanted, columns), **kept}
    aside = keep_aside(path)
    store = MetricsStore.create(
        path,
        configuration=configuration,
        layers=layers,
        figures=figures,
        not_averaged=not_averaged,
        full_ranks=full_ranks,
        groups=groups,
        rows=rows,
    )
    found = store.counts()
    lost = {g: n - found.get(g, 0) for g, n in counts.items() if n > found.get(g, 0)}
    return store, f"it stays as {aside.name}, and a new one goes on {_describe(lost, counts)}"


def _describe(lost: Mapping[str, int], counts: Mapping[str, int]) -> str:
    if not lost:
        return "with all of its rows"
    named = [f"{count} of the {counts[group]} rows of {group}" for group, count in lost.items()]
    more = f" and rows of {len(named) - 3} other groups" if len(named) > 3 else ""
    return f"without {', '.join(named[:3])}{more}, which are lost"
