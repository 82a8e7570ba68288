"""Methods that follow what others have come to: their size, their time, their stable ranks."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.config.settings import Configuration
    from app.data import Task


def narrow(
    width: Mapping[str, int], size: int, count: Callable[[dict[str, int]], int]
) -> dict[str, int]:
    """Find the narrowest network that stores no fewer parameters than asked for.

    It is a little larger than what it is held against, never smaller.

    Args:
        width: keys that are multiplied alike, each with its unit.
        size: parameters.
        count: parameters of the network with these values.
    """
    for factor in itertools.count(1):
        values = {key: factor * unit for key, unit in width.items()}
        if count(values) >= size:
            return values
    raise AssertionError("count has no end")


def shorten(epochs: int, ratio: float) -> int:
    """Return the epochs that take a share of the CPU time: rounded up, in the rival's favour."""
    return max(1, math.ceil(epochs * ratio - 1e-9))


def settled(ranks: Sequence[Sequence[float]], *, tolerance: float = 0.1, latest: int) -> int:
    """Return the first epoch in which no layer's stable rank moves any more.

    Cuttlefish (arXiv 2305.02538) ends its full-rank phase where the change of every layer's stable
    rank in an epoch falls to a tolerance. In a training too short for that it never ends, so there
    is a latest epoch.

    Args:
        ranks: by epoch from 0, the beginning, one number per layer.
        tolerance: of a change from one epoch to the next.
        latest: epoch that is taken if none before is settled, or the last one where the training
            has ended before it.
    """
    latest = min(latest, len(ranks) - 1)
    for epoch in range(1, latest):
        changes = zip(ranks[epoch], ranks[epoch - 1], strict=True)
        if all(abs(now - before) <= tolerance for now, before in changes):
            return epoch
    return latest


def scaled_stable_ranks(
    now: Mapping[str, float], first: Mapping[str, float], full: Mapping[str, int]
) -> dict[str, int]:
    """Return Cuttlefish's ranks: stable ranks, scaled so that they are full at the beginning.

    r = k stable_rank(W) / stable_rank(W_0), stable_rank(W) = sum s^2 / s_1^2, rounded up, from 1 to
    k (arXiv 2305.02538, section 3).

    Args:
        now: stable rank of each layer by name.
        first: the same at the initialization.
        full: k of each layer, min(m, n).
    """
    return {
        name: min(k, max(1, math.ceil(k * now[name] / first[name]))) for name, k in full.items()
    }


def read_stable_ranks(place: Path, names: Iterable[str]) -> list[dict[str, float]]:
    """Return stable ranks by epoch, from 0, and by layer, of a run that measured every epoch.

    Args:
        place: folder of the run.
        names: of the layers.
    """
    from app.recording.store import read_rows

    ranks = {
        name: read_rows(place / "metrics.h5", f"layers/{name}/stability")["stable_rank"].tolist()
        for name in names
    }
    return [dict(zip(ranks, epoch, strict=True)) for epoch in zip(*ranks.values(), strict=True)]


def parameter_count(configuration: "Configuration", task: "Task") -> int:
    """Count the parameters of a configuration's network, without memory for them."""
    import torch

    from app import models
    from oialr.layer_survey import parameter_counts

    section = configuration.model
    sizes: Any = {"input_shape": task.input_shape, "outputs": task.outputs}
    with torch.device("meta"):
        return parameter_counts(models.build(section.name, section.arguments, **sizes))[1]


def full_ranks(configuration: "Configuration", task: "Task") -> dict[str, int]:
    """Return min(m, n) of every layer that the method would factorize, by name."""
    import torch

    from app import models
    from oialr.layer_survey import survey
    from oialr.options import Selection

    section, oialr = configuration.model, configuration.oialr
    sizes: Any = {"input_shape": task.input_shape, "outputs": task.outputs}
    with torch.device("meta"):
        model = models.build(section.name, section.arguments, **sizes)
    kept = {name: getattr(oialr, name) for name in Selection.__dataclass_fields__}
    layers = survey(model, minimum_rank_fraction=oialr.minimum_rank_fraction, **kept)
    return {layer.name: layer.full_rank for layer in layers if layer.stays_dense is None}
