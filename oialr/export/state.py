"""A network for others: dense under the original names, or with two factors for each weight."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oialr.convert import densify_layer, to_dense
from oialr.copies import copied
from oialr.errors import of_the_machine
from oialr.linalg.precision import full_precision
from oialr.sharding import whole
from oialr.skeleton import dense_skeleton, factored_weights


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of the dense network, under the names that it had before a conversion.

    Args:
        model: the network; it stays as it is. Wrappers around it are left away.

    Returns:
        Tensors on the network's devices, in the order of the dense network. Weights of factorized
        layers are formed, all other tensors are the network's own.
    """
    known: dict[int, Any] = {}
    model = whole(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        known[id(tensor)] = tensor  # not copied
    return to_dense(copied(model, known)).state_dict()


@full_precision()
def two_factors(model: nn.Module) -> nn.Module:
    """Make a copy of a network that holds two factors of each factorized weight.

    The core is merged into the first of them; the second has the dtype of the frozen bases, which
    loses nothing. Where two factors store no less than the weight, that is held instead.

    Args:
        model: the network; it stays as it is. Wrappers around it are left away.

    Returns:
        A network as a release makes it, on the same devices, which :func:`oialr.save` stores.
    """
    model = copied(whole(model))
    names = {layer: name for name, layer in factored_weights(model).items()}  # once, if it has two
    for layer, name in names.items():
        pair = layer.pair()
        if not layer.released:
            pair = pair[0], layer.Vh.detach()
        if sum(factor.numel() for factor in pair) < math.prod(layer.reading.shape):
            layer.set_factors(*pair)
        else:
            densify_layer(model, name)
    return model


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


def _load_strictly(model: nn.Module, weights: Mapping[str, Tensor], named: str) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        if of_the_machine(error):
            raise
        problem = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise ValueError(f"{named} belongs to another network: {problem}") from error
    return model


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without numbers, for a skeleton."""
    return {name: tensor.to("meta") for name, tensor in state.items()}
