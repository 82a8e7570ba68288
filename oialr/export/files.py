"""Files of a trained network, which appear when they have been compared with it."""

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from oialr.convert import to_dense
from oialr.copies import copied
from oialr.errors import ExportError
from oialr.export.formats import FORMATS, Network, Samples, arguments, check_name
from oialr.export.state import dense_state, state_bytes
from oialr.sharding import whole

ROUNDS = 5
"""Measurements of time, of which the median counts."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file, and how what it holds compares with the network."""

    path: Path
    format: str
    difference: float
    """Largest difference of an output from the network's."""
    largest_output: float
    """Largest output of the network, by magnitude."""
    bytes: int
    """Size of the file."""
    dense_bytes: int
    """Size of the dense network's tensors."""
    seconds_per_sample: float
    dense_seconds_per_sample: float
    """Of the dense network, measured in turn with the file's, on the CPU and on these samples."""

    def __str__(self) -> str:
        """Tell all of it in one line."""
        seconds, dense = self.seconds_per_sample, self.dense_seconds_per_sample
        return (
            f"{self.path}: {self.format}, largest difference {self.difference:.1e} of outputs up "
            f"to {self.largest_output:.3g}, {self.bytes} bytes ({self.bytes / self.dense_bytes:.2f}"
            f" of dense), {1000 * seconds:.3f} ms per sample ({seconds / dense:.2f} of dense)"
        )


def export_dense(
    model: nn.Module, path: str | Path, samples: Samples, *, tolerance: float = 1e-4
) -> Exported:
    """Write the state_dict of the dense network, under its original names, by torch.save.

    Networks of the same code load it with ``strict=True`` and know nothing of this library. All
    export functions have the same arguments.

    Args:
        model: the network, low-rank or dense; it stays as it is. Wrappers are left away.
        path: of the file; an older one is replaced when the new one has been compared.
        samples: a batch of real input: a tensor (b, ...), a tuple of arguments or a dictionary of
            arguments by name. On them the file is compared with the network, all at once, each
            sample twice, and the first alone.
        tolerance: largest difference of an output, in units of the largest output or 1, whatever
            is more.

    Returns:
        How the file compares.

    Raises:
        ExportError: the outputs differ by more, or are not finite; no file is left.
        OSError: the file cannot be written.
        UserError: the name is one that :func:`read_exported` takes for another format: .onnx and
            .pt2 are the suffixes of ONNX and torch.export, and nobody else's.
    """
    return _export("dense", model, path, samples, tolerance)


def export_factors(
    model: nn.Module, path: str | Path, samples: Samples, *, tolerance: float = 1e-4
) -> Exported:
    """Write two factors for each factorized weight by :func:`oialr.save`: safetensors.

    Where two factors store no less than the dense weight, that is written. :func:`oialr.load` gives
    them to the network as it is built.

    Args:
        model, path, samples, tolerance: as of :func:`export_dense`.

    Raises:
        ExportError, OSError, UserError: as of :func:`export_dense`.
    """
    return _export("factors", model, path, samples, tolerance)


def export_onnx(
    model: nn.Module, path: str | Path, samples: Samples, *, tolerance: float = 1e-4
) -> Exported:
    """Write ONNX for batches of any size, of the plain layers of :func:`oialr.for_inference`.

    Args:
        model, path, samples, tolerance: as of :func:`export_dense`.

    Raises:
        ExportError, OSError: as of :func:`export_dense`; torch cannot express the network.
        UserError: onnx, onnxscript or onnxruntime is not installed; the network exceeds 2 GB; the
            name does not end in .onnx, by which the file is read.
    """
    return _export("onnx", model, path, samples, tolerance)


def export_torch(
    model: nn.Module, path: str | Path, samples: Samples, *, tolerance: float = 1e-4
) -> Exported:
    """Write a program of torch.export for batches of any size, of plain layers too.

    Args:
        model, path, samples, tolerance: as of :func:`export_dense`.

    Raises:
        ExportError, OSError: as of :func:`export_dense`; torch.export cannot follow the network.
        UserError: the name does not end in .pt2, by which the file is read.
    """
    return _export("torch-export", model, path, samples, tolerance)


EXPORTERS = {
    "dense": export_dense,
    "factors": export_factors,
    "onnx": export_onnx,
    "torch-export": export_torch,
}
"""The function of each format's name."""


def _export(
    form: str, model: nn.Module, path: str | Path, samples: Samples, tolerance: float
) -> Exported:
    path = Path(path)
    check_name(form, path)
    network = copied(whole(model)).cpu().eval()
    samples = dict(samples) if isinstance(samples, Mapping) else samples
    samples = tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, samples)
    # Beside the file, so that it takes its place in one step.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            FORMATS[form].write(network, partial, samples)
            try:
                exported = FORMATS[form].read(partial, network)
            except ValueError as error:
                raise ExportError(f"what was written cannot be read again: {error}") from error
            difference, largest = _compare(network, exported, samples)
            if not difference <= tolerance * max(1.0, largest):
                raise ExportError(
                    f"what was written as {form} differs by {difference:.1e} from the network, "
                    f"whose outputs are up to {largest:.3g}: {path} is not made"
                )
            dense = to_dense(copied(network))
            seconds, dense_seconds = _seconds_per_sample([exported, dense], samples)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(
        path=path,
        format=form,
        difference=difference,
        largest_output=largest,
        bytes=path.stat().st_size,
        dense_bytes=state_bytes(dense_state(network)),
        seconds_per_sample=seconds,
        dense_seconds_per_sample=dense_seconds,
    )


def _compare(network: Network, exported: Network, samples: Samples) -> tuple[float, float]:
    """Return the largest difference of outputs over several sizes of the batch, and the largest."""
    difference = largest = 0.0
    for change in (lambda x: x, lambda x: x[:1], lambda x: torch.cat([x, x])):
        expected, found = (_outputs(f, _changed(samples, change)) for f in (network, exported))
        if [x.shape for x in expected] != [x.shape for x in found]:
            raise ExportError(
                f"the network returns {[tuple(x.shape) for x in expected]} and what was written "
                f"{[tuple(x.shape) for x in found]}"
            )
        for ours, theirs in zip(expected, found, strict=True):
            for outputs, whose in (
                (ours, "the network's outputs"),
                (theirs, "outputs of the file"),
            ):
                if not outputs.isfinite().all():
                    raise ExportError(f"{whose} on the samples are not finite: no file is made")
            if ours.numel():
                difference = max(difference, float((ours - theirs).abs().max()))
                largest = max(largest, float(ours.abs().max()))
    return difference, largest


def _changed(samples: Samples, change: Any) -> Samples:
    def of_batch(x: Any) -> Any:
        return change(x) if isinstance(x, Tensor) and x.dim() else x

    changed: Samples = tree_map(of_batch, samples)
    return changed


def _outputs(network: Network, samples: Samples) -> list[Tensor]:
    args, kwargs = arguments(samples)
    leaves = tree_leaves(network(*args, **kwargs))
    return [leaf.detach().double() for leaf in leaves if isinstance(leaf, Tensor)]


def _seconds_per_sample(networks: list[Network], samples: Samples) -> list[float]:
    """Measure networks in turn, so that a disturbance of the machine meets all alike."""
    args, kwargs = arguments(samples)
    count = max(len(x) for x in tree_leaves(samples) if isinstance(x, Tensor) and x.dim())
    seconds: list[list[float]] = [[] for _ in networks]
    for _ in range(ROUNDS):
        for network, times in zip(networks, seconds, strict=True):
            start = time.perf_counter()
            network(*args, **kwargs)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) / count for times in seconds]
