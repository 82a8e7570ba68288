"""Mixed precision of forward and backward; weights, factors and optimizer state are float32."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from app.config.settings import PrecisionName

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """Autocast, and for float16 the scaling of the loss that keeps small gradients from vanishing.

    Factorizations see the float32 weights and run outside of autocast.
    """

    def __init__(self, name: "PrecisionName", device: torch.device) -> None:
        """Choose the dtype of products; "float32" changes nothing."""
        self._device_type = device.type
        self._dtype = DTYPES.get(name)
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Run backward; the gradients are scaled until :meth:`step`."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, model: nn.Module, clip: float | None) -> None:
        """Take the optimizer's step on gradients of at most a norm.

        In float16 gradients may overflow: then the step is skipped and the scale halved. Finding
        that out waits for the device, which torch offers no way around for most optimizers.

        Args:
            optimizer: holds the gradients.
            model: its trained parameters make up the norm.
            clip: the largest norm; None: any.
        """
        if clip is not None:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and its age; empty without scaling."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a stored scale. A run that changed its precision starts with a new one."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)
