"""A layer's replacement by its twin of the same function, and the way back."""

from torch import Tensor, nn

from oialr.layers.base import FACTOR_NAMES, FactoredLayer, FactoredParts, hooks_of
from oialr.layers.registry import adapter_of, claims, kind_of
from oialr.layers.twin import FactoredTwin
from oialr.linalg.precision import full_precision
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


@full_precision()
def densify_layer(model: nn.Module, name: str, *, with_hooks: bool = True) -> nn.Parameter:
    """Put the dense twin in the place of a factorized layer, and return its weight.

    A layer of several weights, such as attention, stays what it is while one of them is factorized.

    Args:
        model: the network; changed in place.
        name: dense parameter name.
        with_hooks: let the twin have the layer's hooks.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, FactoredParts):
        weight = module.densify(key)
    else:
        assert isinstance(module, FactoredTwin)
        dense = module.to_dense()
        if with_hooks:
            dense.__dict__.update(hooks_of(module))
        _replace(model, module, dense, path)
        weight = dense.get_parameter(key)
    if with_hooks:
        _close(model, path)
    return weight


def _close(model: nn.Module, path: str) -> None:
    """Put the dense twin in the place of attention that has no factors any more.

    What is computed with its weights is then what a network computes that is loaded in this form,
    to the last bit.

    Args:
        model: the network; changed in place.
        path: of what has become dense: of attention, or of a child of it.
    """
    for place in filter(None, (path, path.rpartition(".")[0])):
        module = model.get_submodule(place)
        is_factored = any(isinstance(layer, FactoredLayer) for layer in module.modules())
        if isinstance(module, FactoredParts) and not is_factored:
            _replace(model, module, module.to_dense(), place)


@full_precision()
def to_dense(model: nn.Module) -> nn.Module:
    """Put the dense twin in the place of every factorized layer, in place, and return the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FactoredTwin | FactoredParts):
            dense = module.to_dense()
            dense.__dict__.update(hooks_of(module))
            _replace(model, module, dense, path)
    return model


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the network holds it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def _replace(model: nn.Module, old: nn.Module, new: nn.Module, path: str) -> None:
    """Put a module in the place of another, and let the old one say so to whoever has kept it."""
    if new is not old:
        put_in_place(model, old, new)
        retire(old, path, [*kind_of(old).weights, *FACTOR_NAMES])
