"""How a network is written to a file of each format, and how that is run again."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from oialr.compatibility import without_fused_attention
from oialr.convert import to_dense
from oialr.copies import copied
from oialr.errors import ExportError, UserError, of_the_machine
from oialr.export import SUFFIXES
from oialr.export.state import dense_state, load_dense, read_stored, state_bytes, two_factors
from oialr.files import load, save
from oialr.inference import for_call

Samples = Tensor | Sequence[Any] | Mapping[str, Any]
"""A batch: the one argument of a network, its arguments, or those by name.

The leading dimension of every tensor is the batch.
"""
Network = Callable[..., Any]
READ_BY_SUFFIX = {SUFFIXES[form]: form for form in ("onnx", "torch-export")}
"""Suffixes that tell the format of a file; what has another one tells it by its first bytes."""
ONNX = ("onnx", "onnxscript", "onnxruntime")
"""Packages that it takes."""
LARGEST_ONNX = 2**31 - 2**20
"""Bytes that a file of ONNX can hold, less what the graph may take."""


@dataclass(frozen=True)
class Format:
    """One format of files."""

    suffix: str
    """Of its files, by custom."""
    write: Callable[[nn.Module, Path, Samples], None]
    """Write a network, which is in evaluation mode and on the CPU, with samples of its input."""
    read: Callable[[Path, nn.Module | None], Network]
    """Return what is called like the network; a dense or low-rank one is given if it is known."""


def arguments(samples: Samples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, and those by name."""
    if isinstance(samples, Tensor):
        return (samples,), {}
    return ((), dict(samples)) if isinstance(samples, Mapping) else (tuple(samples), {})


def read_exported(path: str | Path, network: nn.Module | None = None) -> Network:
    """Read an exported file of any format, to be called like the network that it was made from.

    Args:
        path: the file; ``.onnx`` is read by onnxruntime and ``.pt2`` by torch.export, all else
            holds a state_dict of the dense network or is of :func:`oialr.save`.
        network: the network as it is built, for the two latter. It stays as it is.

    Raises:
        ValueError: the file is of no such format, or a network is missing, or another one.
        UserError: a package that it takes is not installed.
        OSError: as of open.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix in READ_BY_SUFFIX:
        form = READ_BY_SUFFIX[path.suffix]
    elif head[:2] == b"PK":
        form = "dense"  # an archive of torch.save
    elif head[8:] == b"{":
        form = "factors"  # a header of safetensors behind its length
    else:
        raise ValueError(f"{path} is no file of weights: neither of torch.save nor safetensors")
    return FORMATS[form].read(path, network)


def check_name(form: str, path: Path) -> None:
    """Reject the name of a file that :func:`read_exported` would take for another format.

    Raises:
        UserError: it has the suffix of one, or lacks that of its own.
    """
    own = SUFFIXES[form]
    if READ_BY_SUFFIX.get(path.suffix, form) != form:
        raise UserError(
            f"{path}: {path.suffix} is the suffix of {READ_BY_SUFFIX[path.suffix]}, and this is "
            f"{form}: name the file {path.with_suffix(own)}"
        )
    if own in READ_BY_SUFFIX and path.suffix != own:
        raise UserError(f"{path}: {form} is read by the suffix {own}: name the file {path}{own}")
    if form == "dense" and path.suffix == SUFFIXES["factors"]:
        raise UserError(
            f"{path}: {path.suffix} is the suffix of safetensors, and this is written by "
            f"torch.save: name the file {path.with_suffix(own)}, or export as factors"
        )


def _write_dense(model: nn.Module, path: Path, _: Samples) -> None:
    # clone: of tensors that look at a part of another, no more than that part
    torch.save(_compact(dense_state(model)), path)


def _write_factors(model: nn.Module, path: Path, _: Samples) -> None:
    _need("safetensors")
    save(two_factors(model), path)


def _compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without views of larger storages; tied tensors stay one."""
    clones: dict[tuple[Any, ...], Tensor] = {}
    compact = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage()._cdata, tensor.storage_offset()
        key = (*place, tensor.shape, tensor.stride(), tensor.dtype)
        compact[name] = clones.setdefault(key, tensor.detach().clone())
    return compact


def _read_dense(path: Path, network: nn.Module | None) -> Network:
    model = to_dense(copied(_known(network, path)))
    return load_dense(model, read_stored(path), str(path)).eval()


