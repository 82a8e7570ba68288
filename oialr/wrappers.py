"""What frameworks put around a network and its optimizer.

Wrappers are told by the names of their types, since none of the packages needs to be there.
"""

import gc
import logging
import sys
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from oialr.naming import names_of

logger = logging.getLogger(__name__)

INSIDE = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",  # of torch.compile
    "_FabricModule": "_forward_module",  # of Lightning
}
"""The attribute that holds the network, by the name of the wrapper's type."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside whatever is around it, such as DistributedDataParallel."""
    while inside := _name_inside(model):
        model = getattr(model, inside)
    return model


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside that of accelerate, or of Lightning's Fabric."""
    while {"AcceleratedOptimizer", "_FabricOptimizer"} & {*names_of(optimizer)}:
        inside: Any = optimizer
        optimizer = inside.optimizer
    return optimizer


class Wrappers:
    """Those around a network, where its parameters are replaced: some must be made anew."""

    def __init__(self, model: nn.Module) -> None:
        """Take hold of the network; its wrappers are looked for when something happens to it."""
        self._model = model
        self._changes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def tell(self) -> None:
        """Let every wrapper that the network has outgrown say so, at its next call.

        To be called when the network has new parameters. DistributedDataParallel from before would
        average gradients of the old ones, and torch's own message comes a step later and names
        nobody. torch.compile compiles again, but not for ever.
        """
        for wrapper in _around(self._model):
            if _is_outgrown(wrapper, self._model):
                if _refuse not in wrapper._forward_pre_hooks.values():
                    wrapper.register_forward_pre_hook(_refuse)
            elif "OptimizedModule" in names_of(wrapper) and unwrapped(wrapper) is self._model:
                self._count(wrapper)
        if getattr(self._model, "_compiled_call_impl", None) is not None:  # by its compile method
            self._count(self._model)

    def _count(self, compiled: nn.Module) -> None:
        changes = self._changes[compiled] = self._changes.get(compiled, 0) + 1
        limit = torch._dynamo.config.recompile_limit
        if changes == limit:
            logger.warning(
                "the compiled network has changed its shapes %d times, and torch.compile compiles "
                "it no more than %d times: from now on it runs without compilation. Write "
                "torch.compiler.reset() where event.shapes_changed, or raise "
                "torch._dynamo.config.recompile_limit",
                changes,
                limit,
            )


def renew_wrappers(model: nn.Module) -> None:
    """Make every DistributedDataParallel around a network anew, in its place.

    For loops that keep the wrapper where nobody can exchange it, such as that of transformers'
    Trainer, or where something else keeps it too, such as accelerate. To be called where
    ``event.shapes_changed``. torch gives a wrapper that is unpickled a reducer of its own, for the
    parameters that the network has then; so does this. Nothing is sent.

    Args:
        model: the network, whichever wrappers are around it.

    Raises:
        RuntimeError: a wrapper has another process group than the default one.
    """
    network = unwrapped(model)
    for wrapper in _around(network):
        if not _is_outgrown(wrapper, network):
            continue
        ddp: Any = wrapper
        state = ddp.__getstate__()
        del ddp.reducer, ddp.logger  # before there are others
        state["_forward_pre_hooks"] = OrderedDict(
            (key, hook) for key, hook in ddp._forward_pre_hooks.items() if hook is not _refuse
        )
        state["_module_parameters"] = [
            parameter
            for name, parameter in ddp.module.named_parameters()
            if name not in ddp.parameters_to_ignore
        ]
        hooks, state["_comm_hooks"] = ddp._comm_hooks, []
        ddp.__setstate__(state)
        for hook, its_state in hooks:
            ddp.register_comm_hook(its_state, hook)


def _around(network: nn.Module) -> list[nn.Module]:
    """Return what is around a network, or a part of it, or of which it is a part.

    Nobody tells it of its wrappers.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed and "torch._dynamo" not in sys.modules:
        return []
    parts = {*network.modules()}
    found = [thing for thing in gc.get_objects() if _wraps(thing)]
    return [
        wrapper
        for wrapper in found
        if (inside := unwrapped(wrapper)) in parts or any(m is network for m in inside.modules())
    ]


def _is_outgrown(wrapper: nn.Module, network: nn.Module) -> bool:
    """Whether a wrapper is a DistributedDataParallel to be made anew, after a change of shapes.

    One around the network itself is, and any other if the parameters whose gradients it averages
    are not those that are there.
    """
    ddp: Any = wrapper
    if "DistributedDataParallel" not in names_of(ddp):
        return False
    if unwrapped(ddp) is network:
        return True
    named = ddp.module.named_parameters()
    present = {id(parameter) for name, parameter in named if name not in ddp.parameters_to_ignore}
    return present != {id(parameter) for parameter in ddp._module_parameters}


def _wraps(thing: object) -> bool:
    return issubclass(type(thing), nn.Module) and any(name in INSIDE for name in names_of(thing))


def _refuse(wrapper: nn.Module, _: Any) -> None:
    if torch.is_grad_enabled():  # an evaluation is right
        raise RuntimeError(
            "this DistributedDataParallel was made before layers of its network changed their "
            "form, and would average gradients of parameters that are there no more. Make it anew "
            "where event.shapes_changed: oialr.renew_wrappers(model) does it in its place, or "
            "DistributedDataParallel(model.module), with the same device_ids"
        )


def _name_inside(model: nn.Module) -> str | None:
    return next((INSIDE[name] for name in names_of(model) if name in INSIDE), None)
