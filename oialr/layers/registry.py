"""All kinds of layers that can be factorized, and the way to add one."""

from collections.abc import Iterator
from numbers import Number
from typing import Any

import torch
from torch import nn

from oialr.layers.adapter import LayerAdapter
from oialr.layers.attention import AttentionAdapter
from oialr.layers.conv import ConvAdapter
from oialr.layers.conv1d import Conv1DAdapter
from oialr.layers.conv_transpose import ConvTransposeAdapter
from oialr.layers.embedding import EmbeddingAdapter
from oialr.layers.linear import LinearAdapter
from oialr.naming import full_name

_adapters: dict[type[nn.Module] | str, LayerAdapter] = {}
"""The adapter of each type, or of its full name."""


def register_layer(adapter: LayerAdapter) -> None:
    """Let the method factorize one more kind of layers, from now on and in this process.

    To be called before the method is made, on all processes alike; docs/layers.md leads through an
    adapter.

    Args:
        adapter: of the kind.

    Raises:
        ValueError: one of its types has an adapter already.
    """
    for kind in adapter.dense_types:
        for other, taken in _adapters.items():
            # Types of the same name are different ones: a cell of a notebook that ran twice.
            same_name = isinstance(kind, str) or isinstance(other, str)
            if kind == other or (same_name and _key_name(kind) == _key_name(other)):
                raise ValueError(
                    f"{_key_name(kind)} has an adapter already, that of {taken.name}: a type has "
                    "one"
                )
    _adapters.update(dict.fromkeys(adapter.dense_types, adapter))


def adapter_of(kind: type[nn.Module]) -> LayerAdapter | None:
    """Return the adapter by which layers of a type can be factorized, if there is one.

    A subclass may use its weight otherwise than its base: it is the same kind if it adds nothing
    but plain values, no method above all; and so is what fully_shard makes of a type.
    """
    for ancestor in kind.__mro__:
        if ancestor.__module__.startswith("torch.distributed.fsdp"):
            continue
        if (adapter := _registered(ancestor)) is not None:
            return adapter if ancestor is kind or adapter.accepts_subclasses else None
        added = {key: value for key, value in vars(ancestor).items() if key not in vars(_Bare)}
        if not all(map(is_plain, added.values())):
            return None
    return None


def kind_of(layer: nn.Module) -> LayerAdapter:
    """Return the adapter of what a layer is a subclass of, whether or not it can be factorized.

    It tells how the layer's weights are read, and what a row of its input is.
    """
    for ancestor in type(layer).__mro__:
        if (adapter := _registered(ancestor)) is not None:
            return adapter
    return _LINEAR if isinstance(layer, _MAPS_OF_NO_KIND) else OTHER


def is_layer(layer: nn.Module) -> bool:
    """Whether a module is a layer that the network may begin with: of a known kind."""
    return kind_of(layer) is not OTHER


def is_linear_map(layer: nn.Module) -> bool:
    """Whether a module is a linear map, be it of a kind that can be factorized or not."""
    return kind_of(layer).is_linear_map


def claims(model: nn.Module) -> dict[nn.Module, tuple[str, nn.Module]]:
    """Find the layers whose weights an enclosing layer reads without calling them.

    Returns:
        For each of them the enclosing layer, by its path in the model and itself.
    """
    claimed = {}
    for path, layer in model.named_modules():
        adapter = adapter_of(type(layer))
        for child in adapter.children if adapter else ():
            claimed[layer.get_submodule(child)] = path, layer
    return claimed


def adapters() -> Iterator[LayerAdapter]:
    """Iterate over all adapters, each once, in the order of their registration."""
    yield from dict.fromkeys(_adapters.values())


def is_plain(value: Any) -> bool:
    """Whether a value is one that a twin can take over: nothing that computes or is trained."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, Number | str | bytes | torch.dtype | torch.device)


class _Other(LayerAdapter):
    """Whatever is of no kind that can be factorized; its weights may be measured."""

    name = "a layer of no known kind"
    dense_types = ()
    is_linear_map = False


class _OtherLinearMap(_Other):
    is_linear_map = True


class _Bare:
    """Has what Python itself puts into every class."""

    nothing: None


OTHER = _Other()
"""Of what is no layer that could be factorized, such as a token; its weights may be measured."""
_LINEAR = _OtherLinearMap()
_MAPS_OF_NO_KIND = (nn.Bilinear, nn.modules.conv._ConvNd)


def _registered(kind: type) -> LayerAdapter | None:
    return _adapters.get(kind) or _adapters.get(full_name(kind))


def _key_name(kind: type[nn.Module] | str) -> str:
    return kind if isinstance(kind, str) else full_name(kind)


for _kind in (
    LinearAdapter,
    ConvAdapter,
    ConvTransposeAdapter,
    AttentionAdapter,
    Conv1DAdapter,
    EmbeddingAdapter,
):
    register_layer(_kind())
