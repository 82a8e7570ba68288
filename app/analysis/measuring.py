"""Measures a portion of the weights over all checkpoints, one checkpoint after the other."""

import time
from collections.abc import Mapping, Sequence

import torch

from app.analysis.checkpoint import Weight, as_module, is_finite, read_checkpoint
from app.analysis.files import Source
from app.analysis.unfinished import Part
from app.errors import DivergedError, UserError
from app.training.foreign_files import CheckpointError
from oialr.layer_survey import LayerReport
from oialr.placement.processes import Processes
from oialr.stability.measurement import LayerStability
from oialr.stability.tracker import BasisTracker


def measure(
    layers: Sequence[LayerReport],
    sources: Sequence[Source],
    times: Sequence[int],
    *,
    window: int,
    device: torch.device,
) -> Part:
    """Measure some weights, each with those of the checkpoint ``window`` before.

    Of each checkpoint no more than these weights comes into memory, and it goes before the next
    one comes.

    Args:
        layers: the weights.
        sources: checkpoints, which :func:`find_damage` has found to be sound.
        times: of each; window: in the same unit.
        device: on which is computed.

    Raises:
        UserError: a checkpoint was removed or changed meanwhile.
    """
    tracker = BasisTracker(layers, Processes(), window=window, unit="measurements")
    part = Part(rows={layer.name: [] for layer in layers}, seconds=[])
    for source, position in zip(sources, times, strict=True):
        try:
            rows, seconds = _measure_one(tracker, source, layers, position, device)
        except (CheckpointError, DivergedError) as error:
            raise UserError(
                f"{source.path} was removed or changed during the analysis ({error}); bring it "
                f"back, and the same command goes on"
            ) from None
        part.seconds.append(seconds)
        for row in rows:
            part.rows[row.name].append(row)
    return part


def _measure_one(
    tracker: BasisTracker,
    source: Source,
    layers: Sequence[LayerReport],
    position: int,
    device: torch.device,
) -> tuple[list[LayerStability], float]:
    """Measure a checkpoint's weights, which are let go of with the end of the call."""
    model = as_module(_read(source, layers), device)
    start = time.perf_counter()
    return tracker.measure(model, position), time.perf_counter() - start


def find_damage(layers: Sequence[LayerReport], source: Source) -> tuple[int, str] | None:
    """Look through the values of some weights of a checkpoint.

    Returns:
        Why they cannot be measured, in a line, after the place of the weight; None if they can.
    """
    try:
        weights = _read(source, layers)
    except CheckpointError as error:
        return 0, str(error)
    for place, (name, weight) in enumerate(weights.items()):
        if not is_finite(weight):
            return place, f"{source.path}: {name} holds NaN or infinity"
    return None


def _read(source: Source, layers: Sequence[LayerReport]) -> Mapping[str, Weight]:
    """Map weights of a checkpoint into memory.

    Raises:
        CheckpointError: it cannot be read, or is another one than when it was looked into.
    """
    stored = read_checkpoint(*source.files, verify=False).weights
    for layer in layers:
        if layer.name not in stored:
            raise CheckpointError(f"{source.path}: {layer.name} is gone")
    return {layer.name: stored[layer.name] for layer in layers}
