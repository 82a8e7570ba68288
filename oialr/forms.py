"""The form of a layer's weight, dense or factors of some rank: as a network has it, as a state has.

A stored state_dict tells the forms by its names and shapes: ``layer.weight`` is dense,
``layer.U``, ``layer.core`` and ``layer.Vh`` are low-rank, ``layer.A`` and ``layer.B`` are released.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from oialr.convert import densify_layer, factorize_layer, get_layer
from oialr.layers.base import FACTOR_NAMES, FROZEN, RELEASED, FactoredLayer, FactoredParts
from oialr.layers.reading import MatrixReading
from oialr.layers.registry import adapter_of, kind_of
from oialr.layers.twin import FactoredTwin
from oialr.obstacles import Obstacles, lost_hooks


@dataclass(frozen=True)
class Form:
    """How the weight of a layer is held."""

    rank: int | None = None
    """Of the factors; None: the weight is dense."""
    released: bool = False
    """Whether the factors are A and B, both trained."""
    groups: int = 1
    """Number of matrices that the factors are stacks of; 1 of a dense weight."""
    is_by_direction: bool = False
    """Whether the factors are those of a kernel that is read by its directions."""

    def __str__(self) -> str:
        """Describe the form within a sentence."""
        if self.rank is None:
            return "dense"
        reading = f" in a stack of {self.groups}" if self.groups > 1 else ""
        reading += " by the directions of its kernel" if self.is_by_direction else ""
        return f"{'released' if self.released else 'low-rank'} of rank {self.rank}{reading}"

    def is_read_alike(self, reading: MatrixReading) -> bool:
        """Whether factors of a weight that is read so have this form."""
        return (self.groups, self.is_by_direction) == (reading.groups, reading.is_by_direction)


DENSE = Form()


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the dense shapes of all weights that are low-rank, or of a layer that has a twin."""
    return {name: reading.shape for name, reading in _weights(model)}


def form_of(model: nn.Module, name: str) -> Form:
    """Return the present form of a weight, by its dense parameter name."""
    layer = get_layer(model, name)
    if not isinstance(layer, FactoredLayer):
        return DENSE
    return Form(layer.rank, layer.released, layer.groups, layer.reading.is_by_direction)


