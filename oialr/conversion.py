"""Which layers of a network can be factorized, and the replacement of a layer by its twin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from oialr.layers.attention import (
    INPUT_PROJECTIONS,
    FactoredAttention,
    attention_of,
)
from oialr.layers.base import FACTOR_NAMES, FactoredLayer
from oialr.layers.twin import FactoredTwin
from oialr.obstacles import FACTORED, Obstacles, known_type
from oialr.options import AttentionProjection
from oialr.outputs import LINEAR_MAPS, output_layers
from oialr.replaced import retire
from oialr.schedule import minimum_rank

Twin = TypeVar("Twin", bound=nn.Module)


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
    groups: int = 1
    """Number g of matrices that the weight is read as, one above the other."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight read as a matrix: (m, n), or (m / g, n) of each group's."""
        m, n = matrix_shape(self.shape)
        return m // self.groups, n

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Shape in which the weight is factorized: (m, n), or (g, m / g, n) if g > 1."""
        return self.matrix_shape if self.groups == 1 else (self.groups, *self.matrix_shape)

    @property
    def full_rank(self) -> int:
        """Rank that the weight can have at most: the smaller side of its matrix."""
        return min(self.matrix_shape)


def matrix_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """Read a weight's shape as that of a matrix: all but the leading dimension are flattened."""
    return shape[0], torch.Size(shape[1:]).numel()


def survey(
    model: nn.Module,
    *,
    keep_first_layer: bool = False,
    keep_last_layer: bool = True,
    minimum_rank_fraction: float = 0.01,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    attention_projection: AttentionProjection = "packed",
) -> list[LayerReport]:
    """List every multidimensional weight of a dense network, in the order of its modules.

    The first and the last layer are those of the network, not of the layers that can be factorized:
    nothing else stays full-rank for the sake of a head that is not eligible anyway.

    Args:
        model: a dense network.
        keep_first_layer: leave the network's first layer full-rank.
        keep_last_layer: leave the layers full-rank that produce the network's outputs
            (:func:`oialr.outputs.output_layers`).
        minimum_rank_fraction: share of min(m, n) below which no rank falls.
        include, exclude: shell-style patterns of module names, such as "blocks.*.attn.*". A layer
            is factorized only if it matches one of the first and none of the second.
        attention_projection: whether in_proj_weight of nn.MultiheadAttention is one matrix or a
            stack of three.

    Raises:
        ValueError: a pattern matches no module that holds a multidimensional weight.
    """
    found = [
        (path, module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    _check_patterns([path for path, *_ in found], include=include, exclude=exclude)
    layers = [
        module
        for _, module, key, _ in found
        if _is_linear_map(module, key) or isinstance(module, nn.Embedding)
    ]
    kept_first = layers[:1] if keep_first_layer else []
    kept_last = output_layers(model) if keep_last_layer else []
    obstacles = Obstacles(model)
    reports = []
    for path, module, key, parameter in found:
        groups = _groups(module, key, attention_projection)
        report = LayerReport(
            name=f"{path}.{key}" if path else key,
            shape=tuple(parameter.shape),
            is_linear_map=_is_linear_map(module, key),
            stays_dense=None,
            groups=groups,
        )
        if (reason := _why_not(obstacles, module, report, minimum_rank_fraction)) is None:
            if not _first_match(path, include):
                reason = "matches no pattern of oialr.include"
            elif pattern := _first_match(path, exclude):
                reason = f"excluded by oialr.exclude pattern {pattern!r}"
            elif module in kept_first:
                reason = "the network's first layer (keep_first_layer)"
            elif module in kept_last:
                reason = "the network's last layer (keep_last_layer)"
        reports.append(replace(report, stays_dense=reason))
    return reports


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds the weight of this dense parameter name.

    Where the weight is factorized, this is the module that holds its factors.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, FactoredAttention):
        return module.projection(key) or module
    return module


def factorize_layer(model: nn.Module, name: str, *factors: Tensor) -> FactoredLayer:
    """Put the factorized twin in the place of a dense layer.

    Args:
        model: the network; changed in place.
        name: dense parameter name.
        factors: U (m, r), core (r, r), Vh (r, n); or A (m, r), B (r, n). With groups g > 1, a
            leading dimension g each and m / g for m.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    attention = module if key in INPUT_PROJECTIONS else attention_of(model, module)
    if type(attention) is nn.MultiheadAttention:
        where = path if attention is module else path.rpartition(".")[0]
        attention = _replace(model, attention, FactoredAttention.from_dense(attention), where)
    if key in INPUT_PROJECTIONS:
        assert isinstance(attention, FactoredAttention)
        return attention.factorize(key, *factors)
    known = known_type(type(module))
    assert known is not None
    return _replace(model, module, FACTORED[known].from_dense(module, *factors), path)


def densify_layer(model: nn.Module, name: str) -> nn.Parameter:
    """Put the dense twin in the place of a factorized layer, and return its weight.

    An attention stays the factorized twin that it is, with a dense projection.

    Args:
        model: the network; changed in place.
        name: dense parameter name.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, FactoredAttention):
        return module.densify(key)
    assert isinstance(module, FactoredTwin)
    dense = _replace(model, module, module.to_dense(), path)
    return dense.get_parameter(key)


