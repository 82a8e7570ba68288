"""Exponential moving average of a network's weights, through changes of their rank.

The average A of a weight W is linear in the weights of all steps. When W is replaced by a core,
W = U core V^T with frozen bases, all later weights lie in these bases, and of A there remains its
projection U^T A V, the closest that U and V can hold; what lies outside would decay like all that
is past. From a core to the next, core' = U'^T core V', the average follows by U'^T A V': exactly
where nothing is cut. This is the transport of a first moment (:mod:`oialr.optimizer_state`).
So the average of a parameter is kept where its moments are, in the optimizer's state, and is
rotated, cut, stored and loaded with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.optimizer_state import WEIGHT_AVERAGE as KEY
from oialr.wrappers import unwrapped, unwrapped_optimizer


class WeightAverage:
    """The average of all trained parameters, and of the running statistics of normalizations."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, decay: float) -> None:
        """Start with the weights after the first step.

        Args:
            model: the network, whichever wrappers are around it.
            optimizer: of its parameters; its state holds their averages.
            decay: share of the average that remains at a step; less in the first steps, at most
                (1 + step) / (10 + step), so that the random start is forgotten.
        """
        self._model = unwrapped(model)
        self._optimizer = unwrapped_optimizer(optimizer)
        self._decay = decay
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after an optimizer step. Nothing here waits for the device.

        Args:
            step: optimizer steps taken.
        """
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        averages, present = [], []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if KEY in state:
                    averages.append(state[KEY])
                    present.append(parameter.detach())
                elif state or isinstance(self._optimizer, torch.optim.SGD):
                    # The others have filled the state first, which they do only where it is empty.
                    self._optimizer.state[parameter][KEY] = parameter.detach().clone()
        for name, buffer in self._model.named_buffers():
            if name not in self._buffers:
                self._buffers[name] = buffer.clone()
            elif buffer.is_floating_point():
                averages.append(self._buffers[name])
                present.append(buffer)
            else:
                self._buffers[name].copy_(buffer)
        if averages:
            torch._foreach_lerp_(averages, present, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """Return what the optimizer's state does not hold: the averages of buffers."""
        return {"buffers": self._buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a stored state, after the optimizer's."""
        devices = {name: buffer.device for name, buffer in self._model.named_buffers()}
        self._buffers = {name: b.to(devices[name]) for name, b in state["buffers"].items()}

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, state in self._optimizer.state.items():
            if KEY in state:  # by value: fully_shard reads the memory that a parameter began with
                kept = parameter.clone()
                parameter.copy_(state[KEY])
                state[KEY].copy_(kept)
        for name, buffer in self._model.named_buffers():
            if name in self._buffers:
                buffer.data, self._buffers[name] = self._buffers[name], buffer.data
