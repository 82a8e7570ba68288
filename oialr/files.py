"""Networks as files that describe themselves: safetensors with the forms of the layers beside.

The file holds the network's state_dict, without an optimizer. Its metadata, under "oialr", are a
JSON object: the layout's number, the library's version, for each low-rank layer its dense shape,
rank, and whether it was released; names of tensors that are stored once for several; a checksum.
Whoever reads safetensors reads the tensors.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from oialr.forms import (
    DENSE,
    check_can_take,
    factor_path,
    form_of,
    state_keys,
    stored_forms,
    weight_shapes,
)
from oialr.layers.base import FACTOR_NAMES
from oialr.linalg.checksum import checksum
from oialr.naming import some
from oialr.preparation import prepare
from oialr.sharding import whole

Model = TypeVar("Model", bound=nn.Module)

KEY = "oialr"
"""Of the metadata."""
LAYOUT = 1
"""Number of the layout of the metadata."""


def save(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Store a network, with the ranks of its layers.

    The file appears under its name when it is complete; one that is there stays until then.

    Args:
        model: the network, whichever wrappers are around it.
        file: such as "network.safetensors".

    Raises:
        ImportError: the package safetensors is not installed.
        ValueError: the state of the network holds something that is no tensor, or a tensor of a
            type that such a file cannot have.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from oialr import __version__

    network = whole(model)
    tensors, same = _tensors_of(network)
    forms = {name: form_of(network, name) for name in weight_shapes(network)}
    description = {
        "layout": LAYOUT,
        "version": __version__,
        "layers": {
            name: {"shape": shape, "rank": forms[name].rank, "released": forms[name].released}
            for name, shape in weight_shapes(network).items()
            if forms[name] != DENSE
        },
        "same": same,
        "checksum": _checksum(tensors),
    }
    target = Path(file).absolute()
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    os.close(handle)
    try:
        try:
            save_file(tensors, partial, {"format": "pt", KEY: json.dumps(description)})
        except KeyError as error:  # safetensors looks the types of tensors up
            names = [name for name, tensor in tensors.items() if tensor.dtype in error.args]
            raise ValueError(f"{some(names)}: safetensors cannot store {error}") from None
        except SafetensorError as error:
            raise OSError(f"{target}: cannot be written: {error}") from None
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(partial).chmod(0o666 & ~mask)  # a temporary file is for its owner alone
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def load(model: Model, file: str | os.PathLike[str]) -> Model:
    """Give a network stored weights, and its layers the ranks that they had.

    The network is prepared (:func:`oialr.prepare`); where :class:`oialr.OIALR` has it, the
    optimizer follows. Nothing is changed unless all fits.

    Args:
        model: dense or low-rank, of whatever ranks, whichever wrappers are around it.
        file: written by :func:`save`.

    Returns:
        The model.

    Raises:
        ImportError: the package safetensors is not installed.
        ValueError: the file is damaged, or none of ours, or of another network.
        OSError: the file cannot be read.
    """
    state = _read(Path(file))
    network = whole(prepare(model))
    if empty := [name for name, value in network.state_dict().items() if value.is_meta]:
        raise ValueError(
            f"the network has no memory on the device meta, such as for {some(empty)}: nothing can "
            f"be loaded into it; build it on another device, or call its to_empty before"
        )
    try:
        _check_fits(network, state)
    except ValueError as error:
        raise ValueError(f"{file} does not fit the network: {error}") from None
    network.load_state_dict(state)
    return model


def is_stored(file: str | os.PathLike[str]) -> bool:
    """Whether a file is one of :func:`save`, as far as its head tells; its tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            return KEY in (stored.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _tensors_of(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what is stored, on the CPU, and the names of what is stored under another name."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages = set()
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} of the network's state is no tensor, and cannot be stored")
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in seen:
            same[name] = seen[place]
            continue
        seen[place] = name
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        is_all = storage.nbytes() == tensor.numel() * tensor.element_size()
        is_another = storage.data_ptr() in storages  # two looks at one memory, in other shapes
        tensors[name] = tensor.clone() if is_another or not is_all else tensor
        storages.add(storage.data_ptr())
    return tensors, same


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    with torch.no_grad():
        ordered = [tensors[name] for name in sorted(tensors)]
        return int(checksum(ordered, torch.device("cpu")))


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from None
    if KEY not in metadata:
        raise ValueError(f"{file} was not written by oialr.save: it does not tell of any ranks")
    try:
        description = json.loads(metadata[KEY])
        layout, same, expected = (description[key] for key in ("layout", "same", "checksum"))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged: its metadata cannot be read") from None
    if layout != LAYOUT:
        raise ValueError(
            f"{file} has layout {layout} (oialr {description.get('version')}), and this version "
            f"reads {LAYOUT}"
        )
    if _checksum(tensors) != expected or not set(same.values()) <= set(tensors):
        raise ValueError(f"{file} is damaged: its tensors are not those that were written")
    return tensors | {name: tensors[other] for name, other in same.items()}


def _check_fits(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Find whatever torch would find only after it has loaded a part."""
    forms = stored_forms(network, state)
    check_can_take(network, forms, to_train=False)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    dense_shapes = weight_shapes(network)
    paths: dict[nn.Module, list[str]] = {}  # a layer may be there under several names
    for path, module in network.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for stored, form in forms.items():
        path, _, key = stored.rpartition(".")
        found = [state[k].shape for k in state_keys(network, stored, form)]
        new_shapes = [torch.Size(dense_shapes[stored])] if form == DENSE else found
        for name in (f"{p}.{key}" if p else key for p in paths[network.get_submodule(path)]):
            for old in (name, *(factor_path(network, name) + factor for factor in FACTOR_NAMES)):
                shapes.pop(old, None)
            shapes |= zip(state_keys(network, name, form), new_shapes, strict=True)
    if missing := sorted(set(shapes) - set(state)):
        raise ValueError(f"the file lacks {some(missing)}")
    if unknown := sorted(set(state) - set(shapes)):
        raise ValueError(f"the network has no {some(unknown)}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, and {tuple(shape)} there")
    for first, *others in _alike(network, shapes):
        for name in others:
            one, other = state[first], state[name]
            if one is not other and not torch.equal(one, other):
                raise ValueError(f"{first} and {name} are one in the network, and two there")


def _alike(network: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Return names of a state that are one tensor in the network, whatever form its layers have."""
    groups: dict[tuple[int, str], list[str]] = {}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    modules = dict(network.named_modules(remove_duplicate=False))
    for name in names:
        path, _, key = name.rpartition(".")
        if (parameter := parameters.get(name)) is not None:
            groups.setdefault((id(parameter), ""), []).append(name)
        elif (module := modules.get(path)) is not None:
            groups.setdefault((id(module), key), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
