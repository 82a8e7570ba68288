"""A trained network for its use: plain layers in the place of factorized ones."""

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import nn

from oialr.convert import put_in_place
from oialr.copies import copied
from oialr.errors import of_the_machine
from oialr.layers.base import FactoredParts, hooks_of
from oialr.layers.cost import MANY_ROWS
from oialr.layers.registry import adapter_of
from oialr.layers.twin import FactoredTwin
from oialr.linalg.precision import full_precision
from oialr.naming import some
from oialr.sharding import whole

logger = logging.getLogger(__name__)


@full_precision()
def for_inference(
    model: nn.Module, *, rows: int = MANY_ROWS, exclude: Sequence[str] = ()
) -> nn.Module:
    """Make a network of plain layers with the same function; the given one stays as it is.

    A factorized layer becomes an nn.Sequential of two nn.Linear or two convolutions, with the core
    merged into the first factor, or the dense layer where that is faster or where its kind is no
    sequence of two. Of nn.MultiheadAttention all four projections become layers of that kind, as
    children of a module that attends by the formula; it stays nn.MultiheadAttention where dense
    projections are faster. All types of layers are torch's own, so that quantization and exporters
    find them, and the way of execution depends on no shape of the input. What takes a layer's place
    has its hooks.

    Code that reads ``weight`` or ``in_features`` of a layer, instead of calling it, does not find
    them in an nn.Sequential: exclude such layers.

    Args:
        model: a network with factorized layers or without; DistributedDataParallel, DataParallel or
            torch.compile around it are left away.
        rows: that a layer's input has (batch times tokens, or times positions in an image), for the
            choice between two layers and a dense one; by default many.
        exclude: shell-style patterns of module names, such as "decoder.*", that shall be dense.

    Returns:
        A copy in evaluation mode, without gradients, on the same devices.

    Raises:
        ValueError: rows is not positive, or a pattern matches no factorized layer.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows!r}")
    plain = copied(whole(model)).eval().requires_grad_(False)
    layers = _factorized(plain)
    for pattern in exclude:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise ValueError(f"exclude: the pattern {pattern!r} matches no factorized layer")
    for path, layer in layers.items():
        is_excluded = any(fnmatchcase(path, pattern) for pattern in exclude)
        new = layer.plain(None if is_excluded else rows)
        if adapter_of(type(new)) is not None:  # as it was before the method
            logger.info("%s is dense: %s", path, "excluded" if is_excluded else "faster so")
        new.__dict__.update(hooks_of(layer))
        put_in_place(plain, layer, new)
    _leave_fused_kernels(plain)
    return plain.requires_grad_(False)


def for_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """Make a network of plain layers, as :func:`for_inference`, where it can be called so.

    Layers that the network does more with than to call them with an input become dense: code that
    reads their weight, or gives an ``output_size``, fails with two layers in their place.

    Args:
        model: a network that can be called.
        args, kwargs: of a call.
    """
    paths = list(_factorized(model))

    def try_out(plain: Sequence[str]) -> nn.Module | None:
        """Return the network with these as plain layers, and the others dense; None: it fails."""
        others = [escape(path) for path in paths if path not in plain]
        made = for_inference(model, exclude=others)
        try:
            with torch.no_grad():
                made(*args, **kwargs)
        except Exception as error:  # whatever the code of the network makes of it
            if of_the_machine(error):
                raise
            return None
        return made

    def called(group: Sequence[str]) -> list[str]:
        """Return those that can be plain layers."""
        if not group or try_out(group) is not None:
            return list(group)
        half = len(group) // 2
        return called(group[:half]) + called(group[half:]) if half else []

    if not paths:
        return for_inference(model)
    if (made := try_out(paths)) is not None:
        return made
    plain = called(paths)
    logger.info(
        "dense, since the network fails with two layers in their place: %s",
        some([path for path in paths if path not in plain]),
    )
    return try_out(plain) or for_inference(model, exclude=["*"])


def _factorized(model: nn.Module) -> dict[str, FactoredTwin | FactoredParts]:
    """Find factorized layers by their paths; those inside of another are the matter of that one."""
    layers: dict[str, FactoredTwin | FactoredParts] = {}
    inside: set[nn.Module] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, FactoredTwin | FactoredParts) and layer not in inside:
            layers[path] = layer
            inside.update(layer.modules())
    return layers


def _leave_fused_kernels(model: nn.Module) -> None:
    """Let nn.TransformerEncoderLayer call its children where they are not dense any more.

    In evaluation it hands their weights to one kernel otherwise, and nn.TransformerEncoder looks at
    those of its first layer.
    """
    changed = set()
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and not (
            isinstance(layer.linear1, nn.Linear)
            and isinstance(layer.linear2, nn.Linear)
            and type(layer.self_attn) is nn.MultiheadAttention
        ):
            layer.activation_relu_or_gelu = 0
            changed.add(layer)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and changed & set(encoder.modules()):
            encoder.use_nested_tensor = False
