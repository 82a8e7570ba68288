"""Which tensors of a checkpoint are measured, and which of them are averaged."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from app.analysis.checkpoint import StoredFactors, Weight
from app.errors import UserError
from oialr.layer_survey import LayerReport
from oialr.layers.reading import MatrixReading

NOT_AVERAGED = (
    "*token",
    "*tokens",
    "*embed",
    "*embed.weight",
    "*embedding",
    "*embedding.weight",
    "*embeddings",
    "*embeddings.weight",
    "*embed_tokens.weight",
    "*position*",
    "*wte.weight",
    "*wpe.weight",
    "*bias",
    "*_scale",
    "*_scale_inv",
)
"""Names of embeddings, tokens, positions, masks and scales, which are no linear maps."""

Shapes = Mapping[str, tuple[tuple[int, ...], int, bool]]
"""Of each weight the shape, the number of matrices it is read as, and whether it is factored."""


def shapes_of(weights: Mapping[str, Weight]) -> Shapes:
    """Return what a selection needs to know of the weights."""
    return {
        name: (weight.shape, weight.groups, True)
        if isinstance(weight, StoredFactors)
        else (tuple(weight.shape), 1, False)
        for name, weight in weights.items()
    }


def signature(shapes: Shapes) -> tuple[tuple[str, int, int], ...]:
    """Return what the checkpoints of one network have in common, low-rank or not."""
    matrices = ((name, shape[0], math.prod(shape[1:])) for name, (shape, *_) in shapes.items())
    return tuple(sorted(matrices))


def select_weights(
    checkpoints: Sequence[Shapes],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    not_averaged: Sequence[str],
) -> list[LayerReport]:
    """Choose the weights that are measured, in the order of the first checkpoint.

    Args:
        checkpoints: of one network.
        include: shell-style patterns; a weight is measured only if it matches one of them.
        exclude: patterns of weights that are not measured.
        not_averaged: patterns of weights that are measured, and left out of means.

    Raises:
        UserError: a pattern of the first two matches no weight, or no weight is left.
    """
    names = list(checkpoints[0])
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"{option}: {pattern!r} matches none of the {len(names)} weights "
                    f"(such as {names[0]})"
                )
    chosen = [name for name in names if _matches(name, include) and not _matches(name, exclude)]
    if not chosen:
        raise UserError("--exclude: no weight is left to be measured")
    reports = []
    for name in chosen:
        entries = [shapes[name] for shapes in checkpoints]
        # The kernel's shape is known from a full-rank checkpoint, the groups from a low-rank one.
        shape = next((shape for shape, _, factored in entries if not factored), entries[0][0])
        reports.append(
            LayerReport(
                name=name,
                reading=MatrixReading(shape, groups=max(groups for _, groups, _ in entries)),
                is_linear_map=not _matches(name, not_averaged),
                stays_dense="only measured",
            )
        )
    return reports


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
