"""torch.compile for a network whose shapes change, with a way out."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from app.compatibility import compile_alone
from app.errors import typed_line


class Compiled(nn.Module):
    """A network compiled for itself: what was compiled before its shapes changed does not count.

    It compiles at its first call. Where that fails, because there is no C++ compiler for example,
    the network runs as it is from then on, after a warning. It belongs inside of
    DistributedDataParallel: what that exchanges before it calls the network must not be exchanged
    twice where one process alone cannot compile.
    """

    def __init__(self, module: nn.Module, *, backend: str = "inductor") -> None:
        """Prepare; nothing is compiled yet.

        Args:
            module: a network.
            backend: of torch.compile.
        """
        super().__init__()
        self._module = module
        self._run: Any = compile_alone(module, backend=backend)
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the network run as it is in the block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def forward(self, *inputs: Any) -> Any:
        """Call the network."""
        if self._paused:
            return self._module(*inputs)
        try:
            # Backward is compiled here too and not at its first call, which is out of reach.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return self._run(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self._run is self._module:
                raise
            warnings.warn(
                f"training.compile: the network is trained without compilation, which failed: "
                f"{typed_line(error)[:200]}",
                stacklevel=2,
            )
            self._run = self._module
            return self._run(*inputs)


class Uncompiled(nn.Module):
    """The same without compilation: its modules are called one by one, as they are written."""

    def __init__(self, module: nn.Module, compiled: Compiled) -> None:
        """Prepare.

        Args:
            module: the compiled network, or the DistributedDataParallel around it.
            compiled: what is compiled in it.
        """
        super().__init__()
        self._module = module
        self._compiled = compiled

    def forward(self, *inputs: Any) -> Any:
        """Call the network."""
        with self._compiled.paused():
            return self._module(*inputs)
