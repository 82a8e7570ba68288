"""Measures what factorizations cost on this machine, and keeps it in a file."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from app.distributed.costs import Costs, split_limit
from app.distributed.processes import Processes
from app.errors import UserError
from app.linalg.svd import economy_svd

SHAPES = ((32, 32), (64, 512), (192, 192), (256, 256), (256, 1024), (256, 2304), (512, 512))
LARGE_SHAPES = ((768, 768), (512, 4608), (768, 3072), (1024, 1024))


def read_costs(path: str | Path) -> Costs:
    """Read the file of :func:`write_costs`.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        values = json.loads(Path(path).read_text())
        known = {field.name for field in fields(Costs)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"expected the keys {', '.join(sorted(known))}")
        return Costs(**values)
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = str(error)
    raise UserError(
        f"distributed.calibration: {path}: {problem}; make it by python -m app.calibrate"
    )


def write_costs(costs: Costs, path: str | Path) -> None:
    """Write a file for ``distributed.calibration``.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(asdict(costs), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def measure_costs(
    processes: Processes, device: torch.device, *, quick: bool = False, rounds: int = 3
) -> Costs:
    """Measure factorizations by one process each, and split over all. A collective call.

    All processes work at the same time, as they do in an event, and the slowest counts. With one
    process, or without MPI, the coefficients of splitting stay at their defaults.

    Args:
        processes: those that will train.
        device: on which they will.
        quick: small matrices only.
        rounds: repetitions, of which the fastest counts.
    """
    shapes = SHAPES if quick else SHAPES + LARGE_SHAPES
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    whole = [_seconds(lambda m=m: economy_svd(m), processes, rounds) for m in matrices]  # type: ignore[misc]
    names = ("tall", "square", "entry", "call")
    costs = Costs(**dict(zip(names, _fit([_terms(s) for s in shapes], whole), strict=True)))
    can_be = [m for m in matrices if split_limit(m.shape) >= processes.count > 1]
    if not can_be or processes.communicator is None:
        return costs
    split_svd, members = processes.split_svd(), range(processes.count)
    rounds_of_merging = int(np.ceil(np.log2(processes.count)))
    terms, extra = [], []
    for matrix in can_be:
        seconds = _seconds(lambda m=matrix: split_svd.factorize(m, members), processes, rounds)  # type: ignore[misc]
        without = Costs(**{**asdict(costs), "merge": 0.0, "merge_call": 0.0})
        extra.append(max(1e-9, seconds - without.seconds(matrix.shape, processes.count)))
        terms.append([rounds_of_merging * min(matrix.shape) ** 3, rounds_of_merging])
    merge, merge_call = _fit(terms, extra)
    return Costs(**{**asdict(costs), "merge": merge, "merge_call": merge_call})


def _terms(shape: Sequence[int]) -> list[float]:
    """What the coefficients of one process's factorization are multiplied with."""
    long, short = max(shape), min(shape)
    return [long * short**2, short**3, long * short, 1]


def _fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Fit non-negative coefficients by least squares of the relative errors."""
    from scipy.optimize import nnls

    weighted = np.array(terms, dtype=float) / np.array(seconds)[:, None]
    scale = weighted.max(axis=0)
    coefficients, _ = nnls(weighted / scale, np.ones(len(seconds)))
    return [float(value) for value in coefficients / scale]


def _seconds(function: Callable[[], object], processes: Processes, rounds: int) -> float:
    """Seconds of the slowest process, in the fastest round."""
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        processes.barrier()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(max(processes.gather(time.perf_counter() - start)))
    return min(times[1:])
