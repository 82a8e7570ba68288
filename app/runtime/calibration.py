"""Measures what factorizations cost on this machine, and keeps it in a file."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from math import ceil, log2
from pathlib import Path

import numpy as np
import torch

from app.errors import UserError
from oialr.linalg.svd import economy_svd
from oialr.placement.costs import Costs, split_limit
from oialr.placement.factorization import why_not_split
from oialr.placement.processes import Processes

logger = logging.getLogger(__name__)

SHAPES = (
    *((32, 32), (64, 512), (192, 192), (256, 256), (256, 1024), (256, 2304), (512, 512)),
    *((64, 4096), (128, 4096)),  # other ratios, that tell rows from merging with many processes
)
LARGE_SHAPES = ((768, 768), (512, 4608), (768, 3072), (1024, 1024), (256, 16384))


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
    processes: Processes, device: torch.device, *, quick: bool = False, rounds: int = 5
) -> Costs:
    """Measure factorizations by one process each, and split over all. A collective call.

    All processes work at the same time, as they do in an event, and the slowest counts. With one
    process, more than 32 (quick: 9), or without MPI, the coefficients of splitting stay at their
    defaults: three cannot be told apart by fewer matrices.

    Args:
        processes: those that will train.
        device: on which they will.
        quick: small matrices only.
        rounds: repetitions, of which the fastest counts for each matrix; all matrices take their
            turn in each, so that a disturbance does not meet all repetitions of one.
    """
    shapes = SHAPES if quick else SHAPES + LARGE_SHAPES
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    can_be = [m for m in matrices if split_limit(m.shape) >= processes.count > 1]
    can_split = all(processes.gather(why_not_split(processes) is None))
    if not can_split or len(can_be) < 3:
        can_be = []
    functions: list[Callable[[], object]] = [partial(economy_svd, matrix) for matrix in matrices]
    if can_be:
        split_svd, members = processes.split_svd(), range(processes.count)
        functions += [partial(split_svd.factorize, matrix, members) for matrix in can_be]
    seconds = _fastest(functions, processes, rounds)
    alone, split = seconds[: len(shapes)], seconds[len(shapes) :]
    tall, square, entry, call = _fit([_terms(s) for s in shapes], alone, alone)
    costs = Costs(tall=tall, square=square, entry=entry, call=call)
    if not can_be:
        return costs
    without = replace(costs, merge=0.0, merge_rows=0.0, merge_call=0.0)
    terms = [_split_terms(matrix.shape, processes.count) for matrix in can_be]
    extra = [
        measured - without.seconds(matrix.shape, processes.count)
        for matrix, measured in zip(can_be, split, strict=True)
    ]
    merge, merge_rows, merge_call = _fit(terms, extra, split)
    if not merge + merge_rows + merge_call:
        logger.warning(
            "splitting was measured as free, which it is not: the machine was disturbed; merge, "
            "merge_rows and merge_call stay at their defaults"
        )
        return costs
    return replace(costs, merge=merge, merge_rows=merge_rows, merge_call=merge_call)


def _terms(shape: Sequence[int]) -> list[float]:
    """What the coefficients of one process's factorization are multiplied with."""
    long, short = max(shape), min(shape)
    return [long * short**2, short**3, long * short, 1]


def _split_terms(shape: Sequence[int], process_count: int) -> list[float]:
    """What the coefficients that splitting adds are multiplied with."""
    long, short = max(shape), min(shape)
    rows, merges = ceil(long / process_count), ceil(log2(process_count))
    return [merges * short**3, merges * rows * short**2, merges]


def _fit(
    terms: Sequence[Sequence[float]], targets: Sequence[float], seconds: Sequence[float]
) -> list[float]:
    """Fit non-negative coefficients by least squares of errors relative to what was measured.

    Args:
        terms: of each measurement.
        targets: seconds that the terms are to explain, of each; what is left of a measurement after
            a subtraction may be as small as its noise, or negative.
        seconds: that were measured, whole.
    """
    from scipy.optimize import nnls

    measured = np.array(seconds)
    weighted = np.array(terms, dtype=float) / measured[:, None]
    scale = weighted.max(axis=0)
    coefficients, _ = nnls(weighted / scale, np.array(targets) / measured)
    return [float(value) for value in coefficients / scale]


def _fastest(
    functions: Sequence[Callable[[], object]], processes: Processes, rounds: int
) -> list[float]:
    """Seconds of the slowest process in the fastest round, of each function."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):  # the first one warms up
        for function, taken in zip(functions, times, strict=True):
            processes.barrier()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(max(processes.gather(time.perf_counter() - start)))
    return [min(taken[1:]) for taken in times]
