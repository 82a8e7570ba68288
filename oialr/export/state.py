"""States of a network for others: dense under the original names, or as two factors each."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oialr.convert import densify_layer, factorize_layer, to_dense
from oialr.skeleton import dense_skeleton, factored_weights
from oialr.wrappers import unwrapped

FACTORS, VERSION = "oialr-factors", 1
"""What a file of factors says of itself."""


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of the dense network, under the names that it had before a conversion.

    Args:
        model: the network; it stays as it is. Wrappers around it are left away.

    Returns:
        Tensors on the network's devices, in the order of the dense network. Weights of factorized
        layers are formed, all other tensors are the network's own.
    """
    copied: dict[int, Any] = {}
    model = unwrapped(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        copied[id(tensor)] = tensor  # not copied
    return to_dense(copy.deepcopy(model, copied)).state_dict()


def factor_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of a network with two factors for each factorized weight.

    The core is merged into the first of them. Where two factors store no less than the weight, that
    is in the state.

    Args:
        model: the network; it stays as it is. Wrappers around it are left away.

    Returns:
        A dictionary that torch.save stores and :func:`load_factors` takes: ``format`` and
        ``version``; ``layers``, which has, by dense parameter name, the ``module`` that holds the
        factors and the dense ``shape``; ``weights``, the state_dict with the factors A
        (m, r) and B (r, n) of that module, with a leading dimension for groups.
    """
    model = copy.deepcopy(unwrapped(model))
    layers = {}
    for name, layer in factored_weights(model).items():
        pair = layer.pair()
        shape = layer.form_weight().shape
        if sum(factor.numel() for factor in pair) < math.prod(shape):
            layer.set_factors(*pair)
            layers[name] = {"module": _path(model, layer), "shape": list(shape)}
        else:
            densify_layer(model, name)
    return {"format": FACTORS, "version": VERSION, "layers": layers, "weights": model.state_dict()}


def load_factors(model: nn.Module, source: str | Path | Mapping[str, Any]) -> nn.Module:
    """Give a network the factors and all other numbers that :func:`factor_state` returned.

    Nothing is changed where they do not fit.

    Args:
        model: the network as it is built, or with layers of any ranks; changed in place.
        source: a file, or what is in it.

    Returns:
        The network. Its factorized layers are those that a release makes: both factors are
        parameters, and it can be trained on.

    Raises:
        ValueError: the file is none of factors, or belongs to another network.
    """
    named = str(source) if isinstance(source, str | Path) else "the state"
    stored = read_stored(source) if isinstance(source, str | Path) else source
    if not is_factors(stored):
        raise ValueError(f"{named} holds no factors")
    if stored["version"] > VERSION:
        raise ValueError(f"{named} is of version {stored['version']}; known is {VERSION}")
    _load(dense_skeleton(model), {**stored, "weights": _shapes_of(stored["weights"])}, named)
    return _load(to_dense(model), stored, named)


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of a state; those that several names share count once."""
    sizes = {(x.data_ptr(), x.numel()): x.numel() * x.element_size() for x in state.values()}
    return sum(sizes.values())


def read_stored(path: str | Path) -> Any:
    """Read what torch.save has written, numbers and names alone.

    Raises:
        ValueError: it is nothing of that kind.
        OSError: as of open.
    """
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the bytes make of it
            raise ValueError(
                f"{path} is no file of weights: torch.load finds no tensors and names alone in it"
            ) from error


def is_factors(stored: Any) -> bool:
    """Whether what :func:`read_stored` returned is a state of factors."""
    return isinstance(stored, Mapping) and stored.get("format") == FACTORS


def load_dense(model: nn.Module, stored: Any, named: str) -> nn.Module:
    """Give a dense network a state_dict, all of it or nothing.

    Args:
        model: changed in place.
        stored: what a file holds.
        named: the file, for errors.

    Raises:
        ValueError: the state belongs to another network.
    """
    if not (isinstance(stored, Mapping) and all(isinstance(v, Tensor) for v in stored.values())):
        raise ValueError(f"{named} holds no state_dict")
    _load_strictly(dense_skeleton(model), _shapes_of(stored), named)
    return _load_strictly(model, stored, named)


def _load(model: nn.Module, stored: Mapping[str, Any], named: str) -> nn.Module:
    shapes = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    weights = stored["weights"]
    for name, layer in stored["layers"].items():
        if shapes.get(name) != layer["shape"]:
            raise ValueError(
                f"{named} belongs to another network: it holds {name} {tuple(layer['shape'])}, and "
                f"this one has {tuple(shapes[name]) if name in shapes else 'none of that name'}"
            )
        device = model.get_parameter(name).device
        factors = [torch.empty_like(weights[f"{layer['module']}.{x}"], device=device) for x in "AB"]
        factorize_layer(model, name, *factors)
    return _load_strictly(model, weights, named)


def _load_strictly(model: nn.Module, weights: Mapping[str, Tensor], named: str) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problem = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise ValueError(f"{named} belongs to another network: {problem}") from error
    return model


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without numbers, for a skeleton."""
    return {name: tensor.to("meta") for name, tensor in state.items()}


def _path(model: nn.Module, layer: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is layer)
