"""Exponential moving average of a network's weights, through changes of their rank.

The average A of a weight W is linear in the weights of all steps. When W is replaced by a core,
W = U core V^T with frozen bases, all later weights lie in these bases, and of A there remains its
projection U^T A V, the closest that U and V can hold; what lies outside would decay like all that
is past. From a core to the next, core' = U'^T core V', the average follows by U'^T A V': exactly
where nothing is cut. This is the transport of a first moment (:mod:`oialr.optimizer_state`).
So the average of a parameter is kept where its moments are, in the optimizer's state, and is
rotated, cut, stored and loaded with them; aside (:mod:`oialr.averages`), where there are none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.averages import WEIGHT_AVERAGE as KEY
from oialr.averages import Aside, averages_aside, has_room
from oialr.wrappers import unwrapped, unwrapped_optimizer

STATISTICS = ("running_mean", "running_var")
"""Names of the buffers that are averaged: an average of others, such as masks, is worth nothing."""


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
                average = self._present(parameter)
                if average is not None:
                    averages.append(average)
                    present.append(parameter.detach())
        for name, buffer in self._statistics().items():
            if name in self._buffers:
                averages.append(self._buffers[name])
                present.append(buffer)
            else:
                self._buffers[name] = buffer.clone()
        if averages:
            torch._foreach_lerp_(averages, present, weight)

    def _present(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the average of a parameter; None where it begins now, or where none is needed."""
        state, aside = self._optimizer.state, averages_aside(self._optimizer)
        if KEY in state.get(parameter, {}):
            average: Tensor = state[parameter][KEY]
            return average
        kept = aside.get(parameter)
        if has_room(self._optimizer, parameter):
            aside.pop(parameter, None)
            if kept and kept.had_state:  # and begins anew after an event
                state[parameter][KEY] = kept.average
                return kept.average
            state[parameter][KEY] = parameter.detach().clone()
        elif kept:
            return kept.average
        elif parameter.requires_grad:
            aside[parameter] = Aside(parameter.detach().clone(), had_state=False)
        return None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """Return what the optimizer's state does not hold, averages of buffers above all."""
        aside = averages_aside(self._optimizer)
        return {
            "buffers": self._buffers,
            "aside": {
                i: {"average": aside[parameter].average, "had_state": aside[parameter].had_state}
                for i, parameter in enumerate(self._parameters())
                if parameter in aside
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a stored state, after the optimizer's.

        Raises:
            ValueError: an average has not the shape of its parameter.
        """
        parameters, aside = self._parameters(), averages_aside(self._optimizer)
        stored = state.get("aside", {})  # states of earlier versions are without
        for i, kept in stored.items():
            if i >= len(parameters) or kept["average"].shape != parameters[i].shape:
                raise ValueError(
                    "the stored averages do not fit the optimizer: load the network's state, and "
                    "then the optimizer's, before that of the average"
                )
        aside.clear()
        for i, kept in stored.items():
            average = kept["average"].to(parameters[i].device, copy=True)
            aside[parameters[i]] = Aside(average, kept["had_state"])
        statistics = self._statistics()
        self._buffers = {  # those of earlier versions had all buffers of the network
            name: stored.to(statistics[name].device, copy=True)
            for name, stored in state["buffers"].items()
            if name in statistics
        }

    def _statistics(self) -> dict[str, Tensor]:
        """Return the buffers that are averaged, by name."""
        named = self._model.named_buffers()
        return {name: buffer for name, buffer in named if name.split(".")[-1] in STATISTICS}

    def _parameters(self) -> list[nn.Parameter]:
        """Return all that the optimizer holds, in its order."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def _swap(self) -> None:
        aside = averages_aside(self._optimizer).items()
        averages: dict[Tensor, Tensor] = {parameter: kept.average for parameter, kept in aside}
        states = self._optimizer.state.items()
        averages |= {parameter: state[KEY] for parameter, state in states if KEY in state}
        for parameter, average in averages.items():
            # By value: fully_shard reads the memory that a parameter began with.
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)
        for name, buffer in self._statistics().items():
            if name in self._buffers:
                buffer.data, self._buffers[name] = self._buffers[name], buffer.data