def stored_forms(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> dict[str, Form]:
    """Find the forms that a state has of a network's weights.

    Args:
        model: knows names and dense shapes.
        state: a state_dict.
        prefix: of the network's names in the state, such as "module.".

    Returns:
        Forms by dense parameter name, without weights that the state does not hold.

    Raises:
        ValueError: the state holds a part of a layer's factors, or factors that do not fit.
    """
    found = {}
    for name, reading in _weights(model):
        if form := _stored_form(state, prefix + factor_path(model, name), prefix + name, reading):
            found[name] = form
    return found


def state_keys(model: nn.Module, name: str, form: Form) -> list[str]:
    """Return the names under which a weight of a form is stored."""
    if form.rank is None:
        return [name]
    return [factor_path(model, name) + key for key in (RELEASED if form.released else FROZEN)]


def factor_path(model: nn.Module, name: str) -> str:
    """Return what stands before the factors of a weight in a state, such as "mha.in_proj."."""
    path, _, key = name.rpartition(".")
    module, child = model.get_submodule(path), key.removesuffix("_weight")
    is_part = kind_of(module).key_of_child(child, beside={*module._parameters}) == key
    return "".join(f"{part}." for part in (path, child if is_part else "") if part)


def check_can_take(model: nn.Module, forms: Mapping[str, Form], *, to_train: bool) -> None:
    """Find what would keep layers from taking stored forms, before any of them is changed.

    Args:
        model: the network.
        forms: to be taken, by dense parameter name.
        to_train: the layers are the method's: they must be trained, in float32 or float64.

    Raises:
        ValueError: a layer cannot be replaced by its twin, or has factors with hooks.
    """
    waiting = [
        name
        for name, form in forms.items()
        if form.rank is not None and form_of(model, name) == DENSE
    ]
    for name, form in forms.items():
        layer = get_layer(model, name)
        if not isinstance(layer, FactoredLayer) or form_of(model, name) == form:
            continue
        for factor in layer.factors:
            if reason := lost_hooks(factor):
                raise ValueError(f"{name} cannot be {form} as it was stored: it {reason}")
    obstacles = Obstacles(model) if waiting else None
    for name in waiting:
        assert obstacles
        if reason := obstacles.of(name, to_train=to_train):
            raise ValueError(f"{name} cannot turn low-rank as it was stored: {reason}")


def take_form(
    model: nn.Module, name: str, form: Form, factors: Sequence[Tensor] | None = None
) -> None:
    """Give a layer a form; only the network is changed.

    Args:
        model: the network; changed in place.
        name: dense parameter name.
        form: to be had from now on.
        factors: U, core and Vh, or A and B; None: NaN, to be loaded afterwards.
    """
    layer = get_layer(model, name)
    if isinstance(layer, FactoredLayer):
        was, reading = layer.trained, layer.reading
    else:
        was = model.get_parameter(name)
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        reading = kind_of(module).reading(module, key)
    if form.rank is None:
        if isinstance(layer, FactoredLayer):
            densify_layer(model, name).requires_grad_(was.requires_grad)
        return
    if factors is None:
        factors = _unknown_factors(was, form, reading)
    if isinstance(layer, FactoredLayer):
        layer.reading = _as_held(reading, form)
        layer.set_factors(*factors)
    else:
        layer = factorize_layer(model, name, *factors)
    for key in ("core", *RELEASED):
        if key in layer._parameters:
            getattr(layer, key).requires_grad_(was.requires_grad)


def adopt_dtypes(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """Let frozen factors, which are about to be loaded, have the dtype that they are stored in.

    Args:
        model: the network, whose layers have the forms of the state already.
        state: a state_dict.
        prefix: of the network's names in the state, such as "module.".
    """
    for name, _ in [*_weights(model)]:
        layer, start = get_layer(model, name), prefix + factor_path(model, name)
        if start + "core" in state and isinstance(layer, FactoredLayer):
            frozen, trained = state[start + "U"].dtype, state[start + "core"].dtype
            layer.store_frozen(None if frozen == trained else frozen)


def _weights(model: nn.Module) -> Iterator[tuple[str, MatrixReading]]:
    """Yield the names of low-rank weights and of those of layers with a twin, and their reading."""
    for path, module in model.named_modules():
        before, adapter = f"{path}." if path else "", adapter_of(type(module))
        if isinstance(module, FactoredTwin):
            yield f"{before}weight", module.reading
            continue
        for key in adapter.weights if adapter else ():
            part = module.part(key) if isinstance(module, FactoredParts) else None
            if part:
                yield before + key, part.reading
            elif adapter and module._parameters.get(key) is not None:
                yield before + key, adapter.reading(module, key)


def _stored_form(
    state: Mapping[str, Any], start: str, name: str, reading: MatrixReading
) -> Form | None:
    """Find the form of a weight in a state, where its factors' names have some start."""
    there = {key: state[start + key] for key in FACTOR_NAMES if start + key in state}
    is_dense = name in state
    if not there:
        return DENSE if is_dense else None
    if is_dense or tuple(there) not in {FROZEN, RELEASED}:
        both = [*([name] if is_dense else []), *(start + key for key in there)]
        raise ValueError(
            f"the state holds {', '.join(both)}, and a weight is stored either whole, as U, core "
            "and Vh, or as A and B; nothing has been loaded"
        )
    shapes = [tuple(factor.shape) for factor in there.values()]
    *stack, rank, _ = (1, 1, 1, *shapes[-1])
    form = Form(rank, released=len(there) == len(RELEASED), groups=stack[-1])
    if reading.separable and shapes != _factor_shapes(form, reading):
        form = replace(form, is_by_direction=True)
    if shapes != _factor_shapes(form, reading):
        sizes = ", ".join(f"{key} {size}" for key, size in zip(there, shapes, strict=True))
        raise ValueError(
            f"{name} of the network is {reading.shape}, and the state holds {sizes} of it; "
            "nothing has been loaded"
        )
    return form


def _factor_shapes(form: Form, reading: MatrixReading) -> list[tuple[int, ...]]:
    """Return the shapes of U, core and Vh, or A and B; none of an impossible stack."""
    try:
        m, n = _as_held(reading, form).matrix_shape
    except ValueError:
        return []
    r, g = form.rank, form.groups
    assert r is not None
    core = [] if form.released else [(r, r)]
    return [(*([g] if g > 1 else []), *size) for size in [(m, r), *core, (r, n)]]


def _as_held(reading: MatrixReading, form: Form) -> MatrixReading:
    """Return how a weight is read of which the factors have a form."""
    if reading.separable:
        reading = reading.by_direction(form.is_by_direction)
    return replace(reading, groups=form.groups)


def _unknown_factors(like: Tensor, form: Form, reading: MatrixReading) -> list[Tensor]:
    """Return factors of NaN: if they are never loaded, the next event finds that."""
    return [like.new_full(size, torch.nan) for size in _factor_shapes(form, reading)]
