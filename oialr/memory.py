"""How much memory tensors take, measured on any device."""

import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are given to it or made while it is active.

    A storage counts once, however many tensors look at it, until the last of them is gone. What an
    operator allocates and frees inside itself, such as the workspace of LAPACK, is not seen. It
    slows every operator down while it is active; afterwards nothing is left of it but its figures.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """Start, when it is entered, with tensors that are there already."""
        super().__init__()
        self._tensors = tensors
        self._alive: dict[int, weakref.finalize[..., Any]] = {}
        self.bytes = 0
        """Bytes at present; after the exit those at the exit."""
        self.peak_bytes = 0
        """The most that was there at once."""

    def __enter__(self) -> Self:
        for tensor in self._tensors:
            self._see(tensor)
        self._tensors = ()  # which would keep them alive
        self.peak_bytes = self.bytes
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        # A finalizer lives as long as the storage that it waits for, and holds this object.
        for finalizer in self._alive.values():
            finalizer.detach()
        self._alive.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value)
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive and tensor.device.type != "meta":
            self.bytes += size
            self._alive[key] = weakref.finalize(storage, self._forget, key, size)
            self._alive[key].atexit = False

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key]
        self.bytes -= size


def tensors_of(model: nn.Module, optimizer: Optimizer) -> Iterable[Tensor]:
    """Yield parameters, gradients, buffers and the optimizer's state."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
