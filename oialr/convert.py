"""A layer's replacement by its twin of the same function, and the way back."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from oialr.layer_survey import LayerReport
from oialr.layers.base import FACTOR_NAMES, FactoredLayer, FactoredParts
from oialr.layers.registry import adapter_of, claims, kind_of
from oialr.layers.twin import FactoredTwin
from oialr.replaced import retire


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds the weight of this dense parameter name.

    Where the weight is factorized, this is the module that holds its factors.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, FactoredParts):
        return module.part(key) or module
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
    if claim := claims(model).get(module):
        enclosing_path, enclosing = claim
        opened = kind_of(enclosing).opened(enclosing)
        _replace(model, enclosing, opened, enclosing_path)
    adapter = adapter_of(type(module))
    assert adapter is not None
    twin, layer = adapter.factorize(module, key, factors)
    _replace(model, module, twin, path)
    return layer


def densify_layer(model: nn.Module, name: str) -> nn.Parameter:
    """Put the dense twin in the place of a factorized layer, and return its weight.

    A layer of several weights, such as attention, stays what it is, with one of them dense.

    Args:
        model: the network; changed in place.
        name: dense parameter name.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, FactoredParts):
        return module.densify(key)
    assert isinstance(module, FactoredTwin)
    dense = module.to_dense()
    _replace(model, module, dense, path)
    return dense.get_parameter(key)


def to_dense(model: nn.Module) -> nn.Module:
    """Put the dense twin in the place of every factorized layer, in place, and return the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FactoredTwin | FactoredParts):
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


def _replace(model: nn.Module, old: nn.Module, new: nn.Module, path: str) -> None:
    """Put a module in the place of another, wherever the network holds it."""
    if new is old:
        return
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    retire(old, path, [*kind_of(old).weights, *FACTOR_NAMES])
