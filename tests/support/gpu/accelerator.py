"""What exists on a GPU alone, each with the nearest thing on the CPU for the dry run."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oialr.memory import TensorMemory

DRY_RUN = os.environ.get("OIALR_GPU_DRY_RUN") == "1"


def backend(device: torch.device) -> str:
    """Return the backend of torch.distributed for tensors on the device."""
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def synchronization_is_an_error(
    device: torch.device, host_tensors: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Raise where the host would wait for the device.

    Args:
        device: of the tensors.
        host_tensors: those that lie in host memory, whose values may be read. On the CPU nothing
            tells them from the others, and reading a value is the error.
    """
    if device.type != "cuda":
        with _ValuesAreSecret(host_tensors):
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _ValuesAreSecret(TorchDispatchMode):
    """Forbids the operators whose result depends on values that the host must know."""

    FORBIDDEN = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)

    def __init__(self, host_tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in host_tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.FORBIDDEN:
            storage = args[0].untyped_storage()._cdata
            assert storage in self._known, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Peak:
    """The most memory that was taken, in bytes."""

    bytes = 0


@contextmanager
def peak_memory(device: torch.device, tensors: Iterable[Tensor]) -> Iterator[Peak]:
    """Measure the most that was allocated at once in the block.

    Args:
        device: where.
        tensors: what is there already; an iterator, so that it may be let go of.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with TensorMemory(tensors) as memory:
        yield peak
    peak.bytes = memory.peak_bytes


def allocated_bytes(device: torch.device, tensors: Iterable[Tensor]) -> int:
    """Return the bytes that are allocated now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with TensorMemory(tensors) as memory:
        return memory.bytes


def random_state(device: torch.device) -> Tensor:
    """Return the state of the device's random numbers."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Go on with a stored state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def skipped_graphs() -> int:
    """Count the compiled graphs that reduce-overhead did not record; the CPU records none."""
    return 0 if DRY_RUN else torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def svd_attempts(device: torch.device) -> list[tuple[str, torch.dtype, str, str | None]]:
    """Return function, dtype, device and driver of each way to an SVD that needs torch alone."""
    if device.type != "cuda":
        return [("svd", torch.float32, "cpu", None), ("svd", torch.float64, "cpu", None)]
    return [
        ("eigh", torch.float64, "cuda", None),  # of the Gram matrix
        ("svd", torch.float64, "cuda", None),
        ("svd", torch.float64, "cuda", "gesvd"),
        ("svd", torch.float64, "cpu", None),
    ]
