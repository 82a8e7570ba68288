"""Networks, and what low-rank trainings make of them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_time import rank_at
from oialr.convert import get_layer
from oialr.layer_survey import LayerReport, survey
from oialr.linalg.svd import economy_svd


def perceptron(width: int) -> nn.Module:
    """Build four linear layers of a width with GELU between them."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def of_timm(name: str, **arguments: Any) -> nn.Module:
    """Build a network of timm with random weights."""
    from oialr.compatibility import import_torchvision

    import_torchvision()
    import timm

    network: nn.Module = timm.create_model(name, **arguments)
    return network


def low_rank_layers(model: nn.Module) -> list[LayerReport]:
    """List the layers that OIALR factorizes by its defaults; in a perceptron, all."""
    keep_last_layer = not isinstance(model, nn.Sequential)
    reports = survey(model, keep_last_layer=keep_last_layer)
    return [report for report in reports if report.stays_dense is None]


def with_two_factors(model: nn.Module, fraction: float) -> nn.Module:
    """Return a copy of a network with layers A B, both trained, in the place of W.

    A = U sqrt(diag(s)) (m, r) and B = sqrt(diag(s)) Vh (r, n) of the truncated SVD of W (spectral
    initialization, arXiv 2105.01029). A layer of which this saves nothing stays as it is.

    Args:
        model: a dense network.
        fraction: of the full rank.
    """
    model = copy.deepcopy(model)
    for report in low_rank_layers(model):
        m, n = report.matrix_shape
        r = rank_at(fraction, report.full_rank, next(model.parameters()).device)
        if report.groups > 1 or r * (m + n) >= m * n:
            continue
        path = report.name.rpartition(".")[0]
        layer = get_layer(model, report.name)
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], two_factors(layer, r))
    return model


def two_factors(layer: nn.Module, r: int) -> nn.Sequential:
    """Return the layer B and then A of rank r for a linear layer or a 2-D convolution."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = layer.weight.detach()
    U, s, Vh = economy_svd(weight.flatten(1))
    A, B = U[:, :r] * s[:r].sqrt(), s[:r].sqrt()[:, None] * Vh[:r]
    first: nn.Linear | nn.Conv2d
    second: nn.Linear | nn.Conv2d
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, r, bias=False)
        second = nn.Linear(r, layer.out_features, bias=has_bias)
    else:
        first = nn.Conv2d(
            layer.in_channels,
            r,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            bias=False,
        )
        second = nn.Conv2d(r, layer.out_channels, 1, bias=has_bias)
    first.weight = nn.Parameter(_as(B, first.weight, weight))
    second.weight = nn.Parameter(_as(A, second.weight, weight))
    second.bias = layer.bias
    return nn.Sequential(first, second)


def _as(matrix: Tensor, weight: Tensor, dense: Tensor) -> Tensor:
    """Give a matrix the shape of a weight, and the memory layout that the dense one has."""
    shaped = matrix.reshape(weight.shape)
    if dense.dim() == 4 and dense.is_contiguous(memory_format=torch.channels_last):
        return shaped.contiguous(memory_format=torch.channels_last)
    return shaped.contiguous()
