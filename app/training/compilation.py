"""torch.compile for a network whose shapes change, with a way out."""

import warnings
from typing import Any

import torch
from torch import nn

from app.compatibility import compile_alone
from app.errors import typed_line


class Compiled(nn.Module):
    """A network compiled for itself: what was compiled before its shapes changed does not count.

    It compiles at its first call. Where that fails, because there is no C++ compiler for example,
    the network runs as it is from then on, after a warning.
    """

    def __init__(self, module: nn.Module, *, backend: str = "inductor") -> None:
        """Prepare; nothing is compiled yet.

        Args:
            module: a network, or the DistributedDataParallel around it.
            backend: of torch.compile.
        """
        super().__init__()
        self._module = module
        self._run: Any = compile_alone(module, backend=backend)

    def forward(self, *inputs: Any) -> Any:
        """Call the network."""
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
