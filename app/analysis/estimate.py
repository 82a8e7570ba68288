"""How long an analysis will take, and in how much memory: told before it starts."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from app.analysis.portions import operations, peak_bytes
from app.runtime.processes import Runtime
from oialr.layer_survey import LayerReport
from oialr.placement.assignment import svd_cost
from oialr.stability.measurement import measure_dense

_OPERATIONS_PER_SECOND = 4e9
"""Of l k^2, by one thread of an AMD EPYC (Zen 4): good enough for what takes no minute."""
_SHORT = 60.0  # seconds; of less nobody plans anything
_PIECE = 768  # short side of the pieces that are measured
_PIECES = 4


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a measurement of a weight takes, by its shape."""

    measured: dict[tuple[int, int], float]
    """Seconds of one matrix (m, n)."""
    others: float
    """Seconds per l k^2 of all others."""

    def seconds(self, layer: LayerReport) -> float:
        """Return the seconds of one weight in one checkpoint."""
        known = self.measured.get(layer.matrix_shape)
        return self.others * operations(layer) if known is None else layer.groups * known


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an analysis will take."""

    seconds: float
    bytes: int
    """Of the process that takes most, what it has before the first weight included."""

    def __str__(self) -> str:
        if self.seconds < _SHORT:
            took = "less than a minute"
        else:
            took = f"about {timedelta(seconds=round(self.seconds))}"
        return f"{took}, up to {self.bytes / 2**30:.1f} GiB of memory in a process"


def measure_speed(
    layers: Sequence[LayerReport], *, checkpoint_count: int, runtime: Runtime
) -> Speed:
    """Find out how fast weights of these shapes are measured here. A collective call.

    A piece of the same proportions as the matrix, with a short side of 768, is measured for each of
    the shapes that take most; the time of a decomposition grows with the cube of its sides. All
    processes measure at once, as they will, and the slowest one counts. Where everything takes less
    than a minute, nothing is measured.

    Args:
        layers: the weights.
        checkpoint_count: in how many checkpoints.
        runtime: the processes that share the work.
    """
    work: Counter[tuple[int, int]] = Counter()
    for layer in layers:
        work[layer.matrix_shape] += int(operations(layer))
    usual = 1 / _OPERATIONS_PER_SECOND
    if checkpoint_count * work.total() * usual < _SHORT:
        return Speed(measured={}, others=usual)
    chosen = [shape for shape, _ in work.most_common(_PIECES)]
    if runtime.device.type == "cuda":
        _time((64, 64), runtime.device)  # libraries are loaded with the first call
    mine = {shape: _time(shape, runtime.device) for shape in chosen}
    gathered = runtime.processes.gather(mine)
    measured = {shape: max(part[shape] for part in gathered) for shape in chosen}
    ratios = [measured[shape] / svd_cost(shape) for shape in chosen]
    return Speed(measured=measured, others=sum(ratios) / len(ratios))


def estimate(
    rounds: Sequence[Sequence[Sequence[LayerReport]]],
    speed: Speed,
    *,
    checkpoint_count: int,
    references: int,
) -> Estimate:
    """Tell what an analysis will take.

    Args:
        rounds: portions that are measured at the same time.
        speed: of the processes.
        checkpoint_count: how many are measured.
        references: how many earlier ones are remembered.
    """
    portions = [portion for together in rounds for portion in together]
    return Estimate(
        seconds=checkpoint_count
        * sum(max(sum(map(speed.seconds, portion)) for portion in together) for together in rounds),
        bytes=_own_bytes() + max((peak_bytes(p, references) for p in portions), default=0),
    )


def _time(shape: tuple[int, int], device: torch.device) -> float:
    """Return the seconds of a matrix, extrapolated from a piece where it is large."""
    short = min(shape)
    scale = min(1.0, _PIECE / short)
    m, n = (max(1, round(side * scale)) for side in shape)
    generator = torch.Generator().manual_seed(0)
    piece = torch.randn(1, m, n, generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    measure_dense(piece)  # ends with the spectrum in host memory
    return (time.perf_counter() - start) / scale**3


def _own_bytes() -> int:
    """Return what this process has in memory now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
