"""Which layers of a network can be factorized, and the replacement of a layer by its twin."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from app.lowrank.conv import FactoredConv2d
from app.lowrank.layer import FactoredLayer
from app.lowrank.linear import FactoredLinear
from app.lowrank.schedule import minimum_rank

Twin = TypeVar("Twin", bound=nn.Module)

FACTORED: dict[type[nn.Module], type[FactoredLayer]] = {
    nn.Linear: FactoredLinear,
    nn.Conv2d: FactoredConv2d,
}
"""The twin of each layer type. The exact type counts: a subclass may use its weight otherwise."""

LINEAR_MAPS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.Bilinear)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What becomes of one layer of the network."""

    name: str
    """Dense parameter name, such as blocks.0.attn.qkv.weight; kept after a conversion."""
    shape: tuple[int, ...]
    """Shape of the dense weight."""
    is_linear_map: bool
    """Whether it is the weight of a linear, convolution or attention module."""
    stays_dense: str | None
    """Why the layer is not factorized; None if it is."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (m, n) of the weight read as a matrix."""
        return matrix_shape(self.shape)


def matrix_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """Read a weight's shape as that of a matrix: all but the leading dimension are flattened."""
    return shape[0], torch.Size(shape[1:]).numel()


def survey(
    model: nn.Module,
    *,
    keep_first_layer: bool,
    keep_last_layer: bool,
    minimum_rank_fraction: float,
) -> list[LayerReport]:
    """List every multidimensional weight of a dense network, in the order of its modules.

    The first and the last layer are those of the network, not of the layers that can be factorized:
    nothing else stays full-rank for the sake of a head that is not eligible anyway.

    Args:
        model: a dense network.
        keep_first_layer, keep_last_layer: leave the network's first or last layer full-rank.
        minimum_rank_fraction: share of min(m, n) below which no rank falls.
    """
    found = [
        (f"{path}.{key}" if path else key, module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    layers = [entry for entry in found if isinstance(entry[1], (*LINEAR_MAPS, nn.Embedding))]
    first, last = (layers[0][0], layers[-1][0]) if layers else ("", "")
    holders = _holders(model)
    reports = []
    for name, module, key, parameter in found:
        if (reason := _why_not(module, key, minimum_rank_fraction)) is None:
            if module is model:
                reason = "the model itself is this layer, and nothing holds it"
            elif not parameter.requires_grad:
                reason = "not trained"
            elif holders[id(parameter)] > 1:
                reason = "tied to another layer's weight"
            elif keep_first_layer and name == first:
                reason = "the network's first layer (keep_first_layer)"
            elif keep_last_layer and name == last:
                reason = "the network's last layer (keep_last_layer)"
        reports.append(
            LayerReport(
                name=name,
                shape=tuple(parameter.shape),
                is_linear_map=isinstance(module, LINEAR_MAPS),
                stays_dense=reason,
            )
        )
    return reports


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds the weight of this dense parameter name."""
    return model.get_submodule(name.rpartition(".")[0])


def factorize_layer(
    model: nn.Module, name: str, U: Tensor, core: Tensor, Vh: Tensor
) -> FactoredLayer:
    """Put the factorized twin in the place of a dense layer.

    Args:
        model: the network; changed in place.
        name: dense parameter name.
        U: (m, r). core: (r, r). Vh: (r, n).
    """
    dense = get_layer(model, name)
    return _replace(model, dense, FACTORED[type(dense)].from_dense(dense, U, core, Vh))


def to_dense(model: nn.Module) -> nn.Module:
    """Put the dense twin in the place of every factorized layer, in place, and return the model."""
    for module in list(model.modules()):
        if isinstance(module, FactoredLayer):
            _replace(model, module, module.to_dense())
    return model


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Count the numbers in the trained parameters, and in all parameters."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters)


def _why_not(module: nn.Module, key: str, minimum_rank_fraction: float) -> str | None:
    """Say why a weight cannot be factorized, judging by its module alone; None if it can be."""
    kind = type(module)
    if kind not in FACTORED or key != "weight":
        return f"{kind.__name__} is not factorized"
    if module._forward_pre_hooks or module._forward_hooks or module._backward_hooks:
        return "has hooks, which its replacement would lose"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"grouped convolution ({module.groups} groups)"
    weight = module.weight
    assert isinstance(weight, Tensor)
    m, n = matrix_shape(weight.shape)
    r = minimum_rank(min(m, n), minimum_rank_fraction)
    if r * (m + n) + r * r >= m * n:
        return "too small to save anything at any rank"
    return None


def _holders(model: nn.Module) -> dict[int, int]:
    """Count the modules that hold each parameter, by the parameter's id."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _replace(model: nn.Module, old: nn.Module, new: Twin) -> Twin:
    """Put a module in the place of another, wherever the network holds it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return new