def _read_factors(path: Path, network: nn.Module | None) -> Network:
    _need("safetensors")
    return load(copied(_known(network, path)), path).eval()


def _known(network: nn.Module | None, path: Path) -> nn.Module:
    if network is None:
        raise ValueError(f"{path} holds weights alone: the network must be given too")
    return network


def _write_program(model: nn.Module, path: Path, samples: Samples) -> None:
    program = _program(model, samples)
    with _quiet():
        torch.export.save(program, path)


def _read_program(path: Path, _: nn.Module | None) -> Network:
    try:
        with _quiet():
            return torch.export.load(path).module()
    except Exception as error:  # whatever the bytes make of it
        raise ValueError(f"{path} is no file of torch.export: {_first_line(error)}") from error


def _write_onnx(model: nn.Module, path: Path, samples: Samples) -> None:
    _need(*ONNX)
    if state_bytes(dense_state(model)) > LARGEST_ONNX:
        raise UserError("a file of ONNX holds 2 GB at most: export by torch.export instead")
    program = _program(model, samples)
    if any(tensor.dtype == torch.bfloat16 for tensor in program.state_dict.values()):
        raise ExportError("onnxruntime computes nothing in bfloat16 on CPUs: export model.float()")
    try:
        with _quiet():
            torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ExportError(f"torch finds no ONNX for this network: {_first_line(cause)}") from error


def _read_onnx(path: Path, _: nn.Module | None) -> Network:
    _need(*ONNX)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever the bytes make of it
        raise ValueError(f"{path} is no file of ONNX: {_first_line(error)}") from error
    names = [node.name for node in session.get_inputs()]

    def network(*args: Any, **kwargs: Any) -> list[Tensor]:
        # Inputs have the names of the arguments; those of an argument that holds several tensors
        # have others, in its order.
        named = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)}
        others = {name: value for name, value in kwargs.items() if name not in named}
        tensors = [leaf for leaf in tree_leaves((args, others)) if isinstance(leaf, Tensor)]
        rest = [name for name in names if name not in named]
        unknown = [name for name, value in others.items() if isinstance(value, Tensor)]
        if unknown or len(tensors) != len(rest):
            raise ValueError(f"{path} takes {', '.join(names)}, {_given(args, kwargs)} is given")
        given = named | dict(zip(rest, tensors, strict=True))
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
        return [torch.from_numpy(output) for output in session.run(None, arrays)]

    return network


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Say what a network was called with."""
    many = len([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
    return " and ".join([*([f"{many} by position"] if many or not kwargs else []), *kwargs])


def _need(*packages: str) -> None:
    if missing := [name for name in packages if not find_spec(name)]:
        raise UserError(f"packages are missing for this: pip install {' '.join(missing)}")


def _program(model: nn.Module, samples: Samples) -> torch.export.ExportedProgram:
    """Capture a network, of plain layers, for batches of any size."""
    args, kwargs = tree_map(_at_least_two, arguments(samples))
    order = list(inspect.signature(model.forward).parameters)  # in which a program has its inputs
    kwargs = {name: kwargs[name] for name in sorted(kwargs, key=_place_in(order))}
    batch = torch.export.Dim("batch", min=1)
    shapes = tree_map(
        lambda x: {0: batch} if isinstance(x, Tensor) and x.dim() else None, (args, kwargs)
    )
    try:
        with without_fused_attention(), _quiet():
            plain = for_call(model, args, kwargs)
            return torch.export.export(plain, args, kwargs, dynamic_shapes=shapes[1] or shapes[0])
    except Exception as error:  # whatever the code of the network makes of it
        if of_the_machine(error):
            raise
        raise ExportError(
            f"torch.export cannot follow this network with a batch of any size: "
            f"{_first_line(error)}"
        ) from error


def _place_in(order: Sequence[str]) -> Callable[[str], int]:
    return lambda name: order.index(name) if name in order else len(order)


def _at_least_two(x: Any) -> Any:
    """Return a batch of two for one: a size of one would be taken for a constant."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' advice to themselves: what matters is compared and told by us."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


FORMATS: dict[str, Format] = {
    "dense": Format(SUFFIXES["dense"], _write_dense, _read_dense),
    "factors": Format(SUFFIXES["factors"], _write_factors, _read_factors),
    "onnx": Format(SUFFIXES["onnx"], _write_onnx, _read_onnx),
    "torch-export": Format(SUFFIXES["torch-export"], _write_program, _read_program),
}
"""Each format by its name."""