def to_dense(model: nn.Module) -> nn.Module:
    """Put the dense twin in the place of every factorized layer, in place, and return the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FactoredTwin | FactoredAttention):
            _replace(model, module, module.to_dense(), path)
    return model


def restore(
    model: nn.Module,
    layers: Sequence[LayerReport],
    ranks: Mapping[str, int | None],
    weights: Mapping[str, Tensor],
    released: Mapping[str, str] | None = None,
) -> None:
    """Give a network stored weights, whatever ranks it had then and has now.

    Args:
        model: the network, dense or factorized; changed in place.
        layers: those that may be factorized.
        ranks: of each of them by name; None: it was dense.
        weights: the network's state_dict of then.
        released: of those that a release has changed, by name, "factors" or "dense".
    """
    to_dense(model)
    forms = released or {}
    for report in layers:
        if (rank := ranks[report.name]) is not None:
            factors = empty_factors(
                model, report, rank, released=forms.get(report.name) == "factors"
            )
            factorize_layer(model, report.name, *factors)
    model.load_state_dict(weights)


def empty_factors(
    model: nn.Module, report: LayerReport, rank: int, *, released: bool = False
) -> tuple[Tensor, ...]:
    """Return U, core, Vh, or A, B, of a rank for a dense layer, with undefined values."""
    like = model.get_parameter(report.name)
    *batch, m, n = report.stack_shape
    core = [] if released else [(rank, rank)]
    return tuple(like.new_empty(*batch, *shape) for shape in [(m, rank), *core, (rank, n)])


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Count the numbers in the trained parameters, and in all parameters."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters)


def _why_not(
    obstacles: Obstacles, module: nn.Module, report: LayerReport, minimum_rank_fraction: float
) -> str | None:
    """Say why a weight cannot be factorized, whatever the method's patterns are."""
    if reason := obstacles.of(report.name):
        return reason
    m, n = report.matrix_shape
    if _is_depthwise(module):
        return f"depthwise, a grouped convolution ({module.groups} groups) of single channels"
    r = minimum_rank(report.full_rank, minimum_rank_fraction)
    if r * (m + n) + r * r >= m * n:
        return "too small to save anything at any rank"
    return None


def _is_linear_map(module: nn.Module, key: str) -> bool:
    """Whether a multidimensional parameter is the weight of a linear map: no bias and no factor."""
    is_dense = isinstance(module, LINEAR_MAPS) and not isinstance(module, FactoredLayer)
    return is_dense and key not in {"bias_k", "bias_v"}


def _is_depthwise(module: nn.Module) -> TypeGuard[nn.modules.conv._ConvNd]:
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels


def _groups(module: nn.Module, key: str, attention_projection: AttentionProjection) -> int:
    """Number of matrices that a weight is read as; a depthwise kernel is one, (m, n)."""
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return 1 if _is_depthwise(module) else module.groups
    return 3 if key == "in_proj_weight" and attention_projection == "separate" else 1


def _first_match(path: str, patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), None)


def _check_patterns(
    paths: Sequence[str], *, include: Sequence[str], exclude: Sequence[str]
) -> None:
    """Reject a pattern that matches nothing: most likely it is misspelt."""
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"{option}: the pattern {pattern!r} matches no module that holds a weight"
                )


def _replace(model: nn.Module, old: nn.Module, new: Twin, path: str) -> Twin:
    """Put a module in the place of another, wherever the network holds it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    if isinstance(old, nn.MultiheadAttention):
        retire(old, path, INPUT_PROJECTIONS)
    else:
        retire(old, path, ["weight", *FACTOR_NAMES])
    return new
